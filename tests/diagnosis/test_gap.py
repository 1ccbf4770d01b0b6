"""What wrong statistics do, and whose they are."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
import torch.nn.functional as F

import batchnorm as bn
from batchnorm.diagnosis import gap
from batchnorm.diagnosis.observing import observe
from batchnorm.diagnosis.subject import Subject, subject_of_model
from batchnorm.errors import OptionError
from diagnosis.networks import healthy, labelled
from support.comparison import close


def looked_at(model: torch.nn.Module, batches: Any, **options: Any) -> Subject:
    subject = subject_of_model(model, **options)
    subject.data = observe(model, batches, forward=subject.forward)
    for layer in subject.layers:
        far = gap.distance_of(layer, subject.data.layers[layer.name])
        assert far is not None
        subject.far[layer.name] = far
    return subject


def test_distances_are_in_standard_deviations_and_logarithms() -> None:
    model, batches = healthy(), labelled()
    mean, var = model[4].running_mean.clone(), model[4].running_var.clone()
    model[4].running_mean += 0.5 * (var + 1e-5).sqrt()
    model[4].running_var.copy_((var + 1e-5) * 2 - 1e-5)
    subject = looked_at(model, batches)
    close(subject.far["4"].shift, torch.full((16,), 0.5).double(), 1e-5)
    close(subject.far["4"].log_ratio, torch.full((16,), math.log(2)).double(), 1e-5)
    assert subject.far["4"].moved == pytest.approx(math.log(2), rel=1e-5)
    assert subject.far["1"].moved < 1e-5
    means = torch.cat([x for x, _ in batches]).double().mean((2, 3))
    observed = subject.data.layers["1"]  # type: ignore[union-attr]
    assert len(means) == len(observed.sample_means)
    expected = (observed.sample_means.var(0) / 64 / (observed.variance + 1e-5)).mean().sqrt()
    assert subject.far["1"].noise == pytest.approx(float(expected))
    assert mean.shape == var.shape


@pytest.mark.parametrize("ours", [False, True])
def test_the_planted_layer_is_first_and_all_of_it(ours: bool) -> None:
    model, batches = healthy(ours=ours), labelled()
    model[4].running_mean += 1.5 * model[4].running_var.sqrt()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    subject = looked_at(model, batches)
    passes = subject.data.passes  # type: ignore[union-attr]
    found = gap.measure(subject, subject.far, is_worth_it=lambda _: True)
    assert found is not None
    assert [part.layer for part in found.attribution] == ["4"]
    assert found.attribution[0].closes == pytest.approx(1, abs=1e-4)
    assert found.attribution[0].remains == pytest.approx(1, abs=1e-4)
    assert (found.measure, found.passes, found.samples) == ("output", 4, 8)
    assert subject.data.passes - passes == pytest.approx(2 * 2 / 8)  # type: ignore[union-attr]
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


def test_modes_are_what_inference_gives() -> None:
    model, batches = healthy(), labelled()
    model[7].running_mean += 2 * model[7].running_var.sqrt()
    subject = looked_at(model, batches, loss=F.cross_entropy)
    found = gap.measure(subject, subject.far, is_worth_it=lambda _: False)
    assert found is not None
    assert found.attribution == ()
    kept = subject.data.kept  # type: ignore[union-attr]
    running, exact, batch = found.modes
    assert [mode.name for mode in found.modes] == ["running", "exact", "batch"]
    model.eval()
    wrong = torch.cat([model(x) for x, _ in kept]).detach()
    bn.recalibrate(model, batches)
    model.eval()
    right = torch.cat([model(x) for x, _ in kept]).detach()
    targets = torch.cat([y for _, y in kept])
    for mode, outputs in ((running, wrong), (exact, right)):
        assert mode.loss == pytest.approx(float(F.cross_entropy(outputs, targets)), rel=1e-4)
    assert running.changed == pytest.approx(float((wrong.argmax(1) != right.argmax(1)).float().mean()))
    spread = sum(float((o - o.mean(0)).square().sum()) for o in right.split(8))
    assert running.distance == pytest.approx(math.sqrt(float((wrong - right).square().sum()) / spread), rel=1e-3)
    assert exact.distance == exact.changed == 0
    model.train()
    for module in model.modules():
        if isinstance(module, torch.nn.BatchNorm2d):
            module.momentum = 0.0
    by_batch = torch.cat([model(x) for x, _ in kept]).detach()
    assert batch.loss == pytest.approx(float(F.cross_entropy(by_batch, targets)), rel=1e-3)


def test_attribution_in_the_loss_where_it_rises() -> None:
    model, batches = healthy(), labelled()
    with torch.no_grad():  # classes that the network is right about
        batches = [(x, model.eval()(x).argmax(1)) for x, _ in batches]
    model[4].running_mean += 3 * model[4].running_var.sqrt()
    subject = looked_at(model, batches, loss=F.cross_entropy)
    found = gap.measure(subject, subject.far, is_worth_it=lambda _: True)
    assert found is not None
    assert found.measure == "loss"
    assert found.attribution[0].layer == "4"


def test_statistics_that_make_nothing_finite() -> None:
    model, batches = healthy(), labelled()
    model[4].running_var[3] = torch.nan
    subject = looked_at(model, batches)
    assert subject.far["4"].moved == math.inf
    found = gap.measure(subject, subject.far, is_worth_it=lambda _: True)
    assert found is not None
    assert found.mode("running").distance is None
    assert [(part.layer, part.closes, part.remains) for part in found.attribution] == [("4", 1.0, 1.0)]


def test_a_loss_needs_targets() -> None:
    with pytest.raises(OptionError, match=r"with a loss, batches must be \(input, target\)"):
        gap.target_of(torch.zeros(3))
    assert gap.target_of([1, 2, 3]) == 2


def test_distance_and_decisions() -> None:
    a, b = torch.tensor([[1.0, 0.0], [0.0, 3.0]]), torch.tensor([[0.0, 1.0], [0.0, 3.0]])
    assert gap.changed_decisions([a], [b]) == 0.5
    assert gap.changed_decisions([a[0]], [b[0]]) is None
    assert gap.distance([a], [b]) == pytest.approx(math.sqrt(2 / 2))
    assert gap.distance([a], [a]) == 0
    assert gap.distance([a * torch.nan], [a]) is None
    assert gap.distance([a + 1], [torch.zeros(2, 2)]) is None
