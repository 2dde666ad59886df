"""The calls that the ledger counts: operators and a training step on a GPU, each with the least that it could cost."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import nullcontext
from functools import partial
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, fx
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.utils._python_dispatch import _disable_current_modes

import patchkernels
from bench import shapes
from bench.ledger.attention import counted_attention
from bench.ledger.compiled import compiled_graphs, replay
from bench.ledger.operations import Work
from patchkernels import PatchLM, PatchLMConfig
from patchkernels.model.cost import count_flops
from patchkernels.training.update import update

GPU, BF16 = torch.device("cuda"), torch.bfloat16
Backward = Callable[[Tensor, "Tensor | None"], None]  # of a result and the gradient with respect to it
# A call in its passes: the name of each is given before it runs. The function gets what computes the gradients.
Call = Callable[[Backward], Iterator[str]]


class Case(NamedTuple):
    """Calls that do the same, and what each must do at least."""

    operator: str
    shape: str
    contenders: dict[str, Callable[[], Call]]  # each makes its inputs, and then the call
    floor: dict[str, list[Work]]  # of each pass that is counted: what follows one another at least


def in_two_passes(function: Callable[[], Tensor]) -> Call:
    """A forward and its backward, with a given gradient of the result."""

    def call(backward: Backward) -> Iterator[str]:
        yield "forward"
        out = function()
        upstream = torch.empty_like(out)
        yield "backward"
        backward(out, upstream)

    return call


def in_one_pass(function: Callable[[], Tensor]) -> Call:
    """The forward and the backward of a loss."""

    def call(backward: Backward) -> Iterator[str]:
        yield "forward + backward"
        backward(function(), None)

    return call


def leaf(*shape: int) -> Tensor:
    return torch.randn(*shape, dtype=BF16, device=GPU, requires_grad=True)


def product(rows: int, inner: int, columns: int) -> Work:
    """A bf16 matrix product."""
    return Work(2 * inner * (rows + columns), 2 * rows * columns, 2 * rows * inner * columns)


def linear(shape: shapes.Linear) -> Case:
    """The fused linear loss, against its three bare matrix products."""
    slots, rows, hidden, vocab = shape

    def make(memory: str) -> Call:
        x, weight = leaf(rows, hidden), leaf(vocab, hidden)
        target = torch.randint(0, vocab, (rows, slots), device=GPU)
        return in_one_pass(partial(patchkernels.linear_patch_cross_entropy, x, weight, target, memory=memory))

    products = [product(rows, hidden, vocab), product(rows, vocab, hidden), product(vocab, rows, hidden)]
    return Case(
        "fused linear loss",
        f"K={slots} N={rows} D={hidden} V={vocab}",
        {"patchkernels": partial(make, "default"), "patchkernels, memory=low": partial(make, "low")},
        {"forward + backward": products},
    )


def logits(shape: shapes.Logits) -> Case:
    """The loss of given logits, against reading them once and writing their gradient once."""
    slots, rows, vocab = shape

    def make() -> Call:
        z, target = leaf(rows, vocab), torch.randint(0, vocab, (rows, slots), device=GPU)
        return in_one_pass(partial(patchkernels.patch_cross_entropy, z, target))

    size = 2 * rows * vocab
    least = Work(size + 8 * rows * slots, size)
    return Case(
        "loss of given logits",
        f"K={slots} N={rows} V={vocab}",
        {"patchkernels": make},
        {"forward + backward": [least]},
    )


def embedding(shape: shapes.Embedding) -> Case:
    """Patch embedding, against reading a row of the table for each token, and writing its gradient once."""
    slots, vocab, hidden, _, tokens = shape
    functions: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
        "patchkernels": lambda ids, weight: patchkernels.patch_embedding(ids, weight, slots),
        "F.embedding_bag": lambda ids, weight: F.embedding_bag(ids.view(-1, slots), weight, mode="mean"),
        "mean of F.embedding": lambda ids, weight: F.embedding(ids, weight).unflatten(0, (-1, slots)).mean(1),
    }

    def make(function: Callable[[Tensor, Tensor], Tensor]) -> Call:
        ids, weight = torch.randint(0, vocab, (tokens,), device=GPU), leaf(vocab, hidden)
        return in_two_passes(partial(function, ids, weight))

    out, ids = 2 * tokens // slots * hidden, 8 * tokens
    return Case(
        "patch embedding",
        f"K={slots} NK={tokens} D={hidden} V={vocab}",
        {name: partial(make, function) for name, function in functions.items()},
        {
            "forward": [Work(2 * tokens * hidden + ids, out)],
            "backward": [Work(out + ids, 2 * vocab * hidden)],
        },
    )


def step(shape: shapes.Step, patch_size: int) -> Case:
    """A training step of a preset under bf16 autocast with fused AdamW, against its model FLOPs alone.

    So the ratio is the inverse of the model FLOP utilisation. Data, logging and the learning rate are not counted.
    """
    config = PatchLMConfig.preset(shape.preset, max_position_embeddings=shape.context)
    size = (shape.rows, shape.context * patch_size)

    def make(compiles: bool) -> Call:
        ids = torch.randint(0, config.vocab_size, size, device=GPU)
        without_data = isinstance(ids, FakeTensor)
        graphs = compiled_step(config, size, patch_size) if compiles and without_data else []
        with torch.device(GPU):
            model = PatchLM(config)
        optimizer = torch.optim.AdamW(model.parameters(), fused=True)
        for parameter in model.parameters():
            parameter.grad = torch.zeros_like(parameter)
        optimizer.step()  # makes the moments
        if not graphs:  # whose gradients have no place of their own
            optimizer.zero_grad(set_to_none=True)
        function = torch.compile(model, dynamic=False) if compiles and not without_data else model

        def call(backward: Backward) -> Iterator[str]:
            yield "step"
            if graphs:
                replay(graphs)
            else:
                with counted_attention() if without_data else nullcontext(), torch.autocast("cuda", BF16):
                    loss = function(ids, ids, patch_size)
                backward(loss, None)
            update([optimizer], list(model.parameters()), clip=1.0, loss=torch.ones((), device=GPU))

        return call

    flops = count_flops(config, shape.rows, shape.context, patch_size)
    return Case(
        "training step",
        f"{shape.preset} K={patch_size}, {shape.rows} x {shape.context} positions",
        {"patchkernels": partial(make, False), "patchkernels, compiled": partial(make, True)},
        {"step": [Work(flops=flops)]},
    )


def compiled_step(config: PatchLMConfig, size: tuple[int, int], patch_size: int) -> list[fx.GraphModule]:
    """What ``torch.compile`` traces of a step under bf16 autocast, for :func:`bench.ledger.compiled.replay`."""
    with (
        _disable_current_modes(),
        FakeTensorMode(allow_non_fake_inputs=True),
        counted_attention(),
        torch.autocast("cpu", BF16),
    ):
        model = PatchLM(config)
        return compiled_graphs(lambda ids: model(ids, ids, patch_size), size)
