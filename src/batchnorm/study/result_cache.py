"""Results on disk, one file for each task, so that an interrupted run goes on where it was."""

from __future__ import annotations

import ast
import fcntl
import hashlib
import inspect
import json
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, is_dataclass
from functools import cache
from pathlib import Path
from typing import Any

import torch

import batchnorm
from batchnorm.errors import UsageError
from batchnorm.files import reading, write_text
from batchnorm.study.experiment import Experiment, Setting
from batchnorm.study.grid import Args

_PACKAGE = "batchnorm"
_FOLDER = Path(__file__).parents[1]  # where the package's modules are
_LENGTH = 16  # hexadecimal digits of a name: 64 bits


class ResultCache:
    """The results of one experiment's tasks, in a directory that only equal circumstances share.

    A file appears under its name as a whole or not at all, so a run can be killed at any time, and several runs can
    use one directory: at worst they compute the same thing twice.

    Args:
        folder: where the directories of all experiments are; made if it is missing.
        experiment: whose results.
        plan: its plan.
        setting: the data and the layers.
    """

    def __init__(self, folder: Path, experiment: Experiment[Any], plan: object, setting: Setting) -> None:
        self._folder = folder / f"{experiment.name}-{fingerprint(experiment.run, plan, setting)}"
        self._folder.mkdir(parents=True, exist_ok=True)

    def get(self, args: Args) -> dict[str, Any] | None:
        """A task's result; None where there is no complete one: what is damaged is computed again."""
        file = self._file(args)
        try:
            with reading(file):
                content = json.loads(file.read_text(encoding="utf-8"))
        except UsageError:  # not there yet, or what a full disk or a power cut left
            return None
        if not isinstance(content, dict) or not isinstance(content.get("result"), dict):
            return None
        result: dict[str, Any] = content["result"]
        return result if content == _record(args, result) else None

    def put(self, args: Args, result: dict[str, Any]) -> None:
        """Store a task's result."""
        write_text(self._file(args), json.dumps(_record(args, result), allow_nan=False))

    def _file(self, args: Args) -> Path:
        return self._folder / f"{_digest(json.dumps(args).encode())}.json"


def _record(args: Args, result: dict[str, Any]) -> dict[str, Any]:
    """What a file holds."""
    content = json.dumps([args, result], sort_keys=True)
    return {"args": list(args), "result": result, "digest": _digest(content.encode())}


@contextmanager
def exclusive(folder: Path) -> Iterator[None]:
    """Wait until no other process holds the same folder, so that files that belong together are written together.

    The system releases the lock when its process ends, however it ends.
    """
    with open(folder / ".lock", "w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


def fingerprint(run: Callable[..., Any], plan: object, setting: Setting) -> str:
    """Names all that a task's result depends on, its own arguments apart.

    These are the plan, the data, the layers, the versions and kernels that compute, and the code: of `run`'s module and
    of every module of this package that it imports, so that nobody who edits one of them sees what the old code found.
    """
    assert is_dataclass(plan)
    parts = [
        json.dumps(asdict(plan), sort_keys=True),  # type: ignore[arg-type]  # an instance, not a class
        setting.data.digest,
        setting.layers.name,
        json.dumps(software(), sort_keys=True),
        *(_digest(file.read_bytes()) for file in source_files(run)),
    ]
    return _digest("\n".join(parts).encode())


def source_files(function: Callable[..., Any]) -> list[Path]:
    """The file of a function, and those of this package's modules that it imports, directly or through others."""
    own = inspect.getsourcefile(function)
    assert own is not None
    found, waiting = {Path(own)}, [Path(own)]
    while waiting:
        new = {file for name in _imports(waiting.pop().read_bytes()) if (file := _module_file(name))} - found
        found |= new
        waiting += new
    return sorted(found)


@cache
def _imports(source: bytes) -> tuple[str, ...]:
    """The modules of this package that a source file imports anywhere in it, perhaps with names inside them."""
    names = []
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            names += [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom) and node.module:
            names += [f"{node.module}.{alias.name}" for alias in node.names]
    return tuple(name for name in names if name.split(".")[0] == _PACKAGE)


def _module_file(name: str) -> Path | None:
    """The file of a module, or of the module that holds the name."""
    path = _FOLDER.joinpath(*name.split(".")[1:])
    for file in (path.with_suffix(".py"), path / "__init__.py", path.parent.with_suffix(".py")):
        if file.is_file():
            return file
    return path.parent / "__init__.py"


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
