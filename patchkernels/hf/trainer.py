"""transformers' Trainer for runs in phases: ``PatchTrainer(..., phases="4:2/3,1:1/3")``.

A batch says which phase it belongs to: in a patch phase it has ``shift_labels`` (B, P, K). Everything else is the
Trainer's own: its arguments, optimizer, checkpoints, accumulation, DDP and FSDP.
"""

from __future__ import annotations

import contextlib
import functools
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.optim.lr_scheduler import SequentialLR
from torch.utils.data import SequentialSampler
from transformers import DataCollatorWithPadding, Trainer, default_data_collator

from patchkernels.files import replace_file
from patchkernels.hf.collator import PatchCollator
from patchkernels.hf.enable import enable, unwrap
from patchkernels.hf.meters import Meters
from patchkernels.hf.modules import PatchState
from patchkernels.hf.phase_callback import PhaseCallback
from patchkernels.hf.rows import PatchRows, PatchStream, example_schedule, examples_of_steps
from patchkernels.hf.trainer_checks import (
    check_choice,
    check_class,
    check_examples,
    check_supported,
    is_of_trl,
    is_stream,
)
from patchkernels.numerics import IGNORE_INDEX
from patchkernels.schedule import (
    CONVENTIONS,
    DEFAULT_PHASES,
    OPTIMIZER_AT_SWITCH,
    SCOPES,
    Phases,
    Schedule,
    parse_phases,
)

SCHEDULE_FILE = "patch_schedule.json"


