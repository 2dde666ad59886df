"""The experiment that checks the claim on any corpus: training runs ("arms") over the same data, compared.

    A   token-level on all of the data                       cost 1
    B   patches of K on a share λ of it, then token-level    cost λ/K + 1 - λ
    C   token-level, stopped at B's compute                  the same cost
    ρ = (L_C - L_B) / (L_C - L_A)         1: as good as A at a fraction of its compute; 0: no better than C

L is token-level validation loss. Every arm is one call of :func:`patchkernels.train.train`: the same model and loss
code, tokenizer, validation text and context; by seed the same initial weights and, of the text, the same pieces.
"""

from __future__ import annotations

import dataclasses
import importlib.metadata
import json
import math
import platform
import shutil
import subprocess
import time
from datetime import datetime, timezone
from fractions import Fraction
from pathlib import Path
from typing import Any

import torch
from rich.console import Console

from patchkernels.batches import validation_rows
from patchkernels.checkpoint import checkpoints
from patchkernels.data import Corpus
from patchkernels.experiment_config import NAMES, Budget, ExperimentConfig, arms
from patchkernels.experiment_report import write_report
from patchkernels.metrics import prepare_aloud, read_log
from patchkernels.model import PatchLM, PatchLMConfig
from patchkernels.pretrained import replace_file
from patchkernels.processes import choose_device, environment
from patchkernels.schedule import cost_of, parse_phases
from patchkernels.train import OUT_OF_TIME, NonFiniteError, Stopped, train
from patchkernels.train_config import TrainConfig

MOST_RATES = 5  # learning rates that A is tried with


def experiment(config: ExperimentConfig) -> Path:
    """Runs what is missing of the experiment, writes its report and returns the folder.

    Raises:
        ValueError: settings that make no sense, a corpus too small for them, or a folder of another experiment.
        RuntimeError: before its first step a run's loss is not log V, or not that of the other runs of its seed.
        NonFiniteError: A diverged at every learning rate.
        Stopped: a signal, or ``minutes`` are over; everything is saved, the same call goes on.
    """
    began = time.monotonic()
    budget = config.filled()
    deadline = began + 60 * budget.minutes
    if environment(choose_device(config.device)).world_size > 1:
        raise ValueError("the experiment runs in one process: start it without torchrun")
    PatchLMConfig.preset(budget.model)
    config = dataclasses.replace(config, data=dataclasses.replace(config.data, vocab_size=budget.vocab_size))
    console = Console()
    laboratory = Laboratory(config, prepare_aloud(config.data, console), deadline, console)
    try:
        laboratory.work()
    except NonFiniteError:
        laboratory.report(finished=False)
        raise
    except Stopped as stopped:
        laboratory.report(finished=False)
        why = "out of time" if stopped.code == OUT_OF_TIME else "stopped"
        console.print(f"{why}: {len(laboratory.results)} runs are finished; the same command goes on", soft_wrap=True)
        raise
    laboratory.report(finished=True)
    out = laboratory.out
    console.print(f"written: {out / 'report.md'}, {out / 'results.jsonl'} and figures", soft_wrap=True)
    return out


