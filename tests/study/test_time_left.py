"""The time left: by declared costs at first, by what was measured later."""

from __future__ import annotations

import pytest

from batchnorm.study.time_left import FINISHING, STARTING, TimeLeft


class Clock:
    """Time that passes when a test says so."""

    seconds = 1000.0

    def __call__(self) -> float:
        return self.seconds


def test_nothing_is_known_before_the_work_is() -> None:
    assert TimeLeft().now() is None


def test_at_first_the_costs_and_the_start_of_the_processes_count() -> None:
    clock = Clock()
    left = TimeLeft(clock)
    left.begin([3.0] * 40, 2)
    assert left.now() == (0.0, STARTING + 60 + FINISHING)
    clock.seconds += 3
    assert left.now() == (0.0, STARTING + 57 + FINISHING), "time passes though nothing gets done"
    clock.seconds += 100
    assert left.now() == (0.0, 57 + FINISHING), "no longer than until something should have been done"
    left.begin([3.0] * 40, 1)
    assert left.now() == (0.0, 120 + FINISHING), "one process is there already"
    left.begin([3.0], 2)
    assert left.now() == (0.0, 3 + FINISHING), "nor does a single task need two"


@pytest.mark.parametrize("pace", [0.5, 1.0, 4.0])
@pytest.mark.parametrize("processes", [1, 2])
def test_it_learns_how_quick_the_machine_is(pace: float, processes: int) -> None:
    """Half-way through it knows, whatever the costs were said to be."""
    clock = Clock()
    left = TimeLeft(clock)
    left.begin([1.0] * 400, processes)
    for _ in range(200):
        clock.seconds += pace / processes
        left.advance(1.0)
    share, seconds = left.now() or (0, 0)
    assert share == 0.5
    assert seconds - FINISHING == pytest.approx(200 * pace / processes, rel=0.06)


def test_one_slow_task_at_first_is_no_reason_to_expect_hours() -> None:
    clock = Clock()
    left = TimeLeft(clock)
    left.begin([1.0] * 100, 1)
    left.advance(1.0)
    clock.seconds += 20
    left.advance(1.0)
    assert (left.now() or (0, 0))[1] < 3 * 98


def test_it_is_never_negative_and_ends_with_the_report() -> None:
    clock = Clock()
    left = TimeLeft(clock)
    left.begin([1.0], 1)
    clock.seconds += 100
    assert left.now() == (0.0, FINISHING)
    left.advance(1.0)
    assert left.now() == (1.0, FINISHING)
    left.begin([], 2)
    assert (left.now() or (0, 0))[0] == 1.0, "all was stored"
