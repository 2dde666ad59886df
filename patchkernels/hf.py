"""Patch training in any causal language model of Hugging Face transformers: ``enable(model, patch_size=4)``.

A patch step is the model's own forward, with the mean of K embeddings as ``inputs_embeds`` and the K-token loss in
place of its loss. Where the logits that reach the model's ``loss_function`` are those of ``lm_head``, times a
constant or soft-capped, the loss is formed inside ``lm_head`` and the logits never exist ("fused"); elsewhere it is
formed from the logits that the model made of them ("materialised"). Which of the two is exact is found by running the
model when it is enabled: every token K times in patches must give the loss of the tokens once, one by one. A model
where neither does is refused.

The instance's class is exchanged for a subclass of it, so that ``deepcopy``, pickling, ``save_pretrained``,
``generate`` and ``state_dict`` keep working; :func:`disable` gives back the very class.
"""

from __future__ import annotations

import contextlib
import functools
import logging
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple, TypeVar

import torch
from torch import Tensor, nn

from patchkernels.linear_patch_cross_entropy import linear_patch_cross_entropy
from patchkernels.patch_cross_entropy import next_patch_targets, patch_cross_entropy

logger = logging.getLogger("patchkernels")
Model = TypeVar("Model", bound=nn.Module)

PROBE_PATCH_SIZE, PROBE_TOKENS = 2, 6
# of the loss of repeated tokens against that of the tokens, which transformers takes in fp32
PROBE_TOLERANCE = {torch.float64: 1e-5, torch.float32: 1e-4, torch.bfloat16: 3e-2, torch.float16: 5e-3}


class LogitMap(NamedTuple):
    """What a model makes of ``lm_head``'s logits: ``softcap * tanh(scale z / softcap)``, or ``scale z`` without."""

    scale: float = 1.0
    softcap: float | None = None


class PatchSizeError(ValueError):
    """A batch that cannot be cut into patches."""


def enable(model: Model, patch_size: int = 1, *, reduction: str = "mean") -> Model:
    """``model(input_ids, labels=labels)`` becomes a step on patches of ``patch_size`` tokens (PatchTrain, section 2).

    ``model.patch_size`` may be changed at any time; 1 is the model's ordinary step, untouched. The loss is the mean of
    all valid targets' losses, or ``reduction="slot_mean"``; with ``num_items_in_batch`` their sum over that number.
    In a patch step ``input_ids`` (B, T) and ``labels`` (B, T) are unshifted, T divisible by K; padding is on the
    right; packed documents (``position_ids``) begin on patch boundaries. The fused loss gives no logits.

    Returns the model itself.

    Raises:
        TypeError: not a causal language model of transformers.
        ValueError: K < 1, an unknown reduction, or a model in which no patch step is exact, with the reason.
    """
    from transformers import PreTrainedModel

    if not isinstance(model, PreTrainedModel):
        raise TypeError(f"expected a transformers PreTrainedModel, got {type(model).__name__}")
    patched: Any = model
    name = type(model).__name__
    if patched.config.is_encoder_decoder:
        raise TypeError(f"{name} is an encoder-decoder; patches need a causal language model")
    if not isinstance(patched.get_output_embeddings(), nn.Module):
        raise TypeError(f"{name} has no output head (get_output_embeddings() is {patched.get_output_embeddings()})")
    if reduction not in ("mean", "slot_mean"):
        raise ValueError(f"reduction must be 'mean' or 'slot_mean', got {reduction!r}")
    enabled = isinstance(patched, PatchSteps)
    if not enabled:
        exchange(model, PatchSteps)
    try:
        patched.patch_size, patched._patch_reduction = patch_size, reduction
        if not enabled:
            choose_map(patched, name)
    except Exception:
        if not enabled:
            disable(model)
        raise
    return model


def choose_map(model: Any, name: str) -> None:
    """Fused if that is exact, else materialised if that is; ValueError otherwise."""
    model._patch_map = logit_map(model)
    reason = inexactness(model)
    if reason and model._patch_map is not None:
        model._patch_map = None
        reason = inexactness(model)
    if reason:
        raise ValueError(f"no patch step of {name} is exact: {reason}")
    if model._patch_map is None:
        logger.warning("%s: the loss is formed from materialised logits, since it changes those of its head", name)


