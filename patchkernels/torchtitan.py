"""Patch training in torchtitan, as a module of it: ``--module patchkernels.torchtitan --config llama3_8b``.

    torchrun --nproc-per-node 8 -m torchtitan.train --module patchkernels.torchtitan --config llama3_debugmodel

What torchtitan's configurations of that name are, with three parts exchanged: the token embedding, which averages where
ids come as patches (B, P, K); the loss of a chunk's logits, which takes K targets a row where labels come as (B, P, K);
and the Trainer, whose batches are patches as long as its phase is. Parameters, their names and everything else stay.
"""

from __future__ import annotations

import dataclasses
import importlib.metadata
import math
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from patchkernels.patch_cross_entropy import next_patch_targets, patch_cross_entropy
from patchkernels.patch_embedding import patch_embedding
from patchkernels.schedule import Phase, parse_phases

KNOWN_VERSIONS = ("0.3.0",)  # its interfaces move from one to the next

try:
    version = importlib.metadata.version("torchtitan")
except importlib.metadata.PackageNotFoundError as error:
    raise ImportError("patchkernels.torchtitan needs torchtitan: pip install 'patchkernels[torchtitan]'") from error
if version not in KNOWN_VERSIONS:
    raise ImportError(f"patchkernels.torchtitan knows torchtitan {', '.join(KNOWN_VERSIONS)}, found {version}")

from torchtitan.components.loss import IGNORE_INDEX, ChunkedLossWrapper, CrossEntropyLoss, cross_entropy_loss  # noqa: E402
from torchtitan.models.common.embedding import Embedding  # noqa: E402
from torchtitan.models.deepseek_v3 import config_registry as deepseek_v3  # noqa: E402
from torchtitan.models.gpt_oss import config_registry as gpt_oss  # noqa: E402
from torchtitan.models.llama3 import config_registry as llama3  # noqa: E402
from torchtitan.models.qwen3 import config_registry as qwen3  # noqa: E402
from torchtitan.trainer import Trainer  # noqa: E402

Batch = tuple[dict[str, Tensor], Tensor]


class PatchEmbedding(Embedding):  # type: ignore[misc]
    """``out[b, p] = (1/K) sum_k weight[ids[b, p, k]]`` for ids (B, P, K); torchtitan's own embedding for ids (B, T)."""

    @dataclass(kw_only=True, slots=True)
    class Config(Embedding.Config):  # type: ignore[misc]
        pass

    def forward(self, input: Tensor) -> Tensor:
        if input.ndim == 2:
            out: Tensor = super().forward(input)
        elif self.tp_group is not None:  # each rank's part of the sum, which torchtitan adds up
            out = super().forward(input.flatten(1)).unflatten(1, input.shape[1:]).mean(2)
        else:
            out = patch_embedding(input.flatten(1), self.weight, input.shape[2], padding_idx=self.padding_idx)
        return out


class PatchCrossEntropyLoss(CrossEntropyLoss):  # type: ignore[misc]
    """The sum over K targets of their cross entropies with one row of logits, for labels (B, P, K)."""

    @dataclass(kw_only=True, slots=True)
    class Config(CrossEntropyLoss.Config):  # type: ignore[misc]
        pass

    def __init__(self, config: Any, *, compile_config: Any = None) -> None:
        super().__init__(config, compile_config=compile_config)
        self.fn: Callable[..., Tensor]
        token_level: Callable[..., Tensor] = self.fn

        def loss(pred: Tensor, labels: Tensor, *, global_vocab_size: int | None = None) -> Tensor:
            if labels.ndim == 2:
                found: Tensor = token_level(pred, labels, global_vocab_size=global_vocab_size)
            elif type(pred) is Tensor and global_vocab_size in (None, pred.shape[-1]):
                found = patch_cross_entropy(pred, labels, reduction="sum", ignore_index=IGNORE_INDEX)
            else:  # logits in shards of the vocabulary: torchtitan's loss of them, slot by slot
                slots = labels.unbind(-1)
                found = sum(cross_entropy_loss(pred, slot, global_vocab_size=global_vocab_size) for slot in slots)
            return found

        self.fn = loss


