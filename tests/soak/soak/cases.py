"""What a case is made of, and how it is drawn from its number.

The defaults are those of the simplest case: a failing case is made smaller by setting its fields back to them. The
``repr`` of a case is the Python code that makes it, without fields at their defaults.
"""

from __future__ import annotations

import dataclasses
import random
from collections.abc import Sequence
from typing import Any

import torch
import triton_on_cpu

# Values are names of torch's dtypes, so that the repr of a case is short.
DTYPES = {"eager": ("float32", "bfloat16", "float16", "float64"), "triton": ("float32", "bfloat16", "float16")}
# Kernels take a hundred times as long as eager code on a CPU. On the machine for PTX only they are worth the time.
SLOW_KERNELS = not torch.cuda.is_available()
BACKENDS = ("triton",) if triton_on_cpu.ARCHITECTURE else ("eager",) * 5 + ("triton",)
# "expanded" repeats the first index of the first dimension, "one column" that of the last dimension.
LAYOUTS = ("contiguous", "contiguous", "transposed", "offset", "padded rows", "every other", "expanded")
IGNORE_INDICES = (-100, -100, -1, 0, 3, 1_000_000, -(2**31))


@dataclasses.dataclass(frozen=True, repr=False)
class Case:
    """What all operators have in common."""

    seed: int = 0
    backend: str = "eager"
    dtype: str = "float32"
    small_blocks: bool = False  # of the kernels and of the eager code, so that small inputs are cut into several
    upstream: str = "one"  # the gradient of the result: "one", "zero", "scaled" or "tensor"
    needs: tuple[str, ...] = ()  # the inputs whose gradients are asked for
    no_grad: bool = False

    def __repr__(self) -> str:
        given = [
            f"{field.name}={getattr(self, field.name)!r}"
            for field in dataclasses.fields(self)
            if getattr(self, field.name) != field.default
        ]
        return f"{type(self).__name__}({', '.join(given)})"


@dataclasses.dataclass(frozen=True, repr=False)
class EmbeddingCase(Case):
    """A call of ``patch_embedding`` or ``PatchEmbedding``."""

    module: bool = False
    leading: tuple[int, ...] = (1,)
    patches: int = 1
    patch_size: int = 1
    vocab: int = 5
    hidden: int = 3
    padding_idx: int | None = None
    one_id: bool = False  # the first id makes up most of the batch
    ids_dtype: str = "int64"
    ids_layout: str = "contiguous"
    weight_layout: str = "contiguous"

    @property
    def operator(self) -> str:
        return "PatchEmbedding" if self.module else "patch_embedding"


@dataclasses.dataclass(frozen=True, repr=False)
class LossCase(Case):
    """A call of ``patch_cross_entropy``, ``linear_patch_cross_entropy`` or ``PatchLMHead``."""

    form: str = "logits"  # or "linear", "low" (memory="low"), "head" (PatchLMHead)
    autocast: str | None = None
    leading: tuple[int, ...] = (2,)
    vocab: int = 5
    hidden: int = 3
    slots: int | None = None  # K; None: targets without an axis of slots
    bias: bool = False
    tied: bool = False  # the input is the patch embedding of some ids in the head's weight
    logits_bytes: int | None = None
    values: str = "normal"  # of the logits: "normal", "dominant", "constant" or "masked" (-inf)
    scale: float = 1.0
    ignored: float = 0.0  # the share of targets
    repeated: bool = False  # all targets of a row are the same
    ignore_index: int = -100
    target_dtype: str = "int64"
    input_layout: str = "contiguous"
    weight_layout: str = "contiguous"
    target_layout: str = "contiguous"
    label_smoothing: float = 0.0
    softcap: float | None = None
    z_loss_weight: float = 0.0
    reduction: str = "mean"
    target_weight: str | None = None  # "slot" or "full", with "zeros", "some zeros" or "negative"
    weight_dtype: str = "float32"  # of target_weight
    return_losses: bool = False

    @property
    def operator(self) -> str:
        names = {"logits": "patch_cross_entropy", "linear": "linear_patch_cross_entropy", "head": "PatchLMHead"}
        return names.get(self.form, 'linear_patch_cross_entropy, memory="low"')


@dataclasses.dataclass(frozen=True, repr=False)
class TargetsCase(Case):
    """A call of ``next_patch_targets``."""

    leading: tuple[int, ...] = (1,)
    patches: int = 1
    patch_size: int = 1
    ignore_index: int = -100
    ids_dtype: str = "int64"
    ids_layout: str = "contiguous"

    operator = "next_patch_targets"


@dataclasses.dataclass(frozen=True)
class BadInputCase:
    """A good case with one bad argument, of those in :mod:`soak.bad_input`."""

    good: EmbeddingCase | LossCase | TargetsCase
    mistake: int = 0  # its number, modulo their number

    operator = "bad input"

    @property
    def backend(self) -> str:
        return self.good.backend

    @property
    def dtype(self) -> str:
        return self.good.dtype


def draw(number: int) -> Any:
    """The case of a number."""
    rng = random.Random(number)
    kind = rng.choices((draw_loss, draw_embedding, draw_targets, draw_bad_input), (60, 20, 4, 16))[0]
    return kind(rng, number)


