"""patchkernels: patch-level training of language models, at half the bill (arXiv 2407.12665, arXiv 2605.06546)."""

from patchkernels.linear_patch_cross_entropy import linear_patch_cross_entropy
from patchkernels.modules import PatchEmbedding, PatchLMHead
from patchkernels.patch_cross_entropy import next_patch_targets, patch_cross_entropy
from patchkernels.patch_embedding import patch_embedding

__all__ = [
    "PatchEmbedding",
    "PatchLMHead",
    "linear_patch_cross_entropy",
    "next_patch_targets",
    "patch_cross_entropy",
    "patch_embedding",
]
