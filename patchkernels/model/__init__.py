"""The library's own language model: its settings, the network, and Hugging Face folders of it."""

from patchkernels.model.config import PRESETS, PatchLMConfig
from patchkernels.model.patch_lm import PatchLM

__all__ = ["PRESETS", "PatchLM", "PatchLMConfig"]
