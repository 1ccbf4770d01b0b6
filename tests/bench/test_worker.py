"""The peers' side of the protocol, with a stand-in for the peer's library."""

from __future__ import annotations

import io
import json
from pathlib import Path

import numpy as np
import pytest

from batchnorm.bench import worker


def test_requests_and_replies(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    x = np.arange(6, dtype=np.float32).reshape(2, 3)
    for key, value in {"x": x, "dy": x, "weight": x[0], "bias": x[1]}.items():
        np.save(tmp_path / f"{key}.npy", value)
    seen = []

    def functions(*arguments: object) -> worker.Functions:
        seen.append(arguments)
        return {"both": lambda: (x + 1, x + 2, x[0] + 3, x[0] + 4)}

    monkeypatch.setattr(worker, "jax_functions", functions)
    monkeypatch.setattr("sys.argv", ["worker.py", "jax", "2"])
    requests = [
        {"do": "load", "folder": str(tmp_path), "axis": 1, "dtype": "float32"},
        {"do": "run", "phase": "both"},
        {"do": "run", "phase": "backward"},
        {"do": "answer", "folder": str(tmp_path)},
    ]
    monkeypatch.setattr("sys.stdin", io.StringIO("".join(json.dumps(request) + "\n" for request in requests)))
    worker.main()
    loaded, seconds, unknown, answered = map(json.loads, capsys.readouterr().out.splitlines())
    assert loaded is True
    assert seconds > 0
    assert unknown is None
    assert answered is True
    assert seen[0][4:] == (1, "float32")
    np.testing.assert_array_equal(np.load(tmp_path / "y.npy"), x + 1)
    np.testing.assert_array_equal(np.load(tmp_path / "dbias.npy"), x[0] + 4)
