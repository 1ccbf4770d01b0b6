"""How much memory there is, and how what was used becomes available again."""

from __future__ import annotations

import ctypes
import os
import sys
from collections.abc import Iterator
from pathlib import Path

import torch

from batchnorm.errors import OptionError

# A share for the suspended passes; the rest is for the one that runs, the batches and everybody else.
SHARE = 0.5


def default_limit(device: torch.device) -> int | None:
    """Half of what is available on a device, shared with the other processes that torchrun started here.

    Returns:
        Bytes, or None where the system does not tell.

    Raises:
        OptionError: LOCAL_WORLD_SIZE in the environment is no number of processes.
    """
    free = torch.cuda.mem_get_info(device)[0] if device.type == "cuda" else available()
    told = os.environ.get("LOCAL_WORLD_SIZE", "1")
    if not told.isdecimal() or int(told) == 0:
        raise OptionError(
            f"got LOCAL_WORLD_SIZE={told!r} in the environment; it is how many processes share this machine's memory, "
            f"from 1 on, as torchrun sets it. Unset it, or pass memory_limit"
        )
    return None if free is None else int(free * SHARE) // int(told)


def available(root: Path = Path("/")) -> int | None:
    """Bytes of main memory that can be used without swapping: the machine's, and what a container leaves.

    Args:
        root: where the system's own files are.
    """
    free = [*_machine(root), *_containers(root)]
    return max(min(free), 0) if free else None


def hand_back() -> None:
    """Give memory that was freed back to the system.

    glibc keeps it, in pieces that aligned requests of the same size do not always fit into again: where many large
    tensors come and go in turn, the process grew to three times what was in use.
    """
    if sys.platform == "linux":
        trim = getattr(ctypes.CDLL(None), "malloc_trim", None)  # other C libraries have none, and do not need it
        if trim is not None:
            trim(0)


def _machine(root: Path) -> Iterator[int]:
    """Linux says what is available; other systems how many pages are free, or at least how many there are."""
    try:
        lines = (root / "proc/meminfo").read_text().splitlines()
        yield next(int(line.split()[1]) * 1024 for line in lines if line.startswith("MemAvailable:"))
    except (OSError, StopIteration):
        names = getattr(os, "sysconf_names", {})
        pages = next((name for name in ("SC_AVPHYS_PAGES", "SC_PHYS_PAGES") if name in names), None)
        if pages is not None and "SC_PAGE_SIZE" in names:
            yield os.sysconf(pages) * os.sysconf("SC_PAGE_SIZE")


def _containers(root: Path) -> Iterator[int]:
    """What each control group leaves that this process is in: its own, and those around it. Versions 2 and 1."""
    try:
        lines = (root / "proc/self/cgroup").read_text().splitlines()
    except OSError:
        return
    for line in lines:
        _, controllers, path = line.split(":", 2)
        mounted, limit, used = {
            "": ("sys/fs/cgroup", "memory.max", "memory.current"),
            "memory": ("sys/fs/cgroup/memory", "memory.limit_in_bytes", "memory.usage_in_bytes"),
        }.get(controllers, ("", "", ""))
        if mounted:
            here = Path(path.lstrip("/"))
            for group in (here, *here.parents):  # inside a container the path may be the host's: then only "." is there
                try:
                    folder = root / mounted / group
                    yield int((folder / limit).read_text()) - int((folder / used).read_text())
                except (OSError, ValueError):  # not there, or "max"
                    continue
