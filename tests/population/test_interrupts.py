"""Signals come while the caller's code runs, or at the end."""

from __future__ import annotations

import signal
import sys
import threading
from collections.abc import Iterator
from typing import Any

import pytest
import torch

import batchnorm as bn
from batchnorm.population.interrupts import caller, closed, deliver, shielded
from support.populations import everything, images, made


@pytest.fixture(autouse=True)
def heeded() -> Iterator[None]:
    """Whoever starts the tests may have them ignore interrupts, as shells do with what runs in the background."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


def interrupt() -> None:
    signal.raise_signal(signal.SIGINT)


def test_it_waits_for_the_callers_code() -> None:
    reached: list[str] = []

    def run() -> None:
        with shielded():
            interrupt()
            reached.append("outside")
            with caller():
                reached.append("inside")

    with pytest.raises(KeyboardInterrupt):
        run()
    assert reached == ["outside"]


def test_it_waits_for_the_end() -> None:
    reached: list[str] = []

    def run() -> None:
        with shielded():
            interrupt()
            interrupt()
            reached.append("outside")

    with pytest.raises(KeyboardInterrupt):
        run()
    assert reached == ["outside"]
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler


def test_a_second_one_does_not_stop_what_is_taken_down() -> None:
    reached: list[str] = []

    def run() -> None:
        with shielded():
            try:
                with caller():
                    interrupt()
                    reached.append("after it")
            finally:
                interrupt()
                reached.append("taken down")

    with pytest.raises(KeyboardInterrupt):
        run()
    assert reached == ["taken down"]


def test_our_code_inside_the_callers() -> None:
    reached: list[str] = []

    def run() -> None:
        with shielded(), caller():
            with closed():
                interrupt()
                reached.append("closed")
            reached.append("open")

    with pytest.raises(KeyboardInterrupt):
        run()
    assert reached == ["closed"]
    deliver()  # nothing waits


def test_other_threads_and_handlers_that_return() -> None:
    seen: list[int] = []
    before = signal.signal(signal.SIGINT, lambda number, _: seen.append(number))
    try:
        with shielded():
            thread = threading.Thread(target=lambda: bn.recalibrate(made("plain"), images(2, 3)))
            thread.start(), thread.join()
            with caller():
                interrupt()
                assert len(seen) == 1
                interrupt()
                assert len(seen) == 2
            interrupt()
            assert len(seen) == 2
        assert len(seen) == 3
    finally:
        signal.signal(signal.SIGINT, before)


@pytest.mark.parametrize("times", [1, pytest.param(2, marks=pytest.mark.long)])
@pytest.mark.parametrize("method", ["exact", "pooled"])
def test_an_interrupt_at_any_line_leaves_nothing(method: str, times: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """At lines of this package and of what it uses, all over a run."""
    lost: list[object] = []  # in a generator that is cleared away, where Python reports an exception and goes on
    monkeypatch.setattr(sys, "unraisablehook", lambda report: lost.append(report.exc_value))
    model, batches = made("plain"), images(3, 4)
    before = everything(model)
    lines = 0

    def count(limit: int) -> Any:
        def trace(*_: Any) -> Any:
            nonlocal lines
            lines += 1
            if limit <= lines < limit + times:
                interrupt()
            return trace

        return trace

    def run(limit: int) -> None:
        nonlocal lines
        lines = 0
        sys.settrace(count(limit))
        try:
            bn.recalibrate(model, iter(batches), method=method)
        finally:
            sys.settrace(None)

    def places() -> Iterator[int]:
        run(10**9)  # the first run imports
        run(10**9)
        total = lines
        # Not the last tenth: there "pooled" has put its statistics in place, and an interrupt is still not undone.
        yield from range(30, total * 9 // 10, total // 40)

    copy = {name: buffer.clone() for name, buffer in model.named_buffers()}
    for limit in places():
        with torch.no_grad():
            for name, buffer in model.named_buffers():
                buffer.copy_(copy[name])
        lost.clear()
        try:
            run(limit)
        except KeyboardInterrupt:
            assert everything(model) == before, limit
        else:
            assert [type(exception) for exception in lost] == [KeyboardInterrupt] * times, f"none came at {limit}"
