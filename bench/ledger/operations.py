"""Bytes, FLOPs and launches of PyTorch's operations on a GPU, from their arguments alone.

An operation reads every element of its inputs once and writes every element of its results once, in one kernel. Where
that is not so, ``SPECIAL`` says what is. Token ids are taken to be all different.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import flop_registry

# Operations that start no kernel and are no views: memory alone, or numbers of the host.
FREE = {
    "aten::empty", "aten::empty_like", "aten::empty_strided", "aten::new_empty", "aten::new_empty_strided",
    "aten::resize_", "aten::_unsafe_view", "aten::lift_fresh", "prim::device",
}  # fmt: skip
WRITE_ONLY = {"aten::zero_", "aten::fill_", "aten::copy_", "aten::normal_", "aten::uniform_"}  # in place


class Work(NamedTuple):
    """What an operation costs."""

    read: int = 0  # bytes
    written: int = 0  # bytes
    flops: int = 0
    launches: int = 1


def work_of(func: Any, args: Any, kwargs: dict[str, Any], result: Any) -> Work | None:
    """The work of an operation; None if it starts no kernel."""
    name = func.name().split(".")[0]
    if name in FREE or func.is_view or not any(t.is_cuda for t in tensors_in((args, kwargs, result))):
        return None
    if name in SPECIAL:
        return SPECIAL[name](args, kwargs, result)
    read, written = [], list(tensors_in(result))
    only_like = name.endswith("_like") or name.startswith("aten::new_")  # takes shape, dtype and device of a tensor
    for argument, value in () if only_like else _bound(func, args, kwargs):
        writes = argument.alias_info is not None and argument.alias_info.is_write
        (written if writes else read).extend(tensors_in(value))
        if writes and not argument.kwarg_only and name not in WRITE_ONLY and kwargs.get("beta", 1) != 0:
            read.extend(tensors_in(value))
    formula = flop_registry.get(getattr(torch.ops.aten, name.removeprefix("aten::").rstrip("_"), None))
    flops = formula(*(t for t in args if isinstance(t, Tensor)), out_val=result) if formula else 0
    work = Work(total_bytes(read), total_bytes(written), flops)
    return work if work.written else None


def tensors_in(value: Any) -> Iterable[Tensor]:
    return [leaf for leaf in tree_leaves(value) if isinstance(leaf, Tensor)]


def total_bytes(tensors: Iterable[Tensor]) -> int:
    """The bytes of the different tensors among these: a transpose is the same, and what a view repeats counts once."""
    seen = {(t.untyped_storage()._cdata, t.storage_offset(), *sorted(zip(t.shape, t.stride()))): t for t in tensors}
    return sum(_bytes(t) for t in seen.values())


def _bytes(tensor: Tensor) -> int:
    elements = 1
    for size, stride in zip(tensor.shape, tensor.stride()):
        elements *= size if stride else 1
    return elements * tensor.element_size()


def _bound(func: Any, args: Any, kwargs: dict[str, Any]) -> list[tuple[Any, Any]]:
    """The arguments of an operation's schema and their values."""
    arguments = func._schema.arguments
    by_position = list(zip(arguments, args))
    return by_position + [(a, kwargs[a.name]) for a in arguments[len(args) :] if a.name in kwargs]


def _lookup(args: Any, kwargs: Any, result: Any) -> Work:
    """Reads the elements that the result holds, and where they are: ``embedding``, ``gather``, ``index_select``."""
    indices = [t for t in tensors_in(args) if t.dtype in (torch.int32, torch.int64)]
    return Work(total_bytes(indices) + _bytes(result), _bytes(result))


def _add_at(args: Any, kwargs: Any, result: Any) -> Work:
    """``index_add_``, ``scatter_add_``: reads source and indices, and what it adds to."""
    _, _, index, source = args[:4]
    return Work(_bytes(index) + 2 * _bytes(source), _bytes(source))


def _sort(args: Any, kwargs: Any, result: Any) -> Work:
    """A stable radix sort of n keys with int64 places: torch's ``radix_sort_pairs`` over CUB's one-sweep sort.

    A kernel writes the places. One reads the keys for the histograms, one scans them, and then one for each byte of
    a key reads and writes keys and places.
    """
    keys = args[0]
    n, size = keys.numel(), keys.element_size()
    return Work(n * size + size * n * (size + 8), 8 * n + size * n * (size + 8), launches=3 + size)


