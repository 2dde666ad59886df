"""Checks on this machine's GPU what tests elsewhere can only stand in for: ``python -m bench.operators_on_gpu``.

- results: values and gradients of every operator, at the launch configurations of real shapes, against fp64
- synchronisation: no operator waits for the GPU
- graphs: a CUDA graph of forward and backward gives the same values when it is replayed
- model: loss and gradients of ``PatchLM``, against fp64 on the CPU, and with every FlashAttention that is installed
"""

from __future__ import annotations

import argparse
import sys
import traceback
from collections.abc import Callable
from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor

from bench.measure import device_from, relative_errors
from patchkernels import PatchLM, PatchLMConfig, linear_patch_cross_entropy, patch_cross_entropy, patch_embedding
from patchkernels import reference as definition
from patchkernels.model.attention import FLASH, choose_attention
from patchkernels.numerics import IGNORE_INDEX

SLOTS = 4
OPTIONS = {"plain": {}, "all options": {"label_smoothing": 0.1, "softcap": 30.0, "z_loss_weight": 1e-3}}
# The error that is always allowed, in units of eps: fp32 is summed in any order, 16-bit results are rounded twice.
ROUNDINGS = {torch.float32: 16, torch.bfloat16: 2, torch.float16: 2}
MODEL_TOLERANCE = 1e-4  # of relative errors in fp32


class Case(NamedTuple):
    """A call of an operator, and its definition in plain PyTorch."""

    name: str
    operator: Callable[..., Tensor]
    definition: Callable[..., Tensor]
    leaves: list[Tensor]


def cases(dtype: torch.dtype, device: torch.device) -> list[Case]:
    """Aligned and odd shapes of every operator, with all passes of the kernels."""
    torch.manual_seed(0)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape).to(device, dtype).requires_grad_()

    found = []
    for vocab, hidden in ((512, 768), (301, 100)):
        ids = (vocab * torch.rand(2, 64 * SLOTS) ** 4).long().to(device)  # frequent and rare ones
        for padding_idx in (None, 0):
            found.append(
                Case(
                    f"patch_embedding, {vocab} x {hidden}, padding_idx={padding_idx}",
                    lambda w, i=ids, pad=padding_idx: patch_embedding(i, w, SLOTS, padding_idx=pad),
                    lambda w, i=ids, pad=padding_idx: definition.patch_embedding(i, w, SLOTS, padding_idx=pad),
                    [normal(vocab, hidden)],
                )
            )
    for rows, hidden, vocab in ((64, 64, 8192), (33, 40, 50257)):
        target = torch.randint(0, vocab, (rows, SLOTS))
        target[1], target[2, 1] = IGNORE_INDEX, target[2, 0]
        target = target.to(device)
        few = {"logits_bytes": rows * vocab}  # several chunks, several slices
        for (name, options), reduction in zip(OPTIONS.items(), ("mean", "none")):
            options = {"target": target, "reduction": reduction, **options}
            named = f"{rows} x {vocab}, {name}, reduction={reduction}"
            linear = partial(definition.linear_patch_cross_entropy, **options)
            found += [
                Case(
                    f"patch_cross_entropy, {named}",
                    partial(patch_cross_entropy, **options),
                    partial(definition.patch_cross_entropy, **options),
                    [normal(rows, vocab)],
                ),
                *(
                    Case(
                        f"linear_patch_cross_entropy, memory={memory}, {named}",
                        partial(linear_patch_cross_entropy, memory=memory, **options, **few),
                        linear,
                        [normal(rows, hidden), normal(vocab, hidden)],
                    )
                    for memory in ("default", "low")
                ),
            ]
    return found


def value_and_gradients(function: Callable[..., Tensor], leaves: list[Tensor]) -> list[Tensor]:
    """The result, and the gradients of the leaves for an upstream gradient that is not constant."""
    out = function(*leaves)
    upstream = torch.linspace(0.5, 1.5, out.numel(), device=out.device).to(out.dtype).view_as(out)
    return [out.detach(), *torch.autograd.grad(out, leaves, upstream)]


def check_results(device: torch.device) -> None:
    """The error against fp64 is at most twice that of plain PyTorch in the same dtype, or a few roundings."""
    for dtype in ROUNDINGS:
        for case in cases(dtype, device):
            wide = [leaf.detach().double().requires_grad_() for leaf in case.leaves]
            exact = value_and_gradients(case.definition, wide)
            plain = relative_errors(value_and_gradients(case.definition, case.leaves), exact)
            found = relative_errors(value_and_gradients(case.operator, case.leaves), exact)
            least = ROUNDINGS[dtype] * torch.finfo(dtype).eps
            for error, bound in zip(found, plain):
                assert error <= max(2 * bound, least), f"{case.name}, {dtype}: errors {found}, plain PyTorch {plain}"
            print(f"  {max(found):.1e} (plain PyTorch {max(plain):.1e})  {case.name}, {dtype}")


