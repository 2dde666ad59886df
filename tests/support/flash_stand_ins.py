"""Stand-ins for FlashAttention 2, 3 and 4: their signatures, checks and return values, over eager code for a CPU.

They follow flash-attn 2.8.3, the folder hopper of the repository Dao-AILab/flash-attention (distribution flash_attn_3)
and flash-attn-4 4.0.0b36, as far as :mod:`patchkernels.model.attention` calls or inspects them. Rows that a kernel
would not write hold NaN. Where a package registers its kernels as operators, so does its stand-in, so that
``torch.compile`` sees what it would see on a GPU.
"""

from __future__ import annotations

import sys
import types
from collections.abc import Callable
from importlib import metadata

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor

Edges = tuple[Tensor, Tensor]  # cu_seqlens of queries and of keys
Longest = tuple[int, int]  # max_seqlen of queries and of keys

MOST_SEQUENCES = 65535  # of FlashAttention 2: they are the second dimension of its grid


@torch.library.custom_op("flash_stand_ins::forward", mutates_args=())
def forward_kernel(q: Tensor, k: Tensor, v: Tensor, edges: Tensor, longest: int, scale: float) -> tuple[Tensor, Tensor]:
    """Causal attention within the sequences between edges, ``(N, H, hd)``, and the log-sum-exp, ``(H, N)``, in fp32."""
    scores = _scores(q, k, edges, scale)
    lse = scores.logsumexp(-1)
    out = torch.einsum("hnm,mhd->nhd", (scores - lse[..., None]).exp(), _repeated(v, q).float())
    unwritten = ~_written(len(q), edges, longest)
    return torch.empty_like(q).copy_(out.masked_fill(unwritten[:, None, None], torch.nan)), lse


@forward_kernel.register_fake
def _(q: Tensor, k: Tensor, v: Tensor, edges: Tensor, longest: int, scale: float) -> tuple[Tensor, Tensor]:
    return torch.empty_like(q), q.new_empty(q.shape[1], q.shape[0], dtype=torch.float32)


@torch.library.custom_op("flash_stand_ins::backward", mutates_args=())
def backward_kernel(
    upstream: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, edges: Tensor, scale: float
) -> tuple[Tensor, Tensor, Tensor]:
    """The gradients of q, k and v, by the formulas of the FlashAttention paper (arXiv 2205.14135, appendix B.2)."""
    upstream = upstream.float()
    p = (_scores(q, k, edges, scale) - lse[..., None]).exp()  # (H, N, N)
    dp = torch.einsum("nhd,mhd->hnm", upstream, _repeated(v, q).float())
    ds = p * (dp - (upstream * out.float()).sum(-1).T[..., None]) * scale
    dq = torch.einsum("hnm,mhd->nhd", ds, _repeated(k, q).float())
    dk = torch.einsum("hnm,nhd->mhd", ds, q.float())
    dv = torch.einsum("hnm,nhd->mhd", p, upstream)
    dk, dv = (t.unflatten(1, (k.shape[1], -1)).sum(2) for t in (dk, dv))
    dq, dk, dv = (torch.empty_like(t).copy_(gradient) for t, gradient in ((q, dq), (k, dk), (v, dv)))
    return dq, dk, dv


@backward_kernel.register_fake
def _(
    upstream: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, edges: Tensor, scale: float
) -> tuple[Tensor, Tensor, Tensor]:
    return torch.empty_like(q), torch.empty_like(k), torch.empty_like(v)


def _scores(q: Tensor, k: Tensor, edges: Tensor, scale: float) -> Tensor:
    """``scale * q k^T``, ``(H, N, N)``, fp32, and -inf where a position must not look."""
    sequence = _sequence(len(q), edges)
    seen = (sequence[:, None] == sequence).tril()
    return (scale * torch.einsum("nhd,mhd->hnm", q.float(), _repeated(k, q).float())).masked_fill(~seen, -torch.inf)


