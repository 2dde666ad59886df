"""Patch training in torchtitan, for the option ``--module`` of its command line.

    torchrun --nproc-per-node 8 -m torchtitan.train --module patchkernels.torchtitan --config llama3_debugmodel

The configurations here are torchtitan's of the same names with three parts replaced. The token embedding averages ids
that come as patches (B, P, K). The loss takes K targets for each row of logits where labels come as patches (B, P, K).
And the Trainer makes batches of patches in the steps of a patch phase. Everything else, including parameters
and their names, stays as it is.
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

from patchkernels.ops.patch_cross_entropy import patch_cross_entropy
from patchkernels.ops.patch_embedding import patch_embedding
from patchkernels.ops.targets import next_patch_targets
from patchkernels.schedule import Phase, parse_phases

KNOWN_VERSIONS = ("0.3.0",)  # the interfaces used here change from version to version

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


class TitanPatchEmbedding(Embedding):  # type: ignore[misc]
    """``out[b, p] = (1/K) sum_k weight[ids[b, p, k]]`` for ids (B, P, K); torchtitan's own embedding for ids (B, T)."""

    @dataclass(kw_only=True, slots=True)
    class Config(Embedding.Config):  # type: ignore[misc]
        pass

    def forward(self, input: Tensor) -> Tensor:
        if input.ndim == 2:
            output: Tensor = super().forward(input)
        elif self.tp_group is not None:  # every rank holds a part of the vocabulary; torchtitan adds up their outputs
            output = super().forward(input.flatten(1)).unflatten(1, input.shape[1:]).mean(2)
        else:
            output = patch_embedding(input.flatten(1), self.weight, input.shape[2], padding_idx=self.padding_idx)
        return output


class TitanPatchCrossEntropy(CrossEntropyLoss):  # type: ignore[misc]
    """For labels (B, P, K), the sum of the cross entropies of every row of logits with its K targets.

    For labels (B, T), torchtitan's own loss.
    """

    @dataclass(kw_only=True, slots=True)
    class Config(CrossEntropyLoss.Config):  # type: ignore[misc]
        pass

    def __init__(self, config: Any, *, compile_config: Any = None) -> None:
        super().__init__(config, compile_config=compile_config)
        self.fn: Callable[..., Tensor]
        token_level: Callable[..., Tensor] = self.fn

        def loss(pred: Tensor, labels: Tensor, *, global_vocab_size: int | None = None) -> Tensor:
            if labels.ndim == 2:
                result: Tensor = token_level(pred, labels, global_vocab_size=global_vocab_size)
            elif type(pred) is Tensor and global_vocab_size in (None, pred.shape[-1]):
                result = patch_cross_entropy(pred, labels, reduction="sum", ignore_index=IGNORE_INDEX)
            else:  # every process holds the logits of a part of the vocabulary, which only torchtitan's loss takes
                slots = labels.unbind(-1)
                result = sum(cross_entropy_loss(pred, slot, global_vocab_size=global_vocab_size) for slot in slots)
            return result

        self.fn = loss


class TitanPatchTrainer(Trainer):  # type: ignore[misc]
    """torchtitan's Trainer for a run in phases. The phase depends only on the number of the step.

    A row of a patch step is K consecutive rows of the dataloader, so that rows have the same number of positions in
    every phase. Patch steps ignore where packed documents begin, because they do not begin on patch boundaries:
    attention reaches from one document into the next.
    """

    @dataclass(kw_only=True, slots=True)
    class Config(Trainer.Config):  # type: ignore[misc]
        phases: str = "4:1/3,1:2/3"
        """Patch size and share of the steps of each phase, in order (TST's r); 4:1/3,1:2/3 reads 2/3 of the data in
        patches."""

    def __init__(self, config: Any) -> None:
        self.patch_phases = parse_phases(config.phases)
        phase_ends(self.patch_phases, config.training.steps)  # raises before anything is built
        super().__init__(config)

    def batch_generator(self, data_iterable: Iterable[Batch]) -> Iterator[Batch]:
        batches = super().batch_generator(data_iterable)
        while True:
            patch_size = patch_size_at(self.patch_phases, self.config.training.steps, self.step)
            yield patch_batch([next(batches) for _ in range(patch_size)])


