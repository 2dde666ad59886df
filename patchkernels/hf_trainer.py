"""transformers' Trainer through all phases of a run: ``PatchTrainer(..., phases="4:2/3,1:1/3")``.

What the phase is, the batch says: rows of a patch phase bring ``shift_labels (B, P, K)``. Everything else is the
Trainer's own: its arguments, optimizer, checkpoints, accumulation, DDP and FSDP.
"""

from __future__ import annotations

import contextlib
import json
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.optim.lr_scheduler import SequentialLR
from torch.utils.data import IterableDataset, SequentialSampler
from transformers import Trainer, TrainerCallback

from patchkernels import hf
from patchkernels.hf_modules import Step
from patchkernels.hf_rows import PatchCollator, PatchRows, PatchStream, example_schedule, examples_of_steps
from patchkernels.pretrained import replace_file
from patchkernels.schedule import CONVENTIONS, SCOPES, Schedule, parse_phases

SCHEDULE_FILE = "patch_schedule.json"


class PatchTraining:
    """Mixed in before a Trainer: ``class Mine(PatchTraining, MyTrainer)``; :class:`PatchTrainer` is ready to use.

    The run reads ``num_train_epochs`` of the dataset, or takes ``max_steps`` optimizer steps, divided among the
    phases. A row of a phase of patch size K is K examples one after the other. Steps of all phases take the same rows,
    so ``gradient_accumulation_steps`` and batch sizes need no change. An epoch is one of the examples, whatever the
    steps that it takes. Every phase ends with a checkpoint. Evaluation is token-level in every phase.

    Logged beside the Trainer's values: ``phase`` (from 1), ``patch_size``, ``raw_tokens_per_second``, and in patch
    phases ``slot_loss_k``, the loss of the k-th token of the next patch.

    Args:
        *args, **kwargs: the Trainer's.
        phases: patch size and share of each phase, in order.
        shares_of: ``"data"`` (PatchTrain's lambda) or ``"steps"`` (TST's r).
        convention: constant ``"positions"`` a step, or constant raw ``"tokens"``: a row is then one example.
        optimizer_at_switch: ``"carry"`` (TST) or ``"reset"`` (PatchTrain) the optimizer's state where a phase begins.
        lr_scope: the learning rate's schedule, warmup included, over the whole ``"run"`` or anew in each ``"phase"``.
        reduction: ``"mean"`` or ``"slot_mean"``, of patch steps.

    Raises:
        TypeError, ValueError: as :func:`patchkernels.hf.enable`; ValueError too for settings that have no meaning here.
    """

    def __init__(
        self: Any,
        *args: Any,
        phases: str = "4:2/3,1:1/3",
        shares_of: str = "data",
        convention: str = "positions",
        optimizer_at_switch: str = "carry",
        lr_scope: str = "run",
        reduction: str = "mean",
        **kwargs: Any,
    ) -> None:
        for name, value, choices in (
            ("convention", convention, CONVENTIONS),
            ("optimizer_at_switch", optimizer_at_switch, ("carry", "reset")),
            ("lr_scope", lr_scope, SCOPES),
        ):
            if value not in choices:
                raise ValueError(f"{name} must be one of {choices}, got {value!r}")
        self.patch_phases = parse_phases(phases, shares_of, convention)
        self.convention, self.optimizer_at_switch, self.lr_scope = convention, optimizer_at_switch, lr_scope
        self.patch_reduction = reduction
        self.schedule: Schedule | None = None  # known with the batch size, when training begins
        model = args[0] if args else kwargs.get("model")
        if model is not None:
            hf.enable(model, reduction=reduction)
        super().__init__(*args, **kwargs)
        self.check_arguments()
        self._step.label_smoothing = self.args.label_smoothing_factor
        holders = (self.processing_class, hf.unwrap(self.model).config.get_text_config())
        tokens = [getattr(holder, "pad_token_id", None) for holder in holders]
        collator = kwargs.get("data_collator")
        self.data_collator = PatchCollator(collator, next((token for token in tokens if token is not None), 0))
        self.add_callback(Switch(self))
        self._clear_meters()

    def check_arguments(self: Any) -> None:
        """``ValueError`` for what the Trainer can do and a run in phases cannot."""
        args = self.args
        if self.compute_loss_func is not None:
            raise ValueError("compute_loss_func needs logits; a patch step gives its loss alone")
        if args.ignore_data_skip:
            raise ValueError("ignore_data_skip would begin again with the rows of the first phase")
        if args.accelerator_config.split_batches or args.accelerator_config.dispatch_batches:
            raise ValueError("split_batches and dispatch_batches are not supported: every process reads its own rows")
        older = (
            "group_by_length" if getattr(args, "group_by_length", False) else "random"
        )  # the argument of transformers 5.0
        sampling = getattr(args, "train_sampling_strategy", older)
        if sampling not in ("random", "sequential"):
            raise ValueError(f"train_sampling_strategy must be 'random' or 'sequential', got {sampling!r}")
        if is_stream(self.train_dataset) and args.dataloader_num_workers > 1:
            raise ValueError(
                "a training dataset without a length is read by one worker, got "
                f"dataloader_num_workers={args.dataloader_num_workers}"
            )

    def call_model_init(self: Any, trial: Any = None) -> Any:
        return hf.enable(super().call_model_init(trial), reduction=self.patch_reduction)  # type: ignore[misc]

    @property
    def _step(self: Any) -> Step:
        step: Step = hf.unwrap(self.accelerator.unwrap_model(self.model))._patch
        return step

    # Rows in place of examples

    def get_train_dataloader(self: Any) -> Any:
        examples = self.train_dataset
        if examples is None:
            raise ValueError("training needs a train_dataset")
        args, stream = self.args, is_stream(examples)
        rows = self._train_batch_size * args.gradient_accumulation_steps * args.world_size
        if args.max_steps > 0:
            read = examples_of_steps(self.patch_phases, args.max_steps, rows, self.convention)
        else:
            read = args.num_train_epochs * len(examples)
        schedule = self.schedule = example_schedule(self.patch_phases, read, rows, self.convention)
        seed = args.data_seed if args.data_seed is not None else args.seed
        shuffle = getattr(args, "train_sampling_strategy", "random") == "random"
        self.train_dataset = PatchStream(examples, schedule) if stream else PatchRows(examples, schedule, seed, shuffle)
        try:
            return super().get_train_dataloader()  # type: ignore[misc]
        finally:
            self.train_dataset = examples

    def _get_train_sampler(self: Any, train_dataset: Any = None) -> Any:
        return SequentialSampler(self.train_dataset if train_dataset is None else train_dataset)

    def _set_signature_columns_if_needed(self: Any) -> None:
        super()._set_signature_columns_if_needed()  # type: ignore[misc]
        if "patch_size" not in self._signature_columns:
            self._signature_columns += ["patch_size"]

    def set_initial_training_values(self: Any, args: Any, *rest: Any) -> Any:
        epochs, args.num_train_epochs = args.num_train_epochs, 1  # the rows are those of all epochs
        try:
            return super().set_initial_training_values(args, *rest)  # type: ignore[misc]
        finally:
            args.num_train_epochs = epochs

    # Learning rate, loss, and what is logged of it

    def create_scheduler(self: Any, num_training_steps: int, optimizer: Any = None) -> Any:
        if self.lr_scheduler is not None or self.lr_scope == "run":
            return super().create_scheduler(num_training_steps, optimizer)  # type: ignore[misc]
        assert self.schedule is not None
        optimizer = self.optimizer if optimizer is None else optimizer
        optimizer = getattr(optimizer, "optimizer", optimizer)  # inside Accelerate's
        parts = []
        for steps in self.schedule.steps:
            parts.append(super().create_scheduler(steps, optimizer))  # type: ignore[misc]
            self.lr_scheduler = None
        self.lr_scheduler = SequentialLR(optimizer, parts, self.schedule.starts[1:])
        return self.lr_scheduler

    def _get_num_items_in_batch(self: Any, batch_samples: list[Any], device: Any) -> Any:
        """Counts the targets of patches too, in no version a row's first label, and keeps the count whole."""
        targets = [batch.get("shift_labels", batch.get("labels")) for batch in batch_samples]
        if all(target is not None for target in targets):
            shifted = [
                target.flatten(1) if "shift_labels" in batch else target[:, 1:]
                for target, batch in zip(targets, batch_samples)
            ]
            batch_samples = [{"labels": torch.nn.functional.pad(rows, (1, 0), value=-100)} for rows in shifted]
        count = super()._get_num_items_in_batch(batch_samples, device)  # type: ignore[misc]
        # FSDP2's mixed precision would round one in floating point
        return count.long() if isinstance(count, Tensor) and count.is_floating_point() else count

    def compute_loss(self: Any, model: Any, inputs: Any, *args: Any, **kwargs: Any) -> Any:
        """Label smoothing is taken from logits, which a patch step has not: its own loss is smoothed."""
        smoother = self.label_smoother
        if inputs.get("shift_labels") is not None and inputs["shift_labels"].ndim == 3:
            self.label_smoother = None
        try:
            return super().compute_loss(model, inputs, *args, **kwargs)  # type: ignore[misc]
        finally:
            self.label_smoother = smoother

    def training_step(self: Any, model: Any, inputs: Any, *args: Any, **kwargs: Any) -> Tensor:
        self._raw_tokens += inputs["input_ids"].numel()
        loss: Tensor = super().training_step(model, inputs, *args, **kwargs)  # type: ignore[misc]
        step = self._step
        if step.losses is not None and step.counted is not None:
            sums = torch.stack([step.losses.sum((0, 1)).double(), step.counted.sum((0, 1)).double()])
            self._slots = sums if self._slots is None else self._slots + sums
            step.losses = step.counted = None
        return loss

    def log(self: Any, logs: dict[str, float], *args: Any, **kwargs: Any) -> None:
        if "loss" in logs and self.schedule is not None:
            index, _ = self.schedule.locate(self.state.global_step - 1)
            seconds = time.perf_counter() - self._since
            logs |= {
                "phase": index + 1,
                "patch_size": self.schedule.phases[index].patch_size,
                "raw_tokens_per_second": self._raw_tokens * self.args.world_size / seconds,
            }
            if self._slots is not None:
                total, count = self.accelerator.reduce(self._slots, "sum").tolist()
                logs |= {f"slot_loss_{k}": a / max(b, 1) for k, (a, b) in enumerate(zip(total, count), 1)}
            self._clear_meters()
        super().log(logs, *args, **kwargs)  # type: ignore[misc]

    def _clear_meters(self) -> None:
        self._raw_tokens, self._since, self._slots = 0, time.perf_counter(), None

    @contextlib.contextmanager
    def _clock_stopped(self) -> Iterator[None]:
        began = time.perf_counter()
        try:
            yield
        finally:
            self._since += time.perf_counter() - began

    def evaluate(self: Any, *args: Any, **kwargs: Any) -> Any:
        with self._clock_stopped():
            return super().evaluate(*args, **kwargs)  # type: ignore[misc]

    # Checkpoints

    def settings(self: Any) -> dict[str, Any]:
        """What a checkpoint and its run must share."""
        assert self.schedule is not None
        return {
            "phases": [[phase.patch_size, steps] for phase, steps in zip(self.schedule.phases, self.schedule.steps)],
            "rows": self.schedule.batch_size, "convention": self.convention, "reduction": self.patch_reduction,
            "optimizer_at_switch": self.optimizer_at_switch, "lr_scope": self.lr_scope,
        }  # fmt: skip

    def _save_checkpoint(self: Any, *args: Any, **kwargs: Any) -> None:
        with self._clock_stopped():
            folder = Path(self._get_output_dir(trial=None)) / f"checkpoint-{self.state.global_step}"
            if self.args.should_save:
                folder.mkdir(parents=True, exist_ok=True)
                text = json.dumps(self.settings(), indent=1)
                replace_file(folder / SCHEDULE_FILE, lambda path: path.write_text(text))
            super()._save_checkpoint(*args, **kwargs)  # type: ignore[misc]

    def _load_optimizer_and_scheduler(self: Any, checkpoint: str | None) -> None:
        if checkpoint is not None:
            file = Path(checkpoint) / SCHEDULE_FILE
            theirs = json.loads(file.read_text()) if file.is_file() else None
            mine = self.settings()
            if theirs != mine:
                raise ValueError(f"the checkpoint {checkpoint} is of another schedule: {theirs} there, {mine} here")
        super()._load_optimizer_and_scheduler(checkpoint)  # type: ignore[misc]