class Laboratory:
    """Runs of the experiment, each made once and then remembered in its folder."""

    def __init__(self, config: ExperimentConfig, corpus: Corpus, deadline: float, console: Console) -> None:
        self.config, self.corpus, self.deadline, self.console = config, corpus, deadline, console
        self.budget, self.out = config.filled(), Path(config.out)
        self.arms = arms(config.phases)
        self.results: dict[Path, dict[str, Any]] = {}  # by the run's folder
        self.lr: float | None = None  # not chosen yet
        sizes = [p.patch_size for arm in self.arms.values() for p in parse_phases(arm.phases)]
        self.piece_tokens = self.budget.context * math.lcm(*sizes)
        self.tokens = self._tokens()
        self.settings = self._settings()
        for name in config.arms:  # each raises here, before any work, if it cannot be had
            arm = self.train_config(name, 0, self.budget.lr, self.out / "runs", self.budget.minutes)
            arm.schedule(self.tokens)
            arm.learning_rate()
        validation_rows(corpus.validation, self.budget.context, self.budget.eval_rows)
        self._claim_folder()
        for file in (self.out / "runs").glob("*/result.json"):
            self.results[file.parent] = _read_json(file, {"arm", "seed", "lr"})

    def work(self) -> None:
        """The learning rate on A, then seed after seed all arms, then B and C at the neighbours of A's best rate."""
        self.lr = lr = self.tune() if self.config.tune else self.budget.lr
        for seed in range(self.budget.seeds):
            for name in self.config.arms:
                self.run(name, seed, lr)
        if self.config.tune:
            for name in ("B", "C"):
                for neighbour in (lr / 2, 2 * lr):
                    self.run(name, 0, neighbour)

    def tune(self) -> float:
        """The learning rate at which A ends lowest, between two others where it ends higher."""
        lr = self.budget.lr
        losses = {rate: self.end("A", 0, rate) for rate in (lr, lr / 2, 2 * lr)}
        while (best := min(losses, key=losses.__getitem__)) in (min(losses), max(losses)) and len(losses) < MOST_RATES:
            beyond = best / 2 if best == min(losses) else best * 2
            losses[beyond] = self.end("A", 0, beyond)
        if losses[best] == math.inf:
            raise NonFiniteError(f"A diverged at every learning rate that was tried: {sorted(losses)}")
        return best

    def end(self, name: str, seed: int, lr: float) -> float:
        return float(self.run(name, seed, lr).get("validation_loss", math.inf))

    def run(self, name: str, seed: int, lr: float) -> dict[str, Any]:
        """The result of a run, which is made unless it is there."""
        folder = self.out / "runs" / f"{name}-seed{seed}-lr{lr:.3g}"
        if folder not in self.results:
            left = (self.deadline - time.monotonic()) / 60
            if left <= 0:
                raise Stopped(OUT_OF_TIME)
            config = self.train_config(name, seed, lr, folder, left)
            self.console.rule(folder.name)
            try:
                train(config)
                made = self.summary(name, seed, lr, read_log(folder / "log.jsonl"))
                check_start(made, list(self.results.values()), folder)
            except NonFiniteError as error:
                made = {"arm": name, "seed": seed, "lr": lr, "diverged": str(error)}
            replace_file(folder / "result.json", lambda path: path.write_text(json.dumps(made, indent=1)))
            self.results[folder] = made
        shutil.rmtree(folder / "checkpoints", ignore_errors=True)
        return self.results[folder]

    def train_config(self, name: str, seed: int, lr: float, folder: Path, minutes: float) -> TrainConfig:
        arm, budget, config = self.arms[name], self.budget, self.config
        phases = parse_phases(arm.phases, arm.changes.get("shares_of", "data"))
        warmup = config.warmup / (arm.share * cost_of(phases))  # over as many steps as in A
        if not 0 <= warmup <= 1 - config.decay:
            raise ValueError(
                f"{name} cannot warm up over {config.warmup:g} of A's steps, {warmup:g} of its own, and decay over the "
                f"last {config.decay:g}: use a smaller warmup"
            )
        return TrainConfig(
            out=str(folder), model=budget.model, data=config.data, tokens=round(arm.share * self.tokens),
            phases=arm.phases, batch_size=budget.batch_size, accumulation=config.accumulation, context=budget.context,
            piece_tokens=self.piece_tokens, lr=lr, warmup=warmup, decay=config.decay,
            bf16=budget.bf16, compile=budget.compile, device=config.device, seed=seed, eval_every=budget.eval_every,
            eval_rows=budget.eval_rows, save_every=2 * budget.eval_every, keep=1, minutes=minutes,
            resume=bool(checkpoints(folder / "checkpoints")), **arm.changes,
        )  # fmt: skip

    def summary(self, name: str, seed: int, lr: float, log: list[dict[str, Any]]) -> dict[str, Any]:
        """What the report needs of a run's log: nothing of the losses that were trained on, which differ in kind."""
        keys = ("step", "phase", "patch_size", "raw_tokens", "flops", "seconds", "compile_seconds", "validation_loss",
                "validation_bits_per_byte", "validation_slot_losses")  # fmt: skip
        curve = [{k: line[k] for k in keys if k in line} for line in log if "validation_loss" in line]
        last = curve[-1]
        return {
            "arm": name, "seed": seed, "lr": lr, "phases": self.arms[name].phases,
            **{k: last[k] for k in keys[3:9]}, "steps": last["step"],
            "raw_tokens_per_second": last["raw_tokens"] / last["seconds"],
            **{k: log[0][k] for k in ("initial_losses", "initial_slot_losses")}, "curve": curve,
        }  # fmt: skip

    def report(self, finished: bool) -> None:
        lines: list[dict[str, Any]] = [{"kind": "experiment", "finished": finished, **self.settings}]
        results = sorted(self.results.values(), key=lambda r: (NAMES.index(r["arm"]), r["seed"], r["lr"]))
        for result in results:
            identity = {k: result[k] for k in ("arm", "seed", "lr")}
            lines.append({"kind": "run", **{k: v for k, v in result.items() if k != "curve"}})
            lines += [{"kind": "evaluation", **identity, **point} for point in result.get("curve", [])]
        text = "".join(json.dumps(line) + "\n" for line in lines)
        replace_file(self.out / "results.jsonl", lambda path: path.write_text(text))
        write_report(self.out, self.settings, results, self.lr, finished)

    def _tokens(self) -> int:
        """Raw tokens of A: whole steps of A, B and C, and of what the corpus has."""
        # 0.667 is meant as 2/3: where a share is not quite a fraction, phases end within a step of it
        shares = [Fraction(p.share).limit_denominator(24) for p in parse_phases(self.config.phases)]
        quantum = self.budget.batch_size * self.piece_tokens * math.lcm(*(share.denominator for share in shares))
        there = len(self.corpus.train) // self.piece_tokens * self.piece_tokens
        asked = int(self.budget.tokens)
        if self.config.tokens is not None and asked > there:
            raise ValueError(
                f"tokens must be at most those of the training text, none is read twice: got {asked:,} of {there:,}"
            )
        tokens = min(asked, there) // quantum * quantum
        if tokens == 0:
            raise ValueError(
                f"{min(asked, there):,} tokens are fewer than the {quantum:,} that all arms read in whole steps of "
                f"{self.budget.batch_size} rows of {self.budget.context} positions: use more text or smaller steps"
            )
        if tokens < asked:
            self.console.print(f"A reads {tokens:,} tokens instead of {asked:,}: whole steps of text that is there")
        return tokens

    def _settings(self) -> dict[str, Any]:
        device = choose_device(self.config.device)
        corpus = self.corpus
        return {
            "tokens": self.tokens, "piece_tokens": self.piece_tokens, "phases": self.config.phases,
            "parameters": parameters(self.budget, corpus.vocab_size), "accumulation": self.config.accumulation,
            "tune": self.config.tune, "warmup": self.config.warmup, "decay": self.config.decay,
            "budget": dataclasses.asdict(self.budget),
            "arms": {name: dataclasses.asdict(arm) for name, arm in self.arms.items()},
            "corpus": {
                "origin": corpus.origin, "digest": corpus.digest, "documents": corpus.documents,
                "tokens": {"train": len(corpus.train), "validation": len(corpus.validation)},
                "bytes_per_token": corpus.bytes_per_token, "vocab_size": corpus.vocab_size,
            },
            "device": torch.cuda.get_device_name(device) if device.type == "cuda" else _processor(),
            "versions": {"patchkernels": _version(), "torch": torch.__version__, "python": platform.python_version()},
            "commit": _commit(),
            "date": datetime.now(timezone.utc).date().isoformat(),
        }  # fmt: skip

    def _claim_folder(self) -> None:
        """The folder is this experiment's; more arms, more seeds and another end of the call leave it so."""
        file = self.out / "experiment.json"
        free = {"commit", "date"}
        mine = json.loads(json.dumps(self.settings))
        if file.exists():
            theirs = _read_json(file, {"budget", "corpus", "commit"})
            for settings in (mine, theirs):
                for part, key in (("budget", "seeds"), ("budget", "minutes"), ("corpus", "origin")):
                    settings[part].pop(key, None)
            differing = [k for k in mine if k not in free and mine[k] != theirs.get(k)]
            if differing:
                changes = "; ".join(f"{k}: {theirs.get(k)} there, {mine[k]} here" for k in differing)
                raise ValueError(f"{self.out} holds another experiment ({changes}); choose another --out")
            commits = [*(theirs["commit"] or "").split(", "), mine["commit"] or ""]
            self.settings["commit"] = ", ".join(dict.fromkeys(filter(None, commits))) or None
        self.out.mkdir(parents=True, exist_ok=True)
        replace_file(file, lambda path: path.write_text(json.dumps(self.settings, indent=1)))


