"""For the Trainer of transformers."""

from __future__ import annotations

from typing import Any

from transformers import Trainer, TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from batchnorm.integrations.monitoring import Log, Monitoring
from batchnorm.integrations.recalibrator import Recalibrator


class Recalibrate(Recalibrator, TrainerCallback):
    """A callback that recalibrates; the arguments are those of `Recalibrator`."""

    def on_step_end(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        **host: Any,  # noqa: ANN401 - the trainer's
    ) -> None:
        """Before a validation, which the trainer's own callback, called earlier, has decided on."""
        if control.should_evaluate:
            self._recalibrate("validation", host["model"], host["train_dataloader"])

    on_epoch_end = on_step_end

    def on_train_end(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        **host: Any,  # noqa: ANN401 - the trainer's
    ) -> None:
        """After the last step, and after the best checkpoint was loaded where that is asked for."""
        self._recalibrate("end", host["model"], host["train_dataloader"])


class Monitor(Monitoring, TrainerCallback):
    """A callback that monitors; the arguments are those of `Monitoring`, and one.

    Args:
        trainer: whose `log` gets the numbers, as `trainer.add_callback(Monitor(trainer=trainer))`: transformers gives
            callbacks no logger. Without it and a writer, `monitor.records` keeps them.

    transformers tells callbacks nothing of exceptions: after one, `callback.monitor.abandon()` detaches the monitor.
    """

    def __init__(self, *args: Any, trainer: Trainer | None = None, **options: Any) -> None:  # noqa: ANN401 - Monitoring's
        super().__init__(*args, **options)
        self._trainer = trainer

    def on_train_begin(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        **host: Any,  # noqa: ANN401 - the trainer's
    ) -> None:
        """Before the first step."""
        if state.is_world_process_zero:
            self._start(host["model"], None if self._trainer is None else Log(self._trainer.log))

    def on_train_end(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        **host: Any,  # noqa: ANN401 - the trainer's
    ) -> None:
        """After the last step."""
        self._end(host["model"])