def disable(model: Model) -> Model:
    """Gives back the class that the model had; without effect on one that is not enabled."""
    patched: Any = model
    if isinstance(patched, PatchSteps):
        restore(patched)
        for name in ("_patch_size", "_patch_reduction", "_patch_map", "_patch_target"):
            patched.__dict__.pop(name, None)
    return model


@contextlib.contextmanager
def token_level(model: Any) -> Iterator[None]:
    """``patch_size = 1`` inside the block: for evaluation in the patch phase."""
    before, model.patch_size = model.patch_size, 1
    try:
        yield
    finally:
        model.patch_size = before


class PatchSteps:
    """Mixed in before a model's own class."""

    _patch_map: LogitMap | None  # None: materialised
    _patch_reduction: str
    _patch_size: int
    _patch_target: Tensor | None = None  # (B, P, K) during a patch step

    @property
    def patch_size(self) -> int:
        return self._patch_size

    @patch_size.setter
    def patch_size(self, value: int) -> None:
        if value < 1:
            raise ValueError(f"patch_size must be at least 1, got {value}")
        self._patch_size = value

    @property
    def loss_function(self: Any) -> Callable[..., Tensor]:
        if self._patch_target is None:
            own: Callable[..., Tensor] = super().loss_function  # type: ignore[misc]
            return own
        return functools.partial(patch_loss, self)

    @loss_function.setter
    def loss_function(self: Any, value: Any) -> None:
        self._loss_function = value

    def forward(
        self: Any,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        labels: Tensor | None = None,
        **kwargs: Any,
    ) -> Any:
        own = super().forward  # type: ignore[misc]
        given = {"attention_mask": attention_mask, "position_ids": position_ids, "labels": labels}
        kwargs |= {key: value for key, value in given.items() if value is not None}
        size = self.patch_size
        if size == 1 or kwargs.get("past_key_values") is not None:
            return own(input_ids=input_ids, **kwargs)
        if input_ids is None:
            raise PatchSizeError(
                "a patch step needs input_ids; embeddings of tokens cannot be told from those of patches"
            )
        if labels is None:
            raise PatchSizeError("a patch step needs labels; for logits or generation set model.patch_size = 1")
        if input_ids.ndim != 2 or input_ids.shape[1] % size or labels.shape != input_ids.shape:
            raise PatchSizeError(
                f"a patch step needs input_ids and labels (B, T) with T divisible by patch_size={size}, "
                f"got {tuple(input_ids.shape)} and {tuple(labels.shape)}"
            )
        if attention_mask is not None:
            kwargs["attention_mask"] = patch_mask(attention_mask, input_ids, size)
        if position_ids is not None:
            kwargs["position_ids"] = position_ids[..., ::size] // size
        embedded = self.get_input_embeddings()(input_ids)
        kwargs["inputs_embeds"] = embedded.unflatten(1, (-1, size)).mean(2)
        target = next_patch_targets(labels, size)
        kwargs["labels"] = target[..., 0].contiguous()  # read by no one but to see that there are some
        if position_ids is not None:  # a document's first patch is predicted by no other document
            begins = kwargs["position_ids"][..., 1:] == 0
            target[:, :-1].masked_fill_(begins.expand(len(target), -1).unsqueeze(-1), -100)
        kwargs.setdefault("use_cache", False)
        self._patch_target = target
        head = self.get_output_embeddings()
        fused = self._patch_map is not None
        try:
            with head_loss(head, self) if fused else contextlib.nullcontext():
                out = own(**kwargs | {"return_dict": True})
        finally:
            self._patch_target = None
        if fused:
            out.logits = None
        return out

    def __reduce_ex__(self, protocol: Any) -> Any:
        """Unlike its class, which was made here, the class that the model had can be found by pickle."""
        return rebuild, (type(self)._patch_own, PatchSteps), self.__dict__.copy()  # type: ignore[attr-defined]


class LossHead:
    """Mixed in before the class of a head: during a fused patch step it returns the loss, shaped like one logit."""

    _patch_model: Any

    def forward(self: Any, hidden: Tensor) -> Tensor:
        model = self._patch_model
        scale, softcap = model._patch_map
        loss = linear_patch_cross_entropy(
            hidden * scale if scale != 1 else hidden,
            self.weight,
            model._patch_target,
            linear_bias=None if self.bias is None else self.bias * scale,
            softcap=softcap,
            reduction=model._patch_reduction,
        )
        model._patch_loss = loss
        return loss.reshape(1, 1, 1)


