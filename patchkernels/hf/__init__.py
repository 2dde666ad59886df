"""Patch training in any causal language model of Hugging Face transformers: ``enable(model, patch_size=4)``.

A patch step is the model's own forward, with the mean of K embeddings as ``inputs_embeds`` and the K-token loss in
place of its loss. If the logits that reach the model's ``loss_function`` are the output of its head, times a constant
or soft-capped, the loss is computed inside the head and the logits never exist ("fused"). In other models it is
computed from the model's own logits ("materialised"). :func:`enable` runs the model to find out which of the two is
exact, and refuses a model in which neither is. A patch step is exact if tokens that are each repeated K times give the
loss of the tokens.

The classes of the model, its embedding and its head are swapped for subclasses of them, so that ``deepcopy``, pickling,
``save_pretrained``, ``generate`` and ``state_dict`` keep working. :func:`disable` restores the original classes.
"""

from typing import Any

from patchkernels.hf.collator import PatchCollator
from patchkernels.hf.enable import disable, enable, is_fused, token_level, unwrap
from patchkernels.hf.patch_arguments import PatchSizeError
from patchkernels.hf.rows import PatchRows, PatchStream, example_schedule

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
    """Imports the Trainer on first access, because it needs transformers."""
    if name in ("PatchTrainer", "PatchTraining"):
        from patchkernels.hf import trainer

        return getattr(trainer, name)
    raise AttributeError(f"module 'patchkernels.hf' has no attribute {name!r}")
