"""The callback in the Trainer of transformers."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
from torch import Tensor, nn
from transformers import Trainer, TrainerCallback, TrainingArguments

from batchnorm.integrations.transformers import Monitor, Recalibrate
from diagnosis.training import hooks
from integrations.trainees import counted, is_consistent, network, samples, values


class Regression(nn.Module):
    """Learns that everything is 1; takes and returns what the trainer wants."""

    def __init__(self) -> None:
        super().__init__()
        self.net = network()

    def forward(self, x: Tensor, labels: Tensor) -> dict[str, Tensor]:
        y = self.net(x)
        return {"loss": (y.mean(1) - labels).square().mean(), "logits": y}


class Witness(TrainerCallback):
    """Looks at the model in each validation."""

    def __init__(self) -> None:
        self.seen: list[nn.Module] = []
        self.flags: list[bool] = []

    def on_prediction_step(self, args: Any, state: Any, control: Any, *, model: nn.Module, **_: Any) -> None:
        self.flags += [module.training for module in model.modules()]
        self.seen.append(copy.deepcopy(model.net))


def rows(seed: int) -> list[dict[str, Any]]:
    return [{"x": x, "labels": 1.0} for x in samples(seed)]


def trained(folder: Path, *callbacks: TrainerCallback, **options: Any) -> Regression:
    model = Regression()
    arguments = TrainingArguments(
        output_dir=str(folder),
        per_device_train_batch_size=4,
        per_device_eval_batch_size=26,
        gradient_accumulation_steps=2,
        num_train_epochs=2,
        learning_rate=0.1,
        use_cpu=True,
        save_strategy="no",
        report_to=[],
        disable_tqdm=True,
        dataloader_pin_memory=False,
        **options,
    )
    trainer = Trainer(model, arguments, train_dataset=rows(0), eval_dataset=rows(1), callbacks=list(callbacks))
    trainer.train()
    return model


@pytest.mark.parametrize(
    ("options", "validations"),
    [({"eval_strategy": "steps", "eval_steps": 3}, 3), ({"eval_strategy": "epoch"}, 2)],  # of 8 steps: 3, 6, the last
    ids=["steps", "epoch"],
)
def test_every_validation_sees_population_statistics(options: dict[str, Any], validations: int, tmp_path: Path) -> None:
    witness, without, callback = Witness(), Witness(), Recalibrate()
    model = trained(tmp_path, callback, witness, **options)
    plain = trained(tmp_path, without, **options)
    assert len(witness.seen) == len(without.seen) == validations
    assert not any(witness.flags)
    assert all(map(is_consistent, witness.seen))
    assert not any(map(is_consistent, without.seen))
    assert callback.result is not None
    assert callback.result.samples == 26
    assert values(model) == values(plain), "training is the same, bit for bit: order, dropout, accumulation"


def test_only_before_validations(tmp_path: Path) -> None:
    calls, batches = counted()
    callback = Recalibrate(batches, forward=lambda model, x: model.net(x))
    trained(tmp_path, callback, eval_strategy="epoch")
    assert len(calls) == 2


def test_at_the_end(tmp_path: Path) -> None:
    witness, options = Witness(), {"eval_strategy": "epoch"}
    model = trained(tmp_path, Recalibrate(when="end"), witness, **options)
    assert not any(map(is_consistent, witness.seen))
    assert is_consistent(model.net)
    assert values(model) == values(trained(tmp_path, **options))


def test_training_is_monitored(tmp_path: Path) -> None:
    callback = Monitor(every=3)
    model, plain = trained(tmp_path, callback), trained(tmp_path)
    assert values(model) == values(plain)
    assert callback.monitor is not None
    assert [(r.step, r.layer) for r in callback.monitor.records] == [
        (step, layer) for step in (3, 6) for layer in ("net.1", "net.5")
    ], "of 8 steps, in two passes each"
    assert all(record.weight_gradient and record.effective_learning_rate for record in callback.monitor.records)
    assert not hooks(model)


def test_the_trainers_log_gets_the_numbers(tmp_path: Path) -> None:
    logged: list[dict[str, float]] = []

    class Host:
        def log(self, numbers: dict[str, float]) -> None:
            logged.append(numbers)

    trained(tmp_path, Monitor(every=4, trainer=Host()))
    assert len(logged) == 2
    assert {"batchnorm/net.1/shift/max", "batchnorm/net.5/noise"} <= logged[1].keys()
