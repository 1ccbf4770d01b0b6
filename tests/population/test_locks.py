"""Locks that are held from one layer to the next are found, and only these."""

from __future__ import annotations

import asyncio
import gc
import multiprocessing
import threading
import time
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import batchnorm as bn
from batchnorm.errors import OrderError
from batchnorm.population.locks import Locks
from support.populations import everything

KINDS: dict[str, Callable[[], Any]] = {
    "lock": threading.Lock,
    "semaphore": threading.Semaphore,
    "bounded semaphore": lambda: threading.BoundedSemaphore(2),
    "processes": multiprocessing.Lock,
}


class Locked(nn.Module):
    """Holds something from one layer to another."""

    def __init__(self, lock: Any) -> None:
        super().__init__()
        self.lock = lock
        self.bn1, self.bn2, self.bn3 = (nn.BatchNorm1d(2) for _ in range(3))

    def forward(self, x: Tensor) -> Tensor:
        x = self.bn1(x)
        with self.lock:
            x = self.bn2(x)
        return self.bn3(x)


def data(n: int = 4) -> list[Tensor]:
    return [torch.randn(5, 2, generator=torch.Generator().manual_seed(i)) for i in range(n)]


@pytest.mark.parametrize("kind", KINDS)
def test_what_is_held_across_layers_is_refused(kind: str) -> None:
    model = Locked(KINDS[kind]())
    before = everything(model)
    with pytest.raises(OrderError, match=r'layer "bn2": got a call inside a lock .* method="pooled"'):
        bn.recalibrate(model, data())
    assert everything(model) == before
    assert model.lock.acquire(False)
    model.lock.release()
    bn.recalibrate(model, data(), method="pooled")
    bn.recalibrate(model, data(1))  # nobody else wants it


def test_who_holds_a_lock_may_take_it_again() -> None:
    bn.recalibrate(Locked(threading.RLock()), data())


def test_locks_of_other_threads_are_theirs() -> None:
    """Held for long, and taken and let go all the time."""
    model, expected = Locked(threading.RLock()), Locked(threading.RLock())
    bn.recalibrate(expected, data())
    long, short, stop = threading.Lock(), threading.Lock(), threading.Event()

    def take(lock: Any, seconds: float) -> None:
        while not stop.is_set():
            with lock:
                time.sleep(seconds)

    threads = [threading.Thread(target=take, args=args) for args in ((long, 1.5), (short, 0.001))]

    def progress(done: int, _: int | None) -> None:
        if done == 1 and not threads[0].is_alive():
            for thread in threads:
                thread.start()

    try:
        bn.recalibrate(model, data(), progress=progress)
    finally:
        stop.set()
        for thread in threads:
            thread.join()
    for mine, right in zip(model.buffers(), expected.buffers(), strict=True):
        assert torch.equal(mine, right)


def test_what_is_free_is_not_held() -> None:
    lock, taken = threading.Lock(), threading.Lock()
    with taken:
        locks = Locks()
        assert not locks.held()
        with lock:
            held = locks.held()
            assert held == [lock]
        assert not locks.of_others(held)
        with lock:
            assert locks.of_others(held)
            assert not locks.held()
    assert gc.is_tracked(lock)


def test_an_event_loop_inside_a_forward_pass_is_refused() -> None:
    def forward(net: nn.Module, x: Tensor) -> None:
        async def run() -> None:
            net(x)

        asyncio.run(run())

    model = Locked(threading.RLock())
    before = everything(model)
    with pytest.raises(OrderError, match=r'layer "bn1": got a call inside an event loop .* method="pooled"'):
        bn.recalibrate(model, data(), forward=forward)
    assert everything(model) == before
    bn.recalibrate(model, data(), forward=forward, method="pooled")


def test_an_event_loop_around_the_whole_disturbs_nobody() -> None:
    async def run() -> bn.Recalibration:
        return bn.recalibrate(Locked(threading.RLock()), data())

    assert asyncio.run(run()).batches == 4
