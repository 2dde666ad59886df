"""Finds out which patch step of a Hugging Face model is exact, by comparing steps of a copy with what they must be.

A patch step is exact if

- the loss of the model's ordinary step is the mean cross entropy of its logits, computed by its ``loss_function``, plus
  a loss that does not depend on the labels, such as that of a router;
- no logit depends on later tokens;
- tokens that are each repeated K times give, in patches of K, the loss, the loss of every target and the gradients that
  the tokens give;
- different tokens give the loss, the losses and the gradients of the definition: the cross entropy of every token of
  the next patch, from the logits of the unmodified model for mean embeddings.

All is computed in fp32, on the copy of :func:`patchkernels.hf.probe_copy.copy_to_try`. Its large random weights make
every error visible: the loss of a model with fresh weights is about log V, whatever it computes. Steps are compared in
evaluation mode, and in training mode with the same random numbers in both, for dropout.
"""

from __future__ import annotations

import logging
import random
from typing import Any, NamedTuple

import numpy
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from patchkernels.hf.attach import StepKind, attached, can_swap_embedding, can_swap_head
from patchkernels.hf.global_state import undisturbed
from patchkernels.hf.logit_map import find_logit_map, find_logit_map_at_full_size, recorded_loss
from patchkernels.hf.modules import patch_means
from patchkernels.hf.probe_copy import copy_to_try, forward_of_instance
from patchkernels.numerics import IGNORE_INDEX
from patchkernels.ops.targets import next_patch_targets

logger = logging.getLogger("patchkernels")

BATCH = 2
FIRST_CHANGED = (1, 2, 4, 8, 13, 19)  # from where on tokens are changed to see whether earlier logits change
SEED = 2407


class Trial(NamedTuple):
    """How steps are compared: the patch size, the number of patches, and the mode of the model."""

    patch_size: int
    positions: int
    training: bool


TRIALS = (Trial(2, 20, training=False), Trial(3, 12, training=True))
# What rounding in fp32 allows. On tiny models of 156 architectures, losses and logits were off by at most 6e-6 and
# gradients by at most 3e-4; mistakes in what is computed are of the order of 1.
TOLERANCE = 1e-4  # of losses and logits, relative to the largest of them
LOSS_TOLERANCE = 1e-5  # of the loss function itself, relative to the cross entropy of the same logits in fp64
GRADIENT_TOLERANCE = 1e-3  # of the gradient of a parameter, relative to its norm
# The least norm that a gradient is taken to have, relative to that of all gradients. Some are zero but for rounding
# errors, such as that of a bias of keys, which moves all scores of a query by the same amount.
GRADIENT_FLOOR = 1e-3
INLINE_LOSS = (
    "its forward computes the loss itself; let it call "
    "self.loss_function(logits, labels, vocab_size=self.config.vocab_size)"
)


class InexactError(ValueError):
    """What is wrong with a model or with a patch step of it."""


class Step(NamedTuple):
    """What one step of a model computes."""

    loss: Tensor
    losses: Tensor  # (B, P, K), of every target; 0 where ignored
    logits: Tensor | None  # (B, P, V)
    gradients: dict[str, Tensor]  # of the parameters that have one


def find_step(model: Any) -> StepKind:
    """The exact patch step of the model, which is neither run nor changed.

    Raises:
        ValueError: no patch step is exact, or no copy can be made to find that out, with the reason.
    """
    name = type(model).__name__
    with undisturbed(model):
        try:
            trial, is_small = copy_to_try(model)
        except Exception as error:
            raise ValueError(f"whether a patch step of {name} is exact cannot be found out: {error}") from error
        try:
            return exact_step(model, trial, is_small)
        except Exception as error:
            raise ValueError(f"no patch step of {name} is exact: {describe(error)}") from error


