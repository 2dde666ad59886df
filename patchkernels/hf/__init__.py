"""Patch training in any causal language model of Hugging Face transformers: ``enable(model, patch_size=4)``.

A patch step is the model's own forward, with the mean of K embeddings as ``inputs_embeds`` and the K-token loss in
place of its loss. If the logits that reach the model's ``loss_function`` are the output of its head, times a constant
or soft-capped, the loss is formed inside the head and the logits never exist ("fused"). In other models it is formed
from the logits that the model computed ("materialised"). Which of the two is exact is found by running the model when
it is enabled; a model in which neither is exact is refused.

The classes of the model, its embedding and its head are swapped for subclasses of them, so that ``deepcopy``, pickling,
``save_pretrained``, ``generate`` and ``state_dict`` keep working. :func:`disable` gives the original classes back.
"""

from typing import Any

from patchkernels.hf.enable import disable, enable, is_fused, token_level, unwrap
from patchkernels.hf.patch_step import PatchSizeError
from patchkernels.hf.rows import PatchCollator, PatchRows, PatchStream, example_schedule

__all__ = [
    "PatchCollator",
    "PatchRows",
    "PatchSizeError",
    "PatchStream",
    "PatchTrainer",
    "PatchTraining",
    "disable",
    "enable",
    "example_schedule",
    "is_fused",
    "token_level",
    "unwrap",
]


def __getattr__(name: str) -> Any:
    """Imports the Trainer when it is first asked for, since it needs transformers."""
    if name in ("PatchTrainer", "PatchTraining"):
        from patchkernels.hf import trainer

        return getattr(trainer, name)
    raise AttributeError(f"module 'patchkernels.hf' has no attribute {name!r}")
