"""Train on handwritten digits with Lightning; a callback sets the population statistics before each validation.

pip install "batchnorm[integrations,study]"
python examples/digits_lightning.py
"""

import lightning.pytorch as pl
import torch
from sklearn.datasets import load_digits
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

import batchnorm as bn
from batchnorm.integrations.lightning import Recalibrate


class Digits(pl.LightningModule):
    """A convolutional network for 8 x 8 images; batch norm does its ReLU too."""

    def __init__(self) -> None:
        super().__init__()
        self.net = nn.Sequential(
            *(nn.Conv2d(1, 16, 3, padding=1, bias=False), bn.BatchNorm2d(16, activation="relu")),
            *(nn.Conv2d(16, 32, 3, stride=2, padding=1, bias=False), bn.BatchNorm2d(32, activation="relu")),
            *(nn.Flatten(), nn.Linear(512, 10)),
        )

    def forward(self, x: Tensor) -> Tensor:
        """Images (N, 1, 8, 8) to logits (N, 10); what the callback calls."""
        logits: Tensor = self.net(x)
        return logits

    def training_step(self, batch: list[Tensor], index: int) -> Tensor:
        """The loss of a batch."""
        return nn.functional.cross_entropy(self(batch[0]), batch[1])

    def validation_step(self, batch: list[Tensor], index: int) -> None:
        """Log the accuracy."""
        right = self(batch[0]).argmax(1) == batch[1]
        self.log("accuracy", 100 * right.float().mean(), prog_bar=True)

    def configure_optimizers(self) -> torch.optim.Optimizer:
        """SGD."""
        return torch.optim.SGD(self.parameters(), lr=0.1, momentum=0.9)


pl.seed_everything(0, verbose=False)
pixels, labels = load_digits(return_X_y=True)
data = TensorDataset(torch.from_numpy(pixels).float().view(-1, 1, 8, 8) / 16, torch.from_numpy(labels))
train, validation = torch.utils.data.random_split(data, [1437, 360])

recalibrate = Recalibrate()  # on the training data, before each validation
trainer = pl.Trainer(max_epochs=2, accelerator="cpu", callbacks=[recalibrate], logger=False, enable_checkpointing=False)
trainer.fit(Digits(), DataLoader(train, batch_size=32, shuffle=True), DataLoader(validation, batch_size=360))

print(f"validation accuracy: {trainer.callback_metrics['accuracy']:.1f} %")
print(recalibrate.result)  # how far the running averages were from the statistics that were set
