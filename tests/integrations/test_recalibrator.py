"""What callbacks have in common."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import nn

import batchnorm as bn
from batchnorm.errors import OptionError
from batchnorm.integrations.recalibrator import Recalibrator
from integrations.trainees import loader, network, samples


def statistics(model: nn.Module) -> list[Any]:
    return [buffer.tolist() for buffer in model.buffers()]


@pytest.mark.parametrize("options", [{"when": "epoch"}, {"method": "best"}])
def test_unknown_words_are_refused_at_once(options: dict[str, str]) -> None:
    ((name, value),) = options.items()
    with pytest.raises(OptionError, match=f"got {name}='{value}'; it must be one of \""):
        Recalibrator(**options)


def test_only_when_it_is_to_be_done() -> None:
    model = network()
    before = statistics(model)
    callback = Recalibrator(when="end")
    callback._recalibrate("validation", model, loader())
    assert callback.result is None
    assert statistics(model) == before
    callback._recalibrate("end", model, loader())
    assert callback.result is not None
    assert callback.result.samples == 26


@pytest.mark.parametrize(
    "batches",
    [samples(1).split(5), lambda: iter(samples(1).split(5)), None],
    ids=["iterable", "callable", "training data"],
)
def test_the_data(batches: Any) -> None:
    model = network()
    other = copy.deepcopy(model)
    callback = Recalibrator(batches)
    for _ in range(2):  # an iterator would be used up
        callback._recalibrate("validation", model, samples(2).split(5))
    bn.recalibrate(other, samples(2 if batches is None else 1).split(5))
    assert statistics(model) == statistics(other)


def test_the_options() -> None:
    model = network()
    callback = Recalibrator(
        list(range(3)),
        method="pooled",
        forward=lambda net, i: net(samples(i)),
    )
    callback._recalibrate("validation", model, None)
    assert callback.result is not None
    assert (callback.result.method, callback.result.batches) == ("pooled", 3)
    limited = Recalibrator(max_samples=10)
    limited._recalibrate("validation", model, loader())
    assert limited.result is not None
    assert limited.result.samples == 10


def test_randomness_and_modes_are_undisturbed() -> None:
    model = network()
    model[3].eval()
    flags, state = [m.training for m in model.modules()], torch.get_rng_state()
    Recalibrator()._recalibrate("validation", model, loader())
    assert [m.training for m in model.modules()] == flags
    assert torch.equal(torch.get_rng_state(), state)
