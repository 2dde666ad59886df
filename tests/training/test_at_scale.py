"""FSDP2 on processes that are not there: torch's fake process group counts what a step would send."""

from __future__ import annotations

from collections import Counter

import pytest
import torch
import torch.distributed as dist
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.testing._internal.distributed.fake_pg import FakeStore
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from patchkernels import PatchLM, PatchLMConfig
from patchkernels.model.cost import wire_bytes
from patchkernels.training import processes as module
from patchkernels.training.config import ModelConfig, ScheduleConfig
from patchkernels.training.plan import PlanConfig, plan, print_plan
from patchkernels.training.processes import Processes, parallelize

POSITIONS = 128


@pytest.fixture
def many_processes():
    def start(count: int) -> None:
        dist.init_process_group("fake", store=FakeStore(), rank=0, world_size=count)

    yield start
    dist.destroy_process_group()


class Traffic(TorchDispatchMode):
    """Bytes that this process receives from others in collectives, by the kind, and their order."""

    def __init__(self) -> None:
        super().__init__()
        self.received: Counter[str] = Counter()
        self.order: list[tuple[str, int]] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        if func.namespace == "c10d":
            name = func.name().split("::")[1].split(".")[0]
            out, given = (sum(t.nbytes for t in tree_leaves(a) if isinstance(t, torch.Tensor)) for a in args[:2])
            self.received[name] += abs(out - given)  # a gather gives all but its own part, a sum of shards the reverse
            self.order.append((name, out))
        return result


def traffic_of_a_step(config: PatchLMConfig, processes: int, monkeypatch) -> Traffic:
    mesh = init_device_mesh("cpu", (processes,))
    monkeypatch.setattr(module, "fully_shard", lambda part, **options: fully_shard(part, mesh=mesh, **options))
    with FakeTensorMode():
        model = PatchLM(config)
        here = Processes(torch.device("cpu"), world_size=processes)
        parallelize(model, model.model.layers, "fsdp", here, bf16=True)
        ids = torch.zeros(1, POSITIONS, dtype=torch.int64)
        with Traffic() as traffic:
            with torch.autocast("cpu", torch.bfloat16):
                loss = model(ids, ids)
            loss.backward()
    return traffic


@pytest.mark.parametrize(("preset", "processes"), [("8b", 8), ("8b", 64), ("8b", 512), ("70b", 512)])
def test_the_bytes_of_a_step_are_those_of_plan(many_processes, monkeypatch, preset, processes):
    many_processes(processes)
    config = PatchLMConfig.preset(preset, max_position_embeddings=POSITIONS)
    traffic = traffic_of_a_step(config, processes, monkeypatch)
    expected = wire_bytes(config, processes)
    received = traffic.received
    assert received.keys() == {"_allgather_base_", "_reduce_scatter_base_"}
    assert received["_allgather_base_"] == pytest.approx(expected["gathers"], rel=0.01)
    assert received["_reduce_scatter_base_"] == pytest.approx(expected["sums in shards"], rel=0.01)

    layers, names = config.num_hidden_layers, [name for name, _ in traffic.order]
    assert names.count("_allgather_base_") == 2 * layers + 1 and names.count("_reduce_scatter_base_") == layers + 1
    assert names[: layers + 1] == ["_allgather_base_"] * (layers + 1), "the forward gathers, the root first"


def test_plan_says_what_a_gpu_receives(capsys):
    schedule = ScheduleConfig(tokens=1e9, batch_size=64, context=1024)
    result = plan(PlanConfig(ModelConfig("124m"), schedule, gpus=16, shards=8))["wire_bytes"]
    parameters = 123.6e6
    assert result["sums in shards"] == pytest.approx(4 * parameters * 7 / 8, rel=0.01)
    assert result["over replicas"] == pytest.approx(4 * parameters / 8, rel=0.01)
    print_plan(PlanConfig(ModelConfig("124m"), schedule, gpus=8, shards=8))
    assert "A GPU receives" in capsys.readouterr().out
    assert plan(PlanConfig(ModelConfig("124m"), schedule))["wire_bytes"] == {}
