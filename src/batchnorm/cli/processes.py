"""The processes that torchrun started, as one group for the time of a command."""

from __future__ import annotations

import os
import re
from collections.abc import Iterator
from contextlib import contextmanager

import torch
import torch.distributed as dist

from batchnorm.distributed import Group
from batchnorm.errors import ProcessError, UsageError
from batchnorm.messages import described


@contextmanager
def processes() -> Iterator[Group]:
    """Inside, torchrun's processes are a group, and "cuda" is a GPU for each; without torchrun, this process alone.

    Statistics travel by gloo, through the main memory, whatever the model runs on: they are a few kilobytes a layer.

    Raises:
        UsageError: the environment is not as torchrun makes it.
        ProcessError: the processes do not find each other.
    """
    together = dist.is_available() and dist.is_torchelastic_launched()
    _check_environment(together)
    if together:
        if torch.cuda.is_available():
            torch.cuda.set_device(int(os.environ["LOCAL_RANK"]) % torch.cuda.device_count())
        try:
            dist.init_process_group("gloo")
        except Exception as error:  # of several kinds, and torch has one of its own
            raise ProcessError(f"torchrun's processes do not find each other: {described(error)}") from error
    try:
        yield Group()
    finally:
        if together:
            dist.destroy_process_group()


def _check_environment(together: bool) -> None:
    """What torchrun tells its processes are numbers, and all of them are there."""
    told = (
        {name: os.environ.get(name) for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_PORT")} if together else {}
    )
    told["LOCAL_WORLD_SIZE"] = os.environ.get("LOCAL_WORLD_SIZE", "1")  # the memory is shared by so many
    for name, value in told.items():
        if value is None or not re.fullmatch("[0-9]{1,9}", value) or (name.endswith("SIZE") and not int(value)):
            came = f"no {name}" if value is None else f"{name}={value}"
            raise UsageError(
                f"got {came} in the environment; it must be a number, as torchrun sets it. Run under "
                f"torchrun, or unset it, and TORCHELASTIC_RUN_ID"
            )
    if together and int(os.environ["RANK"]) >= int(os.environ["WORLD_SIZE"]):
        raise UsageError(
            f"got RANK={os.environ['RANK']} of WORLD_SIZE={os.environ['WORLD_SIZE']} in the environment; ranks are "
            f"below the size. Run under torchrun"
        )
