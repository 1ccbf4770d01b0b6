"""The callback in Lightning's own Trainer."""

from __future__ import annotations

import copy
import math
import os
import subprocess
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.loggers import CSVLogger
from torch import Tensor, nn
from torch.utils.data import DataLoader

from batchnorm.diagnosis import curves
from batchnorm.integrations.lightning import Monitor, Recalibrate
from diagnosis.training import hooks
from integrations.trainees import counted, is_consistent, loader, network, samples, values
from support.populations import layers


class Regression(LightningModule):
    """Learns that everything is 1."""

    def __init__(self) -> None:
        super().__init__()
        self.net = network()

    def forward(self, x: Tensor) -> Tensor:
        return self.net(x)

    def training_step(self, batch: list[Tensor], index: int) -> Tensor:
        return (self(batch[0]) - 1).square().mean()

    def validation_step(self, batch: Tensor, index: int) -> None:
        self(batch)

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), 0.1)


class Witness(Callback):
    """Looks at the model in each validation."""

    def __init__(self) -> None:
        self.seen: list[nn.Module] = []

    def on_validation_batch_start(self, trainer: Trainer, pl_module: LightningModule, *_: Any) -> None:
        if not trainer.sanity_checking:
            assert not any(module.training for module in pl_module.modules())
            self.seen.append(copy.deepcopy(pl_module.net))


def trainer(*callbacks: Callback, **options: Any) -> Trainer:
    quiet = {"logger": False, "enable_checkpointing": False, "enable_progress_bar": False}
    return Trainer(
        accelerator="cpu",
        max_epochs=2,
        val_check_interval=3,  # in the middle of an epoch of 7
        callbacks=list(callbacks),
        enable_model_summary=False,
        **quiet | options,
    )


def validation() -> DataLoader[Any]:
    return DataLoader(samples(1), batch_size=26)


def trained(*callbacks: Callback) -> Regression:
    model = Regression()
    trainer(*callbacks).fit(model, loader(3), validation())
    return model


def test_every_validation_sees_population_statistics() -> None:
    witness, without = Witness(), Witness()
    callback = Recalibrate()
    model = trained(callback, witness)
    plain = trained(without)
    assert len(witness.seen) == len(without.seen) == 4
    assert all(map(is_consistent, witness.seen))
    assert not any(map(is_consistent, without.seen))
    assert callback.result is not None
    assert callback.result.samples == 26
    assert values(model) == values(plain), "training is the same, bit for bit: order, dropout, modes"
    assert all(module.training for module in model.modules())


def test_only_before_validations_of_the_run() -> None:
    calls, batches = counted()
    trained(Recalibrate(batches))
    assert len(calls) == 4, "not for the check before the first step"


def test_at_the_end() -> None:
    witness = Witness()
    model = trained(Recalibrate(when="end"), witness)
    assert not any(map(is_consistent, witness.seen))
    assert is_consistent(model.net)
    assert values(model) == values(trained())


def test_a_validation_of_its_own_changes_nothing() -> None:
    model = Regression()
    before = [tensor.tolist() for layer in layers(model).values() for tensor in layer.buffers()]
    trainer(Recalibrate()).validate(model, DataLoader(samples(1), batch_size=26), verbose=False)
    assert [tensor.tolist() for layer in layers(model).values() for tensor in layer.buffers()] == before


class Logger(CSVLogger):
    """Keeps what it is given."""

    def __init__(self, folder: Path) -> None:
        super().__init__(folder)
        self.kept: list[tuple[int | None, dict[str, Any]]] = []

    def log_metrics(self, metrics: dict[str, Any], step: int | None = None) -> None:
        self.kept.append((step, metrics))


@pytest.mark.parametrize("accumulate", [1, 2])
def test_training_is_monitored(accumulate: int, tmp_path: Path) -> None:
    """Through parts of the module too: the trainer does not call it."""
    callback, options = Monitor(every=2, writer=tmp_path / "run.jsonl"), {"accumulate_grad_batches": accumulate}
    model = Regression()
    model.training_step = lambda batch, batch_idx: (model.net(batch[0]) - 1).square().mean()
    trainer(callback, **options).fit(model, loader(3), validation())
    plain = Regression()
    trainer(**options).fit(plain, loader(3), validation())
    assert values(model) == values(plain)
    records, _ = curves.read(tmp_path / "run.jsonl")
    number = 2 * math.ceil(7 / accumulate)
    assert [(r.step, r.layer) for r in records] == [
        (step, layer) for step in range(2, number + 1, 2) for layer in ("net.1", "net.5")
    ]
    assert all(record.weight_gradient and record.effective_learning_rate for record in records)
    assert not hooks(model)


def test_the_trainers_logger_gets_the_numbers(tmp_path: Path) -> None:
    logger = Logger(tmp_path)
    trainer(Monitor(every=7), logger=logger, log_every_n_steps=7).fit(Regression(), loader(3), validation())
    logged = [(step, metrics) for step, metrics in logger.kept if "batchnorm/net.1/shift/max" in metrics]
    assert len(logged) == 2
    assert {"batchnorm/net.5/noise", "batchnorm/net.5/dead"} <= logged[1][1].keys()


def test_training_that_fails_leaves_no_hooks() -> None:
    model, callback = Regression(), Monitor(every=1)
    model.training_step = lambda batch, batch_idx: model.net(batch[0][:, :2]).sum()
    with pytest.raises(RuntimeError, match="shapes"):
        trainer(callback).fit(model, loader(3), validation())
    assert callback.monitor is not None
    assert not callback.monitor.started
    assert not hooks(model)


def test_a_check_at_the_end(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[Any] = []
    check = ModuleType("batchnorm.diagnosis.check")
    check.check = lambda *arguments: seen.append(arguments) or "the report"  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "batchnorm.diagnosis.check", check)
    calls, batches = counted()
    callback, model = Monitor(check=True, batches=batches), Regression()
    trainer(callback).fit(model, loader(3), validation())
    assert callback.report == "the report"
    assert [arguments[0] for arguments in seen] == [model]
    assert calls == [1]


OTHER = """
import sys
if len(sys.argv) > 1:
    sys.modules["lightning"] = None
import warnings
import torch
from pytorch_lightning import Callback, LightningModule, Trainer
from batchnorm.integrations.lightning import Recalibrate
from integrations.trainees import is_consistent, loader, network

assert issubclass(Recalibrate, Callback) or len(sys.argv) == 1

class Regression(LightningModule):
    def __init__(self):
        super().__init__()
        self.net = network()
    def forward(self, x):
        return self.net(x)
    def training_step(self, batch, index):
        return self(batch[0]).square().mean()
    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), 0.1)

model = Regression()
quiet = dict(logger=False, enable_checkpointing=False, enable_progress_bar=False, enable_model_summary=False)
Trainer(accelerator="cpu", max_epochs=1, callbacks=[Recalibrate(when="end")], **quiet).fit(model, loader())
assert is_consistent(model.net)
print("fine")
"""


@pytest.mark.long
@pytest.mark.parametrize("arguments", [[], ["without"]], ids=["both installed", "without lightning"])
def test_the_other_name_of_the_library(arguments: list[str], tmp_path: Path) -> None:
    run = subprocess.run(
        [sys.executable, "-c", OTHER, *arguments],
        env=os.environ | {"PYTHONPATH": str(Path(__file__).parents[1])},
        cwd=tmp_path,
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert run.returncode == 0, run.stderr
    assert run.stdout.endswith("fine\n")
