"""Causal attention behind one function: FlashAttention where one is installed and fits the GPU, else PyTorch's.

out[p] = softmax(q[p] k[<= p]^T / sqrt(hd)) v[<= p],   within the document of p if documents are given
"""

from __future__ import annotations

import functools
import importlib
import logging
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

logger = logging.getLogger("patchkernels")

# name: (module, distribution, compute capabilities (major) it has kernels for), best first
FLASH: dict[str, tuple[str, str, range]] = {
    "flash4": ("flash_attn.cute", "flash-attn-4", range(9, 13)),
    "flash3": ("flash_attn_interface", "flash-attn-3", range(9, 10)),
    "flash2": ("flash_attn", "flash-attn", range(8, 13)),
}
ATTENTIONS = ("auto", "sdpa", *FLASH)


def attention(
    q: Tensor,  # (B, P, H, hd)
    k: Tensor,  # (B, P, H_kv, hd)
    v: Tensor,  # (B, P, H_kv, hd)
    *,
    document_ids: Tensor | None = None,  # (B, P), non-decreasing
    backend: str = "auto",
) -> Tensor:  # (B, P, H, hd)
    """Causal attention with grouped queries.

    ``backend="auto"`` takes the best FlashAttention that is installed and fits the GPU, for bf16 and fp16 on CUDA,
    and ``scaled_dot_product_attention`` otherwise; which one runs is logged once. Documents cost FlashAttention one
    synchronisation (its lengths are a tensor of data-dependent size) and SDPA a ``(B, P, P)`` mask.

    Raises:
        ValueError: an unknown backend.
        RuntimeError: a FlashAttention asked for by name that cannot run here, with the reason.
    """
    if backend not in ATTENTIONS:
        raise ValueError(f"attention must be one of {ATTENTIONS}, got {backend!r}")
    chosen = choose(backend, q.device, q.dtype)
    if chosen == "sdpa":
        return _sdpa(q, k, v, document_ids)
    function = _flash_functions(chosen)[document_ids is not None]
    if document_ids is None:
        return _first(function(q, k, v, causal=True))
    lengths, longest = _document_lengths(document_ids)
    out = _first(
        function(
            *(t.flatten(0, 1) for t in (q, k, v)),
            cu_seqlens_q=lengths,
            cu_seqlens_k=lengths,
            max_seqlen_q=longest,
            max_seqlen_k=longest,
            causal=True,
        )
    )
    return out.view_as(q)


@torch.compiler.assume_constant_result  # type: ignore[untyped-decorator]  # a compiler calls it once, to trace
def choose(backend: str, device: torch.device, dtype: torch.dtype) -> str:
    """The implementation that runs, logged once for each device and dtype."""
    return _choose(backend, device, dtype)


@functools.cache
def _choose(backend: str, device: torch.device, dtype: torch.dtype) -> str:
    if backend == "auto":
        usable = [name for name in FLASH if unavailable(name, device, dtype) is None]
        chosen = usable[0] if usable else "sdpa"
    else:
        chosen = backend
        reason = None if backend == "sdpa" else unavailable(backend, device, dtype)
        if reason is not None:
            raise RuntimeError(f"attention={backend!r} cannot run: {reason}")
    logger.info("attention on %s in %s: %s", device, dtype, chosen)
    return chosen


def unavailable(name: str, device: torch.device, dtype: torch.dtype) -> str | None:
    """Why this FlashAttention cannot run, or None. An installed one that fails to import raises: it is broken."""
    module, distribution, majors = FLASH[name]
    if device.type != "cuda":
        return f"it needs a CUDA GPU, the tensors are on {device}"
    if dtype not in (torch.bfloat16, torch.float16):
        return f"it needs bfloat16 or float16, got {dtype}"
    major, _ = torch.cuda.get_device_capability(device)
    if major not in majors:
        return f"it has no kernels for compute capability {major}.x"
    try:
        importlib.import_module(module)
    except ModuleNotFoundError as error:
        if error.name is None or not (module == error.name or module.startswith(error.name + ".")):
            raise
        return f"{distribution} is not installed"
    if name == "flash2" and not hasattr(importlib.import_module(module), "flash_attn_func"):
        return f"{distribution} is not installed"  # flash-attn-4 alone leaves a namespace package of that name
    return None


def _flash_functions(name: str) -> tuple[Callable[..., Any], Callable[..., Any]]:
    module = importlib.import_module(FLASH[name][0])
    return module.flash_attn_func, module.flash_attn_varlen_func


def _first(out: Any) -> Tensor:
    """Some versions return (out, lse)."""
    tensor: Tensor = out[0] if isinstance(out, tuple) else out
    return tensor


def _document_starts(document_ids: Tensor) -> Tensor:
    """True where a document, or a row, begins: ``(B, P)``."""
    starts = torch.ones_like(document_ids, dtype=torch.bool)
    starts[:, 1:] = document_ids[:, 1:] != document_ids[:, :-1]
    return starts


def document_positions(document_ids: Tensor) -> Tensor:
    """Position within its document of every position: ``(B, P)``."""
    index = torch.arange(document_ids.shape[1], device=document_ids.device).expand_as(document_ids)
    first = torch.where(_document_starts(document_ids), index, 0).cummax(1).values
    return index - first


def _document_lengths(document_ids: Tensor) -> tuple[Tensor, int]:
    begins = _document_starts(document_ids).flatten().nonzero().flatten()
    lengths = F.pad(begins, (0, 1), value=document_ids.numel()).int()
    return lengths, int(lengths.diff().max())


def _sdpa(q: Tensor, k: Tensor, v: Tensor, document_ids: Tensor | None) -> Tensor:
    mask = None
    if document_ids is not None:
        same = document_ids[:, :, None] == document_ids[:, None, :]
        mask = same.tril().unsqueeze(1)  # (B, 1, P, P)
    q, k, v = (t.transpose(1, 2) for t in (q, k, v))
    grouped = q.shape[1] != k.shape[1]
    out = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, is_causal=mask is None, enable_gqa=grouped)
    return out.transpose(1, 2)
