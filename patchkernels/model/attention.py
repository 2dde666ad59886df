"""Causal attention by whichever implementation suits the device: FlashAttention where installed, else PyTorch's.

    out[p] = softmax(q[p] k[<= p]^T / sqrt(hd)) v[<= p]

Where document ids are given, position p sees only the positions of its own document.
"""

from __future__ import annotations

import functools
import importlib
import logging
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

logger = logging.getLogger("patchkernels")


class FlashPackage(NamedTuple):
    module: str  # to import
    distribution: str  # to install
    majors: range  # major compute capabilities that it has kernels for


# In order of preference: the first that runs on the GPU is taken.
FLASH: dict[str, FlashPackage] = {
    "flash4": FlashPackage("flash_attn.cute", "flash-attn-4", range(9, 13)),
    "flash3": FlashPackage("flash_attn_interface", "flash-attn-3", range(9, 10)),
    "flash2": FlashPackage("flash_attn", "flash-attn", range(8, 13)),
}
ATTENTIONS = ("auto", "sdpa", *FLASH)


def attention(
    q: Tensor,  # (B, P, H, hd)
    k: Tensor,  # (B, P, H_kv, hd)
    v: Tensor,  # (B, P, H_kv, hd)
    *,
    document_ids: Tensor | None = None,  # (B, P), non-decreasing along P
    implementation: str = "auto",
) -> Tensor:  # (B, P, H, hd)
    """Causal attention with grouped queries: H is a multiple of H_kv.

    ``implementation="auto"`` takes the best FlashAttention that is installed and has kernels for the GPU, for bf16 and
    fp16
    on CUDA, and ``scaled_dot_product_attention`` otherwise. The choice is logged once. Document ids cost FlashAttention
    one synchronisation with the host, because the number of documents decides a tensor's size, and cost
    ``scaled_dot_product_attention`` a mask of shape ``(B, 1, P, P)``.

    Raises:
        ValueError: an unknown implementation.
        RuntimeError: a FlashAttention is asked for by name and cannot run here. The message has the reason.
    """
    chosen = choose_attention(implementation, q.device, q.dtype)
    if chosen == "sdpa":
        return _sdpa(q, k, v, document_ids)
    dense, packed = _flash_functions(chosen)
    if document_ids is None:
        return _output(dense(q, k, v, causal=True))
    edges, longest = _document_edges(document_ids)
    out = packed(
        *(t.flatten(0, 1) for t in (q, k, v)),
        cu_seqlens_q=edges,
        cu_seqlens_k=edges,
        max_seqlen_q=longest,
        max_seqlen_k=longest,
        causal=True,
    )
    return _output(out).view_as(q)


@torch.compiler.assume_constant_result  # type: ignore[untyped-decorator]  # torch.compile calls it once, while tracing
def choose_attention(implementation: str, device: torch.device, dtype: torch.dtype) -> str:
    """The name of the implementation that runs: ``"sdpa"`` or a key of ``FLASH``. Logged once per device and dtype."""
    return _choose_cached(implementation, device, dtype)


@functools.cache
def _choose_cached(implementation: str, device: torch.device, dtype: torch.dtype) -> str:
    if implementation not in ATTENTIONS:
        raise ValueError(f"attention must be one of {ATTENTIONS}, got {implementation!r}")
    if implementation == "auto":
        usable = [name for name in FLASH if reason_unavailable(name, device, dtype) is None]
        chosen = usable[0] if usable else "sdpa"
    else:
        chosen = implementation
        reason = None if implementation == "sdpa" else reason_unavailable(implementation, device, dtype)
        if reason is not None:
            raise RuntimeError(f"attention={implementation!r} cannot run: {reason}")
    logger.info("attention on %s in %s: %s", device, dtype, chosen)
    return chosen


def reason_unavailable(name: str, device: torch.device, dtype: torch.dtype) -> str | None:
    """Why this FlashAttention cannot run, or None if it can.

    A package that is installed but fails while it is imported raises its own error: the installation is broken, and
    falling back to a slower implementation would hide that.
    """
    package = FLASH[name]
    if device.type != "cuda":
        return f"it needs a CUDA GPU, the tensors are on {device}"
    if dtype not in (torch.bfloat16, torch.float16):
        return f"it needs bfloat16 or float16, got {dtype}"
    major, _ = torch.cuda.get_device_capability(device)
    if major not in package.majors:
        return f"it has no kernels for compute capability {major}.x"
    try:
        module = importlib.import_module(package.module)
    except ModuleNotFoundError as error:
        if error.name is None or not (package.module == error.name or package.module.startswith(error.name + ".")):
            raise
        return f"{package.distribution} is not installed"
    # flash-attn-4 alone installs flash_attn.cute, which leaves an empty namespace package called flash_attn.
    if name == "flash2" and not hasattr(module, "flash_attn_func"):
        return f"{package.distribution} is not installed"
    return None


def _flash_functions(name: str) -> tuple[Callable[..., Any], Callable[..., Any]]:
    """The package's functions for whole rows and for packed documents."""
    module = importlib.import_module(FLASH[name].module)
    return module.flash_attn_func, module.flash_attn_varlen_func


def _output(result: Any) -> Tensor:
    """The attention's output: some versions of FlashAttention return it in a tuple with the log-sum-exp."""
    out: Tensor = result[0] if isinstance(result, tuple) else result
    return out


def document_starts(document_ids: Tensor) -> Tensor:
    """True where a document begins, and at the first position of every row: ``(B, P)``."""
    starts = torch.ones_like(document_ids, dtype=torch.bool)
    starts[:, 1:] = document_ids[:, 1:] != document_ids[:, :-1]
    return starts


def document_positions(document_ids: Tensor) -> Tensor:
    """The place of every position within its document, counted from 0: ``(B, P)``."""
    index = torch.arange(document_ids.shape[1], device=document_ids.device).expand_as(document_ids)
    first = torch.where(document_starts(document_ids), index, 0).cummax(1).values
    return index - first


def _document_edges(document_ids: Tensor) -> tuple[Tensor, int]:
    """The edges of the documents of all rows, laid end to end, and the length of the longest document.

    These are FlashAttention's ``cu_seqlens`` and ``max_seqlen``. Two neighbouring edges enclose a document: with n
    documents the edges have shape ``(n + 1,)``, dtype int32.
    """
    starts = document_starts(document_ids).flatten().nonzero().flatten()
    edges = F.pad(starts, (0, 1), value=document_ids.numel()).int()
    return edges, int(edges.diff().max())


def _sdpa(q: Tensor, k: Tensor, v: Tensor, document_ids: Tensor | None) -> Tensor:
    mask = None
    if document_ids is not None:
        same_document = document_ids[:, :, None] == document_ids[:, None, :]
        mask = same_document.tril().unsqueeze(1)  # (B, 1, P, P)
    q, k, v = (t.transpose(1, 2) for t in (q, k, v))
    grouped = q.shape[1] != k.shape[1]
    out = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, is_causal=mask is None, enable_gqa=grouped)
    return out.transpose(1, 2)
