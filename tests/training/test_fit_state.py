"""What a run of ``fit`` saves, restores and leaves as it was: buffers, modes, gradients, random numbers."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from distributed import run
from fit_runs import (
    CONTEXT,
    VOCAB,
    WIDTH,
    Model,
    adamw,
    assert_equal,
    assert_resumes,
    crash_at,
    new_model,
    token_rows,
    train,
    untimed,
)
from torch import nn
from torch.distributed.fsdp import fully_shard

from patchkernels import next_patch_targets
from patchkernels.training import fit
from patchkernels.training.checkpoint import checkpoints
from patchkernels.training.log import read_log
from patchkernels.training.processes import full_tensor


class Stateful(Model):
    """With a buffer that the state_dict leaves out, one that is expanded, and a number that is no tensor."""

    def __init__(self) -> None:
        super().__init__(dropout=0.0)
        self.register_buffer("recent", torch.zeros(WIDTH), persistent=False)
        self.register_buffer("ones", torch.ones(1).expand(WIDTH))
        self.calls = 0

    def forward(self, input_ids, labels, patch_size):
        scale = 1 + 0.1 * (self.calls % 7) + self.recent.mean()
        if self.training:
            self.calls += 1
            self.recent += 0.01
        return super().forward(input_ids, labels, patch_size) * scale * self.ones.mean()

    def get_extra_state(self):
        return {"calls": self.calls}

    def set_extra_state(self, state):
        self.calls = state["calls"]


def test_all_buffers_and_extra_states_are_saved(tmp_path):
    straight = assert_resumes(tmp_path, lambda: new_model(Stateful))
    assert straight["_extra_state"] == {"calls": 18}


def test_a_model_is_called_once_a_step(tmp_path):
    """There is no call to warm up, which would change what a model keeps between calls."""
    model = new_model(Stateful)
    train(tmp_path, model, validation=None)
    assert model.calls == 18
    assert not any("compile_seconds" in line for line in read_log(tmp_path / "log.jsonl"))


def test_gradients_that_the_model_came_with_do_not_enter_the_first_step(tmp_path):
    model = new_model()
    for parameter in model.parameters():
        parameter.grad = torch.ones_like(parameter)
    assert_equal(train(tmp_path / "found", model), train(tmp_path / "expected", new_model()))


def test_modes_are_as_they_were(tmp_path):
    seen = []

    class Watched(Model):
        def forward(self, input_ids, labels, patch_size):
            seen.append((self.training, self.dropout.training))
            return super().forward(input_ids, labels, patch_size)

    model = new_model(Watched)
    model.dropout.eval()
    train(tmp_path / "a", model)
    assert set(seen) == {(True, False), (False, False)}, "a module in evaluation mode stays so"
    assert model.training and not model.dropout.training
    seen.clear()
    train(tmp_path / "b", model.eval(), validation=None)
    assert set(seen) == {(True, True)}, "a model in evaluation mode is put into training mode"
    assert not any(module.training for module in model.modules())


class MeanOfNothing(Model):
    """A model with torch's cross entropy, whose mean over no target is NaN."""

    def forward(self, input_ids, labels, patch_size):
        logits = self.head(self.hidden(self.tokens(input_ids, patch_size)).tanh())[:, :-1]
        targets = labels.unflatten(1, (-1, patch_size))[:, 1:]
        logits = logits[:, :, None].expand(*targets.shape, VOCAB)
        return F.cross_entropy(logits.reshape(-1, VOCAB), targets.reshape(-1))


def test_a_part_of_a_step_without_targets(tmp_path):
    rows = [
        {"input_ids": row, "labels": row if n % 2 else torch.full((CONTEXT,), -100)}
        for n, row in enumerate(token_rows(4))
    ]
    options = {"rows": rows, "phases": "1:1", "tokens": 12 * CONTEXT, "shuffle": False, "validation": None}
    weights = [train(tmp_path / str(n), new_model(MeanOfNothing), accumulation=n, **options) for n in (1, 2)]
    for name, weight in weights[0].items():
        torch.testing.assert_close(weights[1][name], weight)


