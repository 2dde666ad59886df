"""A minute of the random check, and proof that it finds what is planted. ``make soak`` runs it for an hour."""

from __future__ import annotations

import contextlib
import dataclasses

import pytest
import torch
import triton_on_cpu
from soak.cases import BadInputCase, EmbeddingCase, LossCase, draw
from soak.check import check, smaller

import patchkernels.eager.cross_entropy
import patchkernels.eager.patch_embedding
import patchkernels.eager.scaling
import patchkernels.ops.targets

CASES = 60 if triton_on_cpu.ARCHITECTURE else 900  # about 40 seconds on one core
PARTS = 6  # so that they can run in parallel

# What is planted is planted in the eager backend.
without_kernels = pytest.mark.skipif(bool(triton_on_cpu.ARCHITECTURE), reason="tests the check itself, not the kernels")


@pytest.mark.parametrize("part", range(PARTS))
def test_random_cases(part):
    for number in range(part, CASES, PARTS):
        case = draw(number)
        try:
            check(case)
        except Exception as error:
            raise AssertionError(f"case {number} of the soak fails: {case}") from error


LOGITS = LossCase(dtype="float32", leading=(3,), slots=2, vocab=30, needs=("input",), reduction="sum")
UNREDUCED = dataclasses.replace(LOGITS, reduction="none")
HEAD = dataclasses.replace(LOGITS, form="linear", needs=("input", "weight"), upstream="scaled")
EMBEDDING = EmbeddingCase(patches=4, patch_size=3, hidden=8, needs=("weight",))
CROSS_ENTROPY, LOOKUP = patchkernels.eager.cross_entropy, patchkernels.eager.patch_embedding
SCALING = patchkernels.eager.scaling


def off_by(relative):
    """Makes a function's first result larger by a relative error."""

    def plant(function):
        def wrong(*args, **kwargs):
            out = function(*args, **kwargs)
            return out * (1 + relative) if isinstance(out, torch.Tensor) else (out[0] * (1 + relative), *out[1:])

        return wrong

    return plant


def scaled_in_place(function):
    """Scales what was saved for the backward, unseen by autograd's check of versions."""
    return lambda out, values, scale: out.copy_(values.data.mul_(scale))


def changing(function):
    """Makes a function's results differ from call to call by one part in a hundred million."""
    calls = iter(range(1000))
    return lambda *args: tuple(t * (1 + 2**-23 * next(calls)) for t in function(*args))


def overwriting(function):
    return lambda logits, *args: [function(logits, *args), logits.zero_()][0]


PLANTED = {
    "loss off by 1 in 10^5": (LOGITS, CROSS_ENTROPY, "loss_and_gradient", off_by(1e-5), "error of the loss"),
    "gradient off by 1 in 10^5": (UNREDUCED, CROSS_ENTROPY, "logits_gradient", off_by(1e-5), "gradient of input"),
    "embedding off by 1 in 10^5": (EMBEDDING, LOOKUP, "forward", off_by(1e-5), "error of the embedding"),
    "hidden states scaled in place": (HEAD, SCALING, "scale_into", scaled_in_place, "differ|was changed"),
    "logits overwritten": (LOGITS, CROSS_ENTROPY, "loss_and_gradient", overwriting, "an input was changed"),
    "not deterministic": (LOGITS, CROSS_ENTROPY, "loss_and_gradient", changing, "two calls differ"),
}


@without_kernels
@pytest.mark.parametrize("name", PLANTED)
def test_planted_errors_are_found(name, monkeypatch):
    case, module, function, plant, message = PLANTED[name]
    check(case)
    monkeypatch.setattr(module, function, plant(getattr(module, function)))
    with pytest.raises(AssertionError, match=message):
        check(case)


@without_kernels
def test_missing_checks_are_found(monkeypatch):
    bad = [BadInputCase(LOGITS, mistake) for mistake in range(30)]
    monkeypatch.setattr(patchkernels.ops.patch_cross_entropy, "check_loss_arguments", lambda *_: None)
    missed = 0
    for case in bad:
        with contextlib.suppress(AssertionError):
            check(case)
            missed += 1
    assert missed < 20


@without_kernels
def test_a_failing_case_is_made_smaller(monkeypatch):
    for name in ("loss", "loss_and_gradient"):
        right = getattr(CROSS_ENTROPY, name)
        wrong = lambda *args, right=right: off_by(1e-3 if args[-1].softcap else 0)(right)(*args)  # noqa: E731
        monkeypatch.setattr(CROSS_ENTROPY, name, wrong)
    case = dataclasses.replace(
        LOGITS, softcap=3.0, label_smoothing=0.3, leading=(2, 5), vocab=100, target_weight="slot"
    )
    with pytest.raises(AssertionError) as failed:
        check(case)
    found = smaller(case, failed.value)
    assert found == LossCase(softcap=3.0, leading=())


def test_a_number_draws_the_same_case():
    assert [draw(number) for number in range(50)] == [draw(number) for number in range(50)]