@contextlib.contextmanager
def head_loss(head: nn.Module, model: Any) -> Iterator[None]:
    """``head(hidden)`` gives the loss of ``model``'s patch step inside the block."""
    exchange(head, LossHead)
    head.__dict__["_patch_model"] = model
    try:
        yield
    finally:
        del head.__dict__["_patch_model"]
        restore(head)


@functools.cache
def mixed(own: Any, mixin: Any) -> Any:
    """``own`` with ``mixin`` before it, under the same name: that is what ``save_pretrained`` writes."""
    names = {"__module__": own.__module__, "__qualname__": own.__qualname__, "__doc__": own.__doc__, "_patch_own": own}
    return type(own.__name__, (mixin, own), names)


def exchange(module: Any, mixin: Any) -> None:
    own: Any = type(module)
    module.__class__ = mixed(own, mixin)


def restore(module: Any) -> None:
    module.__class__ = type(module)._patch_own


def rebuild(own: Any, mixin: Any) -> Any:
    cls = mixed(own, mixin)
    return cls.__new__(cls)


def patch_loss(
    model: Any, logits: Tensor, labels: Tensor, *_: Any, num_items_in_batch: Any = None, **__: Any
) -> Tensor:
    """In place of the model's ``loss_function``."""
    target: Tensor = model._patch_target
    if model._patch_map is not None:
        loss: Tensor = model.__dict__.pop("_patch_loss")
    else:
        loss = patch_cross_entropy(logits, target, reduction=model._patch_reduction)
    if num_items_in_batch is None:
        return loss
    # the mean of so many targets becomes their sum over the number that the trainer counted
    counted: Tensor = loss * (target != -100).sum() / num_items_in_batch
    return counted


def patch_mask(attention_mask: Tensor, input_ids: Tensor, patch_size: int) -> Tensor:
    """(B, T) to (B, P): a patch counts if its first token does; padding is on the right."""
    if attention_mask.shape != input_ids.shape:
        raise PatchSizeError(
            f"a patch step takes an attention_mask of the shape of input_ids, {tuple(input_ids.shape)}, "
            f"got {tuple(attention_mask.shape)}"
        )
    if attention_mask.device.type == "cpu" and bool((attention_mask[:, 1:] > attention_mask[:, :-1]).any()):
        raise PatchSizeError("a patch step takes right padding: left padding shifts the patches")
    return attention_mask[:, ::patch_size].contiguous()


def logit_map(model: Any) -> LogitMap | None:
    """How the model's ``loss_function`` sees its head's logits, found by feeding it some; None: in no simple way."""
    head = model.get_output_embeddings()
    if not isinstance(head, nn.Linear) or type(head).forward is not nn.Linear.forward:
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
        with probing(model), token_level(model):
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
    tolerance = PROBE_TOLERANCE[head.weight.dtype]
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
    repeated = ids.repeat_interleave(PROBE_PATCH_SIZE, 1)
    size = model.patch_size
    try:
        with probing(model):
            model.patch_size = 1
            expected = float(model(input_ids=ids, labels=ids).loss)
            model.patch_size = PROBE_PATCH_SIZE
            found = float(model(input_ids=repeated, labels=repeated).loss)
    except Exception as error:
        return f"{type(error).__name__}: {error}"
    finally:
        model.patch_size = size
    tolerance = PROBE_TOLERANCE[next(model.parameters()).dtype]
    if abs(found - expected) <= tolerance * max(abs(expected), 1):
        return ""
    return f"tokens repeated {PROBE_PATCH_SIZE} times in patches give a loss of {found:.6g}, the tokens {expected:.6g}"


def probe_ids(model: Any) -> Tensor:
    """(1, PROBE_TOKENS)"""
    vocab: int = model.get_input_embeddings().num_embeddings
    return (torch.arange(PROBE_TOKENS, device=next(model.parameters()).device)[None] * 7 + 11) % vocab


@contextlib.contextmanager
def probing(model: nn.Module) -> Iterator[None]:
    """Without gradients, dropout, or a trace in the random state."""
    training = model.training
    model.eval()
    try:
        with torch.no_grad(), torch.random.fork_rng(devices=[]):
            yield
    finally:
        model.train(training)
