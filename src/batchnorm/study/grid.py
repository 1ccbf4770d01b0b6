"""Grids of settings and seeds: the tasks of an experiment, and what they found."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable
from typing import Any, NamedTuple

from batchnorm.study.statistics import best_of_the_others

# The arguments that tell one task of an experiment from another, text and numbers: a value of each axis, and the seed.
Args = tuple[str | int | float, ...]
# What one task found: JSON-able numbers.
Run = dict[str, Any]


class Best(NamedTuple):
    """Each seed at the value of an axis that is best for the other seeds, see `statistics.best_of_the_others`.

    Attributes:
        values: the chosen values.
        runs: what was found there.
    """

    values: tuple[Any, ...]
    runs: list[Run]

    def column(self, name: str) -> tuple[Any, ...]:
        """One of the numbers that the runs found."""
        return tuple(run[name] for run in self.runs)


class Grid:
    """Every combination of the values of some axes, each with the seeds 0, 1, ...

    `Grid(10, network=("batch norm", "plain"), rate=(0.1, 1.0))` has 40 tasks: `("batch norm", 0.1, 0)` and so on.

    Args:
        seeds: how many.
        axes: by name, the values of each.
    """

    def __init__(self, seeds: int, **axes: Iterable[str | int | float]) -> None:
        self._seeds = seeds
        self._axes = {name: tuple(values) for name, values in axes.items()}

    def tasks(self) -> list[Args]:
        """The arguments of each task; all tasks of a seed follow each other."""
        combinations = list(itertools.product(*self._axes.values()))
        return [(*values, seed) for seed in range(self._seeds) for values in combinations]


class Results(dict[Args, Run]):
    """What the tasks of a grid found, by their arguments."""

    def runs(self, *values: str | int | float) -> list[Run]:
        """Of each seed, in order, what it found at one value of each axis."""
        return [run for args, run in self.items() if args[:-1] == values]

    def column(self, name: str, *values: str | int | float) -> list[Any]:
        """Of each seed, in order, one of the numbers that it found at one value of each axis."""
        return [run[name] for run in self.runs(*values)]

    def best(self, score: Callable[[Run], float], *values: str | int | float) -> Best:
        """Of each seed, the value of the last axis with the best mean score over the other seeds, and the run there.

        Args:
            score: of a run; larger is better.
            values: of the axes before the last.
        """
        scores: dict[str | int | float, list[float]] = {}
        for args, run in self.items():
            if args[:-2] == values:
                scores.setdefault(args[-2], []).append(score(run))
        chosen = best_of_the_others(scores)
        return Best(chosen, [self[(*values, value, seed)] for seed, value in enumerate(chosen)])

    def records(self, *names: str) -> list[dict[str, Any]]:
        """All runs as JSON-able objects, with the names and values of their arguments."""
        return [dict(zip(names, args, strict=True)) | run for args, run in self.items()]
