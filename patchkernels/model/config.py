"""The settings of :class:`patchkernels.PatchLM`, and named presets."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Any

from patchkernels.model.attention import ATTENTIONS


@dataclass(frozen=True)
class PatchLMConfig:
    """Settings of :class:`patchkernels.PatchLM`, with the names of Hugging Face's ``LlamaConfig``.

    Raises:
        ValueError: a setting out of its range, or settings that do not fit together.
    """

    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_hidden_layers: int
    num_attention_heads: int
    num_key_value_heads: int | None = None  # None: as many as attention heads
    head_dim: int | None = None  # None: hidden_size / num_attention_heads
    max_position_embeddings: int = 2048  # positions are patches in a patch phase, tokens in a token phase
    rms_norm_eps: float = 1e-5
    rope_theta: float = 10000.0
    qk_norm: bool = False  # RMSNorm of every head's queries and keys, as in Qwen3
    tie_word_embeddings: bool = False
    initializer_range: float = 0.02
    attention: str = "auto"  # one of ATTENTIONS
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
        """``head_dim``, or ``hidden_size / num_attention_heads`` if it is None."""
        return self.head_dim or self.hidden_size // self.num_attention_heads

    @property
    def key_value_heads(self) -> int:
        """``num_key_value_heads``, or ``num_attention_heads`` if it is None."""
        return self.num_key_value_heads or self.num_attention_heads

    @classmethod
    def preset(cls, name: str, **changes: Any) -> PatchLMConfig:
        """The settings called ``name`` in ``PRESETS``, with ``changes``. Raises ValueError for an unknown name."""
        if name not in PRESETS:
            raise ValueError(f"preset must be one of {sorted(PRESETS)}, got {name!r}")
        return dataclasses.replace(PRESETS[name], **changes)


PRESETS = {
    "0.4m": PatchLMConfig(4096, 64, 176, 3, 4, max_position_embeddings=256, tie_word_embeddings=True),
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
