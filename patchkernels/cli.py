"""The command line: ``patchkernels train``, ``plan``, ``corpus`` and ``experiment``."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from typing import Annotated

import tyro
from tyro.conf import subcommand

from patchkernels.data.parquet import CorpusConfig, print_corpus
from patchkernels.experiment.config import ExperimentConfig
from patchkernels.experiment.laboratory import experiment
from patchkernels.training.config import TrainConfig
from patchkernels.training.plan import PlanConfig, print_plan
from patchkernels.training.train import train

Command = (
    Annotated[TrainConfig, subcommand("train")]
    | Annotated[PlanConfig, subcommand("plan")]
    | Annotated[CorpusConfig, subcommand("corpus")]
    | Annotated[ExperimentConfig, subcommand("experiment")]
)


def main(arguments: Sequence[str] | None = None) -> None:
    """Runs a command. Bad input exits with code 1 and one line on stderr, a malformed command line with code 2."""
    try:
        run(parse(arguments))
    except (ValueError, IndexError, OSError, RuntimeError) as error:
        print(f"patchkernels: {type(error).__name__}: {error}", file=sys.stderr)
        raise SystemExit(1) from error


def parse(arguments: Sequence[str] | None = None) -> Command:
    """The settings of the command that the arguments name. None stands for the arguments of this process."""
    description = "Patch-level training of language models."
    return tyro.cli(Command, args=arguments, prog="patchkernels", description=description)


def run(command: Command) -> None:
    if isinstance(command, TrainConfig):
        train(command)
    elif isinstance(command, PlanConfig):
        print_plan(command)
    elif isinstance(command, CorpusConfig):
        print_corpus(command)
    else:
        experiment(command)
