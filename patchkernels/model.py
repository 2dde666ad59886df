"""The slim model: tokens -> patch embedding -> transformer (LLaMA shape) -> K-token loss.

Modules bear Hugging Face's names, so that ``state_dict()`` is that of ``LlamaForCausalLM`` (``Qwen3ForCausalLM``
with QK-norm) name for name. The patch size is an argument of the call: positions are patch positions.
"""

from __future__ import annotations

import dataclasses
import os
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from patchkernels.attention import ATTENTIONS, attention, document_positions
from patchkernels.modules import PatchEmbedding, PatchLMHead
from patchkernels.patch_cross_entropy import next_patch_targets


@dataclass(frozen=True)
class PatchLMConfig:
    """Settings of :class:`PatchLM`, named as in Hugging Face's ``LlamaConfig``. ``ValueError`` on nonsense."""

    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_hidden_layers: int
    num_attention_heads: int
    num_key_value_heads: int | None = None  # None: as many as attention heads
    head_dim: int | None = None  # None: hidden_size / num_attention_heads
    max_position_embeddings: int = 2048  # positions: patches in the patch phase
    rms_norm_eps: float = 1e-5
    rope_theta: float = 10000.0
    qk_norm: bool = False
    tie_word_embeddings: bool = False
    initializer_range: float = 0.02
    attention: str = "auto"
    activation_checkpointing: bool = False

    def __post_init__(self) -> None:
        for field in ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads",
                      "num_key_value_heads", "head_dim", "max_position_embeddings"):  # fmt: skip
            value = getattr(self, field)
            if value is not None and (not isinstance(value, int) or value < 1):
                raise ValueError(f"{field} must be a positive integer, got {value!r}")
        if self.head_dim is None and self.hidden_size % self.num_attention_heads:
            raise ValueError(
                f"num_attention_heads must divide hidden_size, got {self.num_attention_heads} and {self.hidden_size}"
            )
        if self.num_attention_heads % self.key_value_heads:
            raise ValueError(
                f"num_key_value_heads must divide num_attention_heads, got {self.key_value_heads} "
                f"and {self.num_attention_heads}"
            )
        if self.head_size % 2:
            raise ValueError(f"the head dimension must be even for rotary embeddings, got {self.head_size}")
        for field in ("rms_norm_eps", "rope_theta", "initializer_range"):
            if not getattr(self, field) > 0:
                raise ValueError(f"{field} must be positive, got {getattr(self, field)!r}")
        if self.attention not in ATTENTIONS:
            raise ValueError(f"attention must be one of {ATTENTIONS}, got {self.attention!r}")

    @property
    def head_size(self) -> int:
        return self.head_dim or self.hidden_size // self.num_attention_heads

    @property
    def key_value_heads(self) -> int:
        return self.num_key_value_heads or self.num_attention_heads

    @classmethod
    def preset(cls, name: str, **changes: Any) -> PatchLMConfig:
        """A named configuration, with changes. ``ValueError`` for an unknown name."""
        if name not in PRESETS:
            raise ValueError(f"preset must be one of {sorted(PRESETS)}, got {name!r}")
        return dataclasses.replace(PRESETS[name], **changes)


PRESETS = {
    "demo": PatchLMConfig(4096, 128, 352, 4, 4, max_position_embeddings=256, tie_word_embeddings=True),
    "42m": PatchLMConfig(32000, 512, 1376, 8, 8, tie_word_embeddings=True),
    "124m": PatchLMConfig(50257, 768, 2048, 12, 12, tie_word_embeddings=True),  # GPT-2 small in LLaMA's shape
    # PatchTrain (arXiv 2407.12665), table 1
    "370m": PatchLMConfig(32000, 1024, 2752, 24, 16),
    "780m": PatchLMConfig(32000, 1536, 4128, 24, 16),
    "1.3b": PatchLMConfig(32000, 2048, 5504, 24, 16),
    "2.7b": PatchLMConfig(32000, 2560, 6880, 32, 32),
    # Llama 3 (arXiv 2407.21783), table 3
    "8b": PatchLMConfig(128256, 4096, 14336, 32, 32, num_key_value_heads=8, rope_theta=500000.0),
    "70b": PatchLMConfig(128256, 8192, 28672, 80, 64, num_key_value_heads=8, rope_theta=500000.0),
}


