"""For the Trainer of transformers."""

from __future__ import annotations

from typing import Any

from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

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
