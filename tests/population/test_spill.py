"""Storages in a file and back: all their tensors stay what they are."""

from __future__ import annotations

import weakref
from collections.abc import Iterator

import pytest
import torch

from batchnorm.population.spill import ASSUMED_BYTES_PER_SECOND, Spill
from batchnorm.population.storages import Storages

COMMON: Storages = weakref.WeakSet()


@pytest.fixture
def spill() -> Iterator[Spill]:
    COMMON.clear()
    made = Spill(COMMON)
    yield made
    made.close()


def test_out_and_back(spill: Spill) -> None:
    tensors = [torch.randn(n, 5).to(dtype) for n in (1, 300, 7) for dtype in (torch.float32, torch.bfloat16)]
    before = [t.clone() for t in tensors]
    view = tensors[2].T[1:]
    address = weakref.ref(tensors[2].untyped_storage())
    for _ in range(3):
        for t in tensors:
            spill.put(t.untyped_storage())
            assert t.untyped_storage().nbytes() == 0
        assert len(spill) == len(tensors)
        spill.next_round()
        for t in tensors:
            spill.get(t.untyped_storage())
        assert len(spill) == 0
        assert all(torch.equal(a, b) for a, b in zip(tensors, before, strict=True))
    assert torch.equal(view, before[2].T[1:])
    assert address() is view.untyped_storage()
    assert spill.written == 3 * sum(t.nbytes for t in tensors)
    assert 0 < spill.bytes_per_second != ASSUMED_BYTES_PER_SECOND


def test_a_file_is_emptied_when_nobody_wants_anything_in_it(spill: Spill) -> None:
    a, b = torch.randn(100), torch.randn(50)
    spill.put(a.untyped_storage()), spill.put(b.untyped_storage())
    assert spill._file.file.seek(0, 2) == 600
    spill.get(a.untyped_storage())
    assert spill._file.file.seek(0, 2) == 600
    spill.get(b.untyped_storage())
    assert spill._file.file.seek(0, 2) == 0


def test_what_is_not_there_is_left_alone(spill: Spill) -> None:
    t = torch.ones(3)
    spill.get(t.untyped_storage())
    assert t.tolist() == [1, 1, 1]


def test_inside_whoever_uses_it_gets_it_back(spill: Spill) -> None:
    t, other = torch.arange(6.0), torch.arange(3.0)
    view = t[2:]
    spill.put(t.untyped_storage()), spill.put(other.untyped_storage())
    with spill:
        assert (view + 1).tolist() == [3, 4, 5, 6]
        assert torch.cat([t, torch.zeros(1)]).tolist() == [0, 1, 2, 3, 4, 5, 0]  # in a list, too
    assert len(spill) == 1
    assert list(COMMON) == [t.untyped_storage()]


def test_closing_hands_back_what_lives(spill: Spill) -> None:
    t, gone = torch.arange(3.0), torch.arange(4.0)
    spill.put(t.untyped_storage()), spill.put(gone.untyped_storage())
    del gone
    spill.close()
    assert t.tolist() == [0, 1, 2]


def test_no_file_before_it_is_needed(spill: Spill) -> None:
    assert spill._file._opened is None


def test_a_write_that_fails_leaves_the_storage(spill: Spill, monkeypatch: pytest.MonkeyPatch) -> None:
    class Full:
        def seek(self, *_: int) -> int:
            return 0

        def write(self, _: memoryview) -> int:
            raise OSError(28, "No space left on device")

        def close(self) -> None:
            pass

    monkeypatch.setattr(spill._file, "_opened", Full())
    t = torch.ones(3)
    with pytest.raises(OSError, match="No space left"):
        spill.put(t.untyped_storage())
    assert t.tolist() == [1, 1, 1]
    assert len(spill) == 0
