"""What a run of ``fit`` saves, restores and leaves as it was: optimizers, buffers, modes, gradients, random numbers."""

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
    crash_at,
    momentum,
    new_model,
    token_rows,
    train,
    untimed,
)
from torch import nn
from torch.distributed.fsdp import fully_shard
from torch.utils.data import DataLoader, Dataset

from patchkernels.training import fit
from patchkernels.training.checkpoint import checkpoints
from patchkernels.training.log import read_log
from patchkernels.training.processes import full_tensor


def assert_resumes(tmp_path, model: Any, make: Any = adamw, rows: Any = token_rows, at: int = 7, **options: Any) -> Any:
    """A run that crashes at a step and is resumed is the same as one that does not, bit for bit."""
    straight = train(tmp_path / "straight", model(), make, rows(), **options)
    with pytest.MonkeyPatch.context() as patch:
        crash_at(patch, at)
        with pytest.raises(KeyboardInterrupt):
            train(tmp_path / "run", model(), make, rows(), **options)
    resumed = train(tmp_path / "run", model(), make, rows(), **options, resume=True)
    assert_equal(resumed, straight)
    assert untimed(tmp_path / "run") == untimed(tmp_path / "straight")
    return straight


class PreciseMomentum(torch.optim.Optimizer):
    """Momentum in fp32, whatever the dtype of the parameters, with a state that is there from the beginning."""

    def __init__(self, parameters: Any, lr: float) -> None:
        super().__init__(parameters, {"lr": lr})
        for parameter in (parameter for group in self.param_groups for parameter in group["params"]):
            self.state[parameter] = {"sum": torch.full(parameter.shape, 1e-4), "steps": 0}

    def step(self, closure: Any = None) -> None:
        for group in self.param_groups:
            for parameter in group["params"]:
                if parameter.grad is not None:
                    state = self.state[parameter]
                    state["steps"] += 1
                    state["sum"].mul_(0.9).add_(parameter.grad.float())
                    parameter.data.add_((-group["lr"] * state["sum"]).to(parameter.dtype))


@pytest.mark.parametrize("at", [7, 12])
def test_the_state_of_an_optimizer_keeps_its_dtype(tmp_path, at):
    assert_resumes(
        tmp_path, lambda: new_model().bfloat16(), lambda model: [PreciseMomentum(model.parameters(), 1e-2)], at=at
    )


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


class Marked(Dataset):
    """Rows whose labels are masked at random as they are read."""

    def __len__(self):
        return 48

    def __getitem__(self, number):
        row = token_rows()[number]
        return {"input_ids": row, "labels": row.masked_fill(torch.rand(CONTEXT) < 0.3, -100)}


@pytest.mark.parametrize(
    "rows",
    [Marked, lambda: DataLoader(token_rows(), batch_size=None, shuffle=True)],
    ids=["dataset that masks at random", "loader that shuffles"],
)
def test_rows_that_draw_random_numbers(tmp_path, rows):
    options = {"tokens": 60 * 2 * CONTEXT, "validation": None, "batch_size": 2}
    assert_resumes(tmp_path, new_model, rows=rows, at=13, **options)


def test_random_rows_depend_on_the_seed_and_leave_the_generator_alone(tmp_path):
    losses = {}
    for seed in (0, 0, 1):
        torch.manual_seed(seed + 7)  # makes no difference
        train(tmp_path / str(len(losses)), new_model(), rows=Marked(), seed=seed, shuffle=False, tokens=8 * 2 * CONTEXT)
        losses[len(losses)] = [line["loss"] for line in read_log(tmp_path / str(len(losses)) / "log.jsonl")[1:]]
    assert losses[0] == losses[1] != losses[2]


def test_a_stream_is_begun_once(tmp_path):
    begun = []

    class Rows:
        def __iter__(self):
            begun.append(None)
            return iter(token_rows(72))

    train(tmp_path, new_model(), rows=Rows())
    assert len(begun) == 1


def test_a_model_is_called_once_a_step(tmp_path):
    """There is no call to warm up, which would change what a model keeps between calls."""
    model = new_model(Stateful)
    train(tmp_path, model, validation=None)
    assert model.calls == 18
    assert not any("compile_seconds" in line for line in read_log(tmp_path / "log.jsonl"))


def test_parameters_in_no_optimizer_do_not_change_the_step(tmp_path):
    """Their gradients are neither clipped with the others nor added up over the steps."""
    steps = {}
    for frozen in (True, False):
        model = new_model(lambda: Model(0.0))
        model.hidden.requires_grad_(frozen)
        trained = [model.tokens.weight, *model.head.parameters()]
        steps[frozen] = train(
            tmp_path / str(frozen), model, lambda _, p=trained: [torch.optim.SGD(p, lr=0.5)], clip=0.1
        )
        assert all(parameter.grad is None for parameter in model.parameters())
    assert_equal(steps[True], steps[False])


def test_gradients_that_the_model_came_with_do_not_enter_the_first_step(tmp_path):
    model = new_model()
    for parameter in model.parameters():
        parameter.grad = torch.ones_like(parameter)
    assert_equal(train(tmp_path / "found", model), train(tmp_path / "expected", new_model()))


