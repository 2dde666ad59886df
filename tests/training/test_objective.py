"""Which interfaces of a model ``fit`` understands, and that it refuses the others."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from fit_runs import CONTEXT, VOCAB, WIDTH, Model, WithEmbedding, assert_equal, new_model, train
from torch import Tensor, nn

from patchkernels import PatchLM, PatchLMConfig
from patchkernels.training.objective import Objective


class TargetsFirst(Model):
    def forward(self, targets: Tensor, *, input_ids: Tensor, patch_size: int = 1) -> Any:  # type: ignore[override]
        return {"loss": super().forward(input_ids, targets, patch_size), "more": None}


class UnusualNames(Model):
    def forward(self, patch_size: int, x: Tensor, y: Tensor, scale: float = 1.0) -> Any:  # type: ignore[override]
        return super().forward(x, y, patch_size) * scale


class Around(nn.Module):
    """A model with a model inside that holds the patch size."""

    def __init__(self, inside: nn.Module) -> None:
        super().__init__()
        self.inside = inside

    def forward(self, input_ids: Tensor, labels: Tensor) -> Tensor:
        output = self.inside(input_ids=input_ids, labels=labels)
        return getattr(output, "loss", output)


class PassedOn(WithEmbedding):
    def forward(self, *args: Any, **kwargs: Any) -> Tensor:  # type: ignore[override]
        return super().forward(*args, **kwargs)


@pytest.mark.parametrize("cls", [TargetsFirst, UnusualNames, PassedOn])
def test_arguments_are_found_by_their_names(tmp_path, cls):
    """Labels and ids differ, so that a model which is given them in the wrong order has another loss."""
    rows = [
        {"input_ids": row, "labels": row.flip(0)}
        for row in torch.randint(VOCAB, (48, CONTEXT), generator=torch.Generator().manual_seed(0))
    ]
    expected = train(tmp_path / "expected", new_model(), rows=rows)
    assert_equal(train(tmp_path / "found", new_model(cls), rows=rows), expected)


def test_a_wrapper_of_a_model_that_holds_the_patch_size(tmp_path):
    expected = train(tmp_path / "expected", new_model())
    model = new_model(lambda: Around(WithEmbedding()))
    model.inside.tokens.patch_size = 2
    found = train(tmp_path / "found", model)
    assert_equal({name.removeprefix("inside."): tensor for name, tensor in found.items()}, expected)
    assert model.inside.tokens.patch_size == 2, "afterwards it is what it was"


def test_enabled_models_inside_of_wrappers(tmp_path):
    transformers = pytest.importorskip("transformers")
    peft = pytest.importorskip("peft")
    from patchkernels import hf

    config = PatchLMConfig(VOCAB, WIDTH, 24, 1, 2, max_position_embeddings=CONTEXT, initializer_range=0.2)
    new_model(lambda: PatchLM(config)).save_pretrained(tmp_path / "model")

    def enabled() -> Any:
        return hf.enable(transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "model"), 2)

    expected = train(tmp_path / "expected", enabled())
    model = Around(enabled())
    found = train(tmp_path / "wrapped", model)
    assert_equal({name.removeprefix("inside."): tensor for name, tensor in found.items()}, expected)
    assert model.inside.patch_size == 2
    lora = peft.get_peft_model(enabled(), peft.LoraConfig(target_modules=["q_proj"], r=2, init_lora_weights=False))
    before = {name: tensor.clone() for name, tensor in lora.state_dict().items()}
    found = train(tmp_path / "lora", lora)
    changed = {name for name in found if not torch.equal(found[name], before[name])}
    assert changed and all("lora" in name for name in changed)


class AnyArguments(WithEmbedding):
    def forward(self, input_ids, *args: Any, **kwargs: Any) -> Tensor:  # type: ignore[override]
        return super().forward(input_ids, *args, **kwargs)


class MoreArguments(Model):
    def forward(self, input_ids, labels, patch_size, rotary):
        return super().forward(input_ids, labels, patch_size)


class PatchSizeWithoutLabels(Model):
    def forward(self, input_ids, patch_size):
        return super().forward(input_ids, input_ids, patch_size)


class NoPatches(Model):
    def __init__(self) -> None:
        super().__init__()
        self.tokens = nn.Embedding(VOCAB, WIDTH)

    def forward(self, input_ids, labels):
        return self.head(self.tokens(input_ids), target=labels)


@pytest.mark.parametrize("cls", [AnyArguments, MoreArguments, PatchSizeWithoutLabels, NoPatches])
def test_other_interfaces_are_refused_with_their_signature(cls):
    with pytest.raises(TypeError, match=rf"{cls.__name__} cannot take patch steps: .*got forward\("):
        Objective(cls())


class WrongLosses(Model):
    """Takes ``reduction``, and gives the losses of the wrong shape for ``"none"``."""

    def forward(self, input_ids, labels, patch_size, reduction="mean"):
        loss = super().forward(input_ids, labels, patch_size)
        return loss if reduction == "mean" else loss.expand(3)


class LossInTuple(Model):
    def forward(self, input_ids, labels, patch_size):
        return super().forward(input_ids, labels, patch_size), None


@pytest.mark.parametrize(
    ("cls", "message"),
    [
        (WrongLosses, r'with reduction="none" losses of shape \(2, 8, 1\).*Tensor of shape \(3,\)'),
        (LossInTuple, "must return the loss, a scalar tensor, or an attribute or entry 'loss' with it; got tuple"),
    ],
)
def test_what_forward_returns_is_checked(tmp_path, cls, message):
    with pytest.raises(TypeError, match=message):
        train(tmp_path, new_model(cls))
