"""What an experiment is."""

from __future__ import annotations

import dataclasses
import pickle

import pytest

from batchnorm.study.dataset import digits
from batchnorm.study.experiment import Setting
from batchnorm.study.experiments import EXPERIMENTS
from batchnorm.study.networks import OURS


def test_it_travels_to_other_processes() -> None:
    setting = pickle.loads(pickle.dumps(Setting(digits(), OURS)))
    assert setting.data.digest == digits().digest
    assert setting.layers is not None
    for row in EXPERIMENTS:
        run, plan = pickle.loads(pickle.dumps((row.run, row.full)))
        assert run is row.run
        assert plan == row.full


def test_it_cannot_be_changed() -> None:
    for row in EXPERIMENTS:
        with pytest.raises(dataclasses.FrozenInstanceError):
            row.full.seeds = 3
        with pytest.raises(dataclasses.FrozenInstanceError):
            row.claims = ()  # type: ignore[misc]  # on purpose
