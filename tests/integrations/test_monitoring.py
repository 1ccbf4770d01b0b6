"""What callbacks that monitor have in common."""

from __future__ import annotations

import sys

import pytest

from batchnorm.integrations.monitoring import Monitoring
from diagnosis.training import batch, hooks, loss, network, sgd, train


def test_a_second_training_begins_anew() -> None:
    model, callback = network(), Monitoring(every=1)
    callback._start(model, None)
    train(model, sgd(model), 1)
    first = callback.monitor
    callback._start(model, None)
    assert first is not None
    assert not first.started
    train(model, sgd(model), 1)
    callback._end(model)
    assert callback.monitor is not None
    assert callback.monitor is not first
    assert callback.monitor.step == 1
    assert not hooks(model)


def test_no_check_unless_asked(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "batchnorm.diagnosis.check", None)
    model, callback = network(), Monitoring()
    callback._start(model, None)
    loss(model(batch(0))).backward()
    callback._end(model)
    assert callback.report is None
