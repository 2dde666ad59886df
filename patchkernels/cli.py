"""The command line: ``patchkernels train``, ``plan``, ``corpus`` and ``experiment``."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from typing import Annotated

import tyro

from patchkernels.corpus import CorpusConfig, print_corpus
from patchkernels.experiment import experiment
from patchkernels.experiment_config import ExperimentConfig
from patchkernels.plan import PlanConfig, print_plan
from patchkernels.train import NonFiniteError, train
from patchkernels.train_config import TrainConfig


def main(arguments: Sequence[str] | None = None) -> None:
    """Bad input is one clear line on stderr and exit code 1 (2 where the command line itself is wrong)."""
    try:
        command = tyro.cli(
            Annotated[TrainConfig, tyro.conf.subcommand("train")]
            | Annotated[PlanConfig, tyro.conf.subcommand("plan")]
            | Annotated[CorpusConfig, tyro.conf.subcommand("corpus")]
            | Annotated[ExperimentConfig, tyro.conf.subcommand("experiment")],
            args=arguments,
            prog="patchkernels",
            description="Patch-level training of language models.",
        )
        if isinstance(command, TrainConfig):
            train(command)
        elif isinstance(command, PlanConfig):
            print_plan(command)
        elif isinstance(command, CorpusConfig):
            print_corpus(command)
        elif isinstance(command, ExperimentConfig):
            experiment(command)
    except (ValueError, IndexError, OSError, RuntimeError, NonFiniteError) as error:
        print(f"patchkernels: {type(error).__name__}: {error}", file=sys.stderr)
        raise SystemExit(1) from error