def check_synchronisation(device: torch.device) -> None:
    """No operator waits for the GPU, forward or backward, once its kernels are compiled."""
    for case in cases(torch.bfloat16, device):
        value_and_gradients(case.operator, case.leaves)
        torch.cuda.set_sync_debug_mode("error")
        try:
            value_and_gradients(case.operator, case.leaves)
        finally:
            torch.cuda.set_sync_debug_mode("default")
        print(f"  none  {case.name}")


def check_graphs(device: torch.device) -> None:
    """A CUDA graph of forward and backward is captured, and replayed with other inputs, to the bit."""
    for case in cases(torch.bfloat16, device):
        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):  # torch asks for a call on another stream before the capture
            value_and_gradients(case.operator, case.leaves)
        torch.cuda.current_stream().wait_stream(side)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            captured = value_and_gradients(case.operator, case.leaves)
        with torch.no_grad():
            for leaf in case.leaves:
                leaf.mul_(0.5)
        graph.replay()
        for ours, again in zip(captured, value_and_gradients(case.operator, case.leaves)):
            assert torch.equal(ours, again), f"{case.name}: a replayed graph gives other values"
        print(f"  same bits  {case.name}")


def loss_and_gradients(model: PatchLM, ids: Tensor, patch_size: int, documents: Tensor | None) -> list[Tensor]:
    """The loss of a step, and the gradients of all parameters, on the CPU."""
    parameters = list(model.parameters())
    ids, documents = (None if t is None else t.to(parameters[0].device) for t in (ids, documents))
    loss = model(ids, ids, patch_size, document_ids=documents)
    return [t.detach().cpu() for t in (loss, *torch.autograd.grad(loss, parameters))]


def check_model(device: torch.device) -> None:
    """Loss and gradients of ``PatchLM`` for patches, tokens and packed documents, with every attention that runs.

    In fp32 they are those of fp64. In bf16 FlashAttention may have twice the error of PyTorch's own attention.
    """
    torch.manual_seed(0)
    ids = torch.randint(0, 4096, (2, 64 * SLOTS))
    packed = (torch.arange(64 * SLOTS) // (20 * SLOTS)).expand_as(ids)
    exact = PatchLM(PatchLMConfig.preset("demo", attention="sdpa")).double()
    for parameter in exact.parameters():  # fresh weights are so small that attention hardly matters
        parameter.data += 0.05 * torch.randn_like(parameter)
    plain: dict[str, float] = {}  # PyTorch's error in bf16, by case
    in_bf16 = [(attention, torch.bfloat16) for attention in ("sdpa", *FLASH)]
    for attention, dtype in [("sdpa", torch.float32), *in_bf16]:
        try:
            choose_attention(attention, device, dtype, exact.config.head_size)
        except RuntimeError as error:
            print(f"  not run: {error}")
            continue
        model = PatchLM(PatchLMConfig.preset("demo", attention=attention)).to(device)
        model.load_state_dict(exact.state_dict())
        for case, (patch_size, documents) in {
            "patches": (SLOTS, None), "tokens": (1, None), "packed documents": (SLOTS, packed)
        }.items():  # fmt: skip
            expected = loss_and_gradients(exact, ids, patch_size, documents)
            with torch.autocast(device.type, torch.bfloat16, enabled=dtype == torch.bfloat16):
                error = max(relative_errors(loss_and_gradients(model, ids, patch_size, documents), expected))
            bound = MODEL_TOLERANCE if dtype == torch.float32 else 2 * plain.setdefault(case, error)
            assert error <= bound, f"{attention}, {dtype}, {case}: relative error {error:.1e}, {bound:.1e} allowed"
            print(f"  {error:.1e}  {attention}, {dtype}, {case}")


CHECKS = {
    "results": check_results,
    "synchronisation": check_synchronisation,
    "graphs": check_graphs,
    "model": check_model,
}
GPU_ALONE = ("synchronisation", "graphs")


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="bench.operators_on_gpu", description=__doc__.splitlines()[0])
    parser.add_argument("--checks", nargs="+", choices=CHECKS, default=list(CHECKS))
    parser.add_argument("--device", default="cuda")
    options = parser.parse_args(arguments)
    device = device_from(parser, options.device)
    failed = []
    for name in options.checks:
        print(name, flush=True)
        if name in GPU_ALONE and device.type != "cuda":
            print("  not run: it needs a GPU")
            continue
        try:
            CHECKS[name](device)
        except Exception:
            traceback.print_exc(file=sys.stdout)
            failed.append(name)
    print(f"failed: {', '.join(failed) or 'none'}")
    return int(bool(failed))


if __name__ == "__main__":
    sys.exit(main())
