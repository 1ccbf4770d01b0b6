"""For Lightning, as `lightning` or as `pytorch_lightning`."""

from __future__ import annotations

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
