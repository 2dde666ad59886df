"""The experiment: training runs ("arms") over the same data, which compare patch-level with token-level training.

    A   token-level on all of the data                       cost 1
    B   patches of K on a share λ of it, then token-level    cost λ/K + 1 - λ
    C   token-level, stopped at B's compute                  the same cost
    ρ = (L_C - L_B) / (L_C - L_A)         1: as good as A at a fraction of its compute; 0: no better than C

L is token-level validation loss. :func:`patchkernels.training.train.train` makes every run, so that all arms have the
same model and loss code, tokenizer, validation text and context. Runs of one seed also start from the same weights and
read the same pieces of the text.
"""

from __future__ import annotations

import dataclasses
import functools
import math
import shutil
import time
from fractions import Fraction
from pathlib import Path

import torch
from rich.console import Console

from patchkernels.data.batches import validation_rows
from patchkernels.data.corpus import Corpus
from patchkernels.experiment.comparison import TOKEN_LOSS, Result
from patchkernels.experiment.config import MAIN_ARMS, ExperimentConfig
from patchkernels.experiment.record import (
    claim_folder,
    experiment_record,
    piece_tokens_of,
    read_json,
    run_result,
    write_json,
    write_results,
)
from patchkernels.experiment.report import write_report
from patchkernels.experiment.side_by_side import Call, call_side_by_side
from patchkernels.training.checkpoint import checkpoints
from patchkernels.training.config import TrainConfig
from patchkernels.training.console import prepare_aloud
from patchkernels.training.log import read_log
from patchkernels.training.processes import choose_device, environment
from patchkernels.training.run import NonFiniteError
from patchkernels.training.stop import OUT_OF_TIME, Stopped
from patchkernels.training.train import train

RESULT_FILE, RESULT_KEYS = "result.json", {"arm", "seed", "lr"}
MOST_RATES = 5
"""Tuning runs an arm at no more learning rates than this."""
LARGEST_DENOMINATOR = 24
"""A phase's share is read as a fraction with at most this denominator, so that 0.667 means 2/3."""


