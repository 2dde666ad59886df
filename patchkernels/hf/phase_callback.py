"""The callback of a Trainer that runs in phases."""

from __future__ import annotations

from typing import Any

from transformers import TrainerCallback

from patchkernels.hf.rows import examples_before
from patchkernels.hf.trainer_checks import is_stream


class PhaseCallback(TrainerCallback):  # type: ignore[misc,unused-ignore]
    """Resets the optimizer, saves, logs and evaluates where a phase or an epoch of the examples begins or ends."""

    def __init__(self, trainer: Any) -> None:
        self.trainer = trainer

    def on_train_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        self.trainer._meters.clear()

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
