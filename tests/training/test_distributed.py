"""A training run on two processes gives the result of one, also when it is resumed on another number of them."""

from __future__ import annotations

import dataclasses
import os
import signal
from pathlib import Path

import pytest
import small_runs
import torch
import torch.distributed as dist
from distributed import run
from small_runs import TIMES, changed, final_weights, small_run
from torch._dynamo.testing import CompileCounterWithBackend

from patchkernels.data.batches import Batches
from patchkernels.model.config import PRESETS
from patchkernels.model.patch_lm import Block
from patchkernels.training.checkpoint import checkpoints
from patchkernels.training.config import TrainConfig
from patchkernels.training.log import read_log
from patchkernels.training.stop import Stopped
from patchkernels.training.train import train

TINY = dataclasses.replace(small_runs.TINY, num_hidden_layers=2)
SMALL = {"tiny": TINY, "untied": dataclasses.replace(TINY, tie_word_embeddings=False)}


@pytest.fixture(autouse=True)
def small_presets(monkeypatch):
    for name, preset in SMALL.items():
        monkeypatch.setitem(PRESETS, name, preset)


@pytest.fixture
def config(text, tmp_path) -> TrainConfig:
    return changed(small_run(text, tmp_path / "run"), batch_size=4, tokens=3072, eval_rows=3)


def train_and_stop(config, step):
    """Trains, and crashes all processes as the given step begins. Returns the names of the checkpoints."""
    PRESETS.update(SMALL)
    read = Batches.batch

    def batch(self, at):
        if at == step:
            raise KeyboardInterrupt
        return read(self, at)

    Batches.batch = batch
    try:
        train(config)
    except KeyboardInterrupt:
        return [path.name for path in checkpoints(Path(config.run.out) / "checkpoints")]
    finally:
        Batches.batch = read
    return []


def train_in_processes(config, resumed=False):
    PRESETS.update(SMALL)
    train(changed(config, resume=resumed))


def train_compiled_in_processes(config):
    """Returns how many graphs were compiled."""
    graphs, compiled = CompileCounterWithBackend("aot_eager"), torch.compile
    torch.compile = lambda module, **options: compiled(module, backend=graphs, **options)
    train_in_processes(changed(config, compile=True))
    return graphs.frame_count


def assert_same(run_a, run_b):
    """Asserts that logs and weights are the same up to rounding."""
    a, b = read_log(run_a / "log.jsonl"), read_log(run_b / "log.jsonl")
    assert [line["step"] for line in a] == [line["step"] for line in b]
    for x, y in zip(a, b):
        assert x.keys() == y.keys()
        for name in x.keys() - set(TIMES):
            torch.testing.assert_close(x[name], y[name], rtol=1e-4, atol=0)
    left, right = final_weights(run_a), final_weights(run_b)
    assert left.keys() == right.keys()
    for name in left:
        torch.testing.assert_close(left[name], right[name], rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize(
    "settings",
    [
        {"parallel": "fsdp", "accumulation": 2},
        {"parallel": "ddp", "accumulation": 2, "optimizer_at_switch": "reset"},
        {"parallel": "fsdp", "preset": "untied", "packed_documents": True, "accumulation": 2},
    ],
    ids=["fsdp", "ddp", "packed"],
)
def test_the_run_of_two_processes(config, settings, tmp_path):
    config = changed(config, **settings)
    one = train(changed(config, out=str(tmp_path / "one")))
    run(train_in_processes, 2, changed(config, out=str(tmp_path / "two")))
    assert_same(tmp_path / "two", one)


@pytest.mark.parametrize("parallel", ["fsdp", "ddp"])
def test_blocks_are_compiled_once(config, parallel, tmp_path):
    """One graph for all blocks and both patch sizes; evaluation runs eagerly."""
    one = train(changed(config, out=str(tmp_path / "one")))
    two = changed(config, out=str(tmp_path / "two"), parallel=parallel)
    assert run(train_compiled_in_processes, 2, two) == [1, 1]
    assert_same(tmp_path / "two", one)


def dtypes_in_a_step(config):
    """The dtypes of the parameters in a forward, and of the gradients that the optimizer gets."""
    used, summed, step = set(), set(), torch.optim.AdamW.step
    PRESETS.update(SMALL)

    def forward(self, x, *arguments):
        if x.device.type == "cpu":  # not where FLOPs are counted
            used.update({x.dtype, *(p.dtype for p in self.parameters())})
        return block_forward(self, x, *arguments)

    def optimizer_step(self):
        summed.update(p.grad.dtype for group in self.param_groups for p in group["params"])
        return step(self)

    block_forward, Block.forward = Block.forward, forward
    torch.optim.AdamW.step = optimizer_step
    train(config)
    return used, summed


def test_bf16_shards_are_gathered_in_bf16_and_summed_in_fp32(config, tmp_path):
    config = changed(config, bf16=True)
    one = train(changed(config, out=str(tmp_path / "one")))
    two = tmp_path / "two"
    assert run(dtypes_in_a_step, 2, changed(config, out=str(two))) == [({torch.bfloat16}, {torch.float32})] * 2
    losses = [[line["loss"] for line in read_log(folder / "log.jsonl") if "loss" in line] for folder in (one, two)]
    torch.testing.assert_close(*map(torch.tensor, losses), rtol=5e-3, atol=0)


def test_checkpoints_load_on_another_number_of_processes(config, tmp_path):
    whole_run = train(changed(config, out=str(tmp_path / "whole")))
    for first, second in ((2, 1), (1, 2), (2, 2)):
        out = tmp_path / f"{first}-{second}"
        ours = changed(config, out=str(out))
        (saved, *_) = run(train_and_stop, first, ours, 7)
        assert saved[-1] == "step-00000006"
        leftover = out / "checkpoints" / ".step-00000009"  # as a killed process leaves it
        leftover.mkdir()
        run(train_in_processes, second, ours, True)
        assert not leftover.exists()
        assert_same(out, whole_run)
    damaged = checkpoints(out / "checkpoints")[-1] / "distributed" / ".metadata"
    os.truncate(damaged, 10)
    with pytest.raises(ValueError, match="is damaged or of another model"):
        train(changed(ours, resume=True))


def train_and_signal(config):
    """Trains, and sends SIGTERM to one of the processes as its sixth step begins. Returns the exit code."""
    PRESETS.update(SMALL)
    read = Batches.batch

    def batch(self, at):
        if at == 5 and dist.get_rank() == 1:
            os.kill(os.getpid(), signal.SIGTERM)
        return read(self, at)

    Batches.batch = batch
    try:
        train(config)
    except Stopped as stopped:
        return stopped.code


def test_a_signal_to_one_process_stops_all_after_the_same_step(config, tmp_path):
    codes = run(train_and_signal, 2, changed(config, out=str(tmp_path)))
    assert codes == [128 + signal.SIGTERM] * 2
    assert checkpoints(tmp_path / "checkpoints")[-1].name == "step-00000006"
