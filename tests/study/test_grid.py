"""Grids of settings and seeds, and what their tasks found."""

from __future__ import annotations

import pytest

from batchnorm.study.grid import Grid, Results
from batchnorm.study.statistics import best_of_the_others

GRID = Grid(2, network=("batch norm", "plain"), rate=(0.1, 1.0))
RESULTS = Results({args: {"value": i} for i, args in enumerate(GRID.tasks())})


def test_every_combination_with_every_seed() -> None:
    assert GRID.tasks() == [
        ("batch norm", 0.1, 0),
        ("batch norm", 1.0, 0),
        ("plain", 0.1, 0),
        ("plain", 1.0, 0),
        ("batch norm", 0.1, 1),
        ("batch norm", 1.0, 1),
        ("plain", 0.1, 1),
        ("plain", 1.0, 1),
    ]


def test_without_axes_there_are_the_seeds() -> None:
    assert Grid(3).tasks() == [(0,), (1,), (2,)]


def test_the_runs_of_a_setting() -> None:
    assert [run["value"] for run in RESULTS.runs("batch norm", 1.0)] == [1, 5]
    assert [run["value"] for run in RESULTS.runs("plain", 0.1)] == [2, 6]
    assert RESULTS.runs("plain") == []
    assert RESULTS.column("value", "batch norm", 1.0) == [1, 5]


def test_records_name_the_arguments() -> None:
    assert RESULTS.records("network", "rate", "seed")[5] == {
        "network": "batch norm",
        "rate": 1.0,
        "seed": 1,
        "value": 5,
    }


def test_the_best_rate_of_each_seed_is_the_others_choice() -> None:
    scores = {0.1: [1.0, 0.0, 0.0], 0.3: [0.0, 0.6, 0.3], 1.0: [0.1, 0.1, 0.5]}
    results = Results(
        {
            (network, rate, seed): {"score": sign * score, "name": (network, rate, seed)}
            for network, sign in (("plain", -1), ("batch norm", 1))
            for rate, values in scores.items()
            for seed, score in enumerate(values)
        }
    )
    best = results.best(lambda run: run["score"], "batch norm")
    rates, runs = best
    assert rates == best_of_the_others(scores) == (0.3, 0.1, 0.1)
    assert [run["name"] for run in runs] == [("batch norm", rate, seed) for seed, rate in enumerate(rates)]
    assert best.column("name") == tuple(run["name"] for run in runs)


def test_one_seed_has_no_others() -> None:
    with pytest.raises(ValueError, match="at least one data point"):
        Results({(0.1, 0): {"score": 1.0}}).best(lambda run: run["score"])
