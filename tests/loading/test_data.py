"""DATA."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from batchnorm.errors import UsageError
from batchnorm.loading.data import load_data

CODE = """
def seven():
    return list(range(7))
def stream():
    yield from range(7)
def own(rank, world_size):
    return [(rank, world_size)]
def failing():
    yield 0
    raise LookupError("no such picture")
def unready():
    raise LookupError("no such folder")
def number():
    return 7
"""


@pytest.fixture(autouse=True)
def code(project: Path) -> None:
    (project / "my.py").write_text(CODE)


def refusal(reference: str, **options: Any) -> str:
    with pytest.raises(UsageError) as caught:
        list(load_data(reference, **options))
    return str(caught.value)


@pytest.mark.parametrize("name", ["seven", "stream"])
def test_batches_of_a_callable(name: str) -> None:
    batches = load_data(f"my.py:{name}")
    assert list(batches) == list(range(7))


@pytest.mark.parametrize("name", ["seven", "stream"])
@pytest.mark.parametrize("size", [2, 3, 9])
def test_batches_are_dealt_out(name: str, size: int) -> None:
    shares = [list(load_data(f"my.py:{name}", rank=rank, size=size)) for rank in range(size)]
    assert shares == [list(range(7))[rank::size] for rank in range(size)]


def length(batches: Iterable[Any]) -> int:
    return len(batches)  # type: ignore[arg-type]  # what is asked


def test_a_share_has_a_length_where_the_batches_have_one() -> None:
    assert [length(load_data("my.py:seven", rank=rank, size=3)) for rank in range(3)] == [3, 2, 2]
    with pytest.raises(TypeError):
        length(load_data("my.py:stream"))


def test_a_callable_may_deal_out_itself() -> None:
    assert list(load_data("my.py:own", rank=1, size=3)) == [(1, 3)]
    assert list(load_data("my.py:own")) == [(0, 1)]


@pytest.mark.parametrize(
    ("name", "part"),
    [
        ("failing", "my.py:failing raised LookupError: no such picture ("),
        ("unready", "my.py:unready raised LookupError: no such folder ("),
        ("number", "my.py:number returned int; DATA must return an iterable of batches"),
        ("nothing", "my.py has no nothing"),
    ],
)
def test_no_data(name: str, part: str) -> None:
    assert part in refusal(f"my.py:{name}")


def test_a_batch_size_is_for_files() -> None:
    assert "a callable makes its batches" in refusal("my.py:seven", batch_size=2)


def test_arrays() -> None:
    x = np.arange(14.0).reshape(7, 2)
    np.savez("a.npz", x=x, y=np.arange(7), other=np.zeros(3))
    batches = list(load_data("a.npz", batch_size=3))
    assert [tuple(map(len, batch)) for batch in batches] == [(3, 3), (3, 3), (1, 1)]
    assert np.array_equal(torch.cat([batch[0] for batch in batches]), x)
    assert np.array_equal(torch.cat([batch[1] for batch in batches]), np.arange(7))
    assert batches[0][0].dtype == torch.float32, "NumPy's default becomes torch's"
    assert batches[0][1].dtype == torch.int64
    assert length(load_data("a.npz", batch_size=3, rank=1, size=2)) == 1


def test_arrays_without_labels_are_tensors_in_batches_of_32() -> None:
    np.savez("a.npz", x=np.zeros((70, 2), np.float16))
    batches = list(load_data("a.npz"))
    assert all(isinstance(batch, Tensor) for batch in batches)
    assert [(len(batch), batch.dtype) for batch in batches] == [(n, torch.float16) for n in (32, 32, 6)]


@pytest.mark.parametrize(
    ("arrays", "part"),
    [
        ({"images": np.zeros(3)}, "a.npz with the arrays images; it must have one named x"),
        ({"x": np.zeros(3), "y": np.zeros(2)}, "the first dimension must be the samples, as many in each"),
        ({"x": np.zeros(())}, "the first dimension must be the samples"),
        ({"x": np.array([{}])}, "allow_pickle=False"),
        ({"x": np.array(["a"])}, "can't convert np.ndarray of type numpy.str_"),
    ],
)
def test_other_arrays(arrays: dict[str, Any], part: str) -> None:
    np.savez("a.npz", **arrays)
    assert part in refusal("a.npz")


def test_files_that_cannot_be_read(project: Path) -> None:
    assert refusal("no.npz").startswith("cannot read no.npz: ")
    Path("a.npz").write_bytes(b"PK\x03\x04 and so on")
    assert refusal("a.npz").startswith("cannot read a.npz: ")


@pytest.mark.parametrize("position", [30, 200, -100])
def test_damaged_arrays(position: int) -> None:
    np.savez_compressed("a.npz", x=np.random.default_rng(0).normal(size=(40, 3)))
    content = bytearray(Path("a.npz").read_bytes())
    content[position] ^= 0xFF
    Path("a.npz").write_bytes(content)
    assert refusal("a.npz").startswith("cannot read a.npz: ")


def test_a_batch_size_beyond_all_samples() -> None:
    np.savez("a.npz", x=np.zeros((7, 2)))
    (batch,) = load_data("a.npz", batch_size=2**63 - 1)
    assert batch.shape == (7, 2)
    assert length(load_data("a.npz", batch_size=10**30)) == 1


def test_a_callable_that_tells_no_parameters() -> None:
    assert list(load_data("builtins:dict")) == []
