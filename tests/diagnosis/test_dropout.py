"""What dropout does to a variance."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from batchnorm.diagnosis.dropout import dropout_ratio
from batchnorm.diagnosis.observation import Observation
from batchnorm.diagnosis.subject import Subject, subject_of_model
from diagnosis.observed import draw


def given(*layers: nn.Module, kept: int = 4) -> Subject:
    torch.manual_seed(0)
    data = Observation(batches=8, passes=1.0, kept=[draw(512, 4, seed=seed) + 1 for seed in range(kept)])
    return subject_of_model(nn.Sequential(*layers), data=data)


@pytest.mark.parametrize("p", [0.2, 0.5])
def test_the_ratio_of_variances(p: float) -> None:
    """Of x with mean 1 and variance 1: E[x^2] / (1 - p) - 1 = 2 / (1 - p) - 1."""
    subject = given(nn.Dropout(p), nn.BatchNorm1d(4))
    ratio = dropout_ratio(subject, subject.layers, {subject.model[0]})["1"]
    assert ratio.mean() == pytest.approx(2 / (1 - p) - 1, rel=0.1)
    assert torch.equal(ratio, dropout_ratio(subject, subject.layers, {subject.model[0]})["1"])


def test_passes_are_counted() -> None:
    subject = given(nn.Dropout(), nn.BatchNorm1d(4))
    dropout_ratio(subject, subject.layers, {subject.model[0]})
    assert subject.data is not None
    assert subject.data.passes == 1 + 2 * 4 / 8


def test_dropout_elsewhere_stays_off() -> None:
    subject = given(nn.Dropout(), nn.BatchNorm1d(4))
    assert torch.equal(dropout_ratio(subject, subject.layers, set())["1"], torch.ones(4, dtype=torch.float64))


def test_channels_without_variance() -> None:
    subject = given(nn.Linear(4, 4), nn.Dropout(), nn.BatchNorm1d(4))
    nn.init.zeros_(subject.model[0].weight[0])
    assert dropout_ratio(subject, subject.layers, {subject.model[1]})["2"][0] == 1


def test_nothing_to_run_or_that_runs() -> None:
    subject = given(nn.Dropout(), nn.BatchNorm1d(4), kept=0)
    assert dropout_ratio(subject, subject.layers, {subject.model[0]}) == {}
    subject = given(nn.Dropout(), nn.Linear(3, 3), nn.BatchNorm1d(3))
    assert dropout_ratio(subject, subject.layers, {subject.model[0]}) == {}
    assert dropout_ratio(Subject([]), [], ()) == {}