def _repeated(t: Tensor, q: Tensor) -> Tensor:
    """Keys or values, each head repeated for the query heads that share it."""
    return t.repeat_interleave(q.shape[1] // t.shape[1], 1)


def _sequence(total: int, edges: Tensor) -> Tensor:
    """The sequence of every position."""
    return torch.bucketize(torch.arange(total), edges[1:].long(), right=True)


def _written(total: int, edges: Tensor, longest: int) -> Tensor:
    """Positions of a sequence, of which the grid has ``longest``: later ones get no program."""
    place = torch.arange(total) - F.pad(edges, (0, 1), value=total).long()[_sequence(total, edges)]
    return (torch.arange(total) < edges[-1]) & (place < longest)


def _check(q: Tensor, k: Tensor, v: Tensor, edges: Edges, longest: Longest) -> None:
    """The checks that all three versions make."""
    assert q.dtype in (torch.float16, torch.bfloat16), "FlashAttention only support fp16 and bf16 data type"
    assert q.dtype == k.dtype == v.dtype, "query, key and value must have the same dtype"
    assert q.shape[1] % k.shape[1] == 0, "Number of heads in key/value must divide number of heads in query"
    assert q.shape[2] % 8 == 0 and q.shape[2] <= 256, "head_size must be a multiple of 8 and at most 256"
    assert k.shape == v.shape and k.shape[::2] == q.shape[::2]
    assert all(e.dtype == torch.int32 and e.ndim == 1 and e.is_contiguous() for e in edges), "cu_seqlens must be int32"
    assert edges[0] is edges[1] and longest[0] == longest[1], "the stand-ins are for self-attention"
    assert all(t.stride(-1) == 1 for t in (q, k, v)), "Input tensor must have contiguous last dimension"


class Attention(torch.autograd.Function):
    """What the packages' own functions are: an ``autograd.Function`` over the kernels."""

    @staticmethod
    def forward(ctx, q, k, v, edges, longest, scale):
        out, lse = forward_kernel(q, k, v, edges, longest, scale)
        ctx.save_for_backward(q, k, v, out, lse, edges)
        ctx.scale = scale
        ctx.mark_non_differentiable(lse)
        return out, lse

    @staticmethod
    def backward(ctx, upstream, _):
        q, k, v, out, lse, edges = ctx.saved_tensors
        upstream = upstream if upstream.stride(-1) == 1 else upstream.contiguous()
        return *backward_kernel(upstream, q, k, v, out, lse, edges, ctx.scale), None, None, None


def _packed(
    q: Tensor, k: Tensor, v: Tensor, edges: Edges, longest: Longest, causal: bool, scale: float | None = None
) -> tuple[Tensor, Tensor]:
    assert causal, "the stand-ins are for causal attention"
    q, k, v = (t if t.stride(-1) == 1 else t.contiguous() for t in (q, k, v))
    _check(q, k, v, edges, longest)
    return Attention.apply(q, k, v, edges[0], longest[0], scale or q.shape[-1] ** -0.5)


def _packed_2(q: Tensor, k: Tensor, v: Tensor, edges: Edges, longest: Longest, causal: bool) -> tuple[Tensor, Tensor]:
    sequences, size = len(edges[0]) - 1, q.shape[-1]
    assert 0 < sequences <= MOST_SEQUENCES, "CUDA error: invalid configuration argument"
    if longest[0] == 1 and q.shape[1] > k.shape[1]:
        assert len(q) == sequences, "shape is invalid"  # of q as (sequences, H_kv, H / H_kv, hd), for decoding
    q, k, v = (F.pad(t, (0, -size % 8)) for t in (q, k, v))
    out, lse = _packed(q, k, v, edges, longest, causal, size**-0.5)
    return out[..., :size], lse


def _packed_4(q: Tensor, k: Tensor, v: Tensor, edges: Edges, longest: Longest, causal: bool) -> tuple[Tensor, Tensor]:
    return _packed(_data_pointer(q), k, v, edges, longest, causal)


@torch.compiler.allow_in_graph
def _data_pointer(t: Tensor) -> Tensor:
    """Fails as FlashAttention 4 fails where torch.compile traces it (its issue 2013): it hands pointers to kernels."""
    if isinstance(t, FakeTensor):
        raise RuntimeError("Cannot access data pointer of Tensor that doesn't have storage")
    return t.view_as(t)


def _dense(packed: Callable, q: Tensor, k: Tensor, v: Tensor, causal: bool) -> tuple[Tensor, Tensor]:
    """Attention over rows of equal length, by a function for packed ones."""
    rows, length = q.shape[:2]
    edges = torch.arange(0, rows * length + 1, length, dtype=torch.int32)
    out, lse = packed(*(t.flatten(0, 1) for t in (q, k, v)), (edges, edges), (length, length), causal)
    return out.view_as(q), lse


class FlashAttention2:
    """Module ``flash_attn`` of distribution flash-attn 2.8.3."""

    @staticmethod
    def flash_attn_func(
        q, k, v, dropout_p=0.0, softmax_scale=None, causal=False, window_size=(-1, -1), softcap=0.0, alibi_slopes=None,
        deterministic=False, return_attn_probs=False,
    ):  # fmt: skip
        return _dense(_packed_2, q, k, v, causal)[0]

    @staticmethod
    def flash_attn_varlen_func(
        q, k, v, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, dropout_p=0.0, softmax_scale=None,
        causal=False, window_size=(-1, -1), softcap=0.0, alibi_slopes=None, deterministic=False,
        return_attn_probs=False, block_table=None,
    ):  # fmt: skip
        return _packed_2(q, k, v, (cu_seqlens_q, cu_seqlens_k), (max_seqlen_q, max_seqlen_k), causal)[0]


class FlashAttention3:
    """Module ``flash_attn_interface`` of distribution flash_attn_3."""

    @staticmethod
    def flash_attn_func(
        q, k, v, softmax_scale=None, causal=False, qv=None, q_descale=None, k_descale=None, v_descale=None,
        window_size=(-1, -1), attention_chunk=0, softcap=0.0, num_splits=1, pack_gqa=None, deterministic=False,
        sm_margin=0, return_attn_probs=False,
    ):  # fmt: skip
        return _dense(_packed, q, k, v, causal)[0]

    @staticmethod
    def flash_attn_varlen_func(
        q, k, v, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, seqused_q=None, seqused_k=None,
        softmax_scale=None, causal=False, qv=None, q_descale=None, k_descale=None, v_descale=None,
        window_size=(-1, -1), attention_chunk=0, softcap=0.0, num_splits=1, pack_gqa=None, deterministic=False,
        sm_margin=0, return_attn_probs=False,
    ):  # fmt: skip
        return _packed(q, k, v, (cu_seqlens_q, cu_seqlens_k), (max_seqlen_q, max_seqlen_k), causal)[0]


class EarlyFlashAttention3:
    """Module ``flash_attn_interface`` of the folder hopper at version 2.7.4: it insists on two more arguments."""

    @staticmethod
    def flash_attn_func(
        q, k, v, softmax_scale=None, causal=False, q_descale=None, k_descale=None, v_descale=None,
        window_size=(-1, -1), sink_token_length=0, softcap=0.0, num_splits=1, pack_gqa=None, deterministic=False,
        sm_margin=0,
    ):  # fmt: skip
        return _dense(_packed, q, k, v, causal)

    @staticmethod
    def flash_attn_varlen_func(
        q, k, v, cu_seqlens_q, cu_seqlens_k, seqused_q, seqused_k, max_seqlen_q, max_seqlen_k, softmax_scale=None,
        causal=False, q_descale=None, k_descale=None, v_descale=None, window_size=(-1, -1), sink_token_length=0,
        softcap=0.0, num_splits=1, pack_gqa=None, deterministic=False, sm_margin=0,
    ):  # fmt: skip
        return _packed(q, k, v, (cu_seqlens_q, cu_seqlens_k), (max_seqlen_q, max_seqlen_k), causal)


class FlashAttention4:
    """Module ``flash_attn.cute`` of distribution flash-attn-4 4.0.0b36."""

    @staticmethod
    def flash_attn_func(
        q, k, v, qv=None, gather_kv_indices=None, softmax_scale=None, causal=False, window_size=(None, None),
        learnable_sink=None, softcap=0.0, num_splits=1, pack_gqa=None, deterministic=False, score_mod=None,
        score_mod_bwd=None, mask_mod=None, aux_tensors=None, aux_scalars=None, block_sparse_tensors=None,
        block_sparse_tensors_bwd=None, return_lse=False, gather_bwd_recompute_p=False, gather_bwd_token_chunk=None,
    ):  # fmt: skip
        return _dense(_packed_4, q, k, v, causal)

    @staticmethod
    def flash_attn_varlen_func(
        q, k, v, qv=None, cu_seqlens_q=None, cu_seqlens_k=None, max_seqlen_q=None, max_seqlen_k=None,
        min_seqlen_k=None, seqused_q=None, seqused_k=None, gather_kv_indices=None, page_table=None,
        softmax_scale=None, causal=False, window_size=(None, None), learnable_sink=None, softcap=0.0, num_splits=1,
        pack_gqa=None, deterministic=False, score_mod=None, score_mod_bwd=None, mask_mod=None,
        block_sparse_tensors=None, aux_tensors=None, aux_scalars=None, return_lse=False, scheduler_metadata=None,
        seqlen_k_per_split=None, disable_scheduler_metadata=False, gather_bwd_recompute_p=False,
        gather_bwd_token_chunk=None,
    ):  # fmt: skip
        return _packed_4(q, k, v, (cu_seqlens_q, cu_seqlens_k), (max_seqlen_q, max_seqlen_k), causal)


class EarlyFlashAttention4:
    """Module ``flash_attn.cute`` in the source distribution of flash-attn 2.8.3: it takes no ``max_seqlen``."""

    @staticmethod
    def flash_attn_func(
        q, k, v, softmax_scale=None, causal=False, window_size=(None, None), learnable_sink=None, softcap=0.0,
        pack_gqa=None,
    ):  # fmt: skip
        return _dense(_packed_4, q, k, v, causal)

    @staticmethod
    def flash_attn_varlen_func(
        q, k, v, cu_seqlens_q=None, cu_seqlens_k=None, seqused_q=None, seqused_k=None, page_table=None,
        softmax_scale=None, causal=False, window_size=(None, None), learnable_sink=None, softcap=0.0, pack_gqa=None,
    ):  # fmt: skip
        return _packed_4(q, k, v, (cu_seqlens_q, cu_seqlens_k), (len(q), len(q)), causal)


# By the names of patchkernels.model.attention.FLASH: what each distribution installs, its version last.
DISTRIBUTIONS = {
    "flash2": ("flash-attn", {"flash_attn": FlashAttention2, "flash_attn.cute": EarlyFlashAttention4}, "2.8.3"),
    "flash3": ("flash-attn-3", {"flash_attn_interface": FlashAttention3}, "3.0.0b1"),
    "flash4": ("flash-attn-4", {"flash_attn.cute": FlashAttention4}, "4.0.0b36"),
}


def install(monkeypatch: pytest.MonkeyPatch, *names: str) -> None:
    """Makes these distributions, and no others of FlashAttention, look installed. A later one overwrites modules."""
    versions: dict[str, str | None] = {distribution: None for distribution, _, _ in DISTRIBUTIONS.values()}
    modules: dict[str, type | None] = dict.fromkeys(m for _, held, _ in DISTRIBUTIONS.values() for m in held)
    if "flash4" in names:
        modules["flash_attn"] = object  # an empty namespace
    for name in names:
        distribution, held, versions[distribution] = DISTRIBUTIONS[name]
        modules |= held
    for name, interface in modules.items():
        monkeypatch.setitem(sys.modules, name, interface and module_of(name, interface))
    version = metadata.version

    def installed_version(distribution: str) -> str:
        if distribution not in versions:
            return version(distribution)
        if versions[distribution] is None:
            raise metadata.PackageNotFoundError(distribution)
        return versions[distribution]

    monkeypatch.setattr(metadata, "version", installed_version)


def module_of(name: str, interface: type) -> types.ModuleType:
    """A module that holds the functions of one of the classes above."""
    module = types.ModuleType(name)
    for function in (n for n in vars(interface) if n.startswith("flash_")):
        setattr(module, function, getattr(interface, function))
    return module
