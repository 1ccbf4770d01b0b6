"""Passes that take turns: order, stops, what they find around them."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch

from batchnorm.population.batches import Batch
from batchnorm.population.lockstep import Lockstep

LOG: list[str] = []


@pytest.fixture(autouse=True)
def log() -> None:
    LOG.clear()


def lockstep(run: Callable[[Lockstep, Batch], None]) -> Lockstep:
    steps = Lockstep(lambda batch: run(steps, batch), {"cpu"})
    return steps


def two_waits(steps: Lockstep, batch: Batch) -> None:
    try:
        for step in "ab":
            LOG.append(f"{batch.content}{step}")
            steps.wait()
        LOG.append(f"{batch.content}c")
    finally:
        LOG.append(f"{batch.content} cleaned")


def test_turns() -> None:
    with lockstep(two_waits) as steps:
        for i in range(2):
            steps.proceed(steps.add(Batch(i, i)))
        for _ in range(2):
            for one in steps.passes:
                steps.proceed(one)
    assert LOG == ["0a", "1a", "0b", "1b", "0c", "0 cleaned", "1c", "1 cleaned"]


def test_the_end_of_the_context_ends_those_that_wait() -> None:
    with lockstep(two_waits) as steps:
        for i in range(3):
            steps.proceed(steps.add(Batch(i, i)))
        stacks = [one.stack for one in steps.passes]
    assert LOG[3:] == ["0 cleaned", "1 cleaned", "2 cleaned"]
    assert all(stack is not None and stack.dead for stack in stacks)
    assert not steps.passes


def test_a_pass_that_was_stopped_begins_anew_with_the_same_random_numbers() -> None:
    def run(steps: Lockstep, batch: Batch) -> None:
        LOG.append(str(torch.rand(()).item()))
        steps.wait()

    with lockstep(run) as steps:
        one, other = (steps.add(Batch(i, i)) for i in range(2))
        steps.proceed(one), steps.proceed(other)
        steps.stop(one)
        assert one.stack is None
        steps.proceed(one)
    assert LOG[2] == LOG[0] != LOG[1]


def test_an_exception_ends_its_pass_and_goes_on_outside() -> None:
    def run(steps: Lockstep, batch: Batch) -> None:
        steps.wait()
        raise LookupError(batch.content)

    with lockstep(run) as steps:
        one = steps.add(Batch(0, "x"))
        steps.proceed(one)
        with pytest.raises(LookupError, match="x"):
            steps.proceed(one)
        assert steps.current is None
        assert one.stack is not None
        assert one.stack.dead


def test_what_is_raised_in_cleaning_up_is_raised_where_nothing_else_was() -> None:
    def run(steps: Lockstep, batch: Batch) -> None:
        try:
            steps.wait()
        finally:
            LOG.append("cleaned")
            raise LookupError(batch.content)

    steps = lockstep(run)
    with pytest.raises(LookupError, match="x"), steps:
        steps.proceed(steps.add(Batch(0, "x")))
    with pytest.raises(ZeroDivisionError), lockstep(run) as steps:
        for i in range(2):
            steps.proceed(steps.add(Batch(i, "x")))
        raise ZeroDivisionError
    assert LOG == ["cleaned"] * 3


def test_a_pass_that_catches_its_end_is_ended_where_it_waits_next() -> None:
    def run(steps: Lockstep, _: Batch) -> None:
        for i in range(3):
            try:
                steps.wait()
            except BaseException:
                LOG.append(f"caught {i}")

    with lockstep(run) as steps:
        one = steps.add(Batch(0, "x"))
        steps.proceed(one)
        stack = one.stack
        steps.stop(one)
    assert stack is not None
    assert stack.dead
    assert LOG == ["caught 0", "caught 1", "caught 2"]


def test_around_is_entered_whenever_a_pass_runs() -> None:
    class Around:
        def __enter__(self) -> None:
            LOG.append("(")

        def __exit__(self, *_: object) -> None:
            LOG.append(")")

    with lockstep(two_waits) as steps:
        steps.around = Around
        one = steps.add(Batch(0, 0))
        for _ in range(2):
            steps.proceed(one)
    assert LOG == ["(", "0a", ")", "(", "0b", ")", "(", "0 cleaned", ")"]


def test_a_thousand_passes() -> None:
    """Each is a piece of memory, not a thread."""
    import threading

    threads = threading.active_count()
    with lockstep(two_waits) as steps:
        for i in range(1000):
            steps.proceed(steps.add(Batch(i, i)))
        assert threading.active_count() == threads
        for one in steps.passes:
            steps.proceed(one)
    assert len(LOG) == 3000
