"""The script's arithmetic, and what it does to a network."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path

import pytest
import torch

import small_batches
from batchnorm.study.dataset import Data, digits
from small_batches import Result

FEW = 24


def few() -> Data:
    data = digits()
    train, test = (type(p)(p.indices[:FEW], p.inputs[:FEW], p.labels[:FEW]) for p in (data.train, data.test))
    return replace(data, train=train, test=test)


def test_the_interval_is_students() -> None:
    mean, reach = small_batches.interval([1.0, 2.0, 6.0])
    assert mean == 3
    assert reach == pytest.approx(4.3027 * math.sqrt(7 / 3), rel=1e-4)  # t of 97.5% at 2 degrees, from a table


def test_methods_change_statistics_alone() -> None:
    """The network stays as it is, and its copies differ from it and from each other where they should."""
    torch.manual_seed(0)
    data, model = few(), small_batches.network()
    before = {key: value.clone() for key, value in model.state_dict().items()}
    scores = small_batches.judged(model, data, 2)
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())
    losses = [loss for _, loss in scores.values()]
    assert len(set(losses)) == len(small_batches.METHODS)
    assert scores["running average"] == small_batches.score(model, data.test.inputs, data.test.labels)


def test_a_score() -> None:
    def outputs(images: torch.Tensor) -> torch.Tensor:
        return torch.tensor([[2.0, 0.0], [0.0, 0.0], [0.0, 1.0], [5.0, 0.0]])

    class Fixed(torch.nn.Module):
        forward = staticmethod(outputs)

    accuracy, loss = small_batches.score(Fixed(), torch.zeros(4, 1), torch.tensor([0, 0, 1, 1]))
    assert accuracy == 75
    expected = [math.log1p(math.exp(-2)), math.log(2), math.log1p(math.exp(-1)), math.log1p(math.exp(5))]
    assert loss == pytest.approx(sum(expected) / 4)


def test_training_is_judged_twice() -> None:
    results = small_batches.trained(few(), 8, 0)
    assert [(r.moment, r.method) for r in results] == [
        (moment, method) for moment in small_batches.MOMENTS for method in small_batches.METHODS
    ]
    assert {(r.batch_size, r.seed) for r in results} == {(8, 0)}
    assert results[0].loss != results[len(small_batches.METHODS)].loss


def test_differences_are_paired() -> None:
    """Seeds that differ by much, and methods that differ by the same in each."""
    results = [
        Result(4, "halfway", seed, method, 10.0 * seed + offset, 0.0)
        for seed in range(3)
        for offset, method in enumerate(small_batches.METHODS)
    ]
    head, rule, line = small_batches.table(results, "accuracy", 1)
    assert line == "| 4 | halfway | 10.0 | +1.0 ± 0.0 | +2.0 ± 0.0 | +3.0 ± 0.0 | +2.0 ± 0.0 |"
    assert head.count("|") == rule.count("|") == line.count("|")


def test_one_seed_has_no_interval() -> None:
    results = [Result(4, "halfway", 0, method, 10.0, 0.0) for method in small_batches.METHODS]
    assert len(small_batches.table(results, "accuracy", 1)) == 2  # no line below the head


def test_pieces_add_up(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    kept = tmp_path / "small.json"
    monkeypatch.setattr(small_batches, "digits", few)
    for size in ("8", "16"):
        monkeypatch.setattr("sys.argv", ["small_batches.py", "--seeds", "2", "--batch", size, "--results", str(kept)])
        small_batches.main()
    rows = [line for line in capsys.readouterr().out.splitlines() if line.startswith(("| 8 |", "| 16 |"))]
    assert len(rows) == 4 + 8
    monkeypatch.setattr(small_batches, "trained", None)  # what is there is not done again
    small_batches.main()
    again = [line for line in capsys.readouterr().out.splitlines() if line.startswith(("| 8 |", "| 16 |"))]
    assert again == rows[4:]
