"""Training any module through all phases: the run of ``patchkernels train`` for a model, an optimizer and rows of one's
own.
"""

from __future__ import annotations

import json
import logging
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.optim import Optimizer

from patchkernels.data.batches import Rows
from patchkernels.schedule import DEFAULT_PHASES, LearningRate, Phases, Schedule, parse_phases
from patchkernels.training.config import CheckpointConfig, LogConfig, LoopConfig, check_batch_size, check_minutes
from patchkernels.training.console import Display
from patchkernels.training.evaluation import evaluate
from patchkernels.training.log import Log
from patchkernels.training.loop import checkpoint_to_resume, loop
from patchkernels.training.objective import Objective, synchronizing_module, unwrapped
from patchkernels.training.plot import plot
from patchkernels.training.processes import Processes, check_data_parallel, current_processes
from patchkernels.training.row_batches import CheckedRows, RowBatches, StreamBatches, stacked
from patchkernels.training.run import Batches, Run
from patchkernels.training.stop import StopRequest

logger = logging.getLogger("patchkernels")


def fit(
    model: nn.Module,
    optimizer: Optimizer | Sequence[Optimizer],
    rows: Any,
    *,
    out: str | Path,
    validation: Any = None,
    phases: Phases = DEFAULT_PHASES,
    shares_of: str = "data",
    convention: str = "positions",
    tokens: float | None = None,
    batch_size: int = 16,
    accumulation: int = 1,
    shuffle: bool = True,
    seed: int = 0,
    warmup: float = 0.05,
    decay: float = 0.1,
    lr_shape: str = "wsd",
    lr_scope: str = "run",
    optimizer_at_switch: str = "carry",
    clip: float = 1.0,
    bf16: bool = False,
    save_every: int = 200,
    keep: int = 2,
    resume: bool = False,
    log_every: int = 20,
    eval_every: int = 100,
    minutes: float | None = None,
) -> Path:
    """Trains a model in place through phases of patch-level and of token-level training, and returns the run's folder.

    A phase of patch size K reads K tokens per position, and its loss is that of all K tokens of the next patch. The
    last phase is usually next-token training (PatchTrain, arXiv 2407.12665, section 2; TST, arXiv 2605.06546).

    On several processes (torchrun), make the process group and shard the model with ``fully_shard`` or wrap it in
    ``DistributedDataParallel`` before making the optimizer. Every process gets all rows and reads a part of each batch.
    The model may be compiled (``torch.compile``); it is evaluated eagerly.

    Args:
        model: a module whose ``forward(input_ids, labels, patch_size)`` returns the loss, the mean over all targets; or
            one prepared by :func:`patchkernels.hf.enable`; or one with a :class:`patchkernels.PatchEmbedding` whose
            ``forward(input_ids, labels)`` or ``forward(input_ids)`` returns the loss. Labels are not shifted, and -100
            is ignored. It is trained on the device that it is on. The module may take ``reduction``: with ``"none"`` it
            returns the losses ``(B, T / K, K)`` of all targets, and the loss of each slot is logged.
        optimizer: of the model's parameters, or several (Muon for matrices and AdamW for the rest, say).
        rows: a dataset (``datasets``, a tensor ``(N, T)``, a list), or an iterable. A row is T token ids, the same T in
            all rows, or a dictionary with ``input_ids`` and perhaps ``labels`` or ``attention_mask``.
        out: the run's folder, for ``log.jsonl``, ``checkpoints/`` and ``plot.png``.
        validation: rows on which the token-level loss is measured, in every phase.
        phases: patch size and share of each phase, such as ``"4:2/3,1:1/3"`` or ``[(4, 2 / 3), (1, 1 / 3)]``.
        shares_of: the shares are those of the ``"data"`` (PatchTrain's lambda) or of the ``"steps"`` (TST's r).
        convention: what is the same in all steps: ``"positions"``, so that K rows are joined in a phase of patch size
            K, or ``"tokens"``, where K must divide T.
        tokens: raw tokens that the run reads. None: all rows once; an iterable has no length, and needs a number.
        batch_size: rows of T positions (or tokens) of a step, over all processes.
        accumulation: parts of a step's rows that are computed one after the other, to save memory.
        shuffle: read a dataset in a new random order in every epoch. An iterable is read in its own order.
        seed: of the order of the rows and of the random numbers that the model draws.
        warmup, decay: shares of the steps over which the learning rate of every group of parameters rises to the one
            that the optimizer came with, and falls from it to 0.
        lr_shape, lr_scope: ``"wsd"`` (warmup, constant, linear decay) or ``"cosine"``, over the ``"run"`` or anew in
            each ``"phase"``.
        optimizer_at_switch: where a phase begins, ``"carry"`` keeps the optimizer's state (TST), ``"reset"`` clears it.
        clip: largest norm of the gradient.
        bf16: compute under autocast to bf16.
        save_every, keep: steps between checkpoints, and how many are kept. The run is also saved where a phase ends.
        resume: go on from the newest checkpoint in ``out``: with the same arguments the run continues as if it had not
            stopped, bit for bit on a CPU. An iterable is read again from its beginning up to there.
        log_every, eval_every: steps between lines of the log, and between measurements of the validation loss.
        minutes: save and stop after that many minutes.

    Raises:
        TypeError: a model or rows of another kind.
        ValueError: an argument out of its range, or a checkpoint of other arguments.
        FileExistsError: the folder holds a run already. FileNotFoundError: there is none to resume.
        NonFiniteError: the loss diverged. The last checkpoint is from before that.
        Stopped: SIGTERM or SIGINT came, or ``minutes`` are over (``SystemExit``). The run is saved.
    """
    config = LoopConfig(
        LearningRate(1.0, warmup, decay, lr_shape, lr_scope), optimizer_at_switch, clip, accumulation, bf16, False,
        CheckpointConfig(save_every, keep, resume), LogConfig(log_every, eval_every),
    )  # fmt: skip
    config.check()
    check_minutes(minutes)
    parsed_phases = parse_phases(phases, shares_of, convention)
    stop = StopRequest(minutes)
    checked = CheckedRows(rows)
    schedule = Schedule(parsed_phases, raw_tokens(tokens, checked), batch_size, checked.context, convention)
    optimizers = [optimizer] if isinstance(optimizer, Optimizer) else list(optimizer)
    processes = check_model(model, optimizers, checked)
    check_batch_size(batch_size, accumulation, processes.world_size)
    held_out = None if validation is None else validation_rows(validation, checked)
    checkpoint = checkpoint_to_resume(Path(out), resume)
    others = {"rows": checked.digest(), "shuffle": shuffle, "seed": seed}
    run = Run(
        Path(out), model, optimizers, batches(checked, schedule, processes, seed, shuffle), schedule, config,
        identity(config, schedule, optimizers, others), processes, stop, held_out=held_out,
    )  # fmt: skip
    torch.manual_seed(seed + 1 + processes.rank)
    take_steps(run, checkpoint)
    return run.out