class PatchLM(nn.Module):
    """A LLaMA-shaped language model that reads patches of any size with the same parameters."""

    def __init__(self, config: PatchLMConfig) -> None:
        super().__init__()
        self.config = config
        self.model = Transformer(config)
        self.lm_head = PatchLMHead(config.hidden_size, config.vocab_size)
        self.apply(self._initialize)
        if config.tie_word_embeddings:
            self.lm_head.weight = self.model.embed_tokens.weight

    def _initialize(self, module: nn.Module) -> None:
        if isinstance(module, nn.Linear | nn.Embedding):
            nn.init.normal_(module.weight, std=self.config.initializer_range)

    def forward(
        self,
        input_ids: Tensor,  # (B, T)
        labels: Tensor | None = None,  # (B, T), unshifted
        patch_size: int = 1,
        reduction: str = "mean",
        document_ids: Tensor | None = None,  # (B, T), non-decreasing along T
    ) -> Tensor:
        """Logits ``(B, T / K, V)``, or with labels the loss of predicting each next patch (PatchTrain, section 2).

        Args:
            input_ids: token ids, T divisible by ``patch_size``.
            labels: usually ``input_ids``; -100 is ignored. Nobody shifts them.
            patch_size: K. 1 is an ordinary language model.
            reduction: that of :func:`patchkernels.patch_cross_entropy`; ``"none"`` gives ``(B, T / K, K)``.
            document_ids: packed documents, which must begin on patch boundaries: positions restart, no position
                sees another document, none predicts the next document's first patch. On a GPU a patch that
                straddles two documents counts to that of its first token.

        Raises:
            ValueError: shapes that do not fit, T not divisible by K, more positions than the model has, a patch
                that straddles documents (on a CPU).
            IndexError: ids or labels outside the vocabulary (on a CPU).
        """
        # An integer that torch.compile may have made symbolic: a phase is a graph of its own.
        patch_size = int(patch_size)
        if input_ids.ndim != 2:
            raise ValueError(f"input_ids must have shape (B, T), got {tuple(input_ids.shape)}")
        for name, tensor in (("labels", labels), ("document_ids", document_ids)):
            if tensor is not None and tensor.shape != input_ids.shape:
                raise ValueError(
                    f"{name} must have the shape of input_ids, {tuple(input_ids.shape)}, got {tuple(tensor.shape)}"
                )
        if patch_size < 1 or input_ids.shape[1] % patch_size:
            raise ValueError(
                f"the number of tokens must be divisible by patch_size, got {input_ids.shape[1]} and {patch_size}"
            )
        if input_ids.shape[1] // patch_size > self.config.max_position_embeddings:
            raise ValueError(
                f"{input_ids.shape[1] // patch_size} positions are more than max_position_embeddings="
                f"{self.config.max_position_embeddings}"
            )
        documents = None if document_ids is None else _patch_documents(document_ids, patch_size)
        hidden = self.model(input_ids, patch_size, documents)
        if labels is None:
            logits: Tensor = self.lm_head(hidden)
            return logits
        target = patch_targets(labels, patch_size, document_ids)
        loss: Tensor = self.lm_head(hidden, target=target, reduction=reduction)
        return loss

    def save_pretrained(self, directory: str | os.PathLike[str], **token_ids: int) -> None:
        """See :func:`patchkernels.pretrained.save`."""
        from patchkernels.pretrained import save

        save(self, directory, **token_ids)

    @classmethod
    def from_pretrained(cls, directory: str | os.PathLike[str], **changes: Any) -> PatchLM:
        """See :func:`patchkernels.pretrained.load`."""
        from patchkernels.pretrained import load

        return load(directory, **changes)


def patch_targets(labels: Tensor, patch_size: int, document_ids: Tensor | None) -> Tensor:
    """``next_patch_targets``, and no document's first patch is predicted by another document."""
    target = next_patch_targets(labels, patch_size)
    if document_ids is None:
        return target
    documents = _patch_documents(document_ids, patch_size)
    other = F.pad(documents[:, 1:] != documents[:, :-1], (0, 1), value=True)
    return target.masked_fill(other.unsqueeze(-1), -100)


def _patch_documents(document_ids: Tensor, patch_size: int) -> Tensor:
    patches = document_ids.unflatten(1, (-1, patch_size))
    if document_ids.device.type == "cpu" and bool((patches != patches[..., :1]).any()):
        raise ValueError(f"every document must begin on a patch boundary, a multiple of patch_size={patch_size} tokens")
    first: Tensor = patches[..., 0]
    return first