def parameters(budget: Budget, vocab_size: int) -> int:
    with torch.device("meta"):
        model = PatchLM(PatchLMConfig.preset(budget.model, vocab_size=vocab_size))
    return sum(p.numel() for p in model.parameters())


def check_start(made: dict[str, Any], others: list[dict[str, Any]], folder: Path) -> None:
    """A run's token-level loss before its first step is that of all runs of its seed.

    Raises:
        RuntimeError: otherwise; the arms cannot be compared.
    """
    start = made["curve"][0]["validation_loss"]
    for other in others:
        if other["seed"] == made["seed"] and "diverged" not in other:
            first = other["curve"][0]["validation_loss"]
            if not math.isclose(first, start, rel_tol=1e-5):
                raise RuntimeError(
                    f"arm {made['arm']}, seed {made['seed']} starts at validation loss {start}, {other['arm']} of the "
                    f"same seed at {first}: not the same weights or validation text. Remove {folder} once it is mended"
                )


def _read_json(file: Path, keys: set[str]) -> dict[str, Any]:
    try:
        found: dict[str, Any] = json.loads(file.read_text())
        if not (isinstance(found, dict) and keys <= found.keys()):
            raise ValueError(f"without {', '.join(sorted(keys))}")
    except ValueError as error:
        raise ValueError(f"{file} is damaged ({error}): remove it, and what it held is made again") from error
    return found


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        name = next(line.split(":", 1)[1].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        name = platform.processor() or platform.machine()
    threads = torch.get_num_threads()
    return f"{name}, {threads} thread{'s' if threads > 1 else ''}"


def _version() -> str:
    try:
        return importlib.metadata.version("patchkernels")
    except importlib.metadata.PackageNotFoundError:
        return "not installed"  # PYTHONPATH=.


def _commit() -> str | None:
    """Of the checkout that this package is run from, if it is one."""

    def git(*words: str) -> str:
        command = ["git", "-C", str(Path(__file__).parent), *words]
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()

    try:
        git("ls-files", "--error-unmatch", Path(__file__).name)  # not merely installed below some repository
        return git("describe", "--always", "--dirty", "--abbrev=10", "--exclude=*")
    except (OSError, subprocess.CalledProcessError):
        return None
