"""The training run from start to end: corpus, model, then step after step until all phases are done."""

from __future__ import annotations

import contextlib
import dataclasses
import json
from pathlib import Path

import torch
from rich.console import Console

from patchkernels.data.tokenizer import save_tokenizer
from patchkernels.files import replace_file
from patchkernels.model.attention import choose_attention
from patchkernels.model.patch_lm import PatchLM
from patchkernels.training.checkpoint import checkpoints
from patchkernels.training.config import TrainConfig
from patchkernels.training.console import Display, prepare_aloud
from patchkernels.training.evaluation import check_initial, evaluate, initial_losses, is_time_to_evaluate
from patchkernels.training.log import Log
from patchkernels.training.plot import plot
from patchkernels.training.processes import choose_device, environment, full_state_dict, joined
from patchkernels.training.run import Run
from patchkernels.training.stop import Stopped, StopRequest


def train(config: TrainConfig) -> Path:
    """Trains a model through all phases and returns the run's folder.

    Raises:
        ValueError: the settings are invalid, or the checkpoint is of other settings.
        FileExistsError: the folder already holds a run, and ``resume`` is not set.
        FileNotFoundError: there is no checkpoint to resume from, or no such text.
        NonFiniteError: the loss diverged. The last checkpoint is from before that.
        RuntimeError: the loss before the first step is not log V, so that targets are lost; or the requested attention
            cannot run here.
        Stopped: a signal came, or ``minutes`` are over. The run is saved and can be resumed.
    """
    config.check()
    stop = StopRequest(config.run.minutes)
    processes = environment(choose_device(config.run.device))
    config.check_batch_size(processes.world_size)
    document_multiple = config.document_multiple()
    dtype = torch.bfloat16 if config.run.bf16 else torch.float32
    head_size = config.model.architecture().head_size
    attention = choose_attention(config.run.attention, processes.device, dtype, head_size)  # raises if it cannot run
    out = Path(config.run.out)
    checkpoint = checkpoint_to_resume(out, config.checkpoint.resume)
    out.mkdir(parents=True, exist_ok=True)
    with joined(processes):
        with processes.first_on_its_node():
            console = Console(quiet=not processes.is_first)
            corpus = prepare_aloud(config.data, console, document_multiple=document_multiple)
        run = Run(config, corpus, processes, stop)
        if checkpoint:
            run.restore(checkpoint)
        if processes.is_first:
            settings = json.dumps(dataclasses.asdict(config), indent=1)
            replace_file(out / "config.json", lambda path: path.write_text(settings))
        loop(run, attention)
    return out


def checkpoint_to_resume(out: Path, resume: bool) -> Path | None:
    """The newest checkpoint of the folder, or None for a new run.

    Raises:
        FileExistsError: the folder holds a run that is not to be resumed.
        FileNotFoundError: there is nothing to resume.
    """
    saved = checkpoints(out / "checkpoints")
    if saved and not resume:
        raise FileExistsError(f"{out} holds a run; pass --resume to go on with it, or another --out")
    if resume and not saved:
        raise FileNotFoundError(f"nothing to resume: {out} holds no checkpoint")
    return saved[-1] if saved else None


def loop(run: Run, attention: str) -> None:
    """Takes the steps of all phases; logs, evaluates and saves on the way, and stops early if asked to."""
    is_first = run.processes.is_first
    log = Log(run.out / "log.jsonl" if is_first else None, run.step)
    display = Display(run.schedule.total_steps, quiet=not is_first)
    with run.stop.listening(), contextlib.closing(log), display:
        display.say(description(run, attention))
        if run.step == 0:
            measure_start(run, log, display)

        while not run.finished:
            run.enter_phase()
            patch_size = run.phase.patch_size

            with run.timed():
                rows = run.read()
                values = run.train_step(rows)

            evaluated = is_time_to_evaluate(run)
            logged = evaluated or run.step % run.config.log.log_every == 0
            if logged:
                values |= run.progress()
            if evaluated:
                values |= evaluate(run, patch_size)
            if logged:
                log.write(**values)
            display.step(run.step, values if logged else None)

            if is_time_to_save(run):
                run.save()
            stop_if_asked(run, display)

        finish(run, display)
        if run.stop.signalled:  # the signal came too late to stop this run, so it stops the caller
            raise Stopped(run.stop.code)


def is_time_to_save(run: Run) -> bool:
    """True every ``save_every`` steps, at the end of a phase, and before the run stops early."""
    return run.step % run.config.checkpoint.save_every == 0 or run.phase_ended or run.stop.code != 0


def stop_if_asked(run: Run, display: Display) -> None:
    """Raises ``Stopped`` if a signal or the deadline asks for it, unless the run is at its last step anyway."""
    if run.stop.code and not run.finished:
        display.say(f"stopped after step {run.step} ({run.stop.reason}); --resume goes on")
        raise Stopped(run.stop.code)


def description(run: Run, attention: str) -> str:
    """One line about the model, the machine and the phases."""
    processes, schedule = run.processes, run.schedule
    where = str(run.device)
    if processes.world_size > 1:
        where = f"{processes.world_size} x {run.device.type} ({run.config.run.parallel})"
    phases = ", ".join(f"K={p.patch_size}: {steps} steps" for p, steps in zip(schedule.phases, schedule.steps))
    return (
        f"{run.config.model.preset}, {run.parameters / 1e6:.2f}M parameters on {where}, attention {attention}; "
        f"{schedule.total_steps} steps, phases {phases}; cost {schedule.cost:.3f} of token-level training"
    )


def measure_start(run: Run, log: Log, display: Display) -> None:
    """Logs the losses of the new model, and raises ``RuntimeError`` unless they are those of random guessing."""
    values = run.progress() | evaluate(run, run.phase.patch_size) | initial_losses(run)
    log.write(**values)
    display.step(0, values)
    variance = run.architecture.hidden_size * run.architecture.initializer_range**2
    check_initial(values, run.corpus.vocab_size, variance)


def finish(run: Run, display: Display) -> None:
    """Saves the model with its tokenizer in Hugging Face's format, draws the plot, and prints where everything is."""
    model = run.model
    if run.processes.world_size > 1:
        weights = full_state_dict(run.model)
        if not run.processes.is_first:
            return
        model = PatchLM(run.architecture)
        model.load_state_dict(weights)
    out, folder, end_of_text = run.out, run.out / "model", run.corpus.end_of_text
    model.save_pretrained(folder, bos_token_id=end_of_text, eos_token_id=end_of_text)
    save_tokenizer(run.corpus.tokenizer_file, folder, run.architecture.max_position_embeddings)
    plot(out / "log.jsonl", out / "plot.png")
    display.say(
        f"done: {run.schedule.raw_tokens(run.step):,} raw tokens, {run.flops():.3e} FLOPs, "
        f"{run.seconds:.0f} s of training.\n"
        f"saved: {folder} (model and tokenizer), {out / 'log.jsonl'}, {out / 'plot.png'}, {out / 'checkpoints'}\n"
        f'next: AutoModelForCausalLM.from_pretrained("{folder}") in transformers, or PatchLM.from_pretrained;\n'
        f"      patchkernels plan --help  for the cost of a larger run"
    )
