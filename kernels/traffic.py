"""How many bytes each kernel moves between the GPU and its memory, as a function of the arguments of a launch.

What a kernel reads again so soon that it is in the GPU's cache is counted apart. What all warps of a program read, a
row's targets say, counts once. Rows whose targets are all ignored are less than this, and so are patches that hold
padding.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

from patchkernels.kernels.cross_entropy import CACHE_BYTES

Arguments = dict[str, Any]  # of a launch, by the names in the kernel's definition
Grid = tuple[int, ...]


class Traffic(NamedTuple):
    """Bytes."""

    read: int  # from memory
    written: int
    read_again: int = 0  # from the cache


def _patch_cross_entropy(grid: Grid, arguments: Arguments) -> Traffic:
    """``e V`` to read for a row of logits, as much to write for its gradient; the rest is small.

    With both passes, a row is read again. It comes from the cache if the rows of all programs fit there.
    """
    logits, target, rows = arguments["logits_ptr"], arguments["target_ptr"], arguments["N"]
    slots, size = arguments["SLOTS"], logits.element_size()
    needs_loss, needs_grad = arguments["NEEDS_LOSS"], arguments["NEEDS_GRAD"]
    row = arguments["readable"] * size
    read = row + slots * (target.element_size() * (1 + needs_loss) + size)  # the targets and their logits
    again = row if needs_loss and needs_grad else 0
    written = 0
    if needs_loss:
        written += 4 * slots + 8  # losses, statistics
    else:
        read += 8
    if needs_grad:
        read += 4 * slots  # c
        written += row + slots * size
    in_cache = row if arguments["dlogits_ptr"] is logits else 2 * row  # in place, or not
    if again and grid[0] * in_cache > CACHE_BYTES:
        read, again = read + again, 0
    return Traffic(rows * read, rows * written, rows * again)


def _slice_statistics(grid: Grid, arguments: Arguments) -> Traffic:
    """``e v`` to read for a row of v classes; its statistics are read and written."""
    logits, target = arguments["logits_ptr"], arguments["target_ptr"]
    slots, size = arguments["SLOTS"], logits.element_size()
    statistics = 12 if arguments["SMOOTHING"] else 8
    read = arguments["readable"] * size + slots * (target.element_size() + size) + 12
    return Traffic(len(logits) * read, len(logits) * (statistics + 4 * slots))


def _patch_embedding(grid: Grid, arguments: Arguments) -> Traffic:
    """``K e D`` to read and ``e D`` to write for a patch; its ids are read once for each block of columns."""
    out, ids = arguments["out_ptr"], arguments["ids_ptr"]
    (patches, hidden), size = out.shape, out.element_size()
    blocks = -(-hidden // arguments["BLOCK_D"])
    read = arguments["SLOTS"] * (hidden * size + blocks * ids.element_size())
    return Traffic(patches * read, patches * hidden * size)


def _patch_embedding_block_sums(grid: Grid, arguments: Arguments) -> Traffic:
    """Two ids of each block of tokens: no block is summed here if no id fills one."""
    ordered = arguments["ordered_ptr"]
    blocks = ordered.numel() // arguments["BLOCK_T"]
    columns = -(-arguments["D"] // arguments["BLOCK_D"])
    return Traffic(blocks * columns * 2 * ordered.element_size(), 0)


def _patch_embedding_backward(grid: Grid, arguments: Arguments) -> Traffic:
    """``e D`` to read for every token, whose patch's gradient it is, and ``e D`` to write for every id of the table.

    With ADD it is ``e D`` to read and to write for the id of every token; the ids are taken to be all different. All
    ids are summed for a block of columns before the next one begins. If these columns of all patches fit the cache, a
    patch's gradient is read from memory once, for the first of its tokens.
    """
    grad, out, order, segments = (arguments[f"{name}_ptr"] for name in ("grad", "out", "order", "segments"))
    (vocab, hidden), size, tokens = out.shape, grad.element_size(), order.numel()
    _, columns = grid
    rows, again = tokens * hidden * size, 0
    if len(grad) * arguments["BLOCK_D"] * size <= CACHE_BYTES:
        again = rows - len(grad) * hidden * size
    place = order.element_size() + (4 if arguments["PADDING"] else 0)
    read = columns * (tokens * place + vocab * 2 * segments.element_size())
    written = (min(tokens, vocab) if arguments["ADD"] else vocab) * hidden * out.element_size()
    return Traffic(rows - again + read + (written if arguments["ADD"] else 0), written, again)


def _scale(grid: Grid, arguments: Arguments) -> Traffic:
    """Reads and writes every element. In place the number is taken to be 1, as upstream gradients usually are."""
    values, out = arguments["values_ptr"], arguments["out_ptr"]
    if arguments["IN_PLACE"]:
        return Traffic(4 * grid[0], 0)
    return Traffic(values.numel() * values.element_size(), out.numel() * out.element_size())


def _target_coefficients(grid: Grid, arguments: Arguments) -> Traffic:
    """Targets, and weights of each, are read twice for a mean. Targets and ``c`` are written."""
    target, passes = arguments["target_ptr"], 1 + (arguments["REDUCTION"] != 0)
    per_target = target.element_size() + (4 if arguments["WEIGHTED"] and arguments["weight_stride"] else 0)
    return Traffic(passes * target.numel() * per_target, target.numel() * (target.element_size() + 4))


def _weighted_sum(grid: Grid, arguments: Arguments) -> Traffic:
    return Traffic(8 * arguments["elements"], 4)


TRAFFIC: dict[str, Callable[[Grid, Arguments], Traffic]] = {
    "patch_cross_entropy_kernel": _patch_cross_entropy,
    "slice_statistics_kernel": _slice_statistics,
    "patch_embedding_kernel": _patch_embedding,
    "patch_embedding_block_sums_kernel": _patch_embedding_block_sums,
    "patch_embedding_backward_kernel": _patch_embedding_backward,
    "scale_kernel": _scale,
    "target_coefficients_kernel": _target_coefficients,
    "weighted_sum_kernel": _weighted_sum,
}
