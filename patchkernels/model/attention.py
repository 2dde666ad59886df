"""Causal attention by whichever implementation suits the device: FlashAttention where installed, else PyTorch's.

    out[p] = softmax(q[p] k[<= p]^T / sqrt(hd)) v[<= p]

Where documents are packed into a row, position p sees only the positions of its own document.
"""

from __future__ import annotations

import functools
import importlib
import inspect
import logging
from collections.abc import Callable, Container
from importlib import metadata
from types import ModuleType
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

logger = logging.getLogger("patchkernels")


class FlashPackage(NamedTuple):
    module: str  # to import
    distribution: str  # to install
    head_sizes: dict[int, Container[int]]  # that it has kernels for, by major compute capability
    compiles: bool  # whether torch.compile can trace it: its kernels are registered as operators


# In order of preference: the first that runs is taken. The head sizes are those that flash-attn 2.8.3, which pads to a
# multiple of 8, flash-attn-3 (the folder hopper of Dao-AILab/flash-attention) and flash-attn-4 4.0.0b36 accept.
_UP_TO_128, _UP_TO_256 = range(8, 129, 8), range(8, 257, 8)
FLASH: dict[str, FlashPackage] = {
    "flash4": FlashPackage(
        "flash_attn.cute",
        "flash-attn-4",
        {9: _UP_TO_256, 10: (*_UP_TO_128, 256), 11: (*_UP_TO_128, 256), 12: _UP_TO_128},
        compiles=False,
    ),
    "flash3": FlashPackage("flash_attn_interface", "flash-attn-3", {9: _UP_TO_256}, compiles=True),
    "flash2": FlashPackage("flash_attn", "flash-attn", dict.fromkeys(range(8, 13), range(1, 257)), compiles=True),
}
ATTENTIONS = ("auto", "sdpa", *FLASH)


class FlashFunctions(NamedTuple):
    """A package's functions for whole rows and for packed documents."""

    dense: Callable[..., Any]
    packed: Callable[..., Any]


# Names of the functions in every package, and of the arguments that they are called with after q, k and v.
FLASH_INTERFACE = {
    "flash_attn_func": ("causal",),
    "flash_attn_varlen_func": ("cu_seqlens_q", "cu_seqlens_k", "max_seqlen_q", "max_seqlen_k", "causal"),
}
# Those of the packages that were chosen. torch.compile can trace a look-up in a dict, but not an import.
_functions: dict[str, FlashFunctions] = {}


class PackedDocuments(NamedTuple):
    """Where the documents of a batch lie, in the form that its attention takes. All layers of a step share it."""

    implementation: str  # the one that runs: "sdpa" or a key of FLASH
    mask: Tensor | None  # (B, 1, P, P), bool: what each position sees; None for FlashAttention
    edges: Tensor | None  # (n + 1,), int32: FlashAttention's cu_seqlens, see document_edges; None for "sdpa"


def attention(
    q: Tensor,  # (B, P, H, hd)
    k: Tensor,  # (B, P, H_kv, hd)
    v: Tensor,  # (B, P, H_kv, hd)
    *,
    documents: PackedDocuments | None = None,
    implementation: str = "auto",
) -> Tensor:  # (B, P, H, hd)
    """Causal attention with grouped queries: H is a multiple of H_kv.

    ``implementation="auto"`` takes the best FlashAttention that is installed and has kernels for the GPU and the head
    size, for bf16 and fp16 on CUDA, and ``scaled_dot_product_attention`` otherwise. The choice is logged once.
    ``documents`` come from :func:`pack_documents`, and the implementation that they were packed for runs.

    Under ``torch.compile`` FlashAttention 4 runs outside of the graph, because its kernels are not registered as
    operators.

    Raises:
        ValueError: an unknown implementation.
        RuntimeError: a FlashAttention is asked for by name and cannot run here. The message has the reason.
    """
    if documents is None:
        chosen = choose_attention(implementation, q.device, q.dtype, q.shape[-1])
    else:
        chosen = documents.implementation
    if chosen == "sdpa":
        return _sdpa(q, k, v, None if documents is None else documents.mask)
    flash = _functions[chosen]
    if documents is None:
        return _output(flash.dense(q, k, v, causal=True))
    longest = q.shape[1]  # no document is longer than its row; the exact length would have to be read from the GPU
    out = flash.packed(
        *(t.flatten(0, 1) for t in (q, k, v)),
        cu_seqlens_q=documents.edges,
        cu_seqlens_k=documents.edges,
        max_seqlen_q=longest,
        max_seqlen_k=longest,
        causal=True,
    )
    return _output(out).view_as(q)


@torch.compiler.assume_constant_result  # type: ignore[untyped-decorator]  # torch.compile calls it, and does not trace it
def choose_attention(implementation: str, device: torch.device, dtype: torch.dtype, head_size: int) -> str:
    """The name of the implementation that runs: ``"sdpa"`` or a key of ``FLASH``.

    It is logged once for each device, dtype and head size, together with the reasons that rule out better ones.

    Raises:
        ValueError: an unknown implementation.
        RuntimeError: a FlashAttention is asked for by name and cannot run here. The message has the reason.
    """
    return _choose_cached(implementation, device, dtype, head_size)


