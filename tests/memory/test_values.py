"""Values: kept or computed again, once for all readers, and never of a tensor that has changed."""

from __future__ import annotations

import gc
import weakref

import pytest
import torch
from torch import Tensor

from batchnorm.errors import OrderError
from batchnorm.memory.values import Saved, Value


class Again:
    """Counts how often it computes."""

    def __init__(self) -> None:
        self.times = 0

    def __call__(self, *inputs: Tensor) -> Tensor:
        self.times += 1
        return torch.stack(inputs).sum(0) + 1


def test_a_kept_value_is_the_tensor() -> None:
    t = torch.arange(6.0)
    value = Value(t)
    assert value.get().data_ptr() == t.data_ptr()
    assert value.decided
    assert value.depth == 0


def test_a_kept_value_that_changed_is_an_error() -> None:
    t = torch.arange(6.0)
    value = Value(t)
    assert value.unchanged
    t.view(2, 3)[0].add_(1)
    assert not value.unchanged
    assert value.changed_once
    with pytest.raises(OrderError, match=r"shape \(6,\).* at version 1; expected version 0"):
        value.get()


def test_the_version_is_watched_without_the_memory() -> None:
    t = torch.arange(6.0)
    storage = weakref.ref(t)
    value = Value(t, Again(), (Value(torch.zeros(6)),))
    t.add_(1)
    assert value.changed_once
    t.add_(1)
    del t
    gc.collect()
    assert storage() is None
    assert not value.unchanged
    assert not value.changed_once


def test_the_depth_is_the_longest_way() -> None:
    t, again = torch.zeros(3), Again()
    kept = Value(t)
    one = Value(t, again, (kept,))
    two = Value(t, again, (kept, one))
    assert [v.depth for v in (one, two, Value(t, again, (two, kept)))] == [1, 2, 3]
    two.keep(t)
    assert two.depth == 0
    assert two.inputs == ()
    assert Value(t, again, (two, one)).depth == 2


def test_readers_share_what_is_computed_once() -> None:
    again = Again()
    value = Value(torch.zeros(3), again, (Value(torch.arange(3.0)),))
    readers = [Saved(value=value) for _ in range(3)]
    results = [reader.get() for reader in readers]
    assert again.times == 1
    assert all(r is results[0] for r in results)
    assert results[0].tolist() == [1, 2, 3]
    result = weakref.ref(results.pop())
    results.clear()
    gc.collect()
    assert result() is None  # the last reader has it
    readers[0].get()  # a second backward pass
    readers[1].get()
    assert again.times == 2


def test_the_dead_are_not_waited_for() -> None:
    again = Again()
    value = Value(torch.zeros(3), again, (Value(torch.arange(3.0)),))
    reader, other = Saved(value=value), Saved(value=value)
    del other
    result = weakref.ref(reader.get())
    assert result() is None


def test_a_value_on_the_way_waits_for_its_own_readers() -> None:
    first, second = Again(), Again()
    t = torch.zeros(3)
    below = Value(t, first, (Value(torch.arange(3.0)),))
    above = Value(t, second, (below,))
    reader_below, reader_above = Saved(value=below), Saved(value=above)
    assert reader_above.get().tolist() == [2, 3, 4]
    assert reader_below.get().tolist() == [1, 2, 3]
    assert (first.times, second.times) == (1, 1)


def test_the_order_in_memory_is_that_of_the_tensor() -> None:
    t = torch.zeros(2, 3).t()
    value = Value(t, lambda x: x.t().contiguous(), (Value(torch.arange(6.0).view(2, 3)),))
    result = value.get()
    assert result.stride() == t.stride()
    assert torch.equal(result, torch.arange(6.0).view(2, 3).t())


def test_no_gradients_are_recorded() -> None:
    x = torch.arange(3.0, requires_grad=True)
    with torch.enable_grad():
        result = Value(torch.zeros(3), lambda x: x * x, (Value(x),)).get()
    assert not result.requires_grad


def test_a_saved_tensor_that_changed_is_an_error() -> None:
    t = torch.zeros(3)
    saved = Saved(t)
    assert saved.get() is t
    t.add_(1)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        saved.get()


def test_a_saved_tensor_may_become_a_value() -> None:
    t = torch.zeros(3)
    saved, again = Saved(t), Again()
    saved.become(Value(t, again, (Value(torch.arange(3.0)),)))
    assert saved.kept is None
    assert saved.get().tolist() == [1, 2, 3]


def test_tensors_of_inference_mode_have_no_version() -> None:
    with torch.inference_mode():
        t = torch.zeros(3)
    assert Saved(t).get() is t
