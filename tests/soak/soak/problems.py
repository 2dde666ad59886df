"""A case as tensors and functions: the library's call, and the same by the other two definitions."""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple
from unittest import mock

import torch
from small_blocks import small_blocks
from torch import Tensor

from patchkernels import (
    PatchEmbedding,
    PatchLMHead,
    linear_patch_cross_entropy,
    next_patch_targets,
    patch_cross_entropy,
    patch_embedding,
)
from soak import exact, plain
from soak.cases import EmbeddingCase, LossCase, TargetsCase
from soak.exact import Arithmetic
from soak.tensors import DEVICE, generator, lay_out, logits, normal, target_weights, targets

Outputs = dict[str, Tensor]  # the first is the result, which may have gradients


class Problem(NamedTuple):
    """Each function takes the leaves by name, as tensors of the case's dtype or (``exact``) of fp64."""

    leaves: dict[str, Tensor]  # the inputs that may have gradients
    constants: dict[str, Tensor]  # all other tensors of the call
    arguments: dict[str, Any]  # all other arguments of the call
    call: Callable[..., Any]  # the public function: call(**leaves, **constants, **arguments)
    name_outputs: Callable[[Any], Outputs]
    plain: Callable[..., Outputs]
    exact: Callable[..., Outputs]  # takes also `arithmetic`
    dtype: torch.dtype  # in which the operator computes
    out_dtypes: dict[str, torch.dtype]

    def ours(self, **leaves: Tensor) -> Outputs:
        return self.name_outputs(self.call(**leaves, **self.constants, **self.arguments))


def problem(case: EmbeddingCase | LossCase | TargetsCase) -> Problem:
    """The tensors and functions of a case."""
    make = {EmbeddingCase: _embedding, LossCase: _loss, TargetsCase: _targets}
    return make[type(case)](case)


@contextlib.contextmanager
def block_sizes(case: Any) -> Iterator[None]:
    """Makes kernel blocks and eager chunks small for the time of a case, if it says so."""
    import patchkernels.eager.cross_entropy as eager

    with contextlib.ExitStack() as stack:
        if case.small_blocks:
            stack.enter_context(small_blocks())
            stack.enter_context(mock.patch.object(eager, "CHUNK_BYTES", {"cpu": 3000}))
        yield


def _targets(case: TargetsCase) -> Problem:
    shape = (*case.leading, case.patches * case.patch_size)
    labels = torch.randint(1000, shape, generator=generator(case.seed)).to(getattr(torch, case.ids_dtype))
    labels = lay_out(labels, case.ids_layout)
    shifted = {"targets": exact.next_patch_targets(labels, case.patch_size, case.ignore_index).to(DEVICE)}
    return Problem(
        leaves={},
        constants={"labels": labels},
        arguments={"patch_size": case.patch_size, "ignore_index": case.ignore_index},
        call=next_patch_targets,
        name_outputs=lambda out: {"targets": out},
        plain=lambda: shifted,
        exact=lambda arithmetic: shifted,
        dtype=labels.dtype,
        out_dtypes={"targets": labels.dtype},
    )


def _embedding(case: EmbeddingCase) -> Problem:
    random, dtype = generator(case.seed), getattr(torch, case.dtype)
    ids = torch.randint(case.vocab, (*case.leading, case.patches * case.patch_size), generator=random)
    if case.one_id and ids.numel():
        ids = torch.where(torch.rand(ids.shape, generator=random) < 0.8, ids.flatten()[0], ids)
    ids = lay_out(ids.to(getattr(torch, case.ids_dtype)), case.ids_layout)
    weight = lay_out(normal(random, case.vocab, case.hidden).to(dtype), case.weight_layout)
    settings = (case.patch_size, case.padding_idx)

    def module(input_ids: Tensor, weight: Tensor, patch_size: int, padding_idx: int | None) -> Tensor:
        layer = PatchEmbedding(case.vocab, case.hidden, patch_size, padding_idx=padding_idx, device="meta")
        return torch.func.functional_call(layer, {"weight": weight}, (input_ids,))

    backend = {} if case.module else {"backend": case.backend}
    return Problem(
        leaves={"weight": weight},
        constants={"input_ids": ids},
        arguments={"patch_size": case.patch_size, "padding_idx": case.padding_idx, **backend},
        call=module if case.module else patch_embedding,
        name_outputs=lambda out: {"embedding": out},
        plain=lambda weight: {"embedding": plain.patch_embedding(ids, weight, *settings)},
        exact=lambda weight, arithmetic: {"embedding": exact.patch_embedding(ids.cpu(), weight, *settings, arithmetic)},
        dtype=dtype,
        out_dtypes={"embedding": dtype},
    )


