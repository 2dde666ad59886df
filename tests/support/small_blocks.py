"""Blocks of the kernels so small that small inputs are cut into several, of which the last is not full."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from unittest import mock

from patchkernels.kernels import cross_entropy, patch_embedding, scaling, targets

SIZES = (
    # two values a thread, and two warps, which can race; so few programs that each has several rows
    (cross_entropy, {"MAX_BLOCK": 128, "VALUES": 2, "CACHE_BYTES": 3000, "MULTIPROCESSORS": 1}),
    (patch_embedding, {"BLOCK_T": 8, "TILE_T": 2, "IDS": 2, "MAX_BLOCK_D": 16, "NUM_WARPS": 1}),
    (scaling, {"BLOCK": 32, "NUM_WARPS": 1}),
    (targets, {"BLOCK": 32, "NUM_WARPS": 1}),
)


@contextlib.contextmanager
def small_blocks() -> Iterator[None]:
    with contextlib.ExitStack() as stack:
        for module, sizes in SIZES:
            stack.enter_context(mock.patch.multiple(module, **sizes))
        yield