def test_the_accumulation_may_change_when_a_run_is_resumed(tmp_path):
    with pytest.MonkeyPatch.context() as patch:
        crash_at(patch, 7)
        with pytest.raises(KeyboardInterrupt):
            train(tmp_path, new_model(), resume="auto")
    assert checkpoints(tmp_path / "checkpoints")
    train(tmp_path, new_model(), accumulation=2, resume="auto")
    assert read_log(tmp_path / "log.jsonl")[-1]["step"] == 18


def fit_sharded_alone(out: Any) -> list[Any]:
    def weights(folder: str, resume: bool = False) -> list[Any]:
        model = new_model()
        fully_shard(model)
        train(out / folder, model, resume=resume)
        return [full_tensor(parameter).tolist() for parameter in model.parameters()]

    straight = weights("straight")
    with pytest.MonkeyPatch.context() as patch:
        crash_at(patch, 7)
        with pytest.raises(KeyboardInterrupt):
            weights("run")
    return [straight, weights("run", resume=True)]


def test_a_sharded_model_on_one_process(tmp_path):
    ((straight, resumed),) = run(fit_sharded_alone, 1, tmp_path)
    assert resumed == straight
    expected = train(tmp_path / "expected", new_model())
    for name, weight in zip(dict(new_model().named_parameters()), straight):
        torch.testing.assert_close(torch.tensor(weight), expected[name])


def test_what_makes_another_run(tmp_path):
    """Settings that change what a resumed run computes are compared, whatever their kind."""

    def grouped(model: nn.Module, split: int) -> list[torch.optim.Optimizer]:
        parameters = list(model.parameters())
        return [torch.optim.AdamW([{"params": parameters[:split]}, {"params": parameters[split:]}], lr=1e-2)]

    train(tmp_path, new_model(), lambda model: grouped(model, 2))
    with pytest.raises(ValueError, match="groups 0 params: '2 tensors"):
        train(tmp_path, new_model(), lambda model: grouped(model, 3), resume=True)
    for change in (lambda model: model.bfloat16(), lambda model: model.hidden.bias.requires_grad_(False)):
        change(model := new_model())
        with pytest.raises(ValueError, match="parameters: "):
            train(tmp_path, model, lambda model: grouped(model, 2), resume=True)

    class Renamed(Model):
        def __init__(self) -> None:
            super().__init__()
            self.renamed = self.__dict__["_parameters"].pop("unused")

    with pytest.raises(ValueError, match="parameters: "):
        train(tmp_path, new_model(Renamed), lambda model: grouped(model, 2), resume=True)
    late = token_rows()
    late[24] = 0  # one of the 64 rows that name a dataset of 48
    with pytest.raises(ValueError, match="rows: "):
        train(tmp_path, new_model(), lambda model: grouped(model, 2), rows=late, resume=True)


def test_rates_and_modes_are_restored_after_an_error(tmp_path):
    model = new_model().eval()
    optimizers = adamw(model)
    with pytest.MonkeyPatch.context() as patch:
        crash_at(patch, 3)
        with pytest.raises(KeyboardInterrupt):
            fit(model, optimizers, token_rows(), out=tmp_path, batch_size=2, phases="2:1/2,1:1/2")
    assert optimizers[0].param_groups[0]["lr"] == 1e-2 and not model.training


