"""Training any module through all phases: the run of ``patchkernels train`` for a model, an optimizer and rows of one's
own.
"""

from __future__ import annotations

import hashlib
import inspect
import json
import logging
import math
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from patchkernels.data.batches import Rows
from patchkernels.schedule import DEFAULT_PHASES, LearningRate, Phases, Schedule, parse_phases
from patchkernels.training.checkpoint import check_settings
from patchkernels.training.config import CheckpointConfig, LogConfig, LoopConfig, check_batch_size, check_minutes
from patchkernels.training.console import Display
from patchkernels.training.evaluation import evaluate, modes_restored
from patchkernels.training.log import Log
from patchkernels.training.loop import checkpoint_to_resume, loop
from patchkernels.training.objective import Objective, synchronizing_module, unwrapped
from patchkernels.training.plot import plot
from patchkernels.training.processes import Processes, check_data_parallel, current_processes
from patchkernels.training.row_batches import CheckedRows, RowBatches, StreamBatches, stacked
from patchkernels.training.run import Batches, Run, count_targets
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
    resume: bool | str = False,
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
        model: a module with ``forward(input_ids, labels, patch_size)``; or with ``forward(input_ids, labels)`` or
            ``forward(input_ids)`` that contains a :class:`patchkernels.PatchEmbedding`, or that is or contains a model
            prepared by :func:`patchkernels.hf.enable`: their ``patch_size`` is then set. It returns the loss, the mean
            over all targets, or something with the attribute or entry ``loss``. Labels are not shifted, and -100 is
            ignored; the argument may also be called ``targets``. If the module takes ``reduction``, it returns for
            ``"none"`` the losses ``(B, T / K, K)`` of all targets, and the loss of each slot is logged. It is trained
            on its device, in training mode; modules that are in evaluation mode within one in training mode stay so.
        optimizer: of the model's parameters, or several (Muon for matrices and AdamW for the rest, say).
        rows: a dataset (``datasets``, a tensor ``(N, T)``, a list), or an iterable. A row is T token ids, the same T in
            all rows, or a dictionary with ``input_ids`` and perhaps ``labels`` or ``attention_mask``. Rows that draw
            from torch's generator on the CPU get one of their own, seeded with ``seed``.
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
        seed: of the order of the rows and of the random numbers that the model draws (``torch.manual_seed``).
        warmup, decay: shares of the steps over which the learning rate of every group of parameters rises to the one
            that the optimizer came with, and falls from it to 0.
        lr_shape, lr_scope: ``"wsd"`` (warmup, constant, linear decay) or ``"cosine"``, over the ``"run"`` or anew in
            each ``"phase"``.
        optimizer_at_switch: where a phase begins, ``"carry"`` keeps the optimizer's state (TST), ``"reset"`` makes it
            the one that it came with.
        clip: largest norm of the gradient of the optimizers' parameters.
        bf16: compute under autocast to bf16.
        save_every, keep: steps between checkpoints, and how many are kept. The run is also saved where a phase ends.
        resume: go on from the newest checkpoint in ``out``: with the same arguments the run continues as if it had not
            stopped, bit for bit on a CPU. An iterable is read again from its beginning up to there. ``"auto"`` begins
            a new run if there is none to resume.
        log_every, eval_every: steps between lines of the log, and between measurements of the validation loss.
        minutes: save and stop after that many minutes.

    Raises:
        TypeError: a model, an optimizer or rows of another kind.
        ValueError: an argument out of its range, or a checkpoint of other arguments.
        FileExistsError: the folder holds a run already. FileNotFoundError: there is none to resume.
        NonFiniteError: the loss diverged. The last checkpoint is from before that.
        Stopped: SIGTERM or SIGINT came, or ``minutes`` are over (``SystemExit``). The run is saved.
    """
    config = LoopConfig(
        LearningRate(1.0, warmup, decay, lr_shape, lr_scope), optimizer_at_switch, clip, accumulation, bf16, False,
        CheckpointConfig(save_every, keep, bool(resume)), LogConfig(log_every, eval_every),
    )  # fmt: skip
    config.check()
    check_minutes(minutes)
    parsed_phases = parse_phases(phases, shares_of, convention)
    stop = StopRequest(minutes)
    checked = CheckedRows(rows, seed)
    schedule = Schedule(parsed_phases, raw_tokens(tokens, checked), batch_size, checked.context, convention)
    check_targets(schedule)
    optimizers = [optimizer] if isinstance(optimizer, Optimizer) else list(optimizer)
    held_out = None if validation is None else CheckedRows(validation, seed)
    processes = check_model(model, optimizers, [checked] if held_out is None else [checked, held_out])
    check_batch_size(batch_size, accumulation, processes.world_size)
    held_out_rows = None if held_out is None else validation_rows(held_out, checked)
    checkpoint = checkpoint_to_resume(Path(out), resume)
    others = {"rows": checked.digest(), "shuffle": shuffle, "seed": seed}
    run = Run(
        Path(out), model, optimizers, batches(checked, schedule, processes, seed, shuffle), schedule, config,
        identity(config, schedule, unwrapped(model), optimizers, others), processes, stop, held_out=held_out_rows,
    )  # fmt: skip
    torch.manual_seed(seed + 1 + processes.rank)
    take_steps(run, checkpoint)
    return run.out


def take_steps(run: Run, checkpoint: Path | None) -> None:
    """Takes the steps that are left. Afterwards the model's modes and patch sizes, and the learning rates, are again
    those that came.
    """
    run.out.mkdir(parents=True, exist_ok=True)
    with modes_restored(run.model):
        if not run.model.training:
            run.model.train()
        run.model.zero_grad(set_to_none=True)
        try:
            if checkpoint:
                run.restore(checkpoint)
            loop(run, type(run.model).__name__.removeprefix("FSDP"), measure_start, finish)  # fully_shard's prefix
        finally:
            run.objective.restore()
            run.set_rates([peak.peak for peak in run.peaks])


def raw_tokens(tokens: float | None, rows: CheckedRows) -> int:
    """How many raw tokens the run reads."""
    if tokens is None and not rows.has_length:
        raise ValueError("rows without a length need tokens, the number of raw tokens to read")
    if tokens is not None and not 0 < tokens < math.inf:
        raise ValueError(f"tokens must be positive and finite, got {tokens}")
    return int(tokens) if tokens is not None else len(rows) * rows.context


def check_targets(schedule: Schedule) -> None:
    """Raises ``ValueError`` if a phase's rows are a single patch, which has no next patch to predict."""
    for phase in schedule.phases:
        if schedule.positions(phase) < 2:
            raise ValueError(
                f"rows of {schedule.row_tokens(phase)} tokens have no targets at patch size {phase.patch_size}: "
                "expected two patches or more"
            )


