"""The processes that torchrun started, as one group for the time of a command."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager

import torch
import torch.distributed as dist

from batchnorm.distributed import Group


@contextmanager
def processes() -> Iterator[Group]:
    """Inside, torchrun's processes are a group, and "cuda" is a GPU for each; without torchrun, this process alone.

    Statistics travel by gloo, through the main memory, whatever the model runs on: they are a few kilobytes a layer.
    """
    together = dist.is_available() and dist.is_torchelastic_launched()
    if together:
        if torch.cuda.is_available():
            torch.cuda.set_device(int(os.environ["LOCAL_RANK"]) % torch.cuda.device_count())
        dist.init_process_group("gloo")
    try:
        yield Group()
    finally:
        if together:
            dist.destroy_process_group()