def exact_step(model: Any, trial: Any, is_small: bool) -> StepKind:
    """The exact patch step of a model and of its copy, with the loss in the head if possible."""
    if forward_of_instance(model) is not None:
        raise InexactError("its forward was replaced on the instance, as accelerate's device_map does, for example")
    for _, positions, training in TRIALS:
        check_loss(trial, *random_batch(trial, positions), training)
    check_causality(trial)
    if is_small:
        check_tables_are_used(model, trial)
    ids, _ = random_batch(trial, TRIALS[0].positions)
    swaps_embedding = can_swap_embedding(model)
    trial_map = find_logit_map(trial, ids) if can_swap_head(model) else None
    own_map = find_logit_map_at_full_size(model, trial, ids) if trial_map and is_small else trial_map
    if own_map is not None and is_exact(trial, StepKind(swaps_embedding, trial_map)):
        return StepKind(swaps_embedding, own_map)
    kind = StepKind(swaps_embedding, None)
    check_step(trial, kind)
    return kind


def describe(error: Exception) -> str:
    return str(error) if isinstance(error, InexactError) else f"{type(error).__name__}: {error}"


def is_exact(trial: Any, kind: StepKind) -> bool:
    """Whether a patch step of this kind is exact in the copy. If not, the reason is logged."""
    try:
        check_step(trial, kind)
        return True
    except Exception as error:
        logger.info("%s: the loss is not exact in the head: %s", type(trial).__name__, describe(error))
        return False


