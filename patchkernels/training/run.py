"""The state of a training run, and one optimizer step of it.

A checkpoint need not keep the phase, the learning rate or the position in the text: all of them follow from the step.
"""

from __future__ import annotations

import contextlib
import copy
import dataclasses
import math
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from patchkernels.data.batches import Rows
from patchkernels.model.patch_lm import patch_targets
from patchkernels.numerics import IGNORE_INDEX
from patchkernels.schedule import Phase, Schedule
from patchkernels.training.checkpoint import (
    load_checkpoint,
    load_optimizer,
    read_state,
    save_checkpoint,
    save_distributed,
)
from patchkernels.training.config import LoopConfig
from patchkernels.training.objective import Objective, synchronizing_module, unwrapped
from patchkernels.training.processes import Processes, is_sharded, synchronized, to_device
from patchkernels.training.speed import peak_flops, speed
from patchkernels.training.stop import StopRequest
from patchkernels.training.update import update


class NonFiniteError(RuntimeError):
    """The loss or the gradient norm is not finite. The parameters were not updated with this gradient."""


class Batches(Protocol):
    """What a run reads."""

    labels_are_ids: bool  # whether every token of every row is a target

    def batch(self, step: int) -> Rows:
        """This process's rows of a step. The same step gives the same rows."""
        ...


