"""A LLaMA-shaped language model over patches: patch embedding, transformer, head with the K-token loss.

Modules and parameters have Hugging Face's names, so that ``state_dict()`` has the names of ``LlamaForCausalLM`` (with
QK-norm those of ``Qwen3ForCausalLM``). The patch size is an argument of the call, and a position is a patch.
"""

from __future__ import annotations

import dataclasses
import functools
import os
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from patchkernels.model.attention import PackedDocuments, attention, document_starts, pack_documents
from patchkernels.model.config import PatchLMConfig
from patchkernels.model.hugging_face import EMBEDDING_WEIGHT, HEAD_WEIGHT, read_folder, write_folder
from patchkernels.model.rotary import rotary_table, rotate
from patchkernels.nn import PatchEmbedding, PatchLMHead
from patchkernels.ops.targets import mask_document_starts, next_patch_targets


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
        labels: Tensor | None = None,  # (B, T), not shifted
        patch_size: int = 1,
        reduction: str = "mean",
        document_ids: Tensor | None = None,  # (B, T), non-decreasing along T
        target_weight: Tensor | None = None,  # (K)
    ) -> Tensor:
        """Logits ``(B, T / K, V)``, or with labels the loss of predicting each next patch (PatchTrain, section 2).

        Args:
            input_ids: token ids, T divisible by ``patch_size``.
            labels: usually ``input_ids`` itself: the model shifts them by one patch. Labels of -100 are ignored.
            patch_size: K. 1 makes it an ordinary language model.
            reduction: as in :func:`patchkernels.patch_cross_entropy`; ``"none"`` gives ``(B, T / K, K)``.
            document_ids: the document of each token, if several documents are packed into a row. Documents must begin
                on patch boundaries, and another id begins another document. Positions restart with each document, no
                position sees another document, and none predicts the first patch of the next one. On a GPU, where
                checking the ids would cost a synchronisation, and under ``torch.compile`` a patch that straddles two
                documents is taken as part of its first token's document.
            target_weight: of the K slots of a patch, as in :func:`patchkernels.patch_cross_entropy`.

        Raises:
            ValueError: shapes that do not fit, T not divisible by K, more positions than the model has, a patch
                that straddles documents (on a CPU, not compiled).
            IndexError: ids or labels outside the vocabulary (on a CPU).
        """
        patch_size = int(patch_size)  # torch.compile may have made it symbolic; as an int, every K has its own graph
        self._check_shapes(input_ids, labels, patch_size, document_ids)
        patch_documents = None if document_ids is None else _patch_documents(document_ids, patch_size)
        tied: dict[str, Tensor] = {}
        if labels is not None and self._shares_its_gradient():
            hidden, tied["weight"] = self.model(input_ids, patch_size, patch_documents, return_weight=True)
        else:
            hidden = self.model(input_ids, patch_size, patch_documents)
        if labels is None:
            logits: Tensor = self.lm_head(hidden)
            return logits
        target = patch_targets(labels, patch_size, document_ids)
        loss: Tensor = self.lm_head(hidden, target=target, reduction=reduction, target_weight=target_weight, **tied)
        return loss

    def compile_layers(self) -> None:
        """Compiles all layers into one graph, which serves every patch size at the same number of positions.

        Embedding and loss stay outside of it: each is one operator, whatever compiles them.
        """
        self.model.compiles_layers = True

    def _shares_its_gradient(self) -> bool:
        """Whether the embedding hands its weight to the head. To hooks of others its output is a tensor as ever."""
        embedding, head = self.model.embed_tokens, self.lm_head
        ours = isinstance(embedding, PatchEmbedding) and isinstance(head, PatchLMHead)
        hooked = self.model._forward_hooks or embedding._forward_hooks
        return torch.is_grad_enabled() and ours and not hooked and head.weight is embedding.weight

    def _check_shapes(
        self, input_ids: Tensor, labels: Tensor | None, patch_size: int, document_ids: Tensor | None
    ) -> None:
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
        positions = input_ids.shape[1] // patch_size
        if positions > self.config.max_position_embeddings:
            raise ValueError(
                f"{positions} positions are more than max_position_embeddings={self.config.max_position_embeddings}"
            )

    def save_pretrained(self, directory: str | os.PathLike[str], **token_ids: int) -> None:
        """Writes a folder that ``transformers.AutoModelForCausalLM.from_pretrained`` loads.

        It holds ``config.json`` and ``model.safetensors`` of a LLaMA, or of a Qwen3 if the model has QK-norm.
        ``token_ids`` (``bos_token_id``, ``eos_token_id``) go into the configuration.
        """
        write_folder(directory, self.config, self.state_dict(), token_ids)

    @classmethod
    def from_pretrained(
        cls, directory: str | os.PathLike[str], *, dtype: torch.dtype | None = None, **changes: Any
    ) -> PatchLM:
        """The model in a Hugging Face folder of a LLaMA or a Qwen3. Its weights may be in one file or in several.

        Args:
            dtype: of the parameters; None keeps that of the file.
            changes: settings of :class:`PatchLMConfig` to change (``attention="sdpa"``, say).

        Raises:
            FileNotFoundError: no such folder, configuration or weights.
            ValueError: another architecture, a feature this model does not have, weights that do not fit.
        """
        config, weights = read_folder(directory)
        config = dataclasses.replace(config, **changes)
        if config.tie_word_embeddings:
            weights.setdefault(HEAD_WEIGHT, weights.get(EMBEDDING_WEIGHT, torch.empty(0)))
        with torch.device("meta"):
            model = cls(config)
        expected = {name: tensor.shape for name, tensor in model.state_dict().items()}
        wrong = [name for name in expected if name not in weights or weights[name].shape != expected[name]]
        extra = [name for name in weights if name not in expected]
        if wrong or extra:
            raise ValueError(
                f"{Path(directory)}: weights missing or of another shape: {wrong[:5]}, unexpected: {extra[:5]}"
            )
        model.load_state_dict(weights, assign=True)
        if config.tie_word_embeddings:
            model.lm_head.weight = model.model.embed_tokens.weight
        for parameter in model.parameters():
            parameter.requires_grad_(True)
        return model if dtype is None else model.to(dtype)


