"""The update of a training step against torch's clipping followed by the optimizer's step."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

from patchkernels.training.stop import OUT_OF_TIME, StopRequest
from patchkernels.training.update import scales_and_skips, update

LOSS = torch.ones(())


def new_model() -> nn.Module:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(5, 7), nn.Linear(7, 3, bias=False))
    for parameter in model.parameters():
        parameter.grad = torch.randn_like(parameter)
    return model


def optimizers(model: nn.Module, fused: bool) -> list[torch.optim.Optimizer]:
    first, *others = model.parameters()
    return [
        torch.optim.AdamW([first], lr=0.1, weight_decay=0.3, fused=fused),
        torch.optim.Adam(others, lr=0.1, fused=fused),
    ]


def state(model: nn.Module, of: list[torch.optim.Optimizer]) -> list[torch.Tensor]:
    entries = [value for o in of for entry in o.state.values() for value in entry.values() if value is not None]
    return [t.detach().clone() for t in (*model.parameters(), *entries)]


@pytest.mark.parametrize("fused", [True, False])
@pytest.mark.parametrize("clip", [0.01, 1.0, 1e3])
def test_as_clipping_and_then_the_step(fused, clip):
    model = new_model()
    other = copy.deepcopy(model)
    for parameter, twin in zip(model.parameters(), other.parameters()):
        twin.grad = parameter.grad.clone()
    ours, theirs = optimizers(model, fused), optimizers(other, fused)
    for _ in range(3):
        norm = update(ours, list(model.parameters()), clip, LOSS)
        expected = nn.utils.clip_grad_norm_(other.parameters(), clip)
        for optimizer in theirs:
            optimizer.step()
        assert norm == expected
        torch.testing.assert_close(state(model, ours), state(other, theirs), rtol=1e-5, atol=1e-7)
        for parameter, twin in zip(model.parameters(), other.parameters()):
            parameter.grad = torch.randn_like(parameter)
            twin.grad = parameter.grad.clone()
    assert not any(hasattr(optimizer, "grad_scale") for optimizer in ours)


@pytest.mark.parametrize("fused", [True, False])
@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_a_gradient_that_is_not_finite_changes_nothing(fused, bad):
    model = new_model()
    ours = optimizers(model, fused)
    update(ours, list(model.parameters()), 1.0, LOSS)
    before = state(model, ours)
    list(model.parameters())[-1].grad[0, 0] = bad
    assert not update(ours, list(model.parameters()), 1.0, LOSS).isfinite()
    assert all(torch.equal(*pair) for pair in zip(state(model, ours), before, strict=True))


@pytest.mark.parametrize("fused", [True, False])
def test_a_loss_that_is_not_finite_changes_nothing_though_its_gradient_is(fused):
    model = new_model()
    ours, before = optimizers(model, fused), [p.detach().clone() for p in model.parameters()]
    assert update(ours, list(model.parameters()), 1.0, torch.tensor(float("inf"))).isfinite()
    assert all(torch.equal(*pair) for pair in zip(model.parameters(), before))


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.float16])
def test_parameters_of_other_dtypes(dtype):
    model = new_model().to(dtype)
    for parameter in model.parameters():
        parameter.grad = torch.full_like(parameter, 1e3)
    before = [p.detach().clone() for p in model.parameters()]
    update(optimizers(model, True), list(model.parameters()), 1.0, LOSS)
    assert all((p - old).abs().max() > 0.05 for p, old in zip(model.parameters(), before))


def test_which_optimizers_scale_and_skip_by_themselves():
    first, second = (nn.Parameter(torch.ones(2)) for _ in range(2))
    mixed = [{"params": [first]}, {"params": [second], "fused": False}]
    hooked = torch.optim.AdamW([first], fused=True)
    hooked.register_step_pre_hook(lambda *_: None)
    scaling = torch.optim.AdamW([first], fused=True)
    scaling.grad_scale = None
    others = [torch.optim.AdamW(mixed, fused=True), torch.optim.SGD([first], fused=True), hooked, scaling]
    assert not any(scales_and_skips(optimizer) for optimizer in others)
    assert scales_and_skips(torch.optim.Adam([first], fused=True))
    for optimizer in others[:3]:
        first.grad, second.grad = torch.full((2,), 3.0), torch.full((2,), 4.0)
        update([optimizer], [first, second], 1.0, LOSS)


@pytest.mark.skipif(torch.cuda.is_available(), reason="tensors without data are for a machine without a GPU")
def test_the_host_does_not_wait():
    fake_cuda = pytest.importorskip("bench.fake_cuda")  # imports the kernels, and they import Triton
    with fake_cuda.FakeCuda():
        loss = torch.zeros((), device="cuda")
        parameters = [nn.Parameter(torch.zeros(3, 4, device="cuda")) for _ in range(2)]
        for parameter in parameters:
            parameter.grad = torch.zeros_like(parameter)
        update([torch.optim.AdamW(parameters, fused=True)], parameters, 1.0, loss)
        with pytest.raises(fake_cuda.HostWaits):
            update([torch.optim.AdamW(parameters, foreach=True)], parameters, 1.0, loss)


def test_a_signal_counts_when_all_processes_have_agreed():
    stop = StopRequest(None)
    stop.received = 130
    assert (stop.code, stop.signalled, stop.flags()) == (0, False, (130.0, 0.0))
    stop.agree(65.0, 0.0)
    assert (stop.code, stop.signalled) == (130, True)
    others = StopRequest(None)
    others.agree(65.0, 0.0)
    assert (others.code, others.received) == (143, 0), "another process received it"
    late = StopRequest(0)
    late.agree(*late.flags())
    assert late.code == OUT_OF_TIME
