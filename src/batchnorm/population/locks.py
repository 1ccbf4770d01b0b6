"""Locks that a forward pass holds where it waits: another pass, on the same thread, would wait for them for ever."""

from __future__ import annotations

import gc
import sys
import threading
import time
from collections.abc import Iterable
from typing import Protocol

PATIENCE = 0.5  # seconds for another thread to let go of a lock


class _Lock(Protocol):
    def acquire(self, block: bool = ..., timeout: float = ..., /) -> bool: ...

    def release(self) -> None: ...


_LOCK = type(threading.Lock())


def _kinds() -> set[type]:
    """An RLock is not among them: who has it gets it again."""
    processes = sys.modules.get("multiprocessing.synchronize")  # otherwise there are none
    names = () if processes is None else ("Lock", "Semaphore", "BoundedSemaphore")
    return {_LOCK, threading.Semaphore, threading.BoundedSemaphore, *(getattr(processes, name) for name in names)}


class Locks:
    """The locks and semaphores that Python has and that are free when this is made."""

    def __init__(self) -> None:
        kinds = _kinds()
        self._free: list[_Lock] = _free([lock for lock in gc.get_objects() if type(lock) in kinds])

    def held(self) -> list[_Lock]:
        """Those that cannot be had now, and not within `PATIENCE` either."""
        now_free = {id(lock) for lock in _free(self._free)}
        suspects = [lock for lock in self._free if id(lock) not in now_free]
        end = time.monotonic() + PATIENCE
        return [lock for lock in suspects if not _can_be_had(lock, max(0.0, end - time.monotonic()))]

    def of_others(self, held: list[_Lock]) -> bool:
        """Whether all of these are still held; from now on they are left out."""
        if _free(held):
            return False
        others = set(map(id, held))
        self._free = [lock for lock in self._free if id(lock) not in others]
        return True


def _free(locks: Iterable[_Lock]) -> list[_Lock]:
    return [lock for lock in locks if _can_be_had(lock, 0.0)]


def _can_be_had(lock: _Lock, seconds: float) -> bool:
    # Asking a lock changes nothing; semaphores can only be tried.
    if seconds == 0 and isinstance(lock, _LOCK):
        return not lock.locked()
    got = lock.acquire(True, seconds) if seconds else lock.acquire(False)
    if got:
        lock.release()
    return got