def draw_bad_input(rng: random.Random, number: int) -> BadInputCase:
    kind = rng.choices((draw_loss, draw_embedding, draw_targets), (6, 3, 1))[0]
    return BadInputCase(kind(rng, number), rng.randrange(1000))


def draw_targets(rng: random.Random, number: int) -> TargetsCase:
    return TargetsCase(
        seed=number,
        leading=_leading(rng, 4),
        patches=rng.choice((0, 1, 2, 5)),
        patch_size=rng.randint(1, 9),
        ignore_index=rng.choice(IGNORE_INDICES),
        ids_dtype=rng.choice(("int64", "int32")),
        ids_layout=rng.choice(LAYOUTS),
    )


def draw_embedding(rng: random.Random, number: int) -> EmbeddingCase:
    common = _common(rng, number, ("weight",))
    small = SLOW_KERNELS and common["backend"] == "triton"
    vocab = rng.choice((1, 2, 5, 17) if small else (1, 2, 5, 17, 64, 100))
    return EmbeddingCase(
        **common,
        module=common["backend"] == "eager" and rng.random() < 0.3,  # the module has no choice of a backend
        leading=_leading(rng, 3),
        patches=rng.choice((0, 1, 2, 5) if small else (0, 1, 2, 5, 11, 40)),
        patch_size=rng.randint(1, 9),
        vocab=vocab,
        hidden=rng.choice((1, 3, 16, 17, 33) if small else (1, 3, 8, 15, 16, 17, 33, 130)),
        padding_idx=rng.choice((None, rng.randrange(-vocab, vocab))),
        one_id=rng.random() < 0.3,
        ids_dtype=rng.choice(("int64", "int32")),
        ids_layout=rng.choice(LAYOUTS),
        weight_layout=rng.choice(LAYOUTS),
    )


def draw_loss(rng: random.Random, number: int) -> LossCase:
    form = rng.choice(("logits", "linear", "low", "head"))
    bias = form != "logits" and rng.random() < 0.5
    names = ("input",) if form == "logits" else ("input", "weight", "bias")[: 2 + bias]
    common = _common(rng, number, names)
    slots = rng.choice((None, *range(1, 10)))
    tied = form != "logits" and rng.random() < 0.15
    reduction = rng.choice(("mean", "slot_mean", "sum", "none"))
    smooth = rng.random() < 0.3
    return LossCase(
        **common,
        form=form,
        autocast=rng.choice((None, None, None, "bfloat16", "float16")) if common["dtype"] == "float32" else None,
        leading=_leading(rng, 4 if SLOW_KERNELS and common["backend"] == "triton" else 14),
        vocab=rng.choice((1, 2, 3, 7, 31, 32, 100, 127, 128, 129, 255, 257, 300)),
        hidden=rng.choice((1, 2, 3, 5, 8, 13, 16, 31)),
        slots=slots,
        bias=bias,
        tied=tied,
        logits_bytes=rng.choice((None, 1, 300, 1000, 5000)) if form != "logits" else None,
        values=rng.choice(("normal", "normal", "dominant", "constant", "normal" if smooth else "masked")),
        scale=10 ** rng.uniform(-4, 4) if rng.random() < 0.4 else 1.0,
        ignored=rng.choice((0.0, 0.0, 0.3, 0.8, 1.0)),
        repeated=rng.random() < 0.2,
        ignore_index=rng.choice(IGNORE_INDICES),
        target_dtype=rng.choice(("int64", "int32")),
        input_layout=rng.choice(LAYOUTS),
        # With equal rows all logits would be equal, and the gradient of the input only the rounding errors of its sums.
        weight_layout=rng.choice((*LAYOUTS[:-1], "one column")),
        target_layout=rng.choice(LAYOUTS),
        label_smoothing=rng.choice((0.1, rng.random(), 1.0)) if smooth else 0.0,
        softcap=10 ** rng.uniform(-1, 2) if rng.random() < 0.25 else None,
        z_loss_weight=10 ** rng.uniform(-5, 0) if rng.random() < 0.25 else 0.0,
        reduction=reduction,
        target_weight=_target_weight(rng, reduction),
        weight_dtype=rng.choice(("float32", "float64", "bfloat16")),
        return_losses=rng.random() < 0.4,
    )


def _common(rng: random.Random, number: int, names: Sequence[str]) -> dict[str, Any]:
    backend = rng.choice(BACKENDS)
    return {
        "seed": number,
        "backend": backend,
        "dtype": rng.choice(DTYPES[backend]),
        "small_blocks": rng.random() < 0.7,
        "upstream": rng.choice(("one", "scaled", "tensor", "tensor", "zero")),
        "needs": names if rng.random() < 0.6 else tuple(name for name in names if rng.random() < 0.5),
        "no_grad": rng.random() < 0.1,
    }


def _leading(rng: random.Random, most: int) -> tuple[int, ...]:
    """Leading dimensions: none to three of them, sometimes with no elements."""
    rows = rng.choice((0, 1, *range(1, most + 1)))
    return rng.choice(((), (rows,), (rows,), (2, rows), (rows, 1), (1, rows, 2)))


def _target_weight(rng: random.Random, reduction: str) -> str | None:
    if rng.random() < 0.5:
        return None
    shape = "slot" if reduction == "slot_mean" else rng.choice(("slot", "full"))
    return shape + rng.choice(("", "", " zeros", " some zeros", " negative"))
