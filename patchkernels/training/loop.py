"""The steps of a run, one after the other through all phases, with all that happens on the way."""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from pathlib import Path

from patchkernels.data.batches import Rows
from patchkernels.training.checkpoint import checkpoints
from patchkernels.training.console import Display
from patchkernels.training.evaluation import evaluate, is_time_to_evaluate
from patchkernels.training.log import Log
from patchkernels.training.run import Run
from patchkernels.training.stop import Stopped


def checkpoint_to_resume(out: Path, resume: bool | str) -> Path | None:
    """The newest checkpoint of the folder, or None for a new run. ``"auto"`` resumes if there is one.

    Raises:
        ValueError: ``resume`` is something else.
        FileExistsError: the folder holds a run that is not to be resumed, or is no folder.
        FileNotFoundError: there is nothing to resume.
    """
    if resume not in (True, False, "auto") or isinstance(resume, int) != isinstance(resume, bool):
        raise ValueError(f"resume must be True, False or 'auto', got {resume!r}")
    if out.exists() and not out.is_dir():
        raise FileExistsError(f"{out} is a file: expected a folder for the run")
    saved = checkpoints(out / "checkpoints")
    if saved and not resume:
        raise FileExistsError(f"{out} holds a run: resume it (--resume, or resume=True), or write to another folder")
    if resume is True and not saved:
        raise FileNotFoundError(f"nothing to resume: {out} holds no checkpoint")
    return saved[-1] if saved else None


def loop(
    run: Run, title: str, begin: Callable[[Run, Log, Display], None], finish: Callable[[Run, Display], None]
) -> None:
    """Takes the steps of all phases; logs, evaluates and saves on the way, and stops early if asked to.

    Args:
        title: names the model on the display.
        begin: called before the first step of a new run.
        finish: called after the last step.
    """
    is_first = run.processes.is_first
    log = Log(run.out / "log.jsonl" if is_first else None, run.step)
    display = Display(run.schedule.total_steps, quiet=not is_first)
    with run.stop.listening(), contextlib.closing(log), display:
        display.say(description(run, title))
        if run.step == 0:
            begin(run, log, display)

        while not run.finished:
            take_step(run, log, display)
            if is_time_to_save(run):
                run.save()
            stop_if_asked(run, display)

        finish(run, display)
        if run.stop.signalled or run.stop.received:  # too late to stop this run, so that it stops the caller
            raise Stopped(run.stop.exit_code)


def take_step(run: Run, log: Log, display: Display) -> None:
    """One step of the run; logs and evaluates after it if it is time to."""
    run.enter_phase()
    patch_size = run.phase.patch_size

    with run.timed():
        run.train_step(read_or_save(run))
        evaluated = is_time_to_evaluate(run)
        logged = evaluated or run.step % run.config.log.log_every == 0
        result = run.result() if logged or is_time_to_save(run) else {}

    values = None
    if logged:
        values = result | run.progress() | (evaluate(run, patch_size) if evaluated else {})
        log.write(**values)
    display.step(run.step, values)


def read_or_save(run: Run) -> list[Rows]:
    """What the next step reads. If reading fails, a run on one process is saved first."""
    try:
        return run.read()
    except Exception:
        if run.step > 0 and not is_time_to_save(run) and run.processes.world_size == 1:
            run.save()
        raise


def is_time_to_save(run: Run) -> bool:
    """True every ``save_every`` steps, at the end of a phase, and before the run stops early."""
    return run.step % run.config.checkpoint.save_every == 0 or run.phase_ended or run.stop.code != 0


def stop_if_asked(run: Run, display: Display) -> None:
    """Raises ``Stopped`` if a signal or the deadline asks for it, unless the run is at its last step anyway."""
    if run.stop.code and not run.finished:
        display.say(f"stopped after step {run.step} ({run.stop.reason}); resume it to go on (--resume, or resume=True)")
        raise Stopped(run.stop.code)


def description(run: Run, title: str) -> str:
    """One line about the model, the machine and the phases."""
    processes, schedule = run.processes, run.schedule
    where = str(run.device) if processes.world_size == 1 else f"{processes.world_size} x {run.device.type}"
    parameters = sum(parameter.numel() for parameter in run.model.parameters())
    phases = ", ".join(f"K={p.patch_size}: {steps} steps" for p, steps in zip(schedule.phases, schedule.steps))
    return (
        f"{title}, {parameters / 1e6:.2f}M parameters on {where}; "
        f"{schedule.total_steps} steps, phases {phases}; cost {schedule.cost:.3f} of token-level training"
    )
