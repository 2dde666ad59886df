"""transformers' Trainer for runs in phases: ``PatchTrainer(..., phases="4:2/3,1:1/3")``.

A batch says which phase it belongs to: in a patch phase it has ``shift_labels`` (B, P, K). Everything else is the
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

from patchkernels.files import replace_file
from patchkernels.hf.enable import enable, unwrap
from patchkernels.hf.modules import PatchState
from patchkernels.hf.rows import (
    PatchCollator,
    PatchRows,
    PatchStream,
    example_schedule,
    examples_before,
    examples_of_steps,
)
from patchkernels.numerics import IGNORE_INDEX
from patchkernels.schedule import CONVENTIONS, DEFAULT_PHASES, OPTIMIZER_AT_SWITCH, SCOPES, Schedule, parse_phases

SCHEDULE_FILE = "patch_schedule.json"


class PatchTraining:
    """The mixin that makes a Trainer run in phases. For your own: ``class Phases(PatchTraining, MyTrainer)``.

    The run reads ``num_train_epochs`` of the dataset, or takes ``max_steps`` optimizer steps, divided among the
    phases. In a phase of patch size K a row of a batch is K examples one after the other. All steps take the same
    number of rows, so that batch sizes and ``gradient_accumulation_steps`` need no change. An epoch ends where all
    examples have been read, whatever the number of steps. A checkpoint is written where one phase follows another,
    whatever ``save_strategy`` is, and a run that is resumed from any checkpoint continues as if it had not stopped.
    Evaluation is token-level in every phase.

    The log also has ``phase`` (from 1), ``patch_size``, ``raw_tokens_per_second``, and in patch phases
    ``slot_loss_k``, the loss of the k-th token of the next patch.

    Args:
        *args, **kwargs: the Trainer's. The dataset's examples hold ``input_ids``, and ``labels`` if these differ.
        phases: patch size and share of each phase, in order.
        shares_of: the shares are those of the ``"data"`` (PatchTrain's lambda) or of the ``"steps"`` (TST's r).
        convention: the number that is the same in all steps, ``"positions"`` or raw ``"tokens"``. With ``"tokens"`` a
            row is one example in every phase.
        optimizer_at_switch: where a phase begins, ``"carry"`` keeps the optimizer's state (TST) and ``"reset"`` clears
            it (PatchTrain).
        lr_scope: the learning rate's schedule, warmup included, spans the ``"run"`` or begins anew in each ``"phase"``.
        reduction: of the loss of patch steps, ``"mean"`` or ``"slot_mean"``.

    Raises:
        TypeError: as :func:`patchkernels.hf.enable`.
        ValueError: as :func:`patchkernels.hf.enable`, and for settings of the Trainer that a run in phases cannot have.
    """

    def __init__(
        self: Any,
        *args: Any,
        phases: str = DEFAULT_PHASES,
        shares_of: str = "data",
        convention: str = "positions",
        optimizer_at_switch: str = "carry",
        lr_scope: str = "run",
        reduction: str = "mean",
        **kwargs: Any,
    ) -> None:
        check_choice("convention", convention, CONVENTIONS)
        check_choice("optimizer_at_switch", optimizer_at_switch, OPTIMIZER_AT_SWITCH)
        check_choice("lr_scope", lr_scope, SCOPES)
        self.patch_phases = parse_phases(phases, shares_of, convention)
        self.convention, self.optimizer_at_switch, self.lr_scope = convention, optimizer_at_switch, lr_scope
        self.patch_reduction = reduction
        self.schedule: Schedule | None = None  # made when training begins, which is when the batch size is known
        model = args[0] if args else kwargs.get("model")
        if model is not None:
            enable(model, reduction=reduction)
        super().__init__(*args, **kwargs)
        check_supported(self)
        self._patch_state.settings.label_smoothing = self.args.label_smoothing_factor
        self.data_collator = PatchCollator(kwargs.get("data_collator"), self._pad_token_id())
        self.add_callback(PhaseCallback(self))
        self._clear_meters()

    def _pad_token_id(self: Any) -> int:
        holders = (self.processing_class, unwrap(self.model).config.get_text_config())
        tokens = [getattr(holder, "pad_token_id", None) for holder in holders]
        return next((token for token in tokens if token is not None), 0)

    def call_model_init(self: Any, trial: Any = None) -> Any:
        return enable(super().call_model_init(trial), reduction=self.patch_reduction)  # type: ignore[misc]

    @property
    def _patch_state(self: Any) -> PatchState:
        state: PatchState = unwrap(self.accelerator.unwrap_model(self.model))._patch_state
        return state

    def get_train_dataloader(self: Any) -> Any:
        """The Trainer's dataloader over the rows of the run instead of the examples of its dataset."""
        dataset, args = self.train_dataset, self.args
        if dataset is None:
            raise ValueError("training needs a train_dataset")
        batch_size = self._train_batch_size * args.gradient_accumulation_steps * args.world_size
        if args.max_steps > 0:
            examples = examples_of_steps(self.patch_phases, args.max_steps, batch_size, self.convention)
        else:
            examples = args.num_train_epochs * len(dataset)
        self.schedule = example_schedule(self.patch_phases, examples, batch_size, self.convention)
        if is_stream(dataset):
            self.train_dataset = PatchStream(dataset, self.schedule)
        else:
            seed = args.data_seed if args.data_seed is not None else args.seed
            shuffle = getattr(args, "train_sampling_strategy", "random") == "random"
            self.train_dataset = PatchRows(dataset, self.schedule, seed, shuffle)
        try:
            return super().get_train_dataloader()  # type: ignore[misc]
        finally:
            self.train_dataset = dataset

    def _get_train_sampler(self: Any, train_dataset: Any = None) -> Any:
        return SequentialSampler(self.train_dataset if train_dataset is None else train_dataset)

    def _set_signature_columns_if_needed(self: Any) -> None:
        super()._set_signature_columns_if_needed()  # type: ignore[misc]
        if "patch_size" not in self._signature_columns:
            self._signature_columns += ["patch_size"]

    def set_initial_training_values(self: Any, args: Any, *rest: Any) -> Any:
        """One pass over the rows is the whole run: the rows hold the examples of all epochs."""
        epochs, args.num_train_epochs = args.num_train_epochs, 1
        try:
            return super().set_initial_training_values(args, *rest)  # type: ignore[misc]
        finally:
            args.num_train_epochs = epochs

    def create_scheduler(self: Any, num_training_steps: int, optimizer: Any = None) -> Any:
        if self.lr_scheduler is not None or self.lr_scope == "run":
            return super().create_scheduler(num_training_steps, optimizer)  # type: ignore[misc]
        assert self.schedule is not None
        optimizer = self.optimizer if optimizer is None else optimizer
        optimizer = getattr(optimizer, "optimizer", optimizer)  # the one inside Accelerate's wrapper
        schedulers = []
        for steps in self.schedule.steps:
            schedulers.append(super().create_scheduler(steps, optimizer))  # type: ignore[misc]
            self.lr_scheduler = None
        self.lr_scheduler = SequentialLR(optimizer, schedulers, self.schedule.starts[1:])
        return self.lr_scheduler

    def _get_num_items_in_batch(self: Any, batch_samples: list[Any], device: Any) -> Any:
        """Counts the targets of patches and of tokens, and returns a whole number.

        The Trainer's own count leaves out the first label of every row, so it gets the targets with an ignored label
        in front. A floating-point count would be rounded by FSDP2's mixed precision.
        """
        targets = [batch.get("shift_labels", batch.get("labels")) for batch in batch_samples]
        if all(target is not None for target in targets):
            shifted = [
                target.flatten(1) if "shift_labels" in batch else target[:, 1:]
                for target, batch in zip(targets, batch_samples)
            ]
            batch_samples = [{"labels": torch.nn.functional.pad(row, (1, 0), value=IGNORE_INDEX)} for row in shifted]
        count = super()._get_num_items_in_batch(batch_samples, device)  # type: ignore[misc]
        return count.long() if isinstance(count, Tensor) and count.is_floating_point() else count

    def compute_loss(self: Any, model: Any, inputs: Any, *args: Any, **kwargs: Any) -> Any:
        """Leaves label smoothing to the model in a patch step: the Trainer's needs logits, which a fused loss lacks."""
        smoother, shift_labels = self.label_smoother, inputs.get("shift_labels")
        if shift_labels is not None and shift_labels.ndim == 3:
            self.label_smoother = None
        try:
            return super().compute_loss(model, inputs, *args, **kwargs)  # type: ignore[misc]
        finally:
            self.label_smoother = smoother

    def training_step(self: Any, model: Any, inputs: Any, *args: Any, **kwargs: Any) -> Tensor:
        self._raw_tokens += inputs["input_ids"].numel()
        loss: Tensor = super().training_step(model, inputs, *args, **kwargs)  # type: ignore[misc]
        state = self._patch_state
        step, state.last_step = state.last_step, None
        if step is not None and step.losses is not None:
            valid = step.target != IGNORE_INDEX
            sums = torch.stack([step.losses.sum((0, 1)).double(), valid.sum((0, 1)).double()])
            self._slot_sums = sums if self._slot_sums is None else self._slot_sums + sums
        return loss

    def log(self: Any, logs: dict[str, float], *args: Any, **kwargs: Any) -> None:
        if "loss" in logs and self.schedule is not None:
            phase, _ = self.schedule.locate(self.state.global_step - 1)
            seconds = time.perf_counter() - self._meters_since
            logs["phase"] = phase + 1
            logs["patch_size"] = self.schedule.phases[phase].patch_size
            logs["raw_tokens_per_second"] = self._raw_tokens * self.args.world_size / seconds
            if self._slot_sums is not None:
                losses, counts = self.accelerator.reduce(self._slot_sums, "sum").tolist()
                for slot, (loss, count) in enumerate(zip(losses, counts), 1):
                    logs[f"slot_loss_{slot}"] = loss / max(count, 1)
            self._clear_meters()
        super().log(logs, *args, **kwargs)  # type: ignore[misc]

    def _clear_meters(self: Any) -> None:
        self._raw_tokens, self._meters_since = 0, time.perf_counter()
        self._slot_sums = None  # (2, K): sums of losses and numbers of valid targets

    @contextlib.contextmanager
    def _meters_paused(self: Any) -> Iterator[None]:
        """Stops the clock inside the block: evaluations and checkpoints do not count as training time."""
        begin = time.perf_counter()
        try:
            yield
        finally:
            self._meters_since += time.perf_counter() - begin

    def evaluate(self: Any, *args: Any, **kwargs: Any) -> Any:
        with self._meters_paused():
            return super().evaluate(*args, **kwargs)  # type: ignore[misc]

    def schedule_settings(self: Any) -> dict[str, Any]:
        """The settings that a run must have in common with the checkpoint from which it resumes."""
        assert self.schedule is not None
        return {
            "phases": [[phase.patch_size, steps] for phase, steps in zip(self.schedule.phases, self.schedule.steps)],
            "rows": self.schedule.batch_size,
            "convention": self.convention,
            "reduction": self.patch_reduction,
            "optimizer_at_switch": self.optimizer_at_switch,
            "lr_scope": self.lr_scope,
        }

    def _save_checkpoint(self: Any, *args: Any, **kwargs: Any) -> None:
        with self._meters_paused():
            folder = Path(self._get_output_dir(trial=None)) / f"checkpoint-{self.state.global_step}"
            if self.args.should_save:
                folder.mkdir(parents=True, exist_ok=True)
                text = json.dumps(self.schedule_settings(), indent=1)
                replace_file(folder / SCHEDULE_FILE, lambda path: path.write_text(text))
            super()._save_checkpoint(*args, **kwargs)  # type: ignore[misc]

    def _load_optimizer_and_scheduler(self: Any, checkpoint: str | None) -> None:
        if checkpoint is not None:
            file = Path(checkpoint) / SCHEDULE_FILE
            saved = json.loads(file.read_text()) if file.is_file() else None
            settings = self.schedule_settings()
            if saved != settings:
                raise ValueError(f"the checkpoint {checkpoint} is of another schedule: {saved} there, {settings} here")
        super()._load_optimizer_and_scheduler(checkpoint)  # type: ignore[misc]


