"""For Lightning, as `lightning` or as `pytorch_lightning`."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from batchnorm.diagnosis.monitor import GuidedMonitor
from batchnorm.integrations.monitoring import Log, Monitoring
from batchnorm.integrations.recalibrator import Recalibrator

try:
    from lightning.pytorch import Callback, LightningModule, Trainer
except ImportError:
    from pytorch_lightning import Callback, LightningModule, Trainer  # type: ignore[assignment]  # the same classes


class Recalibrate(Recalibrator, Callback):
    """A callback that recalibrates; the arguments are those of `Recalibrator`."""

    def on_validation_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Before a validation; not that of `Trainer.validate`, nor the check before the first step."""
        if trainer.state.fn == "fit" and not trainer.sanity_checking:
            self._recalibrate("validation", pl_module, trainer.train_dataloader)

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """After the last step."""
        self._recalibrate("end", pl_module, trainer.train_dataloader)


class Monitor(Monitoring, Callback):
    """A callback that monitors; the arguments are those of `Monitoring`. A forward pass is a `training_step`."""

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Before the first step."""
        if not trainer.is_global_zero:
            return

        def log(numbers: dict[str, float]) -> None:
            for logger in trainer.loggers:
                logger.log_metrics(numbers, step=trainer.global_step)

        self._start(pl_module, Log(log) if trainer.loggers else None, GuidedMonitor)

    def on_train_batch_start(self, *_: Any) -> None:  # noqa: ANN401 - the trainer's
        """Before each training_step."""
        if isinstance(self.monitor, GuidedMonitor):
            self.monitor.begin()

    def on_before_backward(self, trainer: Trainer, pl_module: LightningModule, loss: Tensor) -> None:
        """After each training_step."""
        if isinstance(self.monitor, GuidedMonitor):
            self.monitor.end()

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        """The end of training that fails."""
        if self.monitor is not None:
            self.monitor.abandon()

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """After the last step."""
        self._end(pl_module)
