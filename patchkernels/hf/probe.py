"""Finds out which patch step of a Hugging Face model is exact, by running the model on a few tokens."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

from patchkernels.hf.modules import LogitMap, PatchState, runs_forward_of

PATCH_SIZE, TOKENS = 2, 6
# Relative tolerance of all comparisons here. transformers computes its loss in fp32, whatever the model's dtype is.
TOLERANCE = {torch.float64: 1e-5, torch.float32: 1e-4, torch.bfloat16: 3e-2, torch.float16: 5e-3}


def probe_ids(model: Any) -> Tensor:
    """Token ids of shape (1, TOKENS) that the vocabulary holds."""
    vocab: int = model.get_input_embeddings().weight.shape[0]
    return (torch.arange(TOKENS, device=next(model.parameters()).device)[None] * 7 + 11) % vocab


def find_logit_map(model: Any, ids: Tensor) -> LogitMap | None:
    """The :class:`LogitMap` between the output of the model's head and its loss function; None if there is another.

    Runs the model once. A hook replaces the head's output with known numbers, and what the loss function receives is
    compared with them.
    """
    head = model.get_output_embeddings()
    if not runs_forward_of(head, nn.Linear):
        return None
    z = torch.linspace(-3, 3, head.out_features).to(head.weight)
    try:
        received = logits_received(model, head, z, ids)
    except Exception:  # the loss may still be exact if it is computed from the model's logits, which is tried next
        return None
    z = z.double()
    if len(received) != 1 or received[0].shape != z.shape:
        return None
    logits = received[0]
    tolerance = TOLERANCE[head.weight.dtype]
    for scale in (1.0, float(logits @ z / (z @ z))):
        if torch.allclose(logits, scale * z, rtol=tolerance, atol=tolerance):
            return LogitMap(scale)
    softcap = getattr(model.config.get_text_config(), "final_logit_softcapping", None)
    if softcap and torch.allclose(logits, softcap * torch.tanh(z / softcap), rtol=tolerance, atol=tolerance):
        return LogitMap(1.0, float(softcap))
    return None


def logits_received(model: Any, head: nn.Module, z: Tensor, ids: Tensor) -> list[Tensor]:
    """The first row (V) of logits that each call of the model's loss function receives if its head returns ``z``."""
    received: list[Tensor] = []

    def record(logits: Tensor, *_: Any, **__: Any) -> Tensor:
        received.append(logits.detach().double().flatten(0, -2)[0])
        return logits.sum()

    hook = head.register_forward_hook(lambda module, args, output: z.expand_as(output))
    loss_function = model.__dict__.get("_loss_function")
    try:
        model._loss_function = record
        with probing(model, 1):
            model(input_ids=ids, labels=ids)
    finally:
        hook.remove()
        del model._loss_function
        if loss_function is not None:
            model._loss_function = loss_function
    return received


def token_loss(model: Any, ids: Tensor) -> float:
    """The loss of the model's ordinary step on the tokens. Runs the model once."""
    with probing(model, 1):
        return float(model(input_ids=ids, labels=ids).loss)


def inexactness(model: Any, ids: Tensor, expected: float) -> str:
    """Why the model's patch step is not exact, or an empty string if it is.

    Runs the model twice. If every token is repeated K times, a step on patches of K must give the loss of the tokens,
    ``expected``. And a step on patches of different tokens must run without an error: some models look up their input
    embeddings in the embedding table, where means are not found.
    """
    tolerance = TOLERANCE[next(model.parameters()).dtype]
    repeated = ids.repeat_interleave(PATCH_SIZE, 1)
    try:
        with probing(model, PATCH_SIZE):
            loss = float(model(input_ids=repeated, labels=repeated).loss)
            if not abs(loss - expected) <= tolerance * max(abs(expected), 1):  # also true if the loss is NaN
                return (
                    f"tokens repeated {PATCH_SIZE} times in patches give a loss of {loss:.6g}, "
                    f"the tokens {expected:.6g}"
                )
            model(input_ids=ids, labels=ids)
    except Exception as error:
        return describe(error)
    return ""


def describe(error: Exception) -> str:
    return f"{type(error).__name__}: {error}"


@contextlib.contextmanager
def probing(model: Any, patch_size: int) -> Iterator[None]:
    """Steps inside the block have this patch size, and neither gradients nor dropout.

    Afterwards the model's training mode, its patch size and the random state are what they were.
    """
    state: PatchState = model._patch_state
    training, patch_size_before = model.training, state.settings.patch_size
    model.eval()
    try:
        state.settings.patch_size = patch_size
        with torch.no_grad(), torch.random.fork_rng(devices=[]):
            yield
    finally:
        state.settings.patch_size = patch_size_before
        state.last_step = None
        model.train(training)