def check_choice(name: str, value: str, choices: tuple[str, ...]) -> None:
    if value not in choices:
        raise ValueError(f"{name} must be one of {choices}, got {value!r}")


def check_supported(trainer: Any) -> None:
    """Raises ``ValueError`` for settings of the Trainer that a run in phases cannot have."""
    args = trainer.args
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


def is_stream(dataset: Any) -> bool:
    """Whether a dataset can only be read in order."""
    return dataset is not None and (isinstance(dataset, IterableDataset) or not hasattr(dataset, "__len__"))


class PhaseCallback(TrainerCallback):  # type: ignore[misc,unused-ignore]
    """Resets, saves, logs and evaluates where a phase begins or ends and where an epoch of the examples ends."""

    def __init__(self, trainer: Any) -> None:
        self.trainer = trainer

    def on_train_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        self.trainer._clear_meters()

    def on_step_begin(self, args: Any, state: Any, control: Any, optimizer: Any = None, **_: Any) -> None:
        begins_phase = state.global_step in self.trainer.schedule.starts[1:]
        if begins_phase and self.trainer.optimizer_at_switch == "reset":
            optimizer.state.clear()

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> Any:
        step, schedule = state.global_step, self.trainer.schedule
        if step in schedule.starts:
            control.should_save = control.should_log = True
        state.epoch = self.epochs_before(step)
        ends_epoch = int(state.epoch) > int(self.epochs_before(step - 1))
        if ends_epoch and step < schedule.total_steps:  # at the end of the run the Trainer does this itself
            control.should_log |= args.logging_strategy == "epoch"
            control.should_evaluate |= args.eval_strategy == "epoch"
            control.should_save |= args.save_strategy == "epoch"
        return control

    def epochs_before(self, step: int) -> float:
        """Epochs of the examples read before a step; for a stream, whose length is unknown, the fraction of the run."""
        schedule, dataset = self.trainer.schedule, self.trainer.train_dataset
        if is_stream(dataset):
            return float(step / schedule.total_steps)
        return float(examples_before(schedule, step) / len(dataset))


class PatchTrainer(PatchTraining, Trainer):  # type: ignore[misc,unused-ignore]
    """transformers' Trainer for a run in phases, with one optimizer and one sequence of checkpoints.

    Takes the arguments of the Trainer and those of :class:`PatchTraining`, which says what a run reads, logs and
    refuses. The model is enabled (:func:`patchkernels.hf.enable`); what ``save_model`` writes is an ordinary model.

        trainer = PatchTrainer(model=model, args=arguments, train_dataset=rows, phases="4:2/3,1:1/3")
        trainer.train()
    """