def patch_targets(labels: Tensor, patch_size: int, document_ids: Tensor | None) -> Tensor:
    """The targets of every patch, ``(B, T / K, K)``: the tokens of the next patch if it is of the same document.

    These are :func:`patchkernels.next_patch_targets` with the first patch of every document ignored.
    """
    target = next_patch_targets(labels, patch_size)
    if document_ids is None:
        return target
    return mask_document_starts(target, document_starts(_patch_documents(document_ids, patch_size)))


def _patch_documents(document_ids: Tensor, patch_size: int) -> Tensor:
    """The document of every patch, ``(B, T / K)``: that of its first token."""
    patches = document_ids.unflatten(1, (-1, patch_size))
    checked = document_ids.device.type == "cpu" and not torch.compiler.is_compiling()  # reading would break the graph
    if checked and bool((patches != patches[..., :1]).any()):
        raise ValueError(f"every document must begin on a patch boundary, a multiple of patch_size={patch_size} tokens")
    first: Tensor = patches[..., 0]
    return first


class Transformer(nn.Module):
    """Everything below the head: maps ``input_ids (B, T)``, ``document_ids (B, P)`` to hidden states ``(B, P, D)``.

    With ``return_weight``, also returns the embedding's weight for a tied head.
    """

    def __init__(self, config: PatchLMConfig) -> None:
        super().__init__()
        self.config = config
        self.embed_tokens = PatchEmbedding(config.vocab_size, config.hidden_size)
        self.layers = nn.ModuleList(Block(config) for _ in range(config.num_hidden_layers))
        self.norm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.compiles_layers = False

    def forward(
        self, input_ids: Tensor, patch_size: int, document_ids: Tensor | None, return_weight: bool = False
    ) -> Any:
        embedded = self.embed_tokens(input_ids, patch_size=patch_size, return_weight=return_weight)
        x, weight = embedded if return_weight else (embedded, None)  # (B, P, D), (V, D)
        x = x.to(matmul_dtype(x.device, x.dtype))
        rotary = rotary_table(x, document_ids, self.config.head_size, self.config.rope_theta)
        documents = None
        if document_ids is not None:
            documents = pack_documents(document_ids, self.config.attention, x.dtype, self.config.head_size)
        through_layers = compiled_layers() if self.compiles_layers else Transformer.through_layers
        out = through_layers(self, x, rotary, documents)
        return (out, weight) if return_weight else out

    def through_layers(self, x: Tensor, rotary: tuple[Tensor, Tensor], documents: PackedDocuments | None) -> Tensor:
        """All layers and the norm after them. Shapes here depend on the number of positions alone, not on K."""
        for block in self.layers:
            if self.config.activation_checkpointing and torch.is_grad_enabled():
                x = checkpoint(block, x, rotary, documents, use_reentrant=False)
            else:
                x = block(x, rotary, documents)
        out: Tensor = self.norm(x)
        return out