def random_batch(model: Any, tokens: int) -> tuple[Tensor, Tensor]:
    """Random ids (BATCH, tokens), and labels, of which some are ignored.

    Tokens that begin and end texts are among the ids, since models may see boundaries of documents in them. Other
    special tokens are not: they stand for images, for instance.
    """
    config, text = model.config, model.config.get_text_config()
    table = getattr(model.get_input_embeddings(), "weight", None)
    outputs = getattr(model.get_output_embeddings(), "out_features", None)
    sizes = [getattr(text, "vocab_size", None), outputs, None if table is None else len(table)]
    ordinary = torch.ones(min(size for size in sizes if size is not None), dtype=torch.bool, device="cpu")
    for name, value in (*config.to_dict().items(), *text.to_dict().items()):
        if name.endswith(("token_id", "token_index")):
            special = value if isinstance(value, list) else [value]
            ordinary[[token for token in special if isinstance(token, int) and 0 <= token < len(ordinary)]] = False
    candidates = ordinary.nonzero()[:, 0]
    generator = torch.Generator("cpu").manual_seed(tokens)
    drawn = torch.randint(len(candidates), (BATCH, tokens), generator=generator, device="cpu")
    ids = candidates[drawn]
    for column, name in ((5, "eos_token_id"), (8, "bos_token_id")):
        token = getattr(text, name, None)
        token = token[0] if isinstance(token, list) else token
        if isinstance(token, int) and 0 <= token < len(ordinary):
            ids[:, column] = token
    ids = ids.to(next(model.parameters()).device)
    labels = ids.clone()
    labels[0, :3] = labels[1, tokens // 2] = IGNORE_INDEX
    return ids, labels


def check_loss(model: Any, ids: Tensor, labels: Tensor, training: bool) -> None:
    """Raises InexactError if the loss is not that of the logits, from ``loss_function``, plus one without labels."""
    rests = []
    model.train(training)
    for given in (labels, labels.roll(1, 0)):
        with recorded_loss(model) as calls, torch.no_grad():
            out = seeded(model, input_ids=ids, labels=given)
        if out.loss is None:
            raise InexactError("its forward returns no loss for labels")
        if not calls:
            raise InexactError(INLINE_LOSS)
        if len(calls) > 1:
            raise InexactError(f"its forward calls its loss function {len(calls)} times in a step, expected one call")
        call = calls[0]
        if not torch.equal(call.labels.flatten(), given.flatten()):
            raise InexactError("its forward calls its loss function with other labels than it was given")
        check_close("the logits that its loss function receives", call.logits, "those that it returns", out.logits)
        exact = mean_of_targets(out.logits.double(), next_patch_targets(given, 1))
        difference = "the mean cross entropy of its logits"
        check_close("its loss function", call.loss, difference, exact, tolerance=LOSS_TOLERANCE)
        rests.append(out.loss - call.loss)
    check_close("what is added to the loss", rests[0], "that for other labels", rests[1], size=exact.abs())


@torch.no_grad()
def check_causality(model: Any) -> None:
    """Raises InexactError if a change of later tokens changes earlier rows of logits."""
    positions = TRIALS[0].positions
    ids, others = (random_batch(model, length)[0][0, :positions] for length in (positions, positions + 1))
    column = torch.arange(positions, device=ids.device)
    rows = [torch.where(column < first, ids, others) for first in (positions, *FIRST_CHANGED)]
    embedding = model.get_input_embeddings()
    changed = torch.stack(rows)
    model.eval()
    for name, value in (("input_ids", changed), ("inputs_embeds", embedding(changed))):
        unchanged, *logits = model(**{name: value}).logits
        for first, found in zip(FIRST_CHANGED, logits):
            if not (found - unchanged)[first:].abs().max() > TOLERANCE * unchanged.abs().max():
                raise InexactError(f"its logits do not depend on {name}")
            situation = f"it is not causal: with other tokens from {first} on in {name}, the logits before"
            check_close(situation, found[:first], "those without", unchanged[:first])


def check_tables_are_used(model: Any, small: Any) -> None:
    """Raises InexactError if a tiny model does not use a table of tokens, as the model itself may do."""
    parameters, modules = dict(small.named_parameters()), dict(model.named_modules())
    used = {id(parameters[name]) for name in token_step(small, *random_batch(small, TRIALS[0].positions)).gradients}
    tokens = model.get_input_embeddings().weight
    for name, module in small.named_modules():
        is_table = isinstance(module, nn.Embedding) and len(modules[name].weight) >= len(tokens)
        is_replaced = name.endswith("original_module")  # by a copy that PEFT trains
        if is_table and not is_replaced and id(module.weight) not in used:
            raise InexactError(f"a tiny model of its configuration does not use {name}, which may be of tokens")


def check_step(model: Any, kind: StepKind) -> None:
    """Raises InexactError if a patch step of this kind is not exact."""
    for patch_size, positions, training in TRIALS:
        model.train(training)
        ids, labels = random_batch(model, positions)
        expected = token_step(model, ids, labels)
        repeated_ids, repeated_labels = (tokens.repeat_interleave(patch_size, 1) for tokens in (ids, labels))
        found = patch_step(model, kind, repeated_ids, repeated_labels, patch_size)
        check_equal(f"tokens repeated {patch_size} times in patches", found, "the tokens", expected)
    del expected, found
    for patch_size, positions, training in TRIALS:
        model.train(training)
        ids, labels = random_batch(model, positions * patch_size)
        found = patch_step(model, kind, ids, labels, patch_size)
        expected = step_of_means(model, ids, labels, patch_size)
        check_equal(f"different tokens in patches of {patch_size}", found, "their mean embeddings", expected)


def seeded(model: Any, **inputs: Any) -> Any:
    """What the model returns, with the same random numbers for dropout at every call."""
    torch.manual_seed(SEED)
    random.seed(SEED)
    numpy.random.seed(SEED)  # noqa: NPY002 (the one that models draw from)
    return model(**inputs)


def patch_step(model: Any, kind: StepKind, ids: Tensor, labels: Tensor, patch_size: int) -> Step:
    """A step of the model after its classes were swapped."""
    with attached(model, kind) as state:
        state.settings.patch_size = patch_size
        out = seeded(model, input_ids=ids, labels=labels)
        last: Any = state.last_step
        return Step(out.loss, last.losses, out.logits, gradients(model, out.loss))


def token_step(model: Any, ids: Tensor, labels: Tensor) -> Step:
    """The ordinary step of the unmodified model."""
    out = seeded(model, input_ids=ids, labels=labels)
    losses = target_losses(out.logits.detach().double(), next_patch_targets(labels, 1))
    return Step(out.loss, losses, out.logits, gradients(model, out.loss))


def step_of_means(model: Any, ids: Tensor, labels: Tensor, patch_size: int) -> Step:
    """The definition of a patch step, with the logits of the unmodified model for mean embeddings."""
    means = patch_means(model.get_input_embeddings()(ids), patch_size)
    target = next_patch_targets(labels, patch_size)
    with recorded_loss(model, lambda logits: logits.new_zeros(())):  # leaves the losses that do not depend on labels
        out = seeded(model, inputs_embeds=means, labels=target[..., 0].contiguous())
    loss = mean_of_targets(out.logits, target) + out.loss
    losses = target_losses(out.logits.detach().double(), target)
    return Step(loss, losses, out.logits, gradients(model, loss))


def target_losses(logits: Tensor, target: Tensor) -> Tensor:
    """The cross entropy (B, P, K) of every target, where K targets share a row of logits (B, P, V); 0 where ignored."""
    rows = logits.unsqueeze(-2).expand(*target.shape, -1)
    losses = F.cross_entropy(rows.flatten(0, -2), target.flatten(), ignore_index=IGNORE_INDEX, reduction="none")
    return losses.view_as(target)


def mean_of_targets(logits: Tensor, target: Tensor) -> Tensor:
    """The mean over all targets that are not ignored."""
    return target_losses(logits, target).sum() / (target != IGNORE_INDEX).sum()


def gradients(model: Any, loss: Tensor) -> dict[str, Tensor]:
    """The gradients by the names of the parameters, of those that have one."""
    parameters = dict(model.named_parameters())
    found = torch.autograd.grad(loss, list(parameters.values()), allow_unused=True)
    return {name: gradient for name, gradient in zip(parameters, found) if gradient is not None}


def check_equal(found_name: str, found: Step, expected_name: str, expected: Step) -> None:
    """Raises InexactError with the first thing in which two steps differ."""
    check_close(f"{found_name} give a loss of", found.loss, expected_name, expected.loss)
    check_close(f"{found_name} give losses of", found.losses, expected_name, expected.losses.expand_as(found.losses))
    if found.logits is not None and expected.logits is not None:
        check_close(f"{found_name} give logits of", found.logits, expected_name, expected.logits)
    for name in (*expected.gradients, *found.gradients):
        for owner, other in ((found, expected_name), (expected, found_name)):
            if name not in owner.gradients:
                where = found_name if owner is found else expected_name
                raise InexactError(f"{where} give no gradient of {name}, {other} give one")
    total = torch.stack([gradient.norm() for gradient in expected.gradients.values()]).norm()
    for name, gradient in expected.gradients.items():
        error = (found.gradients[name] - gradient).norm()
        size = gradient.norm().clamp(min=GRADIENT_FLOOR * total)
        if not error <= GRADIENT_TOLERANCE * size:  # also true if it is NaN
            raise InexactError(f"{found_name} give a gradient of {name} that is off by {error / size:.1e} of its norm")


def check_close(
    found_name: str,
    found: Tensor,
    expected_name: str,
    expected: Tensor,
    size: Any = None,
    tolerance: float = TOLERANCE,
) -> None:
    """Raises InexactError if two tensors differ by more than rounding in fp32 explains, relative to ``size``.

    The size is that of the largest number expected if none is given.
    """
    if found.shape != expected.shape:
        raise InexactError(f"{found_name} have shape {tuple(found.shape)}, {expected_name} {tuple(expected.shape)}")
    found, expected = found.detach().double(), expected.detach().double()
    error = (found - expected).abs()
    size = expected.abs().max() if size is None else size
    if not error.max() <= tolerance * size:  # also true if the error is NaN
        place = tuple(int(i) for i in torch.unravel_index(error.argmax(), error.shape))
        where = f" at {place}" if place else ""
        raise InexactError(f"{found_name} {found[place]:.6g}{where}, {expected_name} {expected[place]:.6g}")
