"""A sharded vocabulary: the rows of a DTensor that this process holds, and reductions over processes."""

from __future__ import annotations

from typing import Any, NamedTuple, cast

import torch
import torch.distributed as dist
from torch import Tensor


class VocabShard(NamedTuple):
    """This process's rows of a ``(vocab, D)`` weight: those of its local tensor, of which the first is ``first``."""

    first: int
    vocab: int
    group: str  # the name of the process group, since a registered operator cannot take the group itself


def vocab_shard(weight: Tensor, name: str, other: Tensor, other_name: str) -> tuple[Tensor, VocabShard | None]:
    """The local rows of a weight and their place in it, which is None if this process holds all rows.

    ``other`` is what the weight meets: the hidden states of a head, the ids of a table, the head of a bias. As in
    PyTorch's own operators, DTensors and plain tensors do not mix, because a plain tensor does not tell whether it is
    the same on every process. Without this rule, a parameter that FSDP2 shards would pass for a sharded vocabulary
    when it is used outside of its module's forward, although every process has an input of its own.

    Raises:
        ValueError: one of the two is a DTensor and the other is not, or they are on different meshes; a weight of other
            placements than ``Shard(0)`` or ``Replicate`` on a mesh of one dimension, or one whose rows are not divided
            as ``torch.chunk`` divides them.
    """
    if _is_dtensor(weight) != _is_dtensor(other):
        plain, sharded_name = (other_name, name) if _is_dtensor(weight) else (name, other_name)
        raise ValueError(
            f"{sharded_name} is a DTensor but {plain} is a plain tensor, which does not tell whether it is the same on "
            f"every process. If it is, pass DTensor.from_local({plain}, mesh, [Replicate()]). If {sharded_name} is a "
            f"parameter sharded by FSDP2, use it in the forward of its module, where it is a plain tensor"
        )
    if not _is_dtensor(weight):
        return weight, None
    from torch.distributed.tensor._utils import compute_local_shape_and_global_offset

    sharded, met = cast(Any, weight), cast(Any, other)
    mesh, placements = sharded.device_mesh, sharded.placements
    if met.device_mesh != mesh:
        raise ValueError(f"{name} and {other_name} must be on one mesh, got {mesh} and {met.device_mesh}")
    if all(placement.is_replicate() for placement in placements):
        return sharded.to_local(), None
    if mesh.ndim != 1 or not placements[0].is_shard(0):
        raise ValueError(
            f"{name} must be sharded by its rows, placements (Shard(0),) on a mesh of one dimension, "
            f"got {placements} on a mesh of shape {tuple(mesh.shape)}"
        )
    local: Tensor = sharded.to_local()
    (rows, *_), (first, *_) = compute_local_shape_and_global_offset(weight.shape, mesh, placements)
    if len(local) != rows:
        raise ValueError(
            f"the rows of {name} must be divided over the mesh as torch.chunk divides them: this process must hold "
            f"{rows} of its {weight.shape[0]} rows, got {len(local)}"
        )
    return local, VocabShard(first, weight.shape[0], mesh.get_group().group_name)


def replicated(tensor: Any, name: str) -> Tensor:
    """The local tensor of a replicated DTensor; any other tensor is returned as it is.

    Raises:
        ValueError: a DTensor that is not replicated.
    """
    if not _is_dtensor(tensor):
        return tensor  # type: ignore[no-any-return]
    if not all(placement.is_replicate() for placement in tensor.placements):
        raise ValueError(f"{name} must be replicated over its mesh, got placements {tensor.placements}")
    local: Tensor = tensor.to_local()
    return local


def as_replicated(result: Tensor, tensor: Any) -> Tensor:
    """A result that is the same on every process, as a replicated DTensor if ``tensor`` is a DTensor."""
    if not _is_dtensor(tensor):
        return result
    from torch.distributed.tensor import DTensor, Replicate

    placements = [Replicate()] * tensor.device_mesh.ndim
    return DTensor.from_local(result, tensor.device_mesh, placements, run_check=False)


def sum_(tensor: Tensor, group: str) -> Tensor:
    """The sum over the processes of a group, in place."""
    dist.all_reduce(tensor, dist.ReduceOp.SUM, process_group(group))
    return tensor


def max_(tensor: Tensor, group: str) -> Tensor:
    """The maximum over the processes of a group, in place."""
    dist.all_reduce(tensor, dist.ReduceOp.MAX, process_group(group))
    return tensor


def process_group(name: str) -> dist.ProcessGroup:
    by_name: Any = torch._C._distributed_c10d._resolve_process_group
    group: dist.ProcessGroup = by_name(name)
    return group


def _is_dtensor(tensor: Any) -> bool:
    """Whether a tensor is a DTensor.

    It looks for attributes instead of the type, because importing DTensor takes longer than importing this package.
    """
    return hasattr(tensor, "placements") and hasattr(tensor, "device_mesh")
