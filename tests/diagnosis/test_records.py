"""Records as lines, and back."""

from __future__ import annotations

import json
from dataclasses import replace
from typing import Any

import pytest

import batchnorm as bn
from batchnorm.diagnosis.records import VERSION, LayerRecord, Spread, from_json
from diagnosis.training import network, sgd, train
from support import tolerances
from support.comparison import close


def records() -> list[LayerRecord]:
    model = network()
    with bn.Monitor(model, every=1) as monitor:
        train(model, sgd(model), 2)
    return monitor.records


def test_a_line_and_back() -> None:
    for record in records():
        line = record.to_json("run")
        assert "\n" not in line
        run, read = from_json(line)
        assert run == "run"
        assert from_json(read.to_json("run")) == ("run", read)
        for name, value in record.scalars():
            close(dict(read.scalars())[name], value, tolerances.SIX_DIGITS, name=name)
        exact = ("step", "layer", "channels", "calls", "count", "non_finite", "skipped")
        assert all(getattr(read, name) == getattr(record, name) for name in exact)


def test_the_form_of_a_line() -> None:
    content = json.loads(records()[-1].to_json("run"))
    assert content["version"] == VERSION == 1
    assert (content["step"], content["layer"], content["channels"]) == (2, "7", 6)
    assert len(content["shift"]) == 5
    assert content["shift"] == sorted(content["shift"])


def test_scalars() -> None:
    record = replace(records()[0], shift=Spread(1, 2, 3, 4, 5), noise=None, dead=0.25)
    found = dict(record.scalars())
    assert [found[f"shift/{which}"] for which in ("min", "median", "max")] == [1, 3, 5]
    assert found["dead"] == 0.25
    assert "noise" not in found
    assert not {"step", "layer", "channels"} & found.keys()


CHANGES: dict[str, Any] = {
    "version": 2,
    "run": 3,
    "layer": 1,
    "step": "1",
    "shift": [1, 2, 3],
    "weight": [1, 2, 3, 4, "5"],
    "dead": True,
    "count": None,
    "noise": float("inf"),
}


@pytest.mark.parametrize("name", CHANGES)
def test_other_lines_are_refused(name: str) -> None:
    content = json.loads(records()[0].to_json("run"))
    with pytest.raises(ValueError, match="it is not an object of version 1" if name == "version" else f"its {name} is"):
        from_json(json.dumps(content | {name: CHANGES[name]}))
    del content[name]
    with pytest.raises(
        ValueError, match="it is not an object of version 1" if name == "version" else f"it has no {name}"
    ):
        from_json(json.dumps(content))