class Run:
    """The model, the optimizers and the step of a run, and the rows that it reads.

    Args:
        out: the run's folder.
        model: or a wrapper of it: DistributedDataParallel, torch.compile.
        optimizers: of the model's parameters.
        batches: what every step reads.
        schedule: the steps.
        identity: settings by name that a checkpoint and the run that resumes it must share.
        held_out: rows that the validation loss is measured on.
        step_flops: of one step, for each phase.
        bytes_per_token: of the held-out rows.
        warms_up: run forward and backward once before the first step of a phase, so that the seconds of the log are
            those of training alone. The model must have no state that this would change.
    """

    def __init__(
        self,
        out: Path,
        model: nn.Module,
        optimizers: Sequence[torch.optim.Optimizer],
        batches: Batches,
        schedule: Schedule,
        config: LoopConfig,
        identity: dict[str, Any],
        processes: Processes,
        stop: StopRequest,
        *,
        held_out: Rows | None = None,
        step_flops: list[int] | None = None,
        bytes_per_token: float | None = None,
        warms_up: bool = False,
    ) -> None:
        self.out, self.config, self.identity = out, config, identity
        self.processes, self.device, self.stop = processes, processes.device, stop
        self.model, self.parallel_model = unwrapped(model), synchronizing_module(model)
        self.compiled_model = model  # by the caller, perhaps
        self.objective = Objective(self.model)
        self.optimizers, self.warms_up = list(optimizers), warms_up
        self.parameters = list(self.model.parameters())
        self.trained = [parameter for group in self.groups for parameter in group["params"]]
        self.fresh_states: list[dict[str, Any]] = []  # of the optimizers, if they are reset
        if config.optimizer_at_switch == "reset":
            self.fresh_states = [copy.deepcopy(optimizer.state_dict()) for optimizer in self.optimizers]
        self.peaks = [dataclasses.replace(config.learning_rate, peak=float(group["lr"])) for group in self.groups]
        self.batches, self.schedule, self.held_out = batches, schedule, held_out
        self.step_flops, self.bytes_per_token = step_flops, bytes_per_token
        self.step = 0  # optimizer steps done so far
        self.seconds = 0.0  # duration of all steps, without compiling, evaluation and saving
        self.measured = (0, 0.0)  # steps and seconds at the last measurement of the speed
        self.peak_flops = peak_flops(self.device)
        self.compile_seconds = 0.0
        self.warm_phases: set[int] = set()
        self.read_result: Callable[[], list[float]] | None = None  # of the last step, if that is not read yet
        self.values: dict[str, float] = {}  # loss, gradient norm and learning rate of the last step that was read

    @property
    def groups(self) -> list[dict[str, Any]]:
        """The groups of parameters of all optimizers. Loading a checkpoint makes new ones."""
        return [group for optimizer in self.optimizers for group in optimizer.param_groups]

    def set_rates(self, rates: list[float]) -> None:
        """Sets the learning rate of every group."""
        for group, rate in zip(self.groups, rates):
            if isinstance(group["lr"], Tensor):
                group["lr"].fill_(rate)
            else:
                group["lr"] = rate

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
        if steps_done == 0 and self.step > 0:
            for optimizer, fresh in zip(self.optimizers, self.fresh_states):
                load_optimizer(optimizer, copy.deepcopy(fresh))  # whose tensors the optimizer then changes
        if self.warms_up and index not in self.warm_phases:
            self.warm_up()
            self.warm_phases.add(index)

    def warm_up(self) -> None:
        """Runs forward and backward once, and clears the gradients and the random numbers that were drawn.

        Compiling and first allocations then happen here, so that their time is not counted as training.
        """
        began = time.perf_counter()
        with torch.random.fork_rng(devices=[self.device] if self.device.type == "cuda" else []):
            self.loss(*self.read()[0], self.phase.patch_size).backward()
        self.clear_gradients()
        if self.device.type == "cuda":
            torch.cuda.synchronize()
        self.compile_seconds += time.perf_counter() - began

    @property
    def phase(self) -> Phase:
        """The phase of the next step."""
        return self.schedule.phases[self.schedule.locate(self.step)[0]]

    @contextlib.contextmanager
    def timed(self) -> Iterator[None]:
        """Counts the duration of the block as training."""
        began = time.perf_counter()
        yield
        self.seconds += time.perf_counter() - began

    def read(self) -> list[Rows]:
        """The rows of this process for the next step, split into ``accumulation`` parts."""
        count = self.config.accumulation
        tensors = [None if t is None else to_device(t, self.device) for t in self.batches.batch(self.step)]
        return list(zip(*([None] * count if t is None else t.chunk(count) for t in tensors)))

    def train_step(self, parts: list[Rows]) -> None:
        """Forward and backward over the parts, then one update, unless the gradient is not finite.

        Raises:
            NonFiniteError: loss or gradient are not finite: those of this step, or of the one before if the run reads
                late.
        """
        phase = self.phase
        self.set_rates([peak.at(self.step, self.schedule) for peak in self.peaks])
        total = torch.zeros((), device=self.device)
        for index, (rows, share) in enumerate(zip(parts, self.shares(parts, phase))):
            ids, labels, documents = rows
            if not share:  # a mean over no target is NaN in most losses: compute any loss, and multiply it by 0
                labels = ids
            with synchronized(self.parallel_model, last=index + 1 == len(parts)):
                loss = self.loss(ids, labels, documents, phase.patch_size) * share
                loss.backward()
            total += loss.detach()
        self.result()
        total = self.processes.average(total)
        gradient_norm = update(self.optimizers, self.trained, self.config.clip, total)
        flags = [torch.tensor(flag) for flag in self.stop.flags()]
        self.read_result = self.processes.mean_later(total, gradient_norm, *flags)
        self.clear_gradients()
        self.step += 1
        if not self.reads_late:
            self.result()

    @property
    def reads_late(self) -> bool:
        """Whether the result of a step is read during the next one, so that the device always has work."""
        return self.device.type == "cuda"

    def result(self) -> dict[str, float]:
        """Loss, gradient norm and learning rate of the last step.

        Raises:
            NonFiniteError: loss or gradient norm are not finite.
        """
        if self.read_result is None:
            return self.values
        loss, norm, signalled, late = self.read_result()
        self.read_result = None
        self.stop.agree(signalled, late)
        rate = self.peaks[0].at(self.step - 1, self.schedule)
        if not (math.isfinite(loss) and math.isfinite(norm)):
            raise NonFiniteError(
                f"step {self.step}: loss {loss}, gradient norm {norm}, lr {rate:.3g}; stopped before the update. The "
                "last checkpoint is from before: a smaller lr needs a new run"
            )
        self.values = {"loss": loss, "grad_norm": norm, "lr": rate}
        return self.values

    def clear_gradients(self) -> None:
        """Also those of parameters that no optimizer has."""
        for parameter in self.parameters:
            parameter.grad = None

    def shares(self, parts: list[Rows], phase: Phase) -> list[float]:
        """The weight of each part's mean loss within the loss of the step.

        The weighted sum over parts, averaged over processes, is the mean over all targets of the step, which weigh what
        their slots weigh. The parts' weights are equal unless labels may be ignored, since the parts then hold
        different numbers of targets.
        """
        if self.batches.labels_are_ids:
            return [1 / len(parts)] * len(parts)
        weight = self.slot_weight(phase.patch_size)
        counts = torch.stack([(count_targets(part, phase.patch_size) * weight).sum() for part in parts])
        (mean_count,) = self.processes.mean(counts.sum())
        return [count / (mean_count or 1) for count in counts.tolist()]

    def slot_weight(self, patch_size: int) -> Tensor:
        """The weights of the slots of a patch in the loss, ``i^-slot_exponent``: (K)."""
        return torch.arange(1.0, patch_size + 1, device=self.device) ** -self.config.slot_exponent

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
        module = self.compiled_model if compiled else self.parallel_model
        weighs = self.config.slot_exponent and patch_size > 1 and reduction == "mean"
        weight = self.slot_weight(patch_size) if weighs else None
        uncompiled = self.config.compile and not compiled
        stance = torch.compiler.set_stance("force_eager") if uncompiled else contextlib.nullcontext()
        with stance, torch.autocast(self.device.type, torch.bfloat16, enabled=self.config.bf16):
            return self.objective(module, ids, labels, patch_size, reduction, documents, weight)

    def flops(self) -> int:
        """Counted FLOPs of the steps so far, 0 if those of a step are not known."""
        ranges = zip(self.schedule.starts, self.schedule.steps)
        done = [min(max(self.step - start, 0), steps) for start, steps in ranges]
        return sum(steps * flops for steps, flops in zip(done, self.step_flops or []))

    def progress(self) -> dict[str, Any]:
        """Step, phase, raw tokens, FLOPs and seconds of the run so far, and the speed since the last call."""
        index = self.schedule.locate(max(self.step - 1, 0))[0]
        phase, raw_tokens = self.schedule.phases[index], self.schedule.raw_tokens(self.step)
        values = {
            "step": self.step, "phase": index + 1, "patch_size": phase.patch_size, "raw_tokens": raw_tokens,
            **({"flops": self.flops()} if self.step_flops else {}), "seconds": self.seconds,
            **({"compile_seconds": self.compile_seconds} if self.warms_up else {}),
        }  # fmt: skip
        steps, seconds = self.step - self.measured[0], self.seconds - self.measured[1]
        if steps:
            values |= speed(self.schedule, phase, steps / seconds)
            if self.step_flops and self.peak_flops:
                achieved = self.step_flops[index] * steps / seconds
                values["mfu"] = achieved / (self.peak_flops * self.processes.world_size)
        self.measured = (self.step, self.seconds)
        return values

    def save(self) -> None:
        """Writes a checkpoint, all processes together. Raises ``NonFiniteError`` as :meth:`result` does."""
        self.result()
        state = {"identity": self.identity, "seconds": self.seconds, "compile_seconds": self.compile_seconds}
        together = self.processes.world_size > 1 or is_sharded(self.model)
        save = save_distributed if together else save_checkpoint
        save(self.out / "checkpoints", self.step, self.model, self.optimizers, state, self.config.checkpoint.keep)

    def restore(self, checkpoint: Path) -> None:
        """Resumes from a checkpoint.

        Raises:
            ValueError: the checkpoint is of another configuration or another text, or it is damaged.
        """
        state = read_state(checkpoint)
        saved, current = state.get("identity", {}), self.identity
        differing = sorted(name for name in saved.keys() | current.keys() if saved.get(name) != current.get(name))
        if differing:
            changes = ", ".join(change for name in differing for change in changes_of(name, saved, current))
            raise ValueError(f"the checkpoint {checkpoint} is of another configuration ({changes})")
        load_checkpoint(checkpoint, self.model, self.optimizers)
        self.step, self.seconds = state["step"], state["seconds"]
        self.compile_seconds, self.measured = state["compile_seconds"], (self.step, self.seconds)


def changes_of(name: Any, saved: Any, current: Any) -> Iterator[str]:
    """What differs between the entries of this name in two settings: each entry inside it, if these are comparable."""
    there, here = (s.get(name) if isinstance(s, dict) else s[name] for s in (saved, current))
    if there == here:
        return
    if isinstance(there, dict) and isinstance(here, dict):
        names: Any = there.keys() | here.keys()
    elif isinstance(there, list) and isinstance(here, list) and len(there) == len(here):
        names = range(len(there))
    else:
        yield f"{name}: {there!r} there, {here!r} here"
        return
    for inner in sorted(names):
        yield from (f"{name} {change}" for change in changes_of(inner, there, here))


def count_targets(rows: Rows, patch_size: int) -> Tensor:
    """The number of targets of these rows that are not ignored, for each of the K slots: (K)."""
    _, labels, documents = rows
    return (patch_targets(labels, patch_size, documents) != IGNORE_INDEX).sum((0, 1))