def phase_ends(phases: tuple[Phase, ...], steps: int) -> list[int]:
    """The last step of each phase, counted from 1.

    Raises:
        ValueError: so few steps that a phase would have none.
    """
    ends = [round(steps * math.fsum(phase.share for phase in phases[: i + 1])) for i in range(len(phases))]
    if any(end <= start for start, end in zip([0, *ends], ends)):
        raise ValueError(f"every phase needs a step: {steps} steps end phases at {ends}")
    return ends


def patch_size_at(phases: tuple[Phase, ...], steps: int, step: int) -> int:
    """The patch size of a step, counted from 1."""
    ends = phase_ends(phases, steps)
    return next(phase.patch_size for phase, end in zip(phases, ends) if step <= end or end == ends[-1])


def patch_batch(batches: list[Batch]) -> Batch:
    """Joins K batches into one whose rows are K rows long and cut into patches: ids and labels (B, P, K).

    A single batch is left as it is. torchtitan's labels are shifted, ``labels[i] = token[i + 1]``; they are shifted
    back here. The last patch of a row has no targets, since those lie outside of the row.
    """
    patch_size = len(batches)
    if patch_size == 1:
        return batches[0]
    inputs = torch.cat([batch["input"] for batch, _ in batches])  # (K B, T), consecutive rows of the text
    shifted = torch.cat([labels for _, labels in batches])
    inputs, shifted = (rows.unflatten(0, (-1, patch_size)).flatten(1) for rows in (inputs, shifted))  # (B, K T)
    unshifted = torch.cat([torch.full_like(shifted[:, :1], IGNORE_INDEX), shifted[:, :-1]], 1)
    patches = inputs.unflatten(1, (-1, patch_size))
    positions = torch.arange(patches.shape[1]).expand(patches.shape[:2])
    return {"input": patches, "positions": positions}, next_patch_targets(unshifted, patch_size, IGNORE_INDEX)


def with_patches(config: Any) -> Any:
    """Turns a configuration of torchtitan's Trainer into one of :class:`TitanPatchTrainer`."""
    model = config.model_spec.model
    model.tok_embeddings = TitanPatchEmbedding.Config(**fields_of(model.tok_embeddings))
    config.loss = with_patch_loss(config.loss)
    return TitanPatchTrainer.Config(**fields_of(config))


def fields_of(config: Any) -> dict[str, Any]:
    return {field.name: getattr(config, field.name) for field in dataclasses.fields(config) if field.init}


def with_patch_loss(loss: Any) -> Any:
    """Turns a configuration of torchtitan's cross entropy, in chunks or not, into :class:`TitanPatchCrossEntropy`'s.

    Raises:
        ValueError: any other loss.
    """
    if isinstance(loss, ChunkedLossWrapper.Config):
        return dataclasses.replace(loss, loss_fn=with_patch_loss(loss.loss_fn))
    if type(loss) is not CrossEntropyLoss.Config:
        raise ValueError(f"patch training needs torchtitan's CrossEntropyLoss, got {type(loss).__qualname__}")
    return TitanPatchCrossEntropy.Config(global_vocab_size=loss.global_vocab_size)


def patched(make_config: Callable[[], Any]) -> Callable[[], Any]:
    """Wraps a function of torchtitan that returns a configuration: the result is with patches."""

    def configuration() -> Any:
        return with_patches(make_config())

    configuration.__doc__ = f"torchtitan's ``{make_config.__name__}`` with patches."
    return configuration


llama3_debugmodel, llama3_8b, llama3_70b, llama3_405b = map(
    patched, (llama3.llama3_debugmodel, llama3.llama3_8b, llama3.llama3_70b, llama3.llama3_405b)
)
qwen3_moe_debug, qwen3_30b_a3b = map(patched, (qwen3.qwen3_moe_debug, qwen3.qwen3_30b_a3b))
deepseek_v3_debugmodel, deepseek_v3_16b, deepseek_v3_671b = map(
    patched, (deepseek_v3.deepseek_v3_debugmodel, deepseek_v3.deepseek_v3_16b, deepseek_v3.deepseek_v3_671b)
)
gpt_oss_debugmodel, gpt_oss_20b, gpt_oss_120b = map(
    patched, (gpt_oss.gpt_oss_debugmodel, gpt_oss.gpt_oss_20b, gpt_oss.gpt_oss_120b)
)
