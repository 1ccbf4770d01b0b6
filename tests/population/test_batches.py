"""Batches of every kind: counted, cut, moved, read once."""

from __future__ import annotations

from collections import UserDict, namedtuple
from collections.abc import Iterator

import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, IterableDataset

from batchnorm.errors import OptionError
from batchnorm.models.nested import tensors
from batchnorm.population.batches import Batches, cut, default_forward, samples

Pair = namedtuple("Pair", ["x", "y"])
X, Y = torch.arange(12).view(6, 2), torch.arange(6)
KINDS = [X, (X, Y), [X, Y], Pair(X, Y), {"x": X, "y": Y}, UserDict({"x": X, "y": (Y, [X])}), (X, "text", None, 3)]


@pytest.mark.parametrize("batch", KINDS, ids=lambda b: type(b).__name__)
def test_kinds(batch: object) -> None:
    assert next(tensors(batch)) is X
    assert samples(batch) == 6
    part = cut(batch, 4)
    assert type(part) is type(batch)
    assert samples(batch) == 6
    for small, large in zip(tensors(part), tensors(batch), strict=True):
        assert torch.equal(small, large[:4])


def test_what_has_other_rows_is_not_cut() -> None:
    scalar, table = torch.tensor(3.0), torch.zeros(4, 2)
    part = cut((scalar, X, table), 2)
    assert part[0] is scalar
    assert torch.equal(part[1], X[:2])
    assert part[2] is table


def test_no_tensor_no_count() -> None:
    assert samples(("a", [3], {"k": None})) is None
    assert samples(torch.tensor(3.0)) is None


def read(*batches: object, max_samples: int | None = None) -> tuple[list[tuple[int, object]], Batches]:
    source = Batches(iter(batches), max_samples)
    return [(batch.index, batch.content) for batch in source], source


def test_reading_counts_and_leaves_empty_ones_out() -> None:
    got, source = read(X, X[:0], Y[:2])
    assert [index for index, _ in got] == [0, 2]
    assert (source.read, source.used, source.samples) == (3, 2, 8)
    _, source = read(X, "text")
    assert (source.read, source.used, source.samples) == (2, 2, None)


def test_the_limit_cuts_the_last_and_reads_no_further() -> None:
    def endless() -> Iterator[Tensor]:
        while True:
            yield X

    source = Batches(endless(), 15)
    assert [len(batch.content) for batch in source] == [6, 6, 3]
    assert (source.read, source.used, source.samples) == (3, 3, 15)


def test_expected() -> None:
    assert Batches([X, X], None).expected == 2
    assert Batches([X, X], 3).expected is None
    assert Batches((x for x in [X, X]), None).expected is None


def test_a_length_that_raises() -> None:
    class Stream(IterableDataset[Tensor]):
        def __iter__(self) -> Iterator[Tensor]:
            yield from X

    batches = Batches(DataLoader(Stream(), batch_size=2), None)
    assert batches.expected is None
    assert sum(len(batch.content) for batch in batches) == len(X)


def test_nothing_is_read_before_it_is_asked_for() -> None:
    begun: list[int] = []

    class Data:
        def __iter__(self) -> Iterator[Tensor]:
            begun.append(1)
            yield X

    source = Batches(Data(), None)
    assert not begun
    assert len(list(source)) == 1


def test_skip() -> None:
    source = Batches([X, Y, X[:3]], None)
    assert source.skip(2, 1, 5)
    assert [batch.index for batch in source] == [2]
    assert (source.read, source.used, source.samples) == (3, 2, 8)
    assert not Batches([X], None).skip(2, 1, 5)


def test_default_forward() -> None:
    model = nn.Linear(2, 1)
    assert default_forward(model, X.float()).shape == (6, 1)
    assert default_forward(model, [X.float(), "label"]).shape == (6, 1)
    assert default_forward(model, {"input": X.float()}).shape == (6, 1)
    for batch in ("text", (), ["text"], 3):
        with pytest.raises(OptionError, match="Pass forward="):
            default_forward(model, batch)


def test_a_batch_is_moved_to_the_models_device() -> None:
    moved: list[torch.device] = []

    class Model(nn.Linear):
        def forward(self, x: Tensor) -> Tensor:
            moved.append(x.device)
            return super().forward(x)

    default_forward(Model(2, 1, device="meta"), (X.float(), X))
    assert moved == [torch.device("meta")]
