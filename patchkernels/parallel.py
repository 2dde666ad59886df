"""A vocabulary in shards: which classes this process holds, from a process group or from a DTensor's placements."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor
from torch.utils.weak import WeakTensorKeyDictionary

_gathered = WeakTensorKeyDictionary()  # weight: (group name, VocabShard)


def is_dtensor(tensor: Any) -> bool:
    """Without the type, whose import takes longer than that of all the rest."""
    return hasattr(tensor, "placements") and hasattr(tensor, "device_mesh")


class VocabShard(NamedTuple):
    """Rows ``first`` to ``first + len(local weight)`` of a ``(vocab, D)`` weight; the group holds all of them."""

    first: int
    vocab: int
    group: str


def vocab_shard(weight: Tensor, process_group: dist.ProcessGroup | None, name: str) -> tuple[Tensor, VocabShard | None]:
    """The local rows of a weight and their place; None where this process holds all of them.

    Raises:
        ValueError: a DTensor of other placements than Shard(0) or Replicate on a mesh of one dimension, or one
            together with ``process_group``.
    """
    if not is_dtensor(weight):
        return weight, None if process_group is None else gathered_shard(weight, process_group)
    from torch.distributed.tensor._utils import compute_local_shape_and_global_offset

    sharded: Any = weight
    mesh, placements = sharded.device_mesh, sharded.placements
    if process_group is not None:
        raise ValueError(f"{name} is a DTensor, which knows its process group; got process_group beside it")
    if all(placement.is_replicate() for placement in placements):
        return sharded.to_local(), None
    if mesh.ndim != 1 or not placements[0].is_shard(0):
        raise ValueError(
            f"{name} must be sharded by its rows, placements (Shard(0),) on a mesh of one dimension, "
            f"got {placements} on a mesh of shape {tuple(mesh.shape)}"
        )
    _, offset = compute_local_shape_and_global_offset(weight.shape, mesh, placements)
    return sharded.to_local(), VocabShard(offset[0], weight.shape[0], mesh.get_group().group_name)


def gathered_shard(weight: Tensor, group: dist.ProcessGroup) -> VocabShard:
    """The ranks tell each other their rows, once for every weight: that one time synchronises."""
    if torch.compiler.is_compiling():
        raise RuntimeError("process_group asks the other ranks; under torch.compile give a DTensor, which knows")
    known = _gathered.get(weight)
    if known is not None and known[0] == group.group_name:
        shard: VocabShard = known[1]
        return shard
    rows = [0] * dist.get_world_size(group)
    dist.all_gather_object(rows, len(weight), group)
    shard = VocabShard(sum(rows[: dist.get_rank(group)]), sum(rows), group.group_name)
    _gathered[weight] = group.group_name, shard
    return shard


def replicated(tensor: Any, name: str) -> Tensor:
    """The local tensor of a DTensor that every rank holds whole; any other tensor itself."""
    if not is_dtensor(tensor):
        return tensor  # type: ignore[no-any-return]
    if not all(placement.is_replicate() for placement in tensor.placements):
        raise ValueError(f"{name} must be replicated over its mesh, got placements {tensor.placements}")
    local: Tensor = tensor.to_local()
    return local


def like(result: Tensor, tensor: Any) -> Tensor:
    """A result that every rank holds, as a DTensor where ``tensor`` is one."""
    if not is_dtensor(tensor):
        return result
    from torch.distributed.tensor import DTensor, Replicate

    placements = [Replicate()] * tensor.device_mesh.ndim
    return DTensor.from_local(result, tensor.device_mesh, placements, run_check=False)


def sum_(tensor: Tensor, group: str) -> Tensor:
    dist.all_reduce(tensor, dist.ReduceOp.SUM, resolve(group))
    return tensor


def max_(tensor: Tensor, group: str) -> Tensor:
    dist.all_reduce(tensor, dist.ReduceOp.MAX, resolve(group))
    return tensor


def resolve(group: str) -> dist.ProcessGroup:
    by_name: Any = torch._C._distributed_c10d._resolve_process_group
    found: dist.ProcessGroup = by_name(group)
    return found
