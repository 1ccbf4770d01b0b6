"""Storages whose bytes wait in a file that is mapped where they were.

A storage's address stays valid and its values can be read at any time, by whoever has it: nothing is ever empty.
"""

from __future__ import annotations

import contextlib
import ctypes
import mmap
import sys
import tempfile
import time
import weakref
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import torch

from batchnorm.population.raw import raw

ASSUMED_BYTES_PER_SECOND = 5e8  # of a file, until one has been used
LEAST_BYTES = 2**16  # of a storage; each mapping is an entry in a table of the system's
# What the system lets a process have of such entries is for everybody in it.
SHARE_OF_MAPPINGS = 0.5

_MAP_FIXED, _MREMAP_MAYMOVE, _MREMAP_FIXED = 0x10, 1, 2  # of Linux; the module mmap does not have them
_FAILED = ctypes.c_void_p(-1).value


class _Region(NamedTuple):
    """The whole pages inside a storage."""

    address: int
    size: int


def available() -> bool:
    """Whether memory can be exchanged for a mapped file: on Linux, where malloc is glibc's.

    Other allocators take memory that was given back for zeros, which a mapped file is not.
    """
    if sys.platform != "linux":
        return False
    try:
        libc = ctypes.CDLL("libc.so.6")
        return hasattr(libc, "gnu_get_libc_version") and _address(libc.malloc) == _address(ctypes.CDLL(None).malloc)
    except (OSError, AttributeError):
        return False


def can_spill(storage: torch.UntypedStorage) -> bool:
    """Whether a storage's bytes are memory of torch's own allocator that no other process or device knows of."""
    return (
        storage.device.type == "cpu"
        and storage.nbytes() >= LEAST_BYTES
        and storage.resizable()
        and not storage.is_shared()
        # Not `storage.is_pinned()`, which in torch 2.10 warns of itself.
        and not torch.empty(0, dtype=torch.uint8, device=storage.device).set_(storage).is_pinned()
    )


def left_in_memory(storage: torch.UntypedStorage) -> int:
    """How many bytes stay where they are when a storage is put out: the parts of pages at its ends."""
    return storage.nbytes() - _pages(storage).size


class Spill:
    """Storages in files, where `available`.

    The file lies where the memory was, as a private mapping: reading brings pages back, writing makes them memory
    again, and a child process sees the same. Files have no name where the system allows that, and end with their
    mapping, so that none is left whatever ends the process.

    Attributes:
        written: bytes written, all in all.
    """

    def __init__(self) -> None:
        self.written = 0
        self._moved = 0
        self._seconds = 0.0
        self._out: weakref.WeakKeyDictionary[torch.UntypedStorage, _Region] = weakref.WeakKeyDictionary()
        self._system = _System() if available() else None

    def __len__(self) -> int:
        return len(self._out)

    @property
    def bytes_per_second(self) -> float:
        """As measured, writing and reading."""
        return self._moved / self._seconds if self._moved and self._seconds else ASSUMED_BYTES_PER_SECOND

    def has_room(self) -> bool:
        """Whether the process may have many more mappings."""
        allowed = int(Path("/proc/sys/vm/max_map_count").read_text())
        with Path("/proc/self/maps").open("rb") as maps:
            return sum(1 for _ in maps) < SHARE_OF_MAPPINGS * allowed

    def put(self, storage: torch.UntypedStorage) -> None:
        """Write a storage's bytes, and free its memory.

        Raises:
            OSError: they cannot be written or mapped; the storage is as it was.
        """
        start, region = time.perf_counter(), _pages(storage)
        if self._system is None:
            raise OSError("memory cannot be exchanged for a file here")
        with tempfile.TemporaryFile(buffering=0) as file:
            left = raw(region.address, region.size)
            while left:
                left = left[file.write(left) :]
            self._system.map_file(region, file.fileno())
        self._out[storage] = region
        self.written += region.size
        self._measured(region.size, start)

    def get(self, storage: torch.UntypedStorage) -> None:
        """Let a storage's bytes lie in memory again, where they are in a file and there is memory."""
        region = self._out.pop(storage, None)
        if region is None or self._system is None or region != _pages(storage):  # somebody gave it other memory
            return
        start = time.perf_counter()
        with contextlib.suppress(OSError):  # it can be used where it is
            self._system.map_memory(region)
        self._measured(region.size, start)

    def close(self) -> None:
        """Let whatever is still alive lie in memory again."""
        for storage in list(self._out):
            self.get(storage)

    def _measured(self, size: int, start: float) -> None:
        self._seconds += time.perf_counter() - start
        self._moved += size


class _System:
    """The calls that exchange what lies at an address, in one step for all threads."""

    def __init__(self) -> None:
        libc = ctypes.CDLL(None, use_errno=True)
        pointer, size, number = ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int
        self._mmap = _function(libc, "mmap", [pointer, size, number, number, number, ctypes.c_long])
        self._mremap = _function(libc, "mremap", [pointer, size, size, number, pointer])

    def map_file(self, region: _Region, file: int) -> None:
        """A file instead of memory."""
        _check(self._mmap(*region, mmap.PROT_READ | mmap.PROT_WRITE, mmap.MAP_PRIVATE | _MAP_FIXED, file, 0))

    def map_memory(self, region: _Region) -> None:
        """Memory with the same bytes instead of a file."""
        anonymous = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS
        fresh = self._mmap(None, region.size, mmap.PROT_READ | mmap.PROT_WRITE, anonymous, -1, 0)
        _check(fresh)
        assert fresh is not None  # the first page is never mapped
        ctypes.memmove(fresh, region.address, region.size)
        _check(self._mremap(fresh, region.size, region.size, _MREMAP_MAYMOVE | _MREMAP_FIXED, region.address))


def _function(libc: ctypes.CDLL, name: str, arguments: list[Any]) -> Callable[..., int | None]:
    function: Any = getattr(libc, name)
    function.restype, function.argtypes = ctypes.c_void_p, arguments
    return function  # type: ignore[no-any-return]  # ctypes has no types


def _check(address: int | None) -> None:
    if address == _FAILED:
        number = ctypes.get_errno()
        raise OSError(number, "cannot map memory")


def _address(function: Any) -> int | None:  # noqa: ANN401 - ctypes has no types
    return ctypes.cast(function, ctypes.c_void_p).value


def _pages(storage: torch.UntypedStorage) -> _Region:
    first = -(-storage.data_ptr() // mmap.PAGESIZE) * mmap.PAGESIZE
    end = (storage.data_ptr() + storage.nbytes()) // mmap.PAGESIZE * mmap.PAGESIZE
    return _Region(first, max(end - first, 0))
