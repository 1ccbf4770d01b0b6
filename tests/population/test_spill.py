"""Storages in a file and back: whoever has them can read them all the time."""

from __future__ import annotations

import os
import sys
import tempfile
import threading
import weakref
from typing import Any

import numpy as np
import pytest
import torch

from batchnorm.population import spill as module
from batchnorm.population.spill import ASSUMED_BYTES_PER_SECOND, LEAST_BYTES, Spill, can_spill, left_in_memory
from support.memory import mapped_files

pytestmark = pytest.mark.skipif(
    not module.available(), reason="memory is exchanged for a file with Linux's glibc alone"
)


@pytest.fixture
def spill() -> Any:
    made = Spill()
    yield made
    made.close()


def test_out_and_back(spill: Spill) -> None:
    tensors = [torch.randn(n, 300).to(dtype) for n in (100, 999) for dtype in (torch.float32, torch.bfloat16)]
    tensors += [torch.randn(5_000_003)]
    before = [t.clone() for t in tensors]
    view, address = tensors[2].T[1:], weakref.ref(tensors[2].untyped_storage())
    for _ in range(3):
        for t in tensors:
            spill.put(t.untyped_storage())
        assert len(spill) == len(tensors)
        assert all(torch.equal(a, b) for a, b in zip(tensors, before, strict=True))
        for t in tensors:
            spill.get(t.untyped_storage())
        assert len(spill) == 0
        assert all(torch.equal(a, b) for a, b in zip(tensors, before, strict=True))
    assert torch.equal(view, before[2].T[1:])
    assert address() is view.untyped_storage()
    assert spill.written == 3 * sum(t.nbytes - left_in_memory(t.untyped_storage()) for t in tensors)
    assert 0 < spill.bytes_per_second != ASSUMED_BYTES_PER_SECOND


def test_others_read_and_write_what_is_out(spill: Spill) -> None:
    """NumPy, DLPack, another thread: each has the address alone."""
    t = torch.arange(1e6)
    array, capsule = t.numpy(), np.from_dlpack(t)
    spill.put(t.untyped_storage())
    assert array.sum() == capsule.sum() == t.sum().item()
    read: list[float] = []
    thread = threading.Thread(target=lambda: read.append(float(t[-1])))
    thread.start(), thread.join()
    assert read == [999_999]
    array[5000] = -1
    spill.get(t.untyped_storage())
    assert t[5000] == -1
    assert t[5001:].tolist() == list(range(5001, 1_000_000))


def test_a_child_process_sees_it_and_changes_nothing_here(spill: Spill) -> None:
    t = torch.arange(1e6)
    array = t.numpy()
    spill.put(t.untyped_storage())
    child = os.fork()
    if not child:
        right = array[-1] == 999_999
        array[:] = 0
        os._exit(0 if right else 1)
    assert os.waitpid(child, 0)[1] == 0
    assert array[-1] == 999_999


def test_the_memory_is_free_while_it_is_out(spill: Spill) -> None:
    t = torch.ones(50_000_000 // 4)

    def resident() -> int:
        with open("/proc/self/statm") as numbers:
            return int(numbers.read().split()[1]) * os.sysconf("SC_PAGE_SIZE")

    before = resident()
    spill.put(t.untyped_storage())
    assert before - resident() > 45_000_000


def test_what_dies_while_it_is_out_leaves_nothing(spill: Spill) -> None:
    before = mapped_files()
    kept, gone = torch.arange(20e6), torch.arange(21e6)  # above what malloc keeps for the next
    spill.put(kept.untyped_storage()), spill.put(gone.untyped_storage())
    assert mapped_files() == before + 2
    del gone
    assert mapped_files() == before + 1
    spill.close()
    assert mapped_files() == before
    assert kept[5].item() == 5


def test_what_got_other_memory_is_left_alone(spill: Spill) -> None:
    t = torch.ones(100_000)
    spill.put(t.untyped_storage())
    t.untyped_storage().resize_(4 * 50_000_000)
    t[:] = 2
    spill.get(t.untyped_storage())
    assert t.sum() == 200_000


def test_what_is_not_there_is_left_alone(spill: Spill) -> None:
    t = torch.ones(3)
    spill.get(t.untyped_storage())
    assert t.tolist() == [1, 1, 1]


def test_only_memory_of_torchs_own_allocator_that_nobody_else_maps(spill: Spill) -> None:
    n = LEAST_BYTES // 4
    assert can_spill(torch.ones(n).untyped_storage())
    assert not can_spill(torch.ones(n - 1).untyped_storage())
    assert not can_spill(torch.from_numpy(np.ones(n)).untyped_storage())
    assert not can_spill(torch.ones(n).share_memory_().untyped_storage())
    assert not can_spill(torch.ones(n, device="meta").untyped_storage())


class Full:
    """A disk that takes so many bytes."""

    def __init__(self, room: int) -> None:
        self.room = room

    def __enter__(self) -> Full:
        return self

    def __exit__(self, *_: object) -> None:
        pass

    def write(self, data: memoryview) -> int:
        if not self.room:
            raise OSError(28, "No space left on device")
        written = min(self.room, len(data))
        self.room -= written
        return written


@pytest.mark.parametrize("room", [0, 1, 4095, 8192, 100_000])
def test_a_write_that_fails_leaves_the_storage(room: int, spill: Spill, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tempfile, "TemporaryFile", lambda **_: Full(room))
    t = torch.ones(100_000)
    with pytest.raises(OSError, match="No space left"):
        spill.put(t.untyped_storage())
    assert bool((t == 1).all())
    assert len(spill) == 0


def test_a_mapping_that_fails_leaves_the_storage(spill: Spill) -> None:
    t = torch.ones(100_000)
    spill._system._mmap = lambda *_: module._FAILED
    with pytest.raises(OSError, match="cannot map"):
        spill.put(t.untyped_storage())
    assert bool((t == 1).all())


def test_without_memory_what_is_out_stays_there_and_can_be_used(spill: Spill) -> None:
    t = torch.ones(100_000)
    spill.put(t.untyped_storage())
    spill._system._mmap = lambda *_: module._FAILED
    spill.get(t.untyped_storage())
    assert bool((t == 1).all())


def test_only_where_malloc_is_known(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "platform", "darwin")
    assert not module.available()
    with pytest.raises(OSError, match="cannot be exchanged"):
        Spill().put(torch.ones(100_000).untyped_storage())


def test_there_is_room_for_mappings(spill: Spill, monkeypatch: pytest.MonkeyPatch) -> None:
    assert spill.has_room()
    monkeypatch.setattr(module, "SHARE_OF_MAPPINGS", 0)
    assert not spill.has_room()