def check_model(model: nn.Module, optimizers: list[Optimizer], all_rows: list[CheckedRows]) -> Processes:
    """Checks that these can be trained together, and returns the processes that train them.

    Raises:
        TypeError: the model has no interface that is known.
        ValueError: parameters on the meta device or on several devices, labels that the model does not take, or several
            processes without FSDP2 or DDP.
    """
    inner = unwrapped(model)
    objective = Objective(inner)
    if any(rows.brings_labels for rows in all_rows) and not objective.takes_labels:
        raise ValueError(f"the rows are dictionaries, with labels, but {type(inner).__name__}.forward takes none")
    check_optimizers(optimizers, list(inner.parameters()))
    devices = {parameter.device for parameter in inner.parameters()}
    if len(devices) != 1 or torch.device("meta") in devices:
        raise ValueError(f"the model's parameters must be on one device, got {sorted(map(str, devices))}")
    processes = current_processes(devices.pop())
    if processes.world_size > 1:
        check_data_parallel(synchronizing_module(model))
    return processes


def check_optimizers(optimizers: list[Optimizer], parameters: list[nn.Parameter]) -> None:
    """Checks that the optimizers can train these parameters, and warns if some are in no optimizer.

    Raises:
        TypeError: no optimizer, one whose step needs a closure, or settings that cannot be saved.
        ValueError: parameters that are not the model's, that are in two optimizers, or without a learning rate.
    """
    if not optimizers or not all(isinstance(optimizer, Optimizer) for optimizer in optimizers):
        raise TypeError(f"expected one or several torch.optim.Optimizer, got {[type(o).__name__ for o in optimizers]}")
    seen: set[int] = set()
    for optimizer in optimizers:
        name = type(optimizer).__name__
        if any(p.default is p.empty for p in inspect.signature(optimizer.step).parameters.values()):
            raise TypeError(f"{name}.step needs a closure, which computes the loss several times in a step")
        for group in optimizer.param_groups:
            if not (isinstance(group.get("lr"), float | int | Tensor) and float(group["lr"]) > 0):
                raise ValueError(
                    f"every group of parameters needs a learning rate above 0, got lr={group.get('lr')} in {name}; "
                    "leave out of the optimizers what is not to be trained"
                )
        check_settings(optimizer)
        own = {id(parameter) for group in optimizer.param_groups for parameter in group["params"]}
        if own & seen:
            raise ValueError(f"{len(own & seen)} parameters of {name} are in another optimizer too")
        seen |= own
    if seen - {id(parameter) for parameter in parameters}:
        raise ValueError(
            "the optimizer holds parameters that are not the model's: make it after the model is moved or sharded"
        )
    left_out = sum(parameter.requires_grad and id(parameter) not in seen for parameter in parameters)
    if left_out:
        logger.warning("%d parameters that require gradients are in no optimizer and are not trained", left_out)


