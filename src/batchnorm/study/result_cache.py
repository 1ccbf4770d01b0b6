"""Results on disk, one file a task, so that an interrupted run goes on where it was."""

from __future__ import annotations

import fcntl
import hashlib
import inspect
import json
import os
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, is_dataclass
from pathlib import Path
from typing import Any

import torch

import batchnorm
from batchnorm.study.experiment import Args, Experiment, Setting

_SHARED = ("dataset", "networks", "training")  # what every task computes with, besides the package's own layers
_LENGTH = 16  # hexadecimal digits of a name: 64 bits


class Kept:
    """The results of one experiment's tasks, in a directory that only equal circumstances share.

    A file appears under its name as a whole or not at all, so a run can be killed at any time, and several runs can
    use one directory: at worst they compute the same thing twice.

    Args:
        folder: where the directories of all experiments are; made where it is not there.
        experiment: whose results.
        plan: its plan.
        setting: the data and the layers.
    """

    def __init__(self, folder: Path, experiment: Experiment[Any], plan: object, setting: Setting) -> None:
        self._folder = folder / f"{experiment.name}-{fingerprint(experiment.run, plan, setting)}"
        self._folder.mkdir(parents=True, exist_ok=True)

    def get(self, args: Args) -> dict[str, Any] | None:
        """A task's result; None where there is none that is whole."""
        try:
            content = json.loads(self._file(args).read_text(encoding="utf-8"))
        except (FileNotFoundError, ValueError):  # ValueError: what a full disk or a power cut left
            return None
        return content["result"] if content["args"] == list(args) else None

    def put(self, args: Args, result: dict[str, Any]) -> None:
        """Keep a task's result."""
        write(self._file(args), json.dumps({"args": args, "result": result}, allow_nan=False))

    def _file(self, args: Args) -> Path:
        return self._folder / f"{_digest(json.dumps(args).encode())}.json"


def write(path: Path, content: str) -> None:
    """Put a file in place, as a whole or not at all; until then an old one of that name stays."""
    descriptor, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    try:
        with open(descriptor, "w", encoding="utf-8") as file:
            file.write(content)
        os.chmod(temporary, 0o666 & ~_umask())  # mkstemp's are for their owner alone
        os.replace(temporary, path)
    except BaseException:
        os.unlink(temporary)
        raise


@contextmanager
def alone(folder: Path) -> Iterator[None]:
    """Wait until no other process is in here for the same folder, so that files that belong together stay together.

    The system gives the lock back when its process ends, however it ends.
    """
    with open(folder / ".lock", "w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


def fingerprint(run: Callable[..., Any], plan: object, setting: Setting) -> str:
    """Names all that a task's result depends on, its own arguments apart.

    The plan, the data, the layers, the versions and kernels that compute; and the code of the experiment and of what
    experiments share, lest somebody who changes it is shown what the old code found.
    """
    assert is_dataclass(plan)
    code = [inspect.getsourcefile(run), *(str(Path(__file__).with_name(f"{name}.py")) for name in _SHARED)]
    parts = [
        json.dumps(asdict(plan), sort_keys=True),  # type: ignore[arg-type]  # an instance, not a class
        setting.data.digest,
        setting.layers.name,
        json.dumps(software(), sort_keys=True),
        *(_digest(Path(file).read_bytes()) for file in code if file is not None),
    ]
    return _digest("\n".join(parts).encode())


def software() -> dict[str, str]:
    """What computes: the same numbers can be expected of the same software."""
    kernels = {(row.device, row.dtype): row.implementation for row in batchnorm.kernels()}
    return {
        "batchnorm": batchnorm.__version__,
        "kernels": kernels["cpu", "float32"],
        "torch": torch.__version__,
    }


def _digest(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()[:_LENGTH]


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask
