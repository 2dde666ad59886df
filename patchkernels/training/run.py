"""The state of a training run, and one optimizer step of it.

A checkpoint need not keep the phase, the learning rate or the position in the text: all of them follow from the step.
"""

from __future__ import annotations

import contextlib
import math
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from patchkernels.data.batches import Batches, read_rows, validation_rows
from patchkernels.data.corpus import Corpus
from patchkernels.model.cost import step_flops
from patchkernels.model.patch_lm import PatchLM, patch_targets
from patchkernels.numerics import IGNORE_INDEX
from patchkernels.schedule import Phase
from patchkernels.training.checkpoint import load_checkpoint, read_state, save_checkpoint, save_distributed
from patchkernels.training.config import TrainConfig, flat_settings
from patchkernels.training.processes import Processes, full_tensor, parallelize, synchronized
from patchkernels.training.stop import StopRequest

Rows = tuple[Tensor, Tensor, Tensor | None]  # token ids, labels and, if documents are packed, document ids; each (B, T)


class NonFiniteError(RuntimeError):
    """The loss or the gradient norm is not finite. The parameters were not updated with this gradient."""


class Run:
    """The model, the optimizer and the step of a run, and the rows that it reads."""

    def __init__(self, config: TrainConfig, corpus: Corpus, processes: Processes, stop: StopRequest) -> None:
        self.config, self.corpus, self.processes, self.stop = config, corpus, processes, stop
        self.device, self.out = processes.device, Path(config.run.out)
        self.schedule = schedule = config.schedule.schedule(len(corpus.train))
        self.learning_rate = config.optimizer.learning_rate()
        context, seed, packed = config.schedule.context, config.run.seed, config.run.packed_documents
        self.architecture = config.model.architecture(
            vocab_size=corpus.vocab_size,
            max_position_embeddings=max(context, *(schedule.positions(phase) for phase in schedule.phases)),
            attention=config.run.attention,
        )
        torch.manual_seed(seed)  # the same weights in every process
        self.model = PatchLM(self.architecture).to(self.device)
        self.parameters = sum(parameter.numel() for parameter in self.model.parameters())
        self.parallel_model = parallelize(self.model, self.model.model.layers, config.run.parallel, processes)
        self.compiled_model = (
            torch.compile(self.parallel_model, dynamic=False) if config.run.compile else self.parallel_model
        )
        torch.manual_seed(seed + 1 + processes.rank)
        self.optimizer = self.new_optimizer()
        self.batches = Batches(
            corpus.train, schedule, seed, packed=packed, rank=processes.rank, world_size=processes.world_size
        )
        held_out = validation_rows(corpus.validation, context, config.log.eval_rows)
        self.held_out: Rows = read_rows(corpus.validation, held_out, context, packed)
        self.step_flops = step_flops(self.architecture, schedule)
        self.step = 0  # optimizer steps done so far
        self.step_seconds = 0.0  # duration of the last step
        self.seconds = 0.0  # duration of all steps, without compiling, evaluation and saving
        self.compile_seconds = 0.0
        self.warm_phases: set[int] = set()

    def new_optimizer(self) -> torch.optim.AdamW:
        """AdamW without any state yet. The weights of norms do not decay."""
        settings = self.config.optimizer
        matrices = [parameter for parameter in self.model.parameters() if parameter.ndim >= 2]
        vectors = [parameter for parameter in self.model.parameters() if parameter.ndim < 2]
        groups = [{"params": matrices, "weight_decay": settings.weight_decay}, {"params": vectors, "weight_decay": 0.0}]
        return torch.optim.AdamW(groups, lr=settings.lr, betas=settings.betas, fused=True)

    @property
    def finished(self) -> bool:
        return self.step == self.schedule.total_steps

    @property
    def phase_ended(self) -> bool:
        """Whether the last step was the last one of its phase."""
        return self.finished or self.schedule.locate(self.step)[1] == 0

    def enter_phase(self) -> None:
        """Prepares the phase of the next step: resets the optimizer if the settings say so, and warms up.

        It is called before every step. The reset happens only where a phase begins, the warm-up once for each phase.
        """
        index, steps_done = self.schedule.locate(self.step)
        if steps_done == 0 and self.step > 0 and self.config.optimizer.optimizer_at_switch == "reset":
            self.optimizer = self.new_optimizer()
        if index not in self.warm_phases:
            self.warm_up()
            self.warm_phases.add(index)

    def warm_up(self) -> None:
        """Runs forward and backward once and throws the gradients away.

        Compiling and first allocations then happen here, so that their time is not counted as training.
        """
        began = time.perf_counter()
        self.loss(*self.read()[0], self.phase.patch_size).backward()
        self.optimizer.zero_grad(set_to_none=True)
        if self.device.type == "cuda":
            torch.cuda.synchronize()
        self.compile_seconds += time.perf_counter() - began

    @property
    def phase(self) -> Phase:
        """The phase of the next step."""
        return self.schedule.phases[self.schedule.locate(self.step)[0]]

    @contextlib.contextmanager
    def timed(self) -> Iterator[None]:
        """Records the duration of the block as that of one training step."""
        began = time.perf_counter()
        yield
        self.step_seconds = time.perf_counter() - began
        self.seconds += self.step_seconds

    def read(self) -> list[Rows]:
        """The rows of this process for the next step, split into ``accumulation`` parts."""
        count = self.config.run.accumulation
        tensors = [None if t is None else t.to(self.device) for t in self.batches.batch(self.step)]
        return list(zip(*([None] * count if t is None else t.chunk(count) for t in tensors)))

    def train_step(self, parts: list[Rows]) -> dict[str, Any]:
        """Forward and backward over the parts, then one update. Returns loss, gradient norm and learning rate.

        Raises:
            NonFiniteError: the loss or the gradient norm is not finite.
        """
        phase, learning_rate = self.phase, self.learning_rate.at(self.step, self.schedule)
        for group in self.optimizer.param_groups:
            group["lr"] = learning_rate
        total = torch.zeros((), device=self.device)
        for index, (rows, share) in enumerate(zip(parts, self.shares(parts, phase))):
            with synchronized(self.parallel_model, last=index + 1 == len(parts)):
                loss = self.loss(*rows, phase.patch_size) * share
                loss.backward()
            total += loss.detach()
        gradient_norm = full_tensor(torch.nn.utils.clip_grad_norm_(self.model.parameters(), self.config.optimizer.clip))
        flags = [torch.tensor(flag) for flag in self.stop.flags()]
        mean_loss, mean_norm, signalled, late = self.processes.mean(total, gradient_norm, *flags)
        self.stop.agree(signalled, late)
        if not (math.isfinite(mean_loss) and math.isfinite(mean_norm)):
            raise NonFiniteError(
                f"step {self.step + 1}: loss {mean_loss}, gradient norm {mean_norm}, lr {learning_rate:.3g}; stopped "
                "before the update. The last checkpoint is from before: a smaller --lr needs a new run"
            )
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        self.step += 1
        return {"loss": mean_loss, "grad_norm": mean_norm, "lr": learning_rate}

    def shares(self, parts: list[Rows], phase: Phase) -> list[float]:
        """The weight of each part's mean loss within the loss of the step.

        The weighted sum over parts, averaged over processes, is the mean over all targets of the step. The weights are
        equal unless documents are packed, since the parts then hold different numbers of targets.
        """
        if not self.config.run.packed_documents:
            return [1 / len(parts)] * len(parts)
        targets = [patch_targets(labels, phase.patch_size, documents) for _, labels, documents in parts]
        counts = torch.stack([(target != IGNORE_INDEX).sum() for target in targets])
        (mean_count,) = self.processes.mean(counts.sum())
        return [count / max(mean_count, 1) for count in counts.tolist()]

    def loss(
        self,
        ids: Tensor,  # (B, T)
        labels: Tensor,  # (B, T)
        documents: Tensor | None,  # (B, T)
        patch_size: int,
        reduction: str = "mean",
        compiled: bool = True,
    ) -> Tensor:
        """The model's loss on these rows, under autocast if the run computes in bf16."""
        model = self.compiled_model if compiled else self.model
        with torch.autocast(self.device.type, torch.bfloat16, enabled=self.config.run.bf16):
            loss: Tensor = model(ids, labels, patch_size, reduction, documents)
        return loss

    def flops(self) -> int:
        """Counted FLOPs of the steps so far."""
        ranges = zip(self.schedule.starts, self.schedule.steps)
        done = [min(max(self.step - start, 0), steps) for start, steps in ranges]
        return sum(steps * flops for steps, flops in zip(done, self.step_flops))

    def progress(self) -> dict[str, Any]:
        """Step, phase, raw tokens, FLOPs and seconds of the run so far; after a step also the speed of that step."""
        index = self.schedule.locate(max(self.step - 1, 0))[0]
        phase, raw_tokens = self.schedule.phases[index], self.schedule.raw_tokens(self.step)
        values = {
            "step": self.step, "phase": index + 1, "patch_size": phase.patch_size, "raw_tokens": raw_tokens,
            "flops": self.flops(), "seconds": self.seconds, "compile_seconds": self.compile_seconds,
        }  # fmt: skip
        if self.step > 0:
            row_count, seconds = self.schedule.batch_size, self.step_seconds
            values |= {
                "raw_tokens_per_second": row_count * self.schedule.row_tokens(phase) / seconds,
                "positions_per_second": row_count * self.schedule.positions(phase) / seconds,
            }
        return values

    def save(self) -> None:
        """Writes a checkpoint, all processes together."""
        state = {
            "config": self.config.identity(), "corpus": self.corpus.digest, "seconds": self.seconds,
            "compile_seconds": self.compile_seconds,
        }  # fmt: skip
        save = save_distributed if self.processes.world_size > 1 else save_checkpoint
        save(self.out / "checkpoints", self.step, self.model, self.optimizer, state, self.config.checkpoint.keep)

    def restore(self, checkpoint: Path) -> None:
        """Resumes from a checkpoint.

        Raises:
            ValueError: the checkpoint is of another configuration or another text, or it is damaged.
        """
        state = read_state(checkpoint)
        saved = {**flat_settings(state["config"]), "corpus": state["corpus"]}
        current = {**flat_settings(self.config.identity()), "corpus": self.corpus.digest}
        differing = sorted(name for name in saved.keys() | current.keys() if saved.get(name) != current.get(name))
        if differing:
            changes = ", ".join(f"{name}: {saved.get(name)!r} there, {current.get(name)!r} here" for name in differing)
            raise ValueError(f"the checkpoint {checkpoint} is of another configuration ({changes})")
        load_checkpoint(checkpoint, self.model, self.optimizer)
        self.step, self.seconds = state["step"], state["seconds"]
        self.compile_seconds = state["compile_seconds"]