def validation_rows(checked: CheckedRows, training: CheckedRows) -> Rows:
    """All validation rows, as one batch. ``ValueError`` unless they have targets and the length of training rows."""
    if checked.context != training.context:
        raise ValueError(
            f"validation rows must have {training.context} tokens, as those of training, got {checked.context}"
        )
    rows = stacked(list(checked), not checked.brings_labels)
    if not count_targets(rows, 1):
        raise ValueError("the validation rows have no targets: all their labels are ignored")
    return rows


def batches(rows: CheckedRows, schedule: Schedule, processes: Processes, seed: int, shuffle: bool) -> Batches:
    if rows.has_length:
        return RowBatches(rows, schedule, seed, shuffle, processes.rank, processes.world_size)
    return StreamBatches(rows, schedule, processes.rank, processes.world_size)


def identity(
    config: LoopConfig, schedule: Schedule, model: nn.Module, optimizers: list[Optimizer], others: dict[str, Any]
) -> dict[str, Any]:
    """The settings that a checkpoint and the run that resumes it must share, as JSON gives them back."""
    rate, names = config.learning_rate, {parameter: name for name, parameter in model.named_parameters()}
    settings = {
        "phases": [[phase.patch_size, steps] for phase, steps in zip(schedule.phases, schedule.steps)],
        "batch_size": schedule.batch_size, "context": schedule.context, "convention": schedule.convention,
        "warmup": rate.warmup, "decay": rate.decay, "lr_shape": rate.shape, "lr_scope": rate.scope,
        "optimizer_at_switch": config.optimizer_at_switch, "clip": config.clip, "bf16": config.bf16,
        "parameters": summary(names, names), "optimizers": [type(optimizer).__name__ for optimizer in optimizers],
        "groups": [
            {**group, "params": summary(group["params"], names)}
            for optimizer in optimizers for group in optimizer.param_groups
        ], **others,
    }  # fmt: skip
    found: dict[str, Any] = json.loads(json.dumps(settings, default=describe))
    return found


def summary(parameters: Iterable[Tensor], names: dict[Any, str]) -> str:
    """Names these parameters, in their order, by their number and a digest of their names and shapes."""
    described = [f"{names[parameter]} {tuple(parameter.shape)}" for parameter in parameters]
    return f"{len(described)} tensors ({hashlib.sha256(chr(10).join(described).encode()).hexdigest()[:8]})"


def describe(value: Any) -> Any:
    """What stands for an object that JSON cannot hold: a tensor's numbers, or the name of another object's class."""
    return value.tolist() if hasattr(value, "tolist") else type(value).__name__


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
