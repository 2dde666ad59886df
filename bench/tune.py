"""Searches for the fastest launch configurations of the kernels on this machine's GPU: ``python -m bench.tune``.

It prints times and changes nothing. The configurations in use come from ``launch_config`` in each module of
``kernels/``: where the printed times show a faster one for your GPU, change it there. Each configuration's result is
compared with that of the default, and the configurations of a case are timed in turn.
"""

from __future__ import annotations

import argparse
import itertools
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor
from triton import OutOfResources

from bench.measure import device_from, interleaved
from patchkernels.kernels import cross_entropy, patch_embedding
from patchkernels.numerics import LossOptions

SECONDS = 1.0  # about how long the configurations of a case are timed
PATCH_SIZE = 4


class Case(NamedTuple):
    """A kernel at one shape."""

    name: str
    module: Any  # the module of kernels/ whose launch_config is varied
    configs: list[dict[str, int]]
    run: Callable[[], Tensor]


def configurations(block_name: str, columns: int) -> list[dict[str, int]]:
    """All sensible pairs of block size and number of warps; a block is at most twice as large as a row."""
    pairs = itertools.product((1, 2, 4, 8, 16, 32), (4, 8, 16, 32))
    found = [{block_name: 32 * warps * per_thread, "num_warps": warps} for warps, per_thread in pairs]
    return [config for config in found if 128 <= config[block_name] <= max(2 * columns, 128)]


def loss_function(rows: int, vocab: int, device: torch.device) -> Callable[[], Tensor]:
    """A function that computes loss and dlogits of a chunk of logits in place, as the fused linear loss does."""
    logits = torch.randn(rows, vocab, device=device, dtype=torch.bfloat16)
    target = torch.randint(0, vocab, (rows, PATCH_SIZE), device=device)
    c, losses = torch.ones(rows, PATCH_SIZE, device=device), torch.empty(rows, PATCH_SIZE, device=device)
    buffer = torch.empty_like(logits)

    def run() -> Tensor:
        buffer.copy_(logits)  # the kernel overwrites its input; the copy adds the same time to every configuration
        cross_entropy.loss_and_gradient_(buffer, target, c, losses, LossOptions())
        return buffer

    return run


def embedding_function(
    tokens: int, vocab: int, hidden: int, device: torch.device, backward: bool
) -> Callable[[], Tensor]:
    """A function that computes the patch embedding of random tokens, or its gradient."""
    patches = tokens // PATCH_SIZE
    ids = torch.randint(0, vocab, (patches, PATCH_SIZE), device=device)
    weight = torch.randn(vocab, hidden, device=device, dtype=torch.bfloat16)
    grad = torch.randn(patches, hidden, device=device, dtype=torch.bfloat16)
    if backward:
        return lambda: patch_embedding.backward(grad, ids, vocab, None)
    return lambda: patch_embedding.forward(ids, weight, None)


def search(case: Case) -> list[tuple[float, str]]:
    """The configurations of a case, each after its median seconds, fastest first. The module is left unchanged."""
    default = case.module.launch_config
    expected = case.run().clone()
    functions: dict[str, Callable[[], Tensor]] = {"default": case.run}

    def run_with(config: dict[str, int]) -> Tensor:
        case.module.launch_config = lambda *_: config
        try:
            return case.run()
        finally:
            case.module.launch_config = default

    for config in case.configs:
        named = ", ".join(f"{k}={v}" for k, v in config.items())
        try:
            result = run_with(config)
        except OutOfResources as error:
            print(f"  cannot run: {named}: {error}")
            continue
        torch.testing.assert_close(result.float(), expected.float(), rtol=2e-2, atol=1e-3)
        functions[named] = lambda config=config: run_with(config)
    seconds = interleaved(functions, expected.device, SECONDS)
    return sorted((sorted(times)[len(times) // 2], name) for name, times in seconds.items())


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="bench.tune", description=__doc__.splitlines()[0])
    parser.add_argument("--rows", type=int, default=4096, help="rows of the logits")
    parser.add_argument("--vocab", type=int, nargs="+", default=[32000, 50257, 128256, 151936])
    parser.add_argument("--tokens", type=int, default=2**16)
    parser.add_argument("--table", type=int, default=32000, help="rows of the embedding table")
    parser.add_argument("--hidden", type=int, nargs="+", default=[768, 2048, 4096])
    parser.add_argument("--device", default="cuda")
    options = parser.parse_args(arguments)
    device = device_from(parser, options.device)
    cases = []
    for vocab in options.vocab:
        run = loss_function(options.rows, vocab, device)
        name = f"cross entropy, {options.rows} x {vocab}"
        cases.append(Case(name, cross_entropy, configurations("BLOCK_V", vocab), run))
    for hidden, backward in itertools.product(options.hidden, (False, True)):
        run = embedding_function(options.tokens, options.table, hidden, device, backward)
        name = f"patch embedding {'backward' if backward else 'forward'}, {options.tokens} tokens, D={hidden}"
        cases.append(Case(name, patch_embedding, configurations("BLOCK_D", hidden), run))
    for case in cases:
        print(case.name)
        for seconds, config in search(case):
            print(f"  {seconds * 1e3:9.4f} ms  {config}")


if __name__ == "__main__":
    main()