class PatchTrainer(Trainer):  # type: ignore[misc]
    """torchtitan's Trainer through phases of steps; which phase a step is in, the step alone decides.

    A row of a patch step is K consecutive rows of the dataloader: as many positions in every phase. Packed documents
    are not told apart in patch steps, since they do not begin on patch boundaries.
    """

    @dataclass(kw_only=True, slots=True)
    class Config(Trainer.Config):  # type: ignore[misc]
        phases: str = "4:1/3,1:2/3"
        """Patch size and share of the steps of each phase, in order (TST's r; 4:1/3,1:2/3 reads 2/3 of the data)."""

    def __init__(self, config: Any) -> None:
        self.patch_phases = parse_phases(config.phases)
        steps_of_phases(self.patch_phases, config.training.steps)
        super().__init__(config)

    def batch_generator(self, data_iterable: Iterable[Batch]) -> Iterator[Batch]:
        batches = super().batch_generator(data_iterable)
        while True:
            size = patch_size_at(self.patch_phases, self.config.training.steps, self.step)
            yield patch_batch([next(batches) for _ in range(size)])


def steps_of_phases(phases: tuple[Phase, ...], steps: int) -> list[int]:
    """The last step of each phase, counted from 1. ``ValueError`` where a phase would have none."""
    ends = [round(steps * math.fsum(phase.share for phase in phases[: i + 1])) for i in range(len(phases))]
    if any(end <= start for start, end in zip([0, *ends], ends)):
        raise ValueError(f"every phase needs a step: {steps} steps end phases at {ends}")
    return ends


def patch_size_at(phases: tuple[Phase, ...], steps: int, step: int) -> int:
    """K of a step, counted from 1."""
    ends = steps_of_phases(phases, steps)
    return next(phase.patch_size for phase, end in zip(phases, ends) if step <= end or end == ends[-1])


def patch_batch(batches: list[Batch]) -> Batch:
    """K batches of rows to one of K rows each, in patches: ids and labels (B, P, K). One batch is left as it is.

    torchtitan's labels are shifted: ``labels[i] = token[i + 1]``. The targets of a row's last patch lie outside of it.
    """
    size = len(batches)
    if size == 1:
        return batches[0]
    inputs = torch.cat([batch["input"] for batch, _ in batches])  # (K B, T), consecutive rows of the text
    shifted = torch.cat([labels for _, labels in batches])
    inputs, shifted = (rows.unflatten(0, (-1, size)).flatten(1) for rows in (inputs, shifted))  # (B, K T)
    unshifted = torch.cat([torch.full_like(shifted[:, :1], IGNORE_INDEX), shifted[:, :-1]], 1)
    patches = inputs.unflatten(1, (-1, size))
    positions = torch.arange(patches.shape[1]).expand(patches.shape[:2])
    return {"input": patches, "positions": positions}, next_patch_targets(unshifted, size, IGNORE_INDEX)


def with_patches(config: Any) -> Any:
    """A configuration of torchtitan's Trainer as one of :class:`PatchTrainer`."""
    model = config.model_spec.model
    embedding = model.tok_embeddings
    fields = {field.name: getattr(embedding, field.name) for field in dataclasses.fields(embedding) if field.init}
    model.tok_embeddings = PatchEmbedding.Config(**fields)
    config.loss = exchange_loss(config.loss)
    values = {field.name: getattr(config, field.name) for field in dataclasses.fields(config) if field.init}
    return PatchTrainer.Config(**values)


def exchange_loss(loss: Any) -> Any:
    """``ValueError`` for a loss that is not the cross entropy of logits."""
    if isinstance(loss, ChunkedLossWrapper.Config):
        return dataclasses.replace(loss, loss_fn=exchange_loss(loss.loss_fn))
    if type(loss) is not CrossEntropyLoss.Config:
        raise ValueError(f"patch training needs torchtitan's CrossEntropyLoss, got {type(loss).__qualname__}")
    return PatchCrossEntropyLoss.Config(global_vocab_size=loss.global_vocab_size)


def _patched(make: Callable[[], Any]) -> Callable[[], Any]:
    def configuration() -> Any:
        return with_patches(make())

    configuration.__doc__ = f"torchtitan's ``{make.__name__}`` with patches."
    return configuration


llama3_debugmodel, llama3_8b, llama3_70b, llama3_405b = map(
    _patched, (llama3.llama3_debugmodel, llama3.llama3_8b, llama3.llama3_70b, llama3.llama3_405b)
)
qwen3_moe_debug, qwen3_30b_a3b = map(_patched, (qwen3.qwen3_moe_debug, qwen3.qwen3_30b_a3b))
deepseek_v3_debugmodel, deepseek_v3_16b, deepseek_v3_671b = map(
    _patched, (deepseek_v3.deepseek_v3_debugmodel, deepseek_v3.deepseek_v3_16b, deepseek_v3.deepseek_v3_671b)
)
gpt_oss_debugmodel, gpt_oss_20b, gpt_oss_120b = map(
    _patched, (gpt_oss.gpt_oss_debugmodel, gpt_oss.gpt_oss_20b, gpt_oss.gpt_oss_120b)
)
