"""Which patch step of a Hugging Face model is exact, found by running the model: see :mod:`patchkernels.hf`."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

from patchkernels.hf_modules import LogitMap, is_plain

PATCH_SIZE, TOKENS = 2, 6
# of the loss of repeated tokens against that of the tokens, which transformers takes in fp32
TOLERANCE = {torch.float64: 1e-5, torch.float32: 1e-4, torch.bfloat16: 3e-2, torch.float16: 5e-3}


def logit_map(model: Any) -> LogitMap | None:
    """How the model's ``loss_function`` sees its head's logits, found by feeding it some; None: in no simple way."""
    head = model.get_output_embeddings()
    if not is_plain(head, nn.Linear):
        return None
    seen: list[Tensor] = []
    probe = torch.linspace(-3, 3, head.out_features).to(head.weight)
    hook = head.register_forward_hook(lambda module, args, out: probe.expand_as(out))
    own = model.__dict__.get("_loss_function")

    def spy(logits: Tensor, *_: Any, **__: Any) -> Tensor:
        seen.append(logits.detach().double().flatten(0, -2)[0])
        return logits.sum()

    try:
        model._loss_function = spy
        ids = probe_ids(model)
        with probing(model, 1):
            model(input_ids=ids, labels=ids)
    except Exception:  # what a model cannot do here it may do otherwise: the materialised step is tried next
        return None
    finally:
        hook.remove()
        del model._loss_function
        if own is not None:
            model._loss_function = own
    z = probe.double()
    if len(seen) != 1 or seen[0].shape != z.shape:
        return None
    scale = float(seen[0] @ z / (z @ z))
    tolerance = TOLERANCE[head.weight.dtype]
    for candidate in (1.0, scale):
        if torch.allclose(seen[0], candidate * z, rtol=tolerance, atol=tolerance):
            return LogitMap(candidate)
    softcap = getattr(model.config.get_text_config(), "final_logit_softcapping", None)
    if softcap and torch.allclose(seen[0], softcap * torch.tanh(z / softcap), rtol=tolerance, atol=tolerance):
        return LogitMap(1.0, float(softcap))
    return None


def inexactness(model: Any) -> str:
    """Why a patch step is not exact, or an empty string: tokens repeated K times against the tokens themselves."""
    ids = probe_ids(model)
    repeated = ids.repeat_interleave(PATCH_SIZE, 1)
    try:
        with probing(model, 1):
            expected = float(model(input_ids=ids, labels=ids).loss)
        with probing(model, PATCH_SIZE):
            found = float(model(input_ids=repeated, labels=repeated).loss)
            model(input_ids=ids, labels=ids)  # means that are no token's embedding, which some look for in their table
    except Exception as error:
        return f"{type(error).__name__}: {error}"
    tolerance = TOLERANCE[next(model.parameters()).dtype]
    if abs(found - expected) <= tolerance * max(abs(expected), 1):
        return ""
    return f"tokens repeated {PATCH_SIZE} times in patches give a loss of {found:.6g}, the tokens {expected:.6g}"


def probe_ids(model: Any) -> Tensor:
    """(1, TOKENS)"""
    vocab: int = model.get_input_embeddings().weight.shape[0]
    return (torch.arange(TOKENS, device=next(model.parameters()).device)[None] * 7 + 11) % vocab


@contextlib.contextmanager
def probing(model: Any, patch_size: int) -> Iterator[None]:
    """Steps of that patch size and of plain means, without gradients, dropout, or a trace in the random state."""
    training, step = model.training, model._patch
    settings = step.patch_size, step.label_smoothing
    model.eval()
    try:
        step.patch_size, step.label_smoothing = patch_size, 0.0
        with torch.no_grad(), torch.random.fork_rng(devices=[]):
            yield
    finally:
        step.patch_size, step.label_smoothing = settings
        step.losses = step.counted = None
        model.train(training)
