"""The library's own language model: its settings, the network, and its Hugging Face folders."""

from patchkernels.model.config import PRESETS, PatchLMConfig
from patchkernels.model.patch_lm import PatchLM

__all__ = ["PRESETS", "PatchLM", "PatchLMConfig"]