def test_a_reset_gives_an_optimizer_the_state_that_it_came_with(tmp_path):
    model = new_model().bfloat16()
    optimizer = PreciseMomentum(model.parameters(), 1e-2)
    train(tmp_path, model, lambda _: [optimizer], optimizer_at_switch="reset", validation=None)
    assert {state["steps"] for state in optimizer.state.values()} == {12, 0}, "12 steps of tokens; one is never used"
    assert optimizer.state[model.unused]["sum"].equal(torch.full((3, 3), 1e-4))


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


class Failing(Dataset):
    """Rows of which one cannot be read, as long as the disk fails."""

    fails = True

    def __len__(self):
        return 200

    def __getitem__(self, number):
        if number == 40 and self.fails:
            raise OSError("the disk has failed")
        return token_rows(200)[number]


def test_a_run_is_saved_when_its_rows_fail(tmp_path):
    options = {"shuffle": False, "save_every": 100, "phases": "1:1"}
    expected = train(tmp_path / "expected", new_model(), rows=token_rows(200), **options)
    rows = Failing()
    with pytest.raises(OSError, match="the disk has failed"):
        train(tmp_path / "run", new_model(), rows=rows, **options)
    assert [folder.name for folder in checkpoints(tmp_path / "run" / "checkpoints")] == ["step-00000020"]
    rows.fails = False
    assert_equal(train(tmp_path / "run", new_model(), rows=rows, **options, resume=True), expected)


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


class Unsaveable:
    pass


def with_option(model: nn.Module, **option: Any) -> list[torch.optim.Optimizer]:
    return [torch.optim.SGD([{"params": list(model.parameters()), **option}], lr=0.1)]


@pytest.mark.parametrize(
    ("make", "error", "message"),
    [
        (lambda model: with_option(model, note=Unsaveable()), TypeError, "settings of an optimizer hold .*Unsaveable"),
        (lambda model: with_option(model, lr=0.0), ValueError, r"a learning rate above 0, got lr=0.0 in SGD"),
        (lambda model: with_option(model, lr=None), ValueError, r"a learning rate above 0, got lr=None in SGD"),
        (lambda model: [torch.optim.LBFGS(model.parameters())], TypeError, "LBFGS.step needs a closure"),
        (lambda model: adamw(model) + momentum(model), ValueError, "5 parameters of SGD are in another optimizer too"),
    ],
)
def test_optimizers_that_cannot_be_run_are_refused_before_any_work(tmp_path, make, error, message):
    with pytest.raises(error, match=message):
        train(tmp_path / "run", new_model(), make)
    assert not (tmp_path / "run").exists()


def test_a_state_that_cannot_be_saved_is_named_at_the_first_save(tmp_path):
    model = new_model()
    (optimizer,) = momentum(model)
    step = optimizer.step
    optimizer.step = lambda: (step(), optimizer.state[model.unused].update(note=Unsaveable()))
    with pytest.raises(TypeError, match=r"the state of an optimizer, .* cannot be saved safely, .*Unsaveable"):
        train(tmp_path, model, lambda _: [optimizer])
    assert not checkpoints(tmp_path / "checkpoints")


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        (lambda: [torch.zeros(4, dtype=torch.bool)], r"row 0: input_ids must be integers.*torch.bool"),
        (lambda: [{"input_ids": [1, 2], "attention_mask": [[1, 1]]}], r"row 0: attention_mask must be .*\(1, 2\)"),
        (lambda: [{"input_ids": [1, 2], "labels": [1.0, 2.0]}], "row 0: labels must be integers.*float64"),
        (lambda: [[1, 2, 3], {"input_ids": [1, 2, 3]}], "row 1: either all rows are dictionaries or none, got dict"),
    ],
)
def test_rows_that_are_none_are_named(tmp_path, rows, message):
    with pytest.raises(ValueError, match=message):
        train(tmp_path, new_model(), rows=rows(), validation=None, phases="1:1")


def test_phases_without_targets_are_refused(tmp_path):
    with pytest.raises(ValueError, match="rows of 8 tokens have no targets at patch size 8: expected two patches"):
        train(tmp_path, new_model(), phases="8:1/2,1:1/2", convention="tokens")


def test_integers_of_every_kind_are_token_ids(tmp_path):
    expected = train(tmp_path / "int64", new_model())
    for dtype in (torch.int32, torch.uint8, torch.uint16):
        assert_equal(train(tmp_path / str(dtype), new_model(), rows=token_rows().to(dtype)), expected)


def test_validation_rows_without_targets_are_refused(tmp_path):
    rows = [{"input_ids": row, "labels": torch.full((CONTEXT,), -100)} for row in token_rows(3)]
    with pytest.raises(ValueError, match="the validation rows have no targets"):
        train(tmp_path / "run", new_model(), validation=rows)
    assert not (tmp_path / "run").exists()


def test_what_makes_another_run(tmp_path):
    """Settings that change what a resumed run computes are compared, whatever their kind."""

    def grouped(model: nn.Module, split: int) -> list[torch.optim.Optimizer]:
        parameters = list(model.parameters())
        return [torch.optim.AdamW([{"params": parameters[:split]}, {"params": parameters[split:]}], lr=1e-2)]

    train(tmp_path, new_model(), lambda model: grouped(model, 2))
    with pytest.raises(ValueError, match="groups: "):
        train(tmp_path, new_model(), lambda model: grouped(model, 3), resume=True)

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