def _loss(case: LossCase) -> Problem:
    random, dtype = generator(case.seed), getattr(torch, case.dtype)
    target = targets(case, random)
    leaves = _loss_leaves(case, target, dtype, random)
    weight = target_weights(case, random)
    options = {"ignore_index": case.ignore_index, "label_smoothing": case.label_smoothing}
    options |= {"softcap": case.softcap, "z_loss_weight": case.z_loss_weight}
    arguments = {**options, "reduction": case.reduction, "return_losses": case.return_losses}
    arguments |= {"backend": case.backend}
    if case.form != "logits":
        arguments["logits_bytes"] = case.logits_bytes
    if case.form == "low":
        arguments["memory"] = "low"
    ids = torch.randint(case.vocab, (*case.leading, 2), generator=random).to(DEVICE) if case.tied else None
    compute = dtype if case.form == "logits" or case.autocast is None else getattr(torch, case.autocast)
    out_dtype = torch.float64 if dtype == torch.float64 else torch.float32
    return Problem(
        leaves=leaves,
        constants={"target": target} | ({} if weight is None else {"target_weight": weight}),
        arguments=arguments,
        call=_with_autocast(case, functools.partial(_call_loss, case, ids)),
        name_outputs=lambda out: dict(zip(("loss", "losses"), out if case.return_losses else (out,), strict=False)),
        plain=_with_autocast(case, functools.partial(_plain_loss, case, ids, target, weight, options)),
        exact=functools.partial(_exact_loss, case, ids, target.cpu(), weight, options),
        dtype=compute,
        out_dtypes={"loss": out_dtype, "losses": out_dtype},
    )


def _loss_leaves(case: LossCase, target: Tensor, dtype: torch.dtype, random: torch.Generator) -> dict[str, Tensor]:
    if case.form == "logits":
        return {"input": lay_out(logits(case, target, random).to(dtype), case.input_layout)}
    head = normal(random, case.vocab, case.hidden)
    bias = normal(random, case.vocab)
    if case.values == "constant":
        head, bias = torch.zeros_like(head), torch.zeros_like(bias)
    if case.values == "dominant":
        bias[0] += 30 * max(case.scale, 1.0)
    leaves = {} if case.tied else {"input": normal(random, *case.leading, case.hidden) * case.scale}
    leaves |= {"weight": head} | ({"bias": bias} if case.bias else {})
    layouts = {"input": case.input_layout, "weight": case.weight_layout, "bias": "offset"}
    return {name: lay_out(value.to(dtype), layouts[name]) for name, value in leaves.items()}


def _with_autocast(case: LossCase, function: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(function)
    def wrapped(*args: Any, **kwargs: Any) -> Any:
        with torch.autocast(DEVICE, getattr(torch, case.autocast or "bfloat16"), enabled=case.autocast is not None):
            return function(*args, **kwargs)

    return wrapped


def _call_loss(case: LossCase, ids: Tensor | None, **arguments: Any) -> Any:
    if case.form == "logits":
        return patch_cross_entropy(**arguments)
    weight, bias = arguments.pop("weight"), arguments.pop("bias", None)
    x = arguments.pop("input") if ids is None else patch_embedding(ids, weight, 2).squeeze(-2)
    target = arguments.pop("target")
    if case.form == "head":
        head = PatchLMHead(case.hidden, case.vocab, bias is not None, device="meta")
        parameters = {"weight": weight} | ({} if bias is None else {"bias": bias})
        return torch.func.functional_call(head, parameters, (x, target), arguments)
    return linear_patch_cross_entropy(x, weight, target, linear_bias=bias, **arguments)


def _plain_loss(
    case: LossCase,
    ids: Tensor | None,
    target: Tensor,
    target_weight: Tensor | None,
    options: dict[str, Any],
    *,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    input: Tensor | None = None,
) -> Outputs:
    if ids is not None:
        input = plain.patch_embedding(ids, weight, 2, None).squeeze(-2)
    z = input if weight is None else torch.nn.functional.linear(input, weight, bias)
    slots = case.slots or 1
    target, w = target.reshape(-1, slots), _by_row(target_weight, slots)
    l = plain.losses(z.reshape(-1, z.shape[-1]), target, **options)  # noqa: E741
    return _outputs(case, l, plain.reduce(l, target, w, case.ignore_index, case.reduction))


def _exact_loss(
    case: LossCase,
    ids: Tensor | None,
    target: Tensor,
    target_weight: Tensor | None,
    options: dict[str, Any],
    *,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    input: Tensor | None = None,
    arithmetic: Arithmetic,
) -> Outputs:
    if ids is not None:
        input = arithmetic.store(exact.patch_embedding(ids.cpu(), weight, 2, None, arithmetic).squeeze(-2))
    z = input if weight is None else exact.linear(input, weight, bias, arithmetic)
    slots = case.slots or 1
    target = target.long().reshape(-1, slots)
    w = None if target_weight is None else _by_row(target_weight.cpu().double(), slots)
    l = exact.losses(z.reshape(-1, z.shape[-1]), target, **options, arithmetic=arithmetic)  # noqa: E741
    return _outputs(case, l, exact.reduce(l, target, w, case.ignore_index, case.reduction, arithmetic))


def _by_row(weight: Tensor | None, slots: int) -> Tensor | None:  # (K) or (N, K)
    return weight if weight is None or weight.shape == (slots,) else weight.reshape(-1, slots)


def _outputs(case: LossCase, l: Tensor, loss: Tensor) -> Outputs:  # noqa: E741
    shape = case.leading if case.slots is None else (*case.leading, case.slots)
    loss = loss.reshape(shape) if case.reduction == "none" else loss
    return {"loss": loss} | ({"losses": l.detach().reshape(shape)} if case.return_losses else {})