def _search(args: Any, kwargs: Any, result: Any) -> Work:
    """``searchsorted``: as if each boundary were read once, since the others of a search are in a cache."""
    return Work(min(_bytes(args[0]), _bytes(args[1])) + _bytes(args[1]), _bytes(result))


def _embedding_bag(args: Any, kwargs: Any, result: Any) -> Work:
    """Reads a row of the table for each id; writes bags, and for the backward the bag of each id and three counts."""
    weight, ids = args[:2]
    rows = ids.numel() * weight.shape[1] * weight.element_size()
    return Work(rows + _bytes(ids), total_bytes(tensors_in(result)), launches=2)


def _embedding_backward(grad: Tensor, ids: Tensor, vocab: int, result: Tensor) -> Work:
    """torch's ``embedding_backward_cuda_kernel``: a sort, then partial sums in fp32 of segments of up to 10 tokens.

    The table's gradient is set to zero, the gradient's row of each token is read, the partial sums are written and
    read, and the rows of the ids that occur are written. Between these lie six small kernels and scans over ids.
    """
    tokens, hidden, size = ids.numel(), grad.shape[-1], grad.element_size()
    occurring = min(tokens, vocab)
    sort = _sort((ids,), {}, None)
    read = tokens * hidden * size + occurring * hidden * 4
    written = _bytes(result) + occurring * hidden * (4 + size)
    return Work(sort.read + read + 6 * _bytes(ids), sort.written + written, launches=sort.launches + 9)


def _embedding_dense_backward(args: Any, kwargs: Any, result: Any) -> Work:
    grad, ids, vocab = args[:3]
    return _embedding_backward(grad, ids, vocab, result)


def _embedding_bag_backward(args: Any, kwargs: Any, result: Any) -> Work:
    grad, ids, _, _, _, _, vocab = args[:7]
    return _embedding_backward(grad, ids, vocab, result)


def _adamw(args: Any, kwargs: Any, result: Any) -> Work:
    """``_fused_adamw_``: reads parameters, gradients and both moments; writes the gradients too if it scales them."""
    parameters, gradients, first, second = args[:4]
    updated = total_bytes(parameters) + total_bytes(first) + total_bytes(second)
    scaled = 0 if kwargs.get("grad_scale") is None else total_bytes(gradients)
    read, written = updated + total_bytes(gradients), updated + scaled
    return Work(read, written, launches=_multi_tensor_launches(parameters))


def _foreach_norm(args: Any, kwargs: Any, result: Any) -> Work:
    """A kernel over all tensors, and one for the partial results."""
    return Work(total_bytes(args[0]), total_bytes(result), launches=_multi_tensor_launches(args[0]) + 1)


def _foreach_in_place(args: Any, kwargs: Any, result: Any) -> Work:
    size = total_bytes(args[0])
    return Work(size, size, launches=_multi_tensor_launches(args[0]))


def _multi_tensor_launches(tensors: list[Tensor]) -> int:
    """torch's ``multi_tensor_apply``: a launch takes up to 320 blocks of 65536 elements, of up to 36 tensors."""
    blocks = sum(-(-t.numel() // 65536) for t in tensors)
    return max(-(-blocks // 320), -(-len(tensors) // 36))


SPECIAL: dict[str, Callable[[Any, Any, Any], Work]] = {
    "aten::embedding": _lookup,
    "aten::gather": _lookup,
    "aten::index_select": _lookup,
    "aten::index_add_": _add_at,
    "aten::scatter_add_": _add_at,
    "aten::sort": _sort,
    "aten::searchsorted": _search,
    "aten::_embedding_bag": _embedding_bag,
    "aten::embedding_dense_backward": _embedding_dense_backward,
    "aten::_embedding_bag_backward": _embedding_bag_backward,
    "aten::_fused_adamw_": _adamw,
    "aten::_foreach_norm": _foreach_norm,
    "aten::_foreach_mul_": _foreach_in_place,
    "aten::_foreach_add_": _foreach_in_place,
}