def take_steps(run: Run, checkpoint: Path | None) -> None:
    """Takes the steps that are left. Afterwards the learning rates are again those that the optimizers came with."""
    run.model.train()
    run.out.mkdir(parents=True, exist_ok=True)
    try:
        if checkpoint:
            run.restore(checkpoint)
        loop(run, type(run.model).__name__.removeprefix("FSDP"), measure_start, finish)  # fully_shard adds the prefix
    finally:
        run.set_rates([peak.peak for peak in run.peaks])


def raw_tokens(tokens: float | None, rows: CheckedRows) -> int:
    """How many raw tokens the run reads."""
    if tokens is None and not rows.has_length:
        raise ValueError("rows without a length need tokens, the number of raw tokens to read")
    if tokens is not None and not 0 < tokens < math.inf:
        raise ValueError(f"tokens must be positive and finite, got {tokens}")
    return int(tokens) if tokens is not None else len(rows) * rows.context


def check_model(model: nn.Module, optimizers: list[Optimizer], rows: CheckedRows) -> Processes:
    """Checks that these can be trained together, and returns the processes that train them.

    Raises:
        TypeError: the model has no interface that is known, or an optimizer is none.
        ValueError: parameters on the meta device or on several devices, parameters of the optimizers that are not the
            model's, labels that the model does not take, or several processes without FSDP2 or DDP.
    """
    inner = unwrapped(model)
    objective = Objective(inner)
    if rows.brings_labels and not objective.takes_labels:
        raise ValueError(f"the rows are dictionaries, with labels, but {type(inner).__name__}.forward takes none")
    if not optimizers or not all(isinstance(optimizer, Optimizer) for optimizer in optimizers):
        raise TypeError(f"expected one or several torch.optim.Optimizer, got {[type(o).__name__ for o in optimizers]}")
    trained = {id(p) for optimizer in optimizers for group in optimizer.param_groups for p in group["params"]}
    parameters = list(inner.parameters())
    if trained - {id(parameter) for parameter in parameters}:
        raise ValueError(
            "the optimizer holds parameters that are not the model's: make it after the model is moved or sharded"
        )
    left_out = sum(parameter.requires_grad and id(parameter) not in trained for parameter in parameters)
    if left_out:
        logger.warning("%d parameters that require gradients are in no optimizer and are not trained", left_out)
    devices = {parameter.device for parameter in parameters}
    if len(devices) != 1 or torch.device("meta") in devices:
        raise ValueError(f"the model's parameters must be on one device, got {sorted(map(str, devices))}")
    processes = current_processes(devices.pop())
    if processes.world_size > 1:
        check_data_parallel(synchronizing_module(model))
    return processes


