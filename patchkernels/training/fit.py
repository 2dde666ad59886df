"""Training any module through all phases: the run of ``patchkernels train`` for a model, an optimizer and rows of one's
own.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from patchkernels.schedule import DEFAULT_PHASES, LearningRate, Phases, Schedule, parse_phases
from patchkernels.training.config import CheckpointConfig, LogConfig, LoopConfig, check_batch_size, check_minutes
from patchkernels.training.console import Display
from patchkernels.training.evaluation import evaluate, modes_restored
from patchkernels.training.fit_checks import as_list, check_model, check_targets, raw_tokens, validation_rows
from patchkernels.training.log import Log
from patchkernels.training.loop import checkpoint_to_resume, loop
from patchkernels.training.objective import unwrapped
from patchkernels.training.plot import plot
from patchkernels.training.processes import Processes
from patchkernels.training.row_batches import CheckedRows, RowBatches, StreamBatches
from patchkernels.training.run import Batches, Run
from patchkernels.training.stop import StopRequest


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
        LearningRate(1.0, warmup, decay, lr_shape, lr_scope), optimizer_at_switch, clip, accumulation, 0.0, bf16, False,
        CheckpointConfig(save_every, keep, bool(resume)), LogConfig(log_every, eval_every),
    )  # fmt: skip
    config.check()
    if not isinstance(seed, int) or seed < 0:
        raise ValueError(f"seed must be a whole number from 0 on, got {seed!r}")
    check_minutes(minutes)
    parsed_phases = parse_phases(phases, shares_of, convention)
    stop = StopRequest(minutes)
    checked = CheckedRows(rows, seed)
    schedule = Schedule(parsed_phases, raw_tokens(tokens, checked), batch_size, checked.context, convention)
    check_targets(schedule, checked)
    optimizers = as_list(optimizer)
    held_out = None if validation is None else CheckedRows(validation, seed)
    processes = check_model(model, optimizers, [checked] if held_out is None else [checked, held_out])
    check_batch_size(batch_size, accumulation, processes.world_size)
    held_out_rows = None if held_out is None else validation_rows(held_out, checked)
    checkpoint = checkpoint_to_resume(Path(out), resume)
    others = {
        "rows": checked.digest(), "validation": held_out and held_out.digest(), "shuffle": shuffle, "seed": seed,
    }  # fmt: skip
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
        "optimizer_states": [fresh_state(o) for o in optimizers if config.optimizer_at_switch == "reset"],
        "groups": [
            {**group, "params": summary(group["params"], names)}
            for optimizer in optimizers for group in optimizer.param_groups
        ], **others,
    }  # fmt: skip
    found: dict[str, Any] = json.loads(json.dumps(settings, default=describe))
    return found


def summary(parameters: Iterable[Tensor], names: dict[Any, str]) -> str:
    """Names these parameters, in their order, by their number and a digest of what is not trained in them."""
    described = [
        f"{names[parameter]} {tuple(parameter.shape)} {parameter.dtype} {parameter.requires_grad}"
        for parameter in parameters
    ]
    return f"{len(described)} tensors ({hashlib.sha256(chr(10).join(described).encode()).hexdigest()[:8]})"


def fresh_state(optimizer: Optimizer) -> str:
    """Names the state that an optimizer comes with: which entries it has, and the numbers among them (steps)."""
    entries = [
        (str(index), str(name), value.item() if isinstance(value, Tensor) and value.numel() == 1 else None)
        for index, state in optimizer.state_dict()["state"].items() if isinstance(state, dict)
        for name, value in state.items()
    ]  # fmt: skip
    return f"{len(entries)} entries ({hashlib.sha256(repr(sorted(entries)).encode()).hexdigest()[:8]})"


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