@functools.cache
def _choose_cached(implementation: str, device: torch.device, dtype: torch.dtype, head_size: int) -> str:
    if implementation not in ATTENTIONS:
        raise ValueError(f"attention must be one of {ATTENTIONS}, got {implementation!r}")
    chosen, skipped = implementation, []
    if implementation == "auto":
        chosen = "sdpa"
        for name in FLASH:
            reason = reason_unavailable(name, device, dtype, head_size)
            if reason is None:
                chosen = name
                break
            skipped.append(f"not {name}: {reason}")
    elif implementation != "sdpa":
        reason = reason_unavailable(implementation, device, dtype, head_size)
        if reason is not None:
            raise RuntimeError(f"attention={implementation!r} cannot run: {reason}")
    if chosen in FLASH and chosen not in _functions:
        _functions[chosen] = _import_functions(chosen)
    # On a CPU no reason but the device counts, and that needs no words.
    reasons = skipped if device.type == "cuda" else []
    logger.info("attention on %s in %s: %s", device, dtype, "; ".join([chosen, *reasons]))
    return chosen


def reason_unavailable(name: str, device: torch.device, dtype: torch.dtype, head_size: int) -> str | None:
    """Why this FlashAttention cannot run, or None if it can.

    What is installed is read from the distributions' metadata, because a module says too little: the source
    distribution of flash-attn 2.8.3 holds an early ``flash_attn.cute``, the module of flash-attn-4, and flash-attn-4
    alone leaves an empty ``flash_attn``. A package that fails while it is imported raises its own error: the
    installation is broken, and falling back to a slower implementation would hide that.
    """
    package = FLASH[name]
    if device.type != "cuda":
        return f"it needs a CUDA GPU, the tensors are on {device}"
    if dtype not in (torch.bfloat16, torch.float16):
        return f"it needs bfloat16 or float16, got {dtype}"
    major, _ = torch.cuda.get_device_capability(device)
    if major not in package.head_sizes:
        return f"it has no kernels for compute capability {major}.x"
    if head_size not in package.head_sizes[major]:
        return f"it has no kernels for heads of size {head_size} on compute capability {major}.x"
    try:
        version = metadata.version(package.distribution)
    except metadata.PackageNotFoundError:
        return f"{package.distribution} is not installed"
    try:
        module = importlib.import_module(package.module)
    except ModuleNotFoundError as error:
        if error.name is None or not f"{package.module}.".startswith(f"{error.name}."):
            raise
        return f"{package.distribution} {version} holds no module {package.module}"
    difference = _interface_difference(module)
    if difference is not None:
        return f"{package.distribution} {version} has another interface: {package.module}.{difference}"
    return None


def _interface_difference(module: ModuleType) -> str | None:
    """What keeps the module's functions from being called with ``FLASH_INTERFACE``, or None if nothing does."""
    for function, arguments in FLASH_INTERFACE.items():
        if not hasattr(module, function):
            return f"{function} is missing"
        try:
            inspect.signature(getattr(module, function)).bind("q", "k", "v", **dict.fromkeys(arguments))
        except TypeError as error:
            return f"{function}: {error}"
    return None


def _import_functions(name: str) -> FlashFunctions:
    module = importlib.import_module(FLASH[name].module)
    functions = (getattr(module, function) for function in FLASH_INTERFACE)
    if not FLASH[name].compiles:
        reason = f"the kernels of {FLASH[name].distribution} are not registered as operators"
        functions = (torch.compiler.disable(function, reason=reason) for function in functions)
    return FlashFunctions(*functions)


def _output(result: Any) -> Tensor:
    """The attention's output: some versions of FlashAttention return it in a tuple with the log-sum-exp."""
    out: Tensor = result[0] if isinstance(result, tuple) else result
    return out


def pack_documents(
    document_ids: Tensor,  # (B, P), non-decreasing along P
    implementation: str,
    dtype: torch.dtype,
    head_size: int,
) -> PackedDocuments:
    """The documents in the form that :func:`attention` takes for queries of this dtype and head size.

    For FlashAttention this waits for the GPU once, because the number of documents decides the size of a tensor. With
    ``torch.compile`` that number is read between two graphs, so that ``fullgraph=True`` is refused. For
    ``scaled_dot_product_attention`` there is no wait, but a mask of shape ``(B, 1, P, P)``.

    Raises: as :func:`attention`.
    """
    chosen = choose_attention(implementation, document_ids.device, dtype, head_size)
    if chosen != "sdpa":
        return PackedDocuments(chosen, mask=None, edges=document_edges(document_ids))
    ordinal = document_starts(document_ids).cumsum(1)  # not the id: it may come again, and FlashAttention reads edges
    same_document = ordinal[:, :, None] == ordinal[:, None, :]
    return PackedDocuments(chosen, mask=same_document.tril().unsqueeze(1), edges=None)


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


@torch.compiler.disable(reason="the number of packed documents decides the size of a tensor")  # type: ignore[untyped-decorator]
def document_edges(document_ids: Tensor) -> Tensor:
    """The edges of the documents of all rows, laid end to end: FlashAttention's ``cu_seqlens``, ``(n + 1,)``, int32.

    Two neighbouring edges enclose a document. n is the number of documents, rounded up to a power of two (but at most
    B * P) by empty documents at the end, so that ``torch.compile`` meets few different shapes. Always having B * P
    documents would spare the count, but FlashAttention's backward pass allocates up to 128 rows of fp32 for each, empty
    or not, and FlashAttention 2 takes at most 65535.
    """
    ordinal = document_starts(document_ids).flatten().cumsum(0)  # how many documents have begun, at every position
    count = int(ordinal[-1])  # the one synchronisation
    size = min(1 << (count - 1).bit_length(), len(ordinal))
    return torch.searchsorted(ordinal, torch.arange(1, size + 2, device=ordinal.device), out_int32=True)


def _sdpa(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None) -> Tensor:
    q, k, v = (t.transpose(1, 2) for t in (q, k, v))
    grouped = q.shape[1] != k.shape[1]
    out = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, is_causal=mask is None, enable_gqa=grouped)
    return out.transpose(1, 2)
