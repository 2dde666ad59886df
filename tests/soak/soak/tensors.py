"""Tensors of a case: values, layouts in memory, targets, weights of targets."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from soak.cases import LossCase

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


def generator(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def normal(random: torch.Generator, *shape: int) -> Tensor:
    return torch.randn(*shape, generator=random, dtype=torch.float64)


def lay_out(tensor: Tensor, layout: str) -> Tensor:
    """The same values on the device in another layout; two of the layouts repeat some of them.

    All elements of the storage that belong to no element of the tensor are NaN, or the largest integer.
    """
    tensor = tensor.to(DEVICE)
    if not tensor.ndim or not tensor.numel() or layout == "contiguous":
        return tensor.contiguous()
    if layout == "expanded":
        return tensor[:1].contiguous().expand(tensor.shape)
    if layout == "one column":
        return tensor[..., :1].contiguous().expand(tensor.shape)
    if layout == "transposed":
        return tensor.mT.contiguous().mT if tensor.ndim > 1 else tensor
    *shape, columns = tensor.shape
    padding, offset, step = {"offset": (0, 3, 1), "padded rows": (5, 0, 1), "every other": (0, 1, 2)}[layout]
    row = (columns + padding) * step
    storage = torch.empty(offset + math.prod(shape) * row, dtype=tensor.dtype, device=DEVICE)
    storage.fill_(torch.nan if tensor.is_floating_point() else torch.iinfo(tensor.dtype).max)
    view = storage[offset:].view(*shape, row)[..., : columns * step : step]
    return view.copy_(tensor)


def targets(case: LossCase, random: torch.Generator) -> Tensor:
    """Random classes of shape (..., K), or (...) without slots."""
    shape = case.leading if case.slots is None else (*case.leading, case.slots)
    target = torch.randint(case.vocab, shape, generator=random)
    if case.repeated and case.slots:
        target = target[..., :1].expand(shape)
    target = torch.where(torch.rand(shape, generator=random) < case.ignored, case.ignore_index, target)
    return lay_out(target.to(getattr(torch, case.target_dtype)), case.target_layout)


def target_weights(case: LossCase, random: torch.Generator) -> Tensor | None:
    if case.target_weight is None:
        return None
    kind, _, signs = case.target_weight.partition(" ")
    slots = (case.slots or 1,)
    full = case.leading if case.slots is None else (*case.leading, case.slots)
    weight = torch.rand(slots if kind == "slot" else full, generator=random, dtype=torch.float64) + 0.1
    if signs == "zeros":
        weight.zero_()
    if signs == "some zeros":
        weight = weight * (torch.rand(weight.shape, generator=random) < 0.5)
    if signs == "negative":
        weight = torch.where(torch.rand(weight.shape, generator=random) < 0.3, -weight, weight)
    return weight.to(DEVICE, getattr(torch, case.weight_dtype))


def logits(case: LossCase, target: Tensor, random: torch.Generator) -> Tensor:  # (..., V)
    """Logits as ``case.values`` describes them, finite in the dtype of the case except for masked classes."""
    z = normal(random, *case.leading, case.vocab) * case.scale
    if case.values == "constant":
        z = torch.full_like(z, case.scale)
    if case.values == "dominant":
        z[..., torch.randint(case.vocab, (), generator=random)] += 30 * max(case.scale, 1.0)
    largest = torch.finfo(getattr(torch, case.dtype)).max
    z = z.clamp(-largest / 2, largest / 2)
    if case.values == "masked":
        is_target = torch.zeros(case.vocab, dtype=torch.bool)
        is_target[target[target != case.ignore_index].long().cpu()] = True
        mask = (torch.rand(case.vocab, generator=random) < 0.5) & ~is_target
        mask[0] = False  # a row needs a finite logit
        z = z.masked_fill(mask, -torch.inf)
    return z


def storage_bytes(tensor: Tensor) -> Tensor:
    """A copy of the whole storage of a tensor, padding included."""
    return torch.empty(0, dtype=torch.uint8, device=tensor.device).set_(tensor.untyped_storage()).clone()
