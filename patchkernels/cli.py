"""The command line: ``patchkernels train`` and ``patchkernels plan``."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from typing import Annotated

import tyro

from patchkernels.plan import PlanConfig, print_plan
from patchkernels.train import NonFiniteError, train
from patchkernels.train_config import TrainConfig


def main(arguments: Sequence[str] | None = None) -> None:
    """Bad input is one clear line on stderr and exit code 1 (2 where the command line itself is wrong)."""
    try:
        command = tyro.cli(
            Annotated[TrainConfig, tyro.conf.subcommand("train")] | Annotated[PlanConfig, tyro.conf.subcommand("plan")],
            args=arguments,
            prog="patchkernels",
            description="Patch-level training of language models.",
        )
        if isinstance(command, TrainConfig):
            train(command)
        elif isinstance(command, PlanConfig):
            print_plan(command)
    except (ValueError, IndexError, OSError, RuntimeError, NonFiniteError) as error:
        print(f"patchkernels: {type(error).__name__}: {error}", file=sys.stderr)
        raise SystemExit(1) from error
