"""Fixtures for the study's tests."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import nn

from batchnorm.study import training
from batchnorm.study.dataset import Data, Part, digits
from batchnorm.study.experiment import Setting
from batchnorm.study.networks import OURS
from batchnorm.study.training import one_thread
from study.plans import Start


@pytest.fixture(autouse=True)
def on_one_core() -> Iterator[None]:
    """As the study's tasks are computed: networks this small are slower on two, by far where others compute as well."""
    with one_thread():
        yield


@pytest.fixture(scope="session")
def setting() -> Setting:
    """The digits and our layers."""
    return Setting(digits(), OURS)


@pytest.fixture(scope="session")
def four() -> Setting:
    """Data of four classes, one sample each to test: always the same answer is right in a quarter of cases."""
    part = Part(torch.arange(4), torch.zeros(4, 2), torch.arange(4))
    return Setting(Data(part, part, (2,), 4, "numbers"), OURS)


@pytest.fixture
def starts(monkeypatch: pytest.MonkeyPatch) -> list[Start]:
    """Of every training in the test, what it started from."""
    seen: list[Start] = []
    descend = training.descend

    def watched(network: nn.Module, part: Part, *, generator: torch.Generator, **options: Any) -> Any:
        weights = [parameter.detach().clone() for parameter in network.parameters() if parameter.ndim > 1]
        dropped = [module.p for module in network.modules() if isinstance(module, nn.Dropout)]
        seen.append(Start(weights, part, generator.get_state(), dropped, options))
        return descend(network, part, generator=generator, **options)

    monkeypatch.setattr(training, "descend", watched)
    return seen
