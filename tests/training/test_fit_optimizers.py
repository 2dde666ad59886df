"""The optimizers of ``fit``: which states are saved and restored, what a reset is, and what is refused."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from distributed import run
from fit_runs import (
    Model,
    adamw,
    assert_equal,
    assert_resumes,
    crash_at,
    momentum,
    new_model,
    train,
)
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from patchkernels.training.checkpoint import checkpoints
from patchkernels.training.log import read_log


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


def test_a_reset_gives_an_optimizer_the_state_that_it_came_with(tmp_path):
    model = new_model().bfloat16()
    optimizer = PreciseMomentum(model.parameters(), 1e-2)
    train(tmp_path, model, lambda _: [optimizer], optimizer_at_switch="reset", validation=None)
    assert {state["steps"] for state in optimizer.state.values()} == {12, 0}, "12 steps of tokens; one is never used"
    assert optimizer.state[model.unused]["sum"].equal(torch.full((3, 3), 1e-4))


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


class Nested(torch.optim.Optimizer):
    """Momentum in a list, in fp32, with a number of steps that is of no parameter."""

    def __init__(self, parameters: Any, lr: float, counts: bool = True) -> None:
        super().__init__(parameters, {"lr": lr})
        self.counts = counts

    def step(self, closure: Any = None) -> None:
        if self.counts:
            self.state["steps"] = self.state.get("steps", 0) + 1
        for group in self.param_groups:
            for parameter in group["params"]:
                if parameter.grad is not None:
                    state = self.state[parameter]
                    state.setdefault("sums", [torch.zeros(parameter.shape)])[0].mul_(0.9).add_(parameter.grad.float())
                    parameter.data.add_((-group["lr"] * state["sums"][0]).to(parameter.dtype))


def test_states_in_lists_and_of_no_parameter(tmp_path):
    assert_resumes(tmp_path, lambda: new_model().bfloat16(), lambda model: [Nested(model.parameters(), 1e-2)])


def fit_nested_on_processes(out: Any) -> list[Any]:
    def weights(folder: str, resume: bool = False, counts: bool = False) -> list[Any]:
        model = new_model()
        optimizer = Nested(model.parameters(), 1e-2, counts)
        parallel = DistributedDataParallel(model, find_unused_parameters=True)
        train(out / folder, parallel, lambda _: [optimizer], resume=resume)
        return [parameter.tolist() for parameter in model.parameters()]

    found = [weights("straight")]
    with pytest.MonkeyPatch.context() as patch:
        crash_at(patch, 7)
        with pytest.raises(KeyboardInterrupt):
            weights("run")
    found.append(weights("run", resume=True))
    with pytest.raises(TypeError, match="several processes cannot save the state 'steps' of Nested"):
        weights("refused", counts=True)
    return found


def test_states_in_lists_on_several_processes(tmp_path):
    for straight, resumed in run(fit_nested_on_processes, 2, tmp_path):
        assert straight == resumed


def test_every_reset_is_one(tmp_path):
    """With a state that is there from the beginning, and that steps change in place."""
    states = []

    def make(model: nn.Module) -> list[torch.optim.Optimizer]:
        optimizer = PreciseMomentum(model.parameters(), 1e-2)
        step = optimizer.step
        optimizer.step = lambda: (states.append(float(optimizer.state[model.hidden.bias]["sum"].norm())), step())
        return [optimizer]

    train(tmp_path, new_model(), make, phases="4:1/2,2:1/4,1:1/4", optimizer_at_switch="reset", validation=None)
    lines = read_log(tmp_path / "log.jsonl")[1:]
    firsts = [n for n, line in enumerate(lines) if n == 0 or line["phase"] != lines[n - 1]["phase"]]
    assert len(firsts) == 3 and len({states[n] for n in firsts}) == 1


def test_a_reset_needs_the_state_that_the_optimizer_came_with(tmp_path):
    model = new_model()
    (optimizer,) = adamw(model)
    options = {"optimizer_at_switch": "reset", "validation": None}
    with pytest.MonkeyPatch.context() as patch:
        crash_at(patch, 5)
        with pytest.raises(KeyboardInterrupt):
            train(tmp_path, model, lambda _: [optimizer], **options)
    with pytest.raises(ValueError, match="optimizer_states 0: '0 entries"):
        train(tmp_path, model, lambda _: [optimizer], **options, resume=True)
    train(tmp_path, model, **options, resume=True)