def validation_rows(validation: Any, rows: CheckedRows) -> Rows:
    """All validation rows, as one batch. ``ValueError`` unless they are as long as the training rows."""
    checked = CheckedRows(validation)
    if checked.context != rows.context:
        raise ValueError(
            f"validation rows must have {rows.context} tokens, as those of training, got {checked.context}"
        )
    return stacked(list(checked), not checked.brings_labels)


def batches(rows: CheckedRows, schedule: Schedule, processes: Processes, seed: int, shuffle: bool) -> Batches:
    if rows.has_length:
        return RowBatches(rows, schedule, seed, shuffle, processes.rank, processes.world_size)
    return StreamBatches(rows, schedule, processes.rank, processes.world_size)


def identity(
    config: LoopConfig, schedule: Schedule, optimizers: list[Optimizer], others: dict[str, Any]
) -> dict[str, Any]:
    """The settings that a checkpoint and the run that resumes it must share, as JSON gives them back."""
    rate = config.learning_rate
    groups = [group for optimizer in optimizers for group in optimizer.param_groups]
    settings = {
        "phases": [[phase.patch_size, steps] for phase, steps in zip(schedule.phases, schedule.steps)],
        "batch_size": schedule.batch_size, "context": schedule.context, "convention": schedule.convention,
        "warmup": rate.warmup, "decay": rate.decay, "lr_shape": rate.shape, "lr_scope": rate.scope,
        "optimizer_at_switch": config.optimizer_at_switch, "clip": config.clip, "bf16": config.bf16,
        "accumulation": config.accumulation, "optimizers": [type(optimizer).__name__ for optimizer in optimizers],
        "groups": [{name: value for name, value in group.items() if name != "params"} for group in groups], **others,
    }  # fmt: skip
    found: dict[str, Any] = json.loads(json.dumps(settings, default=str))
    return found


def measure_start(run: Run, log: Log, display: Display) -> None:
    """Logs the validation loss before the first step."""
    values = run.progress() | evaluate(run, run.phase.patch_size)
    log.write(**values)
    display.step(0, values)


def finish(run: Run, display: Display) -> None:
    """Draws the validation loss, and says where everything is."""
    if not run.processes.is_first:
        return
    if run.held_out is not None:
        plot(run.out / "log.jsonl", run.out / "plot.png")
    display.say(
        f"done: {run.schedule.raw_tokens(run.step):,} raw tokens, {run.seconds:.0f} s of training.\n"
        f"saved: {run.out / 'log.jsonl'} and {run.out / 'checkpoints'}; the model has been trained in place"
    )
