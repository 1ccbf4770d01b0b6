"""DATA: batches from a callable or from a `.npz` file, shared out among processes."""

from __future__ import annotations

import inspect
import itertools
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from batchnorm import extras
from batchnorm.errors import UsageError
from batchnorm.files import reading
from batchnorm.loading.object_reference import blaming, resolve

if TYPE_CHECKING:
    import numpy as np

BATCH_SIZE = 32
_END = object()


def load_data(reference: str, *, batch_size: int | None = None, rank: int = 0, size: int = 1) -> Iterable[Any]:
    """The batches of one of `size` processes: those at rank, rank + size, rank + 2 * size and so on.

    A callable with parameters `rank` and `world_size` is called with them and returns the process's own batches. Any
    other must return the same batches in the same order in every process.

    Args:
        reference: `package.module:callable`, `path/file.py:callable`, or a `.npz` file with an array `x` and
            optionally a `y` of the same length, whose batches are `x` or pairs.
        batch_size: of a `.npz` file; 32 by default.
        rank: the process, from 0.
        size: how many processes there are.

    Raises:
        UsageError: the reference leads to no batches. Reading them raises it for whatever the user's code raises.
    """
    if reference.endswith(".npz"):
        arrays = _arrays(Path(reference))
        return Shard(reference, ArrayBatches(arrays, batch_size or BATCH_SIZE), rank, size)
    if batch_size is not None:
        raise UsageError(f"got --batch-size and DATA {reference}; it is for .npz files, a callable makes its batches")
    make = resolve(reference, "DATA")
    with blaming(reference):
        if {"rank", "world_size"} <= _parameters(make):
            batches, rank, size = make(rank=rank, world_size=size), 0, 1
        else:
            batches = make()
        iterable = isinstance(batches, Iterable)
    if not iterable:
        raise UsageError(f"{reference} returned {type(batches).__name__}; DATA must return an iterable of batches")
    return Shard(reference, batches, rank, size)


class Shard:
    """Every `size`-th of the batches, from number `rank` on; what reading them raises names `reference`."""

    def __init__(self, reference: str, batches: Iterable[Any], rank: int, size: int) -> None:
        self._reference = reference
        self._batches = batches
        self._rank = rank
        self._size = size

    def __len__(self) -> int:
        """Raises TypeError where the batches have no length."""
        with blaming(self._reference):
            try:
                whole = len(self._batches)  # type: ignore[arg-type]  # documented
            except TypeError:
                whole = -1
        if whole < 0:
            raise TypeError(f"the batches of {self._reference} have no length")
        return len(range(whole)[self._rank :: self._size])

    def __iter__(self) -> Iterator[Any]:
        with blaming(self._reference):
            items = itertools.islice(self._batches, self._rank, None, self._size)
        while True:
            with blaming(self._reference):
                batch = next(items, _END)
            if batch is _END:
                return
            yield batch


class ArrayBatches:
    """Batches of arrays, cut along their first dimension without copying."""

    def __init__(self, arrays: Sequence[Tensor], batch_size: int) -> None:
        self._arrays = arrays
        self._batch_size = min(batch_size, max(len(arrays[0]), 1))  # torch cannot count beyond 64 bits

    def __len__(self) -> int:
        return -(-len(self._arrays[0]) // self._batch_size)

    def __iter__(self) -> Iterator[Any]:
        for pieces in zip(*(array.split(self._batch_size) for array in self._arrays), strict=True):
            yield pieces[0] if len(pieces) == 1 else pieces


def _parameters(function: Callable[..., Any]) -> set[str]:
    try:
        return set(inspect.signature(function).parameters)
    except (TypeError, ValueError):  # written in C, it may not tell
        return set()


def _arrays(path: Path) -> list[Tensor]:
    """`x`, and `y` where there is one."""
    extras.require("files", "a .npz file", "numpy")
    import numpy as np

    with reading(path), path.open("rb") as file, np.load(file, allow_pickle=False) as archive:
        arrays = {name: _tensor(archive[name]) for name in ("x", "y") if name in archive}
        names = ", ".join(archive)
    if "x" not in arrays:
        raise UsageError(f"got {path} with the arrays {names or '(none)'}; it must have one named x")
    shapes = {name: tuple(array.shape) for name, array in arrays.items()}
    if not all(shapes.values()) or len({shape[0] for shape in shapes.values()}) > 1:
        raise UsageError(
            f"got {path} with the shapes {shapes}; the first dimension must be the samples, as many in each"
        )
    return list(arrays.values())


def _tensor(array: np.ndarray[Any, Any]) -> Tensor:
    """NumPy's default, float64, becomes torch's; everything else stays as it is."""
    tensor = torch.from_numpy(array)
    return tensor.to(torch.get_default_dtype()) if tensor.dtype == torch.float64 else tensor
