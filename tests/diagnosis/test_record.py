"""The report as JSON."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

from batchnorm.diagnosis.record import text
from batchnorm.diagnosis.report import Report
from diagnosis.reports import HOSTILE, fixed, full, not_finite

PAGE = Path(__file__).parents[2] / "docs" / "diagnosis-json.md"


def read(report: Report) -> dict[str, Any]:
    def refuse(constant: str) -> None:
        raise AssertionError(f"{constant} is not JSON")

    content: dict[str, Any] = json.loads(text(report), parse_constant=refuse)
    return content


def test_everything_is_in_it() -> None:
    report = full()
    content = read(report)
    assert (content["version"], content["ok"]) == (1, False)
    assert content["counts"] == {"error": 2, "warning": 18, "info": 2}
    assert (content["batches"], content["samples"], content["passes"]) == (4, 128, 1.4)
    first = content["findings"][1]
    assert (first["code"], first["severity"], first["layer"]) == ("BN301", "error", "layer1.2.bn")
    assert first["evidence"]["rows"] == [["4", "1.24", "-0.8"], ["9", "2", "0"]]
    assert content["findings"][2]["name"] == "momentum-convention"
    layer = content["layers"][1]
    assert report.layers[1].shift is not None
    assert layer["shift"] == report.layers[1].shift.tolist()
    assert (layer["input_shape"], layer["worst_log_variance_ratio"]) == ([4, 8, 5, 5], -0.5)
    assert content["layers"][-1]["shift"] is None
    assert content["attribution"]["measure"] == "loss"
    assert content["attribution"]["layers"][0] == {"layer": "layer1.0.bn", "closes": 0.93, "remains": 0.91}
    assert content["modes"][0] == {"name": "running", "distance": 0.81, "changed": 0.62, "loss": 2.31}
    assert content["skipped"] == [{"layer": "aux.bn", "reason": "never called"}]
    assert content["before"] is None


def test_without_data_what_was_not_measured_is_null() -> None:
    content = read(Report([], []))
    assert (content["ok"], content["modes"], content["attribution"], content["samples"]) == (True, None, None, None)


def test_numbers_are_finite_or_null() -> None:
    content = read(not_finite())
    assert content["passes"] is None
    assert content["modes"][0] == {"name": "running", "distance": None, "changed": None, "loss": None}
    assert content["layers"][0]["worst_shift"] is None
    assert content["layers"][0]["shift"].count(None) == 1


def test_names_are_whole_and_the_file_is_ascii() -> None:
    content = read(full())
    assert content["layers"][3]["name"] == HOSTILE
    assert text(full()).isascii()


def test_before_and_after() -> None:
    content = read(fixed())
    assert content["before"]["counts"]["error"] == 2
    assert content["counts"]["error"] == 0


def fields(value: Any, path: str = "") -> set[str]:  # JSON
    if isinstance(value, dict):
        return {
            p for key, inner in value.items() for p in {f"{path}.{key}".strip(".")} | fields(inner, f"{path}.{key}")
        }
    return {p for inner in value for p in fields(inner, f"{path}[]")} if isinstance(value, list) else set()


def test_every_field_is_documented_and_every_documented_field_is_there() -> None:
    content = read(fixed())
    there = {path for path in fields(content["before"]) | fields(content) if not path.startswith("before.")}
    told = set(re.findall(r"^\| `([^`]+)` \|", PAGE.read_text(encoding="utf-8"), flags=re.M))
    assert told == there