def experiment(config: ExperimentConfig) -> Path:
    """Makes the runs that the experiment still lacks, writes its report and returns its folder.

    Raises:
        ValueError: invalid settings, a corpus too small for them, or a folder of another experiment.
        RuntimeError: a run's loss before its first step is not log V, or not that of the other runs of its seed.
        NonFiniteError: A, B or C diverged at every learning rate.
        Stopped: a signal came, or ``minutes`` are over. Everything is saved, and the same call continues.
    """
    began = time.monotonic()
    config.check()
    if environment(choose_device(config.device)).world_size > 1:
        raise ValueError("the experiment runs in one process: start it without torchrun")
    budget, console = config.effective_budget, Console()
    corpus = prepare_aloud(budget.base.data, console)
    laboratory = Laboratory(config, corpus, began + 60 * budget.minutes, console)
    try:
        laboratory.run_all()
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
    """The runs of an experiment. Each is made once, and its result is kept in the experiment's folder."""

    def __init__(self, config: ExperimentConfig, corpus: Corpus, deadline: float, console: Console) -> None:
        self.config, self.corpus, self.console = config, corpus, console
        self.deadline = deadline  # of time.monotonic()
        self.jobs = config.jobs or (1 if choose_device(config.device).type == "cuda" else torch.get_num_threads())
        self.budget, self.arms, self.out = config.effective_budget, config.known_arms, Path(config.out)
        self.results: dict[Path, Result] = {}  # by the run's folder
        self.lr: float | None = None  # the rate at which all arms are compared; run_all chooses it
        base = self.budget.base
        sizes = [phase.patch_size for arm in self.arms.values() for phase in arm.schedule.parsed_phases]
        whole_rows = base.schedule.context * math.lcm(*sizes)  # of every phase of every arm
        self.piece_tokens = piece_tokens_of(self.out, whole_rows)
        self.tokens = self._tokens_of_a()
        self.record = experiment_record(config, corpus, self.tokens, self.piece_tokens, self.jobs)
        # Settings that cannot run raise here, before the folder is made and before any run.
        for name in config.arms:
            self.train_config(name, 0, base.optimizer.lr, self.out / "runs", self.budget.minutes).schedule.schedule()
        validation_rows(corpus.validation, base.schedule.context, base.log.eval_rows)
        claim_folder(self.out, self.record)
        for file in (self.out / "runs").glob(f"*/{RESULT_FILE}"):
            self.results[file.parent] = read_json(file, RESULT_KEYS)
            shutil.rmtree(file.parent / "checkpoints", ignore_errors=True)

    def run_all(self) -> None:
        """Tunes the learning rate on A, B and C, and runs all arms at A's best rate, seed after seed.

        Of B and C, whose best rates may be others, all seeds are also run at these.
        """
        self.lr = lr = self.budget.base.optimizer.lr
        rates: dict[str, float] = {}
        if self.config.tune:
            rates = self.tune(lr)
            self.lr = lr = rates["A"]
        seeds = range(self.budget.seeds)
        wanted = [(name, seed, lr) for seed in seeds for name in self.config.arms]
        self.make(wanted + [(name, seed, rate) for seed in seeds for name, rate in rates.items()])

    def tune(self, lr: float) -> dict[str, float]:
        """For A, B and C the learning rate at which the final loss is lowest, tried until it lies between two others.

        After ``MOST_RATES`` rates it is the best of them, even if that is the lowest or the highest rate.

        Raises:
            NonFiniteError: an arm diverged at every rate.
        """
        tried = {name: [lr, lr / 2, 2 * lr] for name in MAIN_ARMS}
        while True:
            self.make([(name, 0, rate) for name, rates in tried.items() for rate in rates])
            losses = {name: {rate: self.final_loss(name, 0, rate) for rate in rates} for name, rates in tried.items()}
            beyond = {name: rate for name, of_rates in losses.items() if (rate := beyond_best(of_rates))}
            if not beyond:
                break
            for name, rate in beyond.items():
                tried[name].append(rate)
        for name, of_rates in losses.items():
            if min(of_rates.values()) == math.inf:
                raise NonFiniteError(f"{name} diverged at every learning rate that was tried: {sorted(of_rates)}")
        return {name: min(of_rates, key=of_rates.__getitem__) for name, of_rates in losses.items()}

    def final_loss(self, name: str, seed: int, lr: float) -> float:
        """Token-level validation loss at the end of a run; infinite if it diverged."""
        return float(self.run(name, seed, lr).get(TOKEN_LOSS, math.inf))

    def run(self, name: str, seed: int, lr: float) -> Result:
        """The result of a run of the arm ``name``. The run is made unless its result is known."""
        self.make([(name, seed, lr)])
        return self.results[self.folder(name, seed, lr)]

    def make(self, wanted: list[tuple[str, int, float]]) -> None:
        """Makes the runs, each an arm, a seed and a rate, whose results are not known yet."""
        missing = [run for run in dict.fromkeys(wanted) if self.folder(*run) not in self.results]
        if self.jobs > 1:
            calls = [Call(self.folder(*run), make_run, functools.partial(self.arguments, *run)) for run in missing]
            call_side_by_side(calls, self.jobs, max(torch.get_num_threads() // self.jobs, 1), self.take_result)
            return
        for run in missing:
            self.console.rule(self.folder(*run).name)
            make_run(*self.arguments(*run))
            self.take_result(self.folder(*run))

    def folder(self, name: str, seed: int, lr: float) -> Path:
        in_a_path = name.translate({ord(":"): "x", ord("/"): "of", ord(","): "+"})  # an arm may be called by its phases
        return self.out / "runs" / f"{in_a_path}-seed{seed}-lr{lr:.3g}"

    def arguments(self, name: str, seed: int, lr: float) -> tuple[TrainConfig, str]:
        """The arguments of :func:`make_run` for a run that begins now. ``Stopped`` if the time is over."""
        minutes_left = (self.deadline - time.monotonic()) / 60
        if minutes_left <= 0:
            raise Stopped(OUT_OF_TIME)
        return self.train_config(name, seed, lr, self.folder(name, seed, lr), minutes_left), name

    def take_result(self, folder: Path) -> None:
        """Reads the result of a finished run, and removes its checkpoints."""
        result = read_json(folder / RESULT_FILE, RESULT_KEYS)
        try:
            check_start(result, list(self.results.values()), folder)
        except RuntimeError:
            (folder / RESULT_FILE).unlink()
            raise
        self.results[folder] = result
        shutil.rmtree(folder / "checkpoints", ignore_errors=True)
        if self.jobs > 1:
            loss = f"{result[TOKEN_LOSS]:.4f}" if TOKEN_LOSS in result else "diverged"
            self.console.print(f"{folder.name}: {loss}", highlight=False)

    def train_config(self, name: str, seed: int, lr: float, folder: Path, minutes: float) -> TrainConfig:
        """The settings of a run: those of the budget, with the changes of the arm ``name``, the seed and the rate.

        The run stops after ``minutes``. It resumes from the newest checkpoint if ``folder`` holds one.
        """
        base, arm = self.budget.base, self.arms[name]
        warmup = self.config.warmup_of(name)
        return dataclasses.replace(
            base,
            run=dataclasses.replace(base.run, out=str(folder), seed=seed, minutes=minutes, **arm.run_changes),
            schedule=dataclasses.replace(
                arm.schedule, tokens=round(arm.share * self.tokens), piece_tokens=self.piece_tokens
            ),
            optimizer=dataclasses.replace(base.optimizer, lr=lr, warmup=warmup, **arm.optimizer_changes),
            checkpoint=dataclasses.replace(base.checkpoint, resume=bool(checkpoints(folder / "checkpoints"))),
        )

    def report(self, finished: bool) -> None:
        """Writes ``results.jsonl``, ``report.md`` and the figures from the runs so far."""
        order = list(self.record["arms"])
        results = sorted(self.results.values(), key=lambda run: (order.index(run["arm"]), run["seed"], run["lr"]))
        write_results(self.out, self.record, results, finished)
        write_report(self.out, self.record, results, self.lr, finished)

    def _tokens_of_a(self) -> int:
        """The number of raw tokens that A reads: as requested, but at most the corpus and in whole steps of A, B and C.

        If a phase's share is not exactly such a fraction, the phase ends up to one step away from it.
        """
        schedule = self.budget.base.schedule
        shares = [Fraction(phase.share).limit_denominator(LARGEST_DENOMINATOR) for phase in schedule.parsed_phases]
        unit = schedule.batch_size * self.piece_tokens * math.lcm(*(share.denominator for share in shares))
        available = len(self.corpus.train) // self.piece_tokens * self.piece_tokens
        asked = int(schedule.tokens or 0)
        if self.config.tokens is not None and asked > available:
            raise ValueError(
                f"tokens must be at most those of the training text, none is read twice: got {asked:,} of {available:,}"
            )
        tokens = min(asked, available) // unit * unit
        if tokens == 0:
            raise ValueError(
                f"{min(asked, available):,} tokens are fewer than the {unit:,} that all arms read in whole steps of "
                f"{schedule.batch_size} rows of {schedule.context} positions: use more text or smaller steps"
            )
        if tokens < asked:
            self.console.print(f"A reads {tokens:,} tokens instead of {asked:,}: whole steps of text that is there")
        return tokens


def beyond_best(losses: dict[float, float]) -> float | None:
    """The rate to try next; None if the best one lies between two others, or enough were tried."""
    best = min(losses, key=losses.__getitem__)
    if len(losses) >= MOST_RATES or best not in (min(losses), max(losses)):
        return None
    return best / 2 if best == min(losses) else best * 2


def make_run(config: TrainConfig, arm: str) -> None:
    """Makes a run and writes its ``result.json``, which also says if the run diverged."""
    folder, seed, lr = Path(config.run.out), config.run.seed, config.optimizer.lr
    try:
        train(config)
        result = run_result(arm, config.schedule.phases, seed, lr, read_log(folder / "log.jsonl"))
    except NonFiniteError as error:
        result = {"arm": arm, "seed": seed, "lr": lr, "diverged": str(error)}
    write_json(folder / RESULT_FILE, result)


def check_start(result: Result, others: list[Result], folder: Path) -> None:
    """Checks that a run's token-level loss before its first step is that of all other runs of its seed.

    Raises:
        RuntimeError: the losses differ, so that the arms cannot be compared.
    """
    if "diverged" in result:
        return
    start = result["curve"][0][TOKEN_LOSS]
    for other in others:
        if other["seed"] == result["seed"] and "diverged" not in other:
            start_of_other = other["curve"][0][TOKEN_LOSS]
            if not math.isclose(start_of_other, start, rel_tol=1e-5):
                raise RuntimeError(
                    f"arm {result['arm']}, seed {result['seed']} starts at validation loss {start}, {other['arm']} of "
                    f"the same seed at {start_of_other}: not the same weights or validation text. Remove {folder} once "
                    "it is mended"
                )
