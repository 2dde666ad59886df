"""What a Trainer that runs in phases can take: its settings, its dataset, its class."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
from torch.utils.data import IterableDataset
from transformers import Trainer

from patchkernels.hf.rows import ROW_COLUMNS

LOOKED_AT = 64  # examples of a dataset, before the first step


def check_choice(name: str, value: str, choices: tuple[str, ...]) -> None:
    if value not in choices:
        raise ValueError(f"{name} must be one of {choices}, got {value!r}")


def check_supported(trainer: Any, lr_scope: str) -> None:
    """Raises ``ValueError`` for settings of the Trainer that a run in phases cannot have."""
    args = trainer.args
    if lr_scope == "phase" and (trainer.lr_scheduler is not None or args.lr_scheduler_type == "reduce_lr_on_plateau"):
        raise ValueError(
            "lr_scope='phase' makes a scheduler for each phase: pass none, and none that waits for a plateau"
        )
    if trainer.compute_loss_func is not None:
        raise ValueError("compute_loss_func needs logits; a patch step gives its loss alone")
    if args.ignore_data_skip:
        raise ValueError("ignore_data_skip would begin again with the rows of the first phase")
    if args.accelerator_config.split_batches or args.accelerator_config.dispatch_batches:
        raise ValueError("split_batches and dispatch_batches are not supported: every process reads its own rows")
    # transformers 5.0 has group_by_length, later versions have train_sampling_strategy.
    by_length = getattr(args, "group_by_length", False)
    strategy = getattr(args, "train_sampling_strategy", "group_by_length" if by_length else "random")
    if strategy not in ("random", "sequential"):
        raise ValueError(f"train_sampling_strategy must be 'random' or 'sequential', got {strategy!r}")
    if is_stream(trainer.train_dataset) and args.dataloader_num_workers > 1:
        raise ValueError(
            "a training dataset without a length is read by one worker, got "
            f"dataloader_num_workers={args.dataloader_num_workers}"
        )
    parallelism = trainer.accelerator.parallelism_config
    if parallelism is not None and (parallelism.cp_enabled or getattr(parallelism, "sp_enabled", False)):
        raise ValueError("a sequence that is split over processes (cp_size, sp_size) cannot be cut into patches")
    if args.use_liger_kernel and (args.liger_kernel_config or {}).get("fused_linear_cross_entropy", True):
        raise ValueError(
            "use_liger_kernel replaces the model's forward, which a patch step runs; keep it with "
            "liger_kernel_config={'fused_linear_cross_entropy': False}"
        )
    loss_type = getattr(args, "loss_type", "nll")  # of TRL
    if loss_type != "nll":
        raise ValueError(f"a patch step needs loss_type='nll', got loss_type={loss_type!r}")


def check_class(trainer: Any) -> None:
    """Raises ``ValueError`` for a trainer of TRL whose loss is not that of next tokens."""
    names = [cls.__name__ for cls in type(trainer).__mro__ if is_of_trl(cls) and issubclass(cls, Trainer)]
    if names and "SFTTrainer" not in names:
        raise ValueError(f"of TRL's trainers only the SFTTrainer predicts next tokens, got {names[0]}")


def is_of_trl(thing: Any) -> bool:
    """Whether a class or a method is defined in TRL."""
    return bool(thing.__module__.split(".")[0] == "trl")


def check_examples(dataset: Any, model_arguments: list[str], patch_size: int) -> None:
    """Looks at some examples of a training set that can be read in any order.

    Raises:
        ValueError: they are no dictionaries; or they hold an argument of the model that a row of several examples has
            not; or no row of one example, where ``patch_size`` is above 1, has two patches.
    """
    columns = getattr(dataset, "column_names", None)
    if not is_stream(dataset) and len(dataset):
        numbers = np.linspace(0, len(dataset) - 1, min(LOOKED_AT, len(dataset)), dtype=int).tolist()
        examples = [dataset[number] for number in numbers]
        if not all(isinstance(example, Mapping) for example in examples):
            raise ValueError(f"examples must be dictionaries with input_ids, got {type(examples[0]).__name__}")
        longest = max(len(example.get("input_ids", ())) for example in examples)
        if patch_size > 1 and longest and longest <= patch_size:
            raise ValueError(
                f"examples of up to {longest} tokens have nothing to predict in patches of {patch_size}; with "
                "convention='positions' a row is several examples"
            )
        columns = columns or list(examples[0])
    lost = [name for name in columns or () if name in model_arguments and name not in ROW_COLUMNS]
    if lost:
        raise ValueError(
            f"rows of several examples are made of {sorted(ROW_COLUMNS)}; remove the columns {lost} of the training "
            "dataset, which the model would read too"
        )


def is_stream(dataset: Any) -> bool:
    """Whether a dataset can only be read in order."""
    return dataset is not None and (isinstance(dataset, IterableDataset) or not hasattr(dataset, "__len__"))
