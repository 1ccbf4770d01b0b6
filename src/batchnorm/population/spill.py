"""Storages whose bytes wait in a temporary file."""

from __future__ import annotations

import tempfile
import time
import weakref
from dataclasses import dataclass
from typing import IO, Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode

from batchnorm.population.raw import raw
from batchnorm.population.storages import Storages, storages

ASSUMED_BYTES_PER_SECOND = 5e8  # of a file, until one has been used


@dataclass
class _File:
    """A file, and how many storages in it are still wanted."""

    _opened: IO[bytes] | None = None
    wanted: int = 0

    @property
    def file(self) -> IO[bytes]:
        """Opened when it is first asked for."""
        if self._opened is None:
            self._opened = tempfile.TemporaryFile()  # noqa: SIM115 - `close` closes it
        return self._opened

    def close(self) -> None:
        """Remove it."""
        if self._opened is not None:
            self._opened.close()


@dataclass(frozen=True)
class _Region:
    """Where a storage's bytes are."""

    file: _File
    offset: int
    size: int


class Spill(TorchDispatchMode):
    """Storages in a file. As a context, what an operator is about to use comes back before it runs.

    A storage is emptied in place, so that all tensors that share it stay what they are, without their values. One that
    turns out to be used by others than the pass that held it is handed back to them: torch's operators would read at
    address 0. Files have no name where the system allows that, so that none is left whatever ends the process.

    Args:
        common: where storages that were handed back are noted; they are not to be put here again.

    Attributes:
        written: bytes written, all in all.
    """

    def __init__(self, common: Storages) -> None:
        super().__init__()  # type: ignore[no-untyped-call]  # torch's
        self._common = common
        self.written = 0
        self._moved = 0
        self._seconds = 0.0
        self._out: weakref.WeakKeyDictionary[torch.UntypedStorage, _Region] = weakref.WeakKeyDictionary()
        # What is read in a round was written in the one before: then a file is empty, and starts again.
        self._file, self._other = _File(), _File()

    def __len__(self) -> int:
        return len(self._out)

    @property
    def bytes_per_second(self) -> float:
        """As measured, writing and reading."""
        return self._moved / self._seconds if self._moved and self._seconds else ASSUMED_BYTES_PER_SECOND

    def next_round(self) -> None:
        """What is written from now on goes to the other file."""
        self._file, self._other = self._other, self._file

    def put(self, storage: torch.UntypedStorage) -> None:
        """Write a storage's bytes, and free its memory.

        Raises:
            OSError: they cannot be written; the storage is as it was.
        """
        start, size, there = time.perf_counter(), storage.nbytes(), self._file
        offset = there.file.seek(0, 2)
        here = storage if storage.device.type == "cpu" else storage.cpu()
        there.file.write(raw(here.data_ptr(), size))
        there.file.flush()
        self._out[storage] = _Region(there, offset, size)
        there.wanted += 1
        storage.resize_(0)
        self.written += size
        self._measured(size, start)

    def get(self, storage: torch.UntypedStorage) -> None:
        """Let a storage have its values again, where they are here."""
        region = self._out.get(storage)
        if region is None:
            return
        start = time.perf_counter()
        storage.resize_(region.size)
        here = storage if storage.device.type == "cpu" else torch.UntypedStorage(region.size)
        region.file.file.seek(region.offset)
        read = region.file.file.readinto(raw(here.data_ptr(), region.size))  # type: ignore[attr-defined]  # files of bytes have it
        if read != region.size:
            raise OSError(f"got {read} of {region.size} bytes back from a temporary file")
        if here is not storage:
            storage.copy_(here)
        del self._out[storage]
        region.file.wanted -= 1
        if not region.file.wanted:
            region.file.file.truncate(0)
        self._measured(region.size, start)

    def close(self) -> None:
        """Hand back whatever is still alive, and remove the files."""
        for storage in list(self._out):
            self.get(storage)
        self._file.close()
        self._other.close()

    def __torch_dispatch__(
        self,
        func: Any,  # noqa: ANN401 - torch's signature
        types: Any,  # noqa: ANN401
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:  # noqa: ANN401
        """Before any operator, while this is a context."""
        for storage in storages((args, kwargs or {})):
            if storage in self._out:
                self.get(storage)
                self._common.add(storage)
        return func(*args, **(kwargs or {}))

    def _measured(self, size: int, start: float) -> None:
        self._seconds += time.perf_counter() - start
        self._moved += size
