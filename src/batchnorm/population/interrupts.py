"""Ctrl-C in the caller's code only: what this package sets up and takes down is not cut in the middle.

An interrupt that comes outside of the caller's code waits until that runs again, or to the end.
"""

from __future__ import annotations

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType
from typing import Any

# Those whose handlers raise: the user's Ctrl-C, ends asked for by the system, time limits.
_NAMES = ("SIGINT", "SIGTERM", "SIGHUP", "SIGALRM")


class _State:
    """What handlers and contexts share.

    Attributes:
        shielded: how many `shielded` contexts there are.
        open: whether the caller's code runs.
        waiting: a signal that came outside of it, and its handler.
    """

    shielded = 0
    open = False
    waiting: tuple[int, Any] | None = None


def _deliver() -> None:
    if _State.waiting is not None:
        (number, handler), _State.waiting = _State.waiting, None
        handler(number, None)


@contextmanager
def shielded() -> Iterator[None]:
    """Inside, interrupts come at `caller` and `deliver` only, and at the end."""
    if threading.current_thread() is not threading.main_thread():  # others get no signals
        yield
        return
    replaced: list[tuple[int, Any, Any]] = []
    _State.shielded += 1
    was_open, _State.open = _State.open, False
    try:
        for number in [getattr(signal, name) for name in _NAMES if hasattr(signal, name)]:
            handler = signal.getsignal(number)
            if callable(handler):
                replaced.append((number, handler, ours := _handler(handler)))
                signal.signal(number, ours)
        yield
    finally:
        for number, handler, ours in replaced:
            if signal.getsignal(number) is ours:
                signal.signal(number, handler)
        _State.shielded -= 1
        _State.open = was_open
        if not _State.shielded or was_open:
            _deliver()


def _handler(handler: Any) -> Any:  # noqa: ANN401 - of a signal
    def handle(number: int, frame: FrameType | None) -> None:
        if not _State.open:
            _State.waiting = (number, handler)
            return
        # From now on things are taken down; a handler that does not raise goes back to the caller's code.
        _State.open = False
        handler(number, frame)
        _State.open = True

    return handle


@contextmanager
def caller() -> Iterator[None]:
    """Inside, the caller's code runs, and interrupts come at once."""
    if not _State.shielded or threading.current_thread() is not threading.main_thread():
        yield
        return
    before = _State.open
    try:
        deliver()
        _State.open = True
        yield
    finally:
        _State.open = before


@contextmanager
def closed() -> Iterator[None]:
    """Inside `caller`, this package's code runs again."""
    if not _State.open or threading.current_thread() is not threading.main_thread():
        yield
        return
    _State.open = False
    yield
    # Not after an exception: then things are taken down.
    deliver()
    _State.open = True


def deliver() -> None:
    """Let an interrupt that waits come now."""
    if threading.current_thread() is threading.main_thread():
        _deliver()


def waits() -> bool:
    """Whether an interrupt waits."""
    return _State.waiting is not None