class Transformer(nn.Module):
    def __init__(self, config: PatchLMConfig) -> None:
        super().__init__()
        self.config = config
        self.embed_tokens = PatchEmbedding(config.vocab_size, config.hidden_size)
        self.layers = nn.ModuleList(Block(config) for _ in range(config.num_hidden_layers))
        self.norm = RMSNorm(config.hidden_size, config.rms_norm_eps)

    def forward(self, input_ids: Tensor, patch_size: int, documents: Tensor | None) -> Tensor:
        x = self.embed_tokens(input_ids, patch_size=patch_size)  # (B, P, D)
        rotary = rotary_table(x, documents, self.config)
        for block in self.layers:
            if self.config.activation_checkpointing and torch.is_grad_enabled():
                x = checkpoint(block, x, rotary, documents, use_reentrant=False)
            else:
                x = block(x, rotary, documents)
        out: Tensor = self.norm(x)
        return out


class RMSNorm(nn.Module):
    """``weight * x / sqrt(mean x^2 + eps)``, statistics in fp32 (fp64 for fp64)."""

    def __init__(self, size: int, eps: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(size))
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        wide = x.float() if x.dtype in (torch.bfloat16, torch.float16) else x
        return self.weight * F.rms_norm(wide, (x.shape[-1],), eps=self.eps).to(x.dtype)


class Block(nn.Module):
    def __init__(self, config: PatchLMConfig) -> None:
        super().__init__()
        self.input_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.self_attn = Attention(config)
        self.post_attention_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.mlp = MLP(config)

    def forward(self, x: Tensor, rotary: tuple[Tensor, Tensor], documents: Tensor | None) -> Tensor:
        x = x + self.self_attn(self.input_layernorm(x), rotary, documents)
        out: Tensor = x + self.mlp(self.post_attention_layernorm(x))
        return out


class Attention(nn.Module):
    def __init__(self, config: PatchLMConfig) -> None:
        super().__init__()
        self.backend = config.attention
        self.head_size = config.head_size
        queries, keys = (n * config.head_size for n in (config.num_attention_heads, config.key_value_heads))
        self.q_proj = nn.Linear(config.hidden_size, queries, bias=False)
        self.k_proj = nn.Linear(config.hidden_size, keys, bias=False)
        self.v_proj = nn.Linear(config.hidden_size, keys, bias=False)
        self.o_proj = nn.Linear(queries, config.hidden_size, bias=False)
        norm = config.qk_norm
        self.q_norm = RMSNorm(config.head_size, config.rms_norm_eps) if norm else nn.Identity()
        self.k_norm = RMSNorm(config.head_size, config.rms_norm_eps) if norm else nn.Identity()

    def forward(self, x: Tensor, rotary: tuple[Tensor, Tensor], documents: Tensor | None) -> Tensor:
        q, k, v = (
            rearrange(projection(x), "b p (h d) -> b p h d", d=self.head_size)
            for projection in (self.q_proj, self.k_proj, self.v_proj)
        )
        # fp32 norm weights would widen q and k under autocast
        q, k = rotate(self.q_norm(q), rotary).to(v.dtype), rotate(self.k_norm(k), rotary).to(v.dtype)
        out = attention(q, k, v, document_ids=documents, backend=self.backend)
        projected: Tensor = self.o_proj(rearrange(out, "b p h d -> b p (h d)"))
        return projected


class MLP(nn.Module):
    """SwiGLU."""

    def __init__(self, config: PatchLMConfig) -> None:
        super().__init__()
        self.gate_proj = nn.Linear(config.hidden_size, config.intermediate_size, bias=False)
        self.up_proj = nn.Linear(config.hidden_size, config.intermediate_size, bias=False)
        self.down_proj = nn.Linear(config.intermediate_size, config.hidden_size, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.down_proj(F.silu(self.gate_proj(x)) * self.up_proj(x))
        return out


def rotary_table(x: Tensor, documents: Tensor | None, config: PatchLMConfig) -> tuple[Tensor, Tensor]:
    """cos and sin of ``position * theta^(-2i / hd)``, ``(B or 1, P, 1, hd)``, angles in fp32 (RoFormer)."""
    position = torch.arange(x.shape[1], device=x.device)[None] if documents is None else document_positions(documents)
    exponent = torch.arange(0, config.head_size, 2, device=x.device).float() / config.head_size
    angle = position[..., None].float() * (1.0 / config.rope_theta**exponent)
    angle = torch.cat([angle, angle], -1).unsqueeze(-2)
    return angle.cos().to(x.dtype), angle.sin().to(x.dtype)


def rotate(x: Tensor, rotary: tuple[Tensor, Tensor]) -> Tensor:
    """Rotary position embedding in the half-split layout of Hugging Face's LLaMA."""
    cos, sin = rotary
    first, second = x.chunk(2, -1)
    return (x * cos + torch.cat([-second, first], -1) * sin).to(x.dtype)
