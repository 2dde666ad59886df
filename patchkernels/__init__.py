"""patchkernels: patch-level training of language models (arXiv 2407.12665, arXiv 2605.06546)."""

import importlib
from typing import TYPE_CHECKING, Any

from patchkernels.nn import PatchEmbedding, PatchLMHead
from patchkernels.ops.linear_patch_cross_entropy import linear_patch_cross_entropy
from patchkernels.ops.patch_cross_entropy import patch_cross_entropy
from patchkernels.ops.patch_embedding import patch_embedding
from patchkernels.ops.targets import next_patch_targets

if TYPE_CHECKING:
    from patchkernels.model import PatchLM, PatchLMConfig

__all__ = [
    "PatchEmbedding",
    "PatchLM",
    "PatchLMConfig",
    "PatchLMHead",
    "linear_patch_cross_entropy",
    "next_patch_targets",
    "patch_cross_entropy",
    "patch_embedding",
]


def __getattr__(name: str) -> Any:
    """Imports the model and the integrations on first access, because the operators need none of them."""
    if name in ("PatchLM", "PatchLMConfig"):
        return getattr(importlib.import_module("patchkernels.model"), name)
    if name in ("hf", "reference", "torchtitan"):
        return importlib.import_module(f"patchkernels.{name}")
    raise AttributeError(f"module 'patchkernels' has no attribute {name!r}")