class Growing(Model):
    """With a buffer that grows, and one that is expanded and not in the state_dict."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("seen", torch.zeros(0))
        self.register_buffer("ones", torch.ones(1).expand(WIDTH), persistent=False)

    def forward(self, input_ids, labels, patch_size):
        if self.training:
            self.seen = torch.cat([self.seen, input_ids.float().mean()[None]])
        return super().forward(input_ids, labels, patch_size) * self.ones.mean()


def fit_with_buffers_on_processes(out: Any) -> list[Any]:
    """The weights, and the buffers of this process, of a run and of one that is resumed."""

    def values(folder: str, resume: bool = False) -> list[Any]:
        model = new_model(Growing)
        fully_shard(model)
        train(out / folder, model, resume=resume)
        weights = [full_tensor(parameter).tolist() for parameter in model.parameters()]
        return [*weights, model.seen.tolist(), model.average.tolist()]

    found = [values("straight")]
    with pytest.MonkeyPatch.context() as patch:
        crash_at(patch, 7)
        with pytest.raises(KeyboardInterrupt):
            values("run")
    return [*found, values("run", resume=True)]


def test_buffers_of_each_process(tmp_path):
    (first, again), (second, again_second) = run(fit_with_buffers_on_processes, 2, tmp_path)
    assert first == again and second == again_second
    assert first[-1] != second[-1], "each process has a mean of its own rows"


class SharedMemory(Model):
    """With tensors that share memory without being the same, and with a buffer that appears and grows."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("table", torch.ones(4, 4))
        self.register_buffer("part", self.table[:2])
        self.again = nn.Parameter(self.hidden.weight.data)
        self.register_buffer("seen", None)

    def forward(self, input_ids, labels, patch_size):
        if self.training:
            seen = torch.zeros(0) if self.seen is None else self.seen
            self.seen = torch.cat([seen, input_ids.float().mean()[None]])
        return super().forward(input_ids, labels, patch_size) + self.seen.sum() * 1e-3 * self.again.mean()


def test_tensors_that_share_memory_or_grow(tmp_path):
    straight = assert_resumes(tmp_path, lambda: new_model(SharedMemory), validation=None)
    assert straight["seen"].shape == (18,)


class Careless(Model):
    """Changes what it is given, and draws random numbers in evaluation mode too."""

    def forward(self, input_ids, labels, patch_size):
        labels = labels.clone()
        input_ids[:, 0] = 0
        return super().forward(input_ids, labels, patch_size) * (1 + 0.1 * torch.rand(()))


class Careful(Careless):
    def forward(self, input_ids, labels, patch_size):
        return super().forward(input_ids.clone(), labels, patch_size)


def test_a_model_that_changes_its_inputs_and_draws_in_evaluation(tmp_path):
    expected = train(tmp_path / "careful", new_model(Careful))
    assert_equal(train(tmp_path / "careless", new_model(Careless), eval_every=100), expected)
    lines = {name: untimed(tmp_path / name) for name in ("careful", "careless")}
    losses = {name: [line["loss"] for line in lines[name] if "loss" in line] for name in lines}
    assert losses["careful"] == losses["careless"]


def test_a_loss_of_zero_counts(tmp_path):
    """The validation loss of a model that is sure of half its targets is half that of the others."""

    class Sure(Model):
        def forward(self, input_ids, labels, patch_size, reduction="mean"):
            target = next_patch_targets(labels, patch_size)
            losses = torch.where(target % 2 == 0, 0.0, 3.0).masked_fill(target == -100, 0.0)
            losses = losses + 0 * self.hidden.weight.sum()
            return losses if reduction == "none" else losses.sum() / (target != -100).sum()

    held_out = token_rows(5)
    train(tmp_path, new_model(Sure), validation=held_out, phases="1:1")
    odd = (held_out[:, 1:] % 2).double().mean().item()
    assert read_log(tmp_path / "log.jsonl")[0]["validation_loss"] == pytest.approx(3 * odd)


def test_the_log_of_a_run_without_a_checkpoint_is_kept(tmp_path):
    with pytest.MonkeyPatch.context() as patch:
        crash_at(patch, 3)
        with pytest.raises(KeyboardInterrupt):
            train(tmp_path, new_model())
    old = (tmp_path / "log.jsonl").read_text()
    train(tmp_path, new_model())
    assert (tmp_path / "log.previous.jsonl").read_text() == old
