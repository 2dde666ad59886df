"""Data parallel training: the processes that torchrun started, and the model under FSDP2 or DDP."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel

PARALLEL_MODES = ("fsdp", "ddp")


@dataclass(frozen=True)
class Processes:
    """The rank of this process among those that torchrun started, and its device. Without torchrun it is alone."""

    device: torch.device
    rank: int = 0
    local_rank: int = 0
    world_size: int = 1

    @property
    def is_first(self) -> bool:
        """Whether this is the one process that prints and writes the log and the model."""
        return self.rank == 0

    @contextlib.contextmanager
    def first_on_its_node(self) -> Iterator[None]:
        """Lets the first process of every node run the block first. The others then find the files that it made."""
        if self.world_size > 1 and self.local_rank:
            dist.barrier()
        yield
        if self.world_size > 1 and not self.local_rank:
            dist.barrier()

    def average(self, value: Tensor) -> Tensor:
        """The mean of a tensor over all processes, without waiting for a GPU."""
        if self.world_size > 1:
            value = value.detach().clone()
            dist.all_reduce(value)
            value /= self.world_size
        return value

    def mean(self, *values: Tensor) -> list[float]:
        """Averages each scalar over all processes, in fp64, with one all-reduce and one copy to the host for all."""
        return self.mean_later(*values)()

    def mean_later(self, *values: Tensor) -> Callable[[], list[float]]:
        """The same in two parts. The host waits only when the result is called, and only for what is queued here."""
        stacked = torch.stack([value.detach().double().to(self.device) for value in values])
        if self.world_size > 1:
            dist.all_reduce(stacked)
        stacked /= self.world_size
        if self.device.type != "cuda":
            return stacked.tolist
        on_host = torch.empty(stacked.shape, dtype=stacked.dtype, pin_memory=True)
        on_host.copy_(stacked, non_blocking=True)
        copied = torch.cuda.Event()
        copied.record()

        def read() -> list[float]:
            copied.synchronize()
            return on_host.tolist()

        return read


def choose_device(name: str) -> torch.device:
    """The device of that name; for ``"auto"`` a GPU if there is one, else the CPU.

    Raises:
        ValueError: there is no device of that name, or it is a GPU and torch sees none.
    """
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        device = torch.device(name)
    except RuntimeError as error:
        raise ValueError(f"device must be 'auto', 'cpu' or 'cuda', got {name!r}") from error
    if device.type == "cuda" and not torch.cuda.is_available():
        raise ValueError(f"device {name!r} was asked for, and torch {torch.__version__} sees no GPU")
    return device


def to_device(tensor: Tensor, device: torch.device) -> Tensor:
    """The tensor on the device. A copy from the host to a GPU waits for nothing that the GPU has still to do."""
    if device.type == "cuda" and tensor.device.type == "cpu":
        tensor = tensor.pin_memory()
    return tensor.to(device, non_blocking=True)


def environment(device: torch.device) -> Processes:
    """Reads the variables ``RANK``, ``LOCAL_RANK`` and ``WORLD_SIZE``, which torchrun sets.

    Raises:
        ValueError: this node has more processes than GPUs, or a variable is invalid.
    """
    try:
        rank, local, world = (int(os.environ.get(n, d)) for n, d in (("RANK", 0), ("LOCAL_RANK", 0), ("WORLD_SIZE", 1)))
    except ValueError as error:
        raise ValueError(f"RANK, LOCAL_RANK and WORLD_SIZE must be numbers: {error}") from error
    if not 0 <= rank < world:
        raise ValueError(f"RANK must be in [0, WORLD_SIZE), got {rank} of {world}; start processes with torchrun")
    if device.type == "cuda" and world > 1:
        if local >= torch.cuda.device_count():
            raise ValueError(f"LOCAL_RANK={local}, but this node has {torch.cuda.device_count()} GPU(s)")
        device = torch.device("cuda", local)
    return Processes(device, rank, local, world)


def current_processes(device: torch.device) -> Processes:
    """The processes of the process group that the caller has made; without one this process is alone.

    Raises:
        ValueError: torchrun started several processes, and there is no process group.
    """
    if dist.is_initialized():
        return Processes(device, dist.get_rank(), int(os.environ.get("LOCAL_RANK", 0)), dist.get_world_size())
    if (world := environment(device).world_size) > 1:
        raise ValueError(f"torchrun started {world} processes: call torch.distributed.init_process_group() before")
    return Processes(device)


def check_data_parallel(model: nn.Module) -> None:
    """Raises ``ValueError`` unless FSDP2 or DDP, and these alone, divide the training among several processes."""
    if not isinstance(model, FSDPModule | DistributedDataParallel):
        raise ValueError(
            "on several processes the model must be sharded with torch.distributed.fsdp.fully_shard or wrapped in "
            f"DistributedDataParallel, got {type(model).__name__}"
        )
    for name, parameter in model.named_parameters():
        if (
            isinstance(parameter, DTensor)
            and sum(not placement.is_replicate() for placement in parameter.placements) > 1
        ):
            raise ValueError(f"every process reads rows of its own, so that no tensor parallelism is possible: {name}")


@contextlib.contextmanager
def joined(processes: Processes) -> Iterator[None]:
    """Makes the run's GPU the current one, and provides a process group within the block.

    If the caller has made a process group already, it is used and kept.
    """
    if processes.device.index is not None:  # a GPU that was asked for by number
        torch.cuda.set_device(processes.device)
    if processes.world_size == 1 or dist.is_initialized():
        yield
        return
    cuda = processes.device.type == "cuda"
    dist.init_process_group("cpu:gloo,cuda:nccl" if cuda else "gloo")
    try:
        yield
    finally:
        dist.destroy_process_group()


def parallelize(
    model: nn.Module,
    blocks: nn.ModuleList,
    parallel: str,
    processes: Processes,
    *,
    bf16: bool = False,
    compiled: bool = False,
) -> nn.Module:
    """The module to call in place of the model. On one process it is the model itself.

    ``"fsdp"`` shards the model in place: each block is an FSDP unit, and all other parameters belong to the root unit.
    With ``bf16`` the parameters are gathered in bf16, and the gradients summed in fp32. ``"ddp"`` wraps the model. In
    both modes each block is ``compiled`` by itself: one graph of all blocks would give all gradients at its end, so
    that none could be exchanged while others are computed.
    """
    if processes.world_size == 1:
        return model
    if compiled:
        for block in blocks:
            block.compile(dynamic=False)
    if parallel == "fsdp":
        # Inputs keep their dtypes: the residual stream has autocast's, and the rotary table stays in fp32.
        dtypes = {"param_dtype": torch.bfloat16, "reduce_dtype": torch.float32} if bf16 else {}
        policy = MixedPrecisionPolicy(**dtypes, cast_forward_inputs=False)
        for block in blocks:
            fully_shard(block, mp_policy=policy)
        fully_shard(model, mp_policy=policy)
        return model
    device_ids = [processes.device.index] if processes.device.type == "cuda" else None
    return DistributedDataParallel(model, device_ids=device_ids)


@contextlib.contextmanager
def synchronized(module: nn.Module, last: bool) -> Iterator[None]:
    """Lets a backward pass in the block exchange gradients between processes only for the last part of a step."""
    if isinstance(module, FSDPModule):
        module.set_requires_gradient_sync(last)
    with module.no_sync() if isinstance(module, DistributedDataParallel) and not last else contextlib.nullcontext():
        yield


def is_sharded(model: nn.Module) -> bool:
    """Whether the model's parameters are DTensors; those of FSDP2 are plain tensors between forward and backward."""
    return any(isinstance(module, FSDPModule) for module in model.modules()) or any(
        isinstance(parameter, DTensor) for parameter in model.parameters()
    )


def full_tensor(tensor: Tensor) -> Tensor:
    """The full tensor that this process holds a shard of. A tensor that is not sharded is returned as it is."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def full_state_dict(model: nn.Module) -> dict[str, Any]:
    """The full ``state_dict`` on the CPU in the first process. In the others it is empty."""
    return get_model_state_dict(model, options=StateDictOptions(full_state_dict=True, cpu_offload=True))