class PatchTraining:
    """The mixin that makes a Trainer run in phases. For your own: ``class Phases(PatchTraining, MyTrainer)``.

    The run reads ``num_train_epochs`` of the dataset, or takes ``max_steps`` optimizer steps, divided among the
    phases. In a phase of patch size K a row of a batch is K examples one after the other. All steps take the same
    number of rows, so that batch sizes and ``gradient_accumulation_steps`` need no change. Examples may have any
    length: the last patch of a row is filled up with padding, which costs no target. An epoch ends where all examples
    have been read, whatever the number of steps. A checkpoint is written where one phase follows another, whatever
    ``save_strategy`` is unless it is ``"best"``, and a run that is resumed from any checkpoint continues as if it had
    not stopped. Evaluation is token-level in every phase.

    A batch without a target has a loss of 0 and gradients of 0, and the optimizer takes its step with them. The log
    also has ``phase`` (from 1), ``patch_size``, ``raw_tokens_per_second``, and in patch phases ``slot_loss_k``, the
    loss of the k-th token of the next patch. A loss that is NaN or infinite is logged as such: while it trains, the
    run does not follow ``logging_nan_inf_filter``.

    A trainer whose own ``compute_loss`` needs logits does not work, since a patch step has none. Of TRL's trainers the
    ``SFTTrainer`` does, also with packing: in patch phases it takes the model's loss and logs no accuracy and entropy.

    Args:
        *args, **kwargs: the Trainer's. The dataset's examples hold ``input_ids``, and ``labels`` if these differ. If an
            example is several documents, it also holds their ``position_ids``.
        phases: patch size and share of each phase, in order: ``"4:2/3,1:1/3"`` or ``[(4, 2 / 3), (1, 1 / 3)]``.
        shares_of: the shares are those of the ``"data"`` (PatchTrain's lambda) or of the ``"steps"`` (TST's r).
        convention: the number that is the same in all steps, ``"positions"`` or raw ``"tokens"``. With ``"tokens"`` a
            row is one example in every phase, whose length the patch size need not divide.
        optimizer_at_switch: where a phase begins, ``"carry"`` keeps the optimizer's state (TST) and ``"reset"`` clears
            it (PatchTrain).
        lr_scope: the learning rate's schedule, warmup included, spans the ``"run"`` or begins anew in each ``"phase"``.
        reduction: of the loss of patch steps, ``"mean"`` or ``"slot_mean"``, the latter within each batch that is
            computed at once.

    Raises:
        TypeError: as :func:`patchkernels.hf.enable`, or a ``compute_loss`` that does not run the model on patches.
        ValueError: as :func:`patchkernels.hf.enable`, and for settings of the Trainer or columns of the dataset that a
            run in phases cannot have.
    """

    def __init__(
        self: Any,
        *args: Any,
        phases: Phases = DEFAULT_PHASES,
        shares_of: str = "data",
        convention: str = "positions",
        optimizer_at_switch: str = "carry",
        lr_scope: str = "run",
        reduction: str = "mean",
        **kwargs: Any,
    ) -> None:
        check_class(self)
        check_choice("convention", convention, CONVENTIONS)
        check_choice("optimizer_at_switch", optimizer_at_switch, OPTIMIZER_AT_SWITCH)
        check_choice("lr_scope", lr_scope, SCOPES)
        self.patch_phases = parse_phases(phases, shares_of, convention)
        self.convention, self.optimizer_at_switch, self.lr_scope = convention, optimizer_at_switch, lr_scope
        self.patch_reduction = reduction
        self.schedule: Schedule | None = None  # made when training begins, which is when the batch size is known
        model = args[0] if args else kwargs.get("model")
        if isinstance(model, str):
            raise TypeError(f"a run in phases needs the model, not its name {model!r}: load it with from_pretrained")
        if model is not None:
            enable(model, reduction=reduction)
        self._meters = Meters()
        super().__init__(*args, **kwargs)
        check_supported(self, lr_scope)
        if is_stream(self.train_dataset):  # otherwise the first process would read it and send parts to the others
            self.accelerator.dataloader_config.dispatch_batches = False
        self._filters_nan = self.args.logging_nan_inf_filter  # in evaluations
        self._patch_state.settings.label_smoothing = self.args.label_smoothing_factor
        self.data_collator = self._patch_collator()
        self.add_callback(PhaseCallback(self))

    def _patch_collator(self: Any) -> PatchCollator:
        """A collator around the Trainer's, or around none if that is a default: it would not pad labels."""
        collate = self.data_collator
        is_default = collate is default_data_collator or isinstance(collate, DataCollatorWithPadding)
        model_config = unwrap(self.model).config.get_text_config()
        holders = (collate, getattr(collate, "tokenizer", None), self.processing_class, model_config)
        pad_tokens = [getattr(holder, "pad_token_id", None) for holder in holders]
        pad_token = next((token for token in pad_tokens if token is not None and token >= 0), 0)
        return PatchCollator(None if is_default else collate, pad_token)

    def call_model_init(self: Any, trial: Any = None) -> Any:
        model = super().call_model_init(trial)  # type: ignore[misc]
        return enable(model, reduction=self.patch_reduction, label_smoothing=self.args.label_smoothing_factor)

    @property
    def _patch_state(self: Any) -> PatchState:
        state: PatchState = unwrap(self.accelerator.unwrap_model(self.model))._patch_state
        return state

    def get_train_dataloader(self: Any) -> Any:
        """The Trainer's dataloader over the rows of the run instead of the examples of its dataset."""
        dataset, args = self.train_dataset, self.args
        if dataset is None:
            raise ValueError("training needs a train_dataset")
        self._set_signature_columns_if_needed()
        largest = max(phase.patch_size for phase in self.patch_phases) if self.convention == "tokens" else 1
        check_examples(dataset, self._signature_columns, largest)
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
        return count.long() if isinstance(count, Tensor) else count

    def compute_loss(self: Any, model: Any, inputs: Any, *args: Any, **kwargs: Any) -> Any:
        """The loss of the Trainer's own ``compute_loss``, in patch steps that of the model's forward.

        A patch step has no logits. So label smoothing is left to the model there, and TRL's ``compute_loss``, which
        computes its loss from the hidden states of tokens, is passed over.
        """
        labels, shift_labels = inputs.get("labels"), inputs.get("shift_labels")
        if shift_labels is None or shift_labels.ndim != 3:
            loss = super().compute_loss(model, inputs, *args, **kwargs)  # type: ignore[misc]
            in_training = model.training and isinstance(loss, Tensor)
            return zero_if_undefined(loss, labels) if in_training and labels is not None else loss
        compute_loss = super().compute_loss  # type: ignore[misc]
        if is_of_trl(compute_loss):
            compute_loss = functools.partial(loss_of_model, self)
        smoother, self.label_smoother = self.label_smoother, None
        try:
            loss = compute_loss(model, inputs, *args, **kwargs)
        except TypeError as error:
            if "NoneType" in str(error):
                raise TypeError(
                    f"compute_loss of {type(self).__name__} needs logits, which no patch step has"
                ) from error
            raise
        finally:
            self.label_smoother = smoother
        if self._patch_state.last_step is None:
            raise TypeError(f"compute_loss of {type(self).__name__} must call the model with all of its inputs")
        return loss

    def training_step(self: Any, model: Any, inputs: Any, num_items_in_batch: Any = None) -> Tensor:
        raw_tokens = inputs["input_ids"].numel()
        if isinstance(num_items_in_batch, Tensor):
            num_items_in_batch = num_items_in_batch.clamp(min=1)  # without a target 0 / 1, not 0 / 0
        loss: Tensor = super().training_step(model, inputs, num_items_in_batch)  # type: ignore[misc]
        state = self._patch_state
        step, state.last_step = state.last_step, None
        self._meters.add(raw_tokens, step)
        return loss

    def train(self: Any, *args: Any, **kwargs: Any) -> Any:
        with self._nan_filter(False):  # the filter puts 0 into the log in place of a loss that is NaN
            return super().train(*args, **kwargs)  # type: ignore[misc]

    def evaluate(self: Any, *args: Any, **kwargs: Any) -> Any:
        with self._meters.paused(), self._nan_filter(self._filters_nan):
            return super().evaluate(*args, **kwargs)  # type: ignore[misc]

    @contextlib.contextmanager
    def _nan_filter(self: Any, value: bool) -> Iterator[None]:
        """Sets ``logging_nan_inf_filter`` inside the block."""
        before, self.args.logging_nan_inf_filter = self.args.logging_nan_inf_filter, value
        try:
            yield
        finally:
            self.args.logging_nan_inf_filter = before

    def log(self: Any, logs: dict[str, float], *args: Any, **kwargs: Any) -> None:
        if "loss" in logs and self.schedule is not None:
            phase, _ = self.schedule.locate(self.state.global_step - 1)
            logs["phase"] = phase + 1
            logs["patch_size"] = self.schedule.phases[phase].patch_size
            logs.update(self._meters.read(self.accelerator))
        super().log(logs, *args, **kwargs)  # type: ignore[misc]

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
        with self._meters.paused():
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


