"""Training data, read aside."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from accelerate.data_loader import prepare_data_loader
from torch.utils.data import DataLoader, Sampler

from batchnorm.integrations.loader import aside
from integrations.trainees import loader, samples


class Turning(Sampler[int]):
    """An order that changes whenever it is read."""

    def __init__(self) -> None:
        self.turn = 0

    def __iter__(self) -> Iterator[int]:
        self.turn += 1
        return iter([(i + self.turn) % 26 for i in range(26)])


def rows(batches: Any) -> list[Any]:
    return torch.cat([batch[0] for batch in batches]).tolist()


def turning() -> DataLoader[Any]:
    return DataLoader(loader().dataset, batch_size=4, sampler=Turning())


@pytest.mark.parametrize("make", [lambda: loader(3), turning], ids=["generator", "sampler"])
def test_the_originals_order_is_undisturbed(make: Any) -> None:
    expected, original = make(), make()
    for _ in range(2):
        assert sorted(rows(aside(original))) == sorted(samples().tolist())
        assert rows(original) == rows(expected)


def test_the_data_set_is_shared() -> None:
    original = loader()
    twin: Any = aside(original)
    assert twin.dataset is original.dataset
    assert twin.sampler.data_source is original.dataset


def test_workers_under_way_are_left_alone() -> None:
    original = loader(3, num_workers=1, persistent_workers=True)
    whole = rows(loader(3))
    under_way = iter(original)
    first = next(under_way)[0].tolist()
    assert sorted(rows(aside(original))) == sorted(samples().tolist())
    assert first + rows(under_way) == whole


def test_accelerates_own_account_is_left_alone() -> None:
    prepared = prepare_data_loader(loader(3), use_seedable_sampler=True)
    state = prepared.gradient_state
    under_way = iter(prepared)
    next(under_way)
    before = list(state.dataloader_references)
    part = iter(aside(prepared))
    next(part)
    assert list(state.dataloader_references) == before
    assert len(list(under_way)) == 6


@pytest.mark.parametrize("batches", [[1, 2], {"a": 1}])
def test_anything_else_is_itself(batches: Any) -> None:
    assert aside(batches) is batches
