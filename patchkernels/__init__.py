"""patchkernels: patch-level training of language models, at half the bill (arXiv 2407.12665, arXiv 2605.06546)."""

from typing import TYPE_CHECKING, Any

from patchkernels.linear_patch_cross_entropy import linear_patch_cross_entropy
from patchkernels.modules import PatchEmbedding, PatchLMHead
from patchkernels.patch_cross_entropy import next_patch_targets, patch_cross_entropy
from patchkernels.patch_embedding import patch_embedding

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
    """The model is imported when it is first asked for: the operators alone need none of it."""
    if name in ("PatchLM", "PatchLMConfig"):
        from patchkernels import model

        return getattr(model, name)
    raise AttributeError(f"module 'patchkernels' has no attribute {name!r}")