def loss_of_model(trainer: Any, model: Any, inputs: Any, return_outputs: bool = False, **options: Any) -> Any:
    """The Trainer's ``compute_loss``, with the loss of routers weighted as TRL's ``compute_loss`` does in token steps.

    TRL divides it by the number of batches of an optimizer step, and does not multiply it by that of processes.
    """
    loss, outputs = Trainer.compute_loss(trainer, model, inputs, return_outputs=True, **options)
    if getattr(trainer, "aux_loss_enabled", False):
        counted = options.get("num_items_in_batch") is not None
        factor = trainer.accelerator.num_processes if counted and trainer.args.average_tokens_across_devices else 1
        steps = trainer.current_gradient_accumulation_steps if counted else 1
        inner = unwrap(trainer.accelerator.unwrap_model(model))
        given = getattr(inner, "router_aux_loss_coef", trainer.router_aux_loss_coef)
        loss = loss + (trainer.router_aux_loss_coef / steps - given * factor) * outputs.aux_loss
    return (loss, outputs) if return_outputs else loss


def zero_if_undefined(loss: Tensor, labels: Tensor) -> Tensor:
    """0 in place of the mean over no targets, ``0 / 0``."""
    has_target = (labels[..., 1:] != IGNORE_INDEX).any()
    return torch.where(has_target | loss.isfinite(), loss, torch.zeros_like(loss))


class PatchTrainer(PatchTraining, Trainer):  # type: ignore[misc,unused-ignore]
    """transformers' Trainer for a run in phases, with one optimizer and one sequence of checkpoints.

    Takes the arguments of the Trainer and those of :class:`PatchTraining`, which says what a run reads, logs and
    refuses. The model is enabled (:func:`patchkernels.hf.enable`); what ``save_model`` writes is an ordinary model.

        trainer = PatchTrainer(model=model, args=arguments, train_dataset=rows, phases="4:2/3,1:1/3")
        trainer.train()
    """