def is_stream(dataset: Any) -> bool:
    """Whether a dataset can only be read in order."""
    return dataset is not None and (isinstance(dataset, IterableDataset) or not hasattr(dataset, "__len__"))


class Switch(TrainerCallback):  # type: ignore[misc,unused-ignore]
    """What happens where a phase ends and the next begins, and where an epoch of the examples ends."""

    def __init__(self, trainer: Any) -> None:
        self.trainer = trainer

    def on_train_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        self.trainer._clear_meters()

    def on_step_begin(self, args: Any, state: Any, control: Any, optimizer: Any = None, **_: Any) -> None:
        begins = state.global_step in self.trainer.schedule.starts[1:]
        if begins and self.trainer.optimizer_at_switch == "reset":
            optimizer.state.clear()

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> Any:
        if state.global_step in self.trainer.schedule.starts:
            control.should_save = control.should_log = True
        before, after = (self.epochs(step) for step in (state.global_step - 1, state.global_step))
        state.epoch = after
        if int(after) > int(before) and state.global_step < self.trainer.schedule.total_steps:  # then the Trainer does
            control.should_log |= args.logging_strategy == "epoch"
            control.should_evaluate |= args.eval_strategy == "epoch"
            control.should_save |= args.save_strategy == "epoch"
        return control

    def epochs(self, step: int) -> float:
        """Epochs of the examples; of a stream, whose length nobody knows, of the run."""
        schedule, examples = self.trainer.schedule, self.trainer.train_dataset
        if is_stream(examples):
            return float(step / schedule.total_steps)
        return float(schedule.raw_tokens(step) // schedule.context / len(examples))


class PatchTrainer(PatchTraining, Trainer):  # type: ignore[misc,unused-ignore]
    __doc__ = PatchTraining.__doc__