@functools.cache
def compiled_layers() -> Any:
    """The function for all models, so that a copy of a model calls its own layers."""
    return torch.compile(Transformer.through_layers, dynamic=False)


class RMSNorm(nn.Module):
    """``weight * x / sqrt(mean x^2 + eps)``, computed in fp32 (in fp64 for fp64) and rounded once."""

    def __init__(self, size: int, eps: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(size))
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        wide = x.float() if x.dtype in (torch.bfloat16, torch.float16) else x
        return F.rms_norm(wide, (x.shape[-1],), self.weight.to(wide.dtype), self.eps).to(x.dtype)


class Block(nn.Module):
    """A transformer layer: attention and MLP, each preceded by an RMSNorm and added to its input."""

    def __init__(self, config: PatchLMConfig) -> None:
        super().__init__()
        self.input_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.self_attn = Attention(config)
        self.post_attention_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.mlp = MLP(config)

    def forward(self, x: Tensor, rotary: tuple[Tensor, Tensor], documents: PackedDocuments | None) -> Tensor:
        x = x + self.self_attn(self.input_layernorm(x), rotary, documents)
        out: Tensor = x + self.mlp(self.post_attention_layernorm(x))
        return out


class Attention(nn.Module):
    """Causal self-attention with grouped queries and rotary positions; QK-norm if the configuration asks for it."""

    def __init__(self, config: PatchLMConfig) -> None:
        super().__init__()
        self.attention = config.attention
        self.head_size = config.head_size
        query_size = config.num_attention_heads * config.head_size
        key_size = config.key_value_heads * config.head_size
        self.q_proj = nn.Linear(config.hidden_size, query_size, bias=False)
        self.k_proj = nn.Linear(config.hidden_size, key_size, bias=False)
        self.v_proj = nn.Linear(config.hidden_size, key_size, bias=False)
        self.o_proj = nn.Linear(query_size, config.hidden_size, bias=False)
        self.q_norm = RMSNorm(config.head_size, config.rms_norm_eps) if config.qk_norm else nn.Identity()
        self.k_norm = RMSNorm(config.head_size, config.rms_norm_eps) if config.qk_norm else nn.Identity()

    def forward(self, x: Tensor, rotary: tuple[Tensor, Tensor], documents: PackedDocuments | None) -> Tensor:
        q, k, v = (
            rearrange(projection(x), "b p (h d) -> b p h d", d=self.head_size)
            for projection in (self.q_proj, self.k_proj, self.v_proj)
        )
        q, k = rotate(self.q_norm(q), rotary), rotate(self.k_norm(k), rotary)
        out = attention(q, k, v, documents=documents, implementation=self.attention)
        projected: Tensor = self.o_proj(rearrange(out, "b p h d -> b p (h d)"))
        return projected


class MLP(nn.Module):
    """SwiGLU: ``down(silu(gate(x)) * up(x))``."""

    def __init__(self, config: PatchLMConfig) -> None:
        super().__init__()
        self.gate_proj = nn.Linear(config.hidden_size, config.intermediate_size, bias=False)
        self.up_proj = nn.Linear(config.hidden_size, config.intermediate_size, bias=False)
        self.down_proj = nn.Linear(config.intermediate_size, config.hidden_size, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.down_proj(F.silu(self.gate_proj(x)) * self.up_proj(x))
        return out


@torch.compiler.assume_constant_result  # type: ignore[untyped-decorator]  # torch.compile calls it, and does not trace it
def matmul_dtype(device: torch.device, dtype: torch.dtype) -> torch.dtype:
    """The dtype of a linear layer's output for an input of this dtype: autocast's if it is enabled, except for fp64."""
    name = device.type
    autocast = torch.amp.is_autocast_available(name) and torch.is_autocast_enabled(name)
    return torch.get_autocast_dtype(name) if autocast and dtype != torch.float64 else dtype
