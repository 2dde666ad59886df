"""The peer of ``patchkernels train``: the same model and step in plain PyTorch, in the manner of nanoGPT.

Rows are drawn at random from one array of token ids, AdamW is fused, and the loss is read every ``LOG_EVERY`` steps.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from patchkernels import PatchLMConfig

LOG_EVERY = 20


class PlainAttention(nn.Module):
    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.q_proj, self.k_proj, self.v_proj, self.o_proj = (nn.Linear(width, width, bias=False) for _ in range(4))

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:  # x (B, T, D), cos and sin (T, D / heads)
        q, k, v = (
            projection(x).unflatten(-1, (self.heads, -1)).transpose(1, 2)
            for projection in (self.q_proj, self.k_proj, self.v_proj)
        )
        out = F.scaled_dot_product_attention(turned(q, cos, sin), turned(k, cos, sin), v, is_causal=True)
        projected: Tensor = self.o_proj(out.transpose(1, 2).flatten(-2))
        return projected


def turned(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    first, second = x.chunk(2, -1)
    return x * cos + torch.cat([-second, first], -1) * sin


class PlainMLP(nn.Module):
    def __init__(self, width: int, inner: int) -> None:
        super().__init__()
        self.gate_proj, self.up_proj = nn.Linear(width, inner, bias=False), nn.Linear(width, inner, bias=False)
        self.down_proj = nn.Linear(inner, width, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.down_proj(F.silu(self.gate_proj(x)) * self.up_proj(x))
        return out


class PlainBlock(nn.Module):
    def __init__(self, config: PatchLMConfig) -> None:
        super().__init__()
        width, eps = config.hidden_size, config.rms_norm_eps
        self.input_layernorm, self.post_attention_layernorm = nn.RMSNorm(width, eps), nn.RMSNorm(width, eps)
        self.self_attn = PlainAttention(width, config.num_attention_heads)
        self.mlp = PlainMLP(width, config.intermediate_size)

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        x = x + self.self_attn(self.input_layernorm(x), cos, sin)
        out: Tensor = x + self.mlp(self.post_attention_layernorm(x))
        return out


class PlainTransformer(nn.Module):
    def __init__(self, config: PatchLMConfig) -> None:
        super().__init__()
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size)
        self.layers = nn.ModuleList(PlainBlock(config) for _ in range(config.num_hidden_layers))
        self.norm = nn.RMSNorm(config.hidden_size, config.rms_norm_eps)
        size = config.head_size
        frequency = config.rope_theta ** -(torch.arange(0, size, 2).float() / size)
        angle = torch.outer(torch.arange(config.max_position_embeddings).float(), frequency)
        self.register_buffer("cos", torch.cat([angle, angle], -1).cos(), persistent=False)
        self.register_buffer("sin", torch.cat([angle, angle], -1).sin(), persistent=False)

    def forward(self, ids: Tensor) -> Tensor:
        x, tokens = self.embed_tokens(ids), ids.shape[1]
        for layer in self.layers:
            x = layer(x, self.cos[:tokens], self.sin[:tokens])
        out: Tensor = self.norm(x)
        return out


class PlainLM(nn.Module):
    """A LLaMA with the parameters' names of ``PatchLM``, without its patches, documents and checks."""

    def __init__(self, config: PatchLMConfig) -> None:
        super().__init__()
        self.model = PlainTransformer(config)
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        if config.tie_word_embeddings:
            self.lm_head.weight = self.model.embed_tokens.weight

    def forward(self, ids: Tensor, target: Tensor) -> Tensor:
        logits = self.lm_head(self.model(ids))
        return F.cross_entropy(logits.flatten(0, 1), target.flatten())


class PlainLoop:
    """One training step after the other."""

    def __init__(
        self, model: PlainLM, ids: np.ndarray[Any, Any], rows: int, context: int, device: torch.device, compiled: bool
    ) -> None:
        self.model, self.ids, self.rows, self.context, self.device = model, ids, rows, context, device
        self.call = torch.compile(model, dynamic=False) if compiled else model
        parameters = list(model.parameters())
        groups = [
            {"params": [p for p in parameters if p.ndim >= 2], "weight_decay": 0.1},
            {"params": [p for p in parameters if p.ndim < 2], "weight_decay": 0.0},
        ]
        self.optimizer = torch.optim.AdamW(groups, lr=1e-3, betas=(0.9, 0.95), fused=True)
        self.taken = 0
        self.batch = self.next_batch()

    def next_batch(self) -> tuple[Tensor, Tensor]:
        """Rows from random places, and the tokens that follow each of theirs."""
        starts = torch.randint(len(self.ids) - self.context, (self.rows,)).tolist()
        rows = [torch.from_numpy(self.ids[start : start + self.context + 1].astype(np.int64)) for start in starts]
        return tuple(  # type: ignore[return-value]
            torch.stack([row[part] for row in rows]).to(self.device, non_blocking=True)
            for part in (slice(-1), slice(1, None))
        )

    def step(self) -> None:
        with torch.autocast(self.device.type, torch.bfloat16, enabled=self.device.type == "cuda"):
            loss = self.call(*self.batch)
        self.batch = self.next_batch()
        loss.backward()
        nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        self.taken += 1
        if self.taken % LOG_EVERY == 0:
            loss.item()
