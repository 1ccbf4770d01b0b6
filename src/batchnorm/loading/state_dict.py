"""Weights in files: `.safetensors`, or `.pt` and `.pth` as torch.save writes a state_dict."""

from __future__ import annotations

import os
import pickle
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple

import torch
from torch import nn

from batchnorm import extras
from batchnorm.errors import UsageError

_SHOWN = 5  # names of a list in a message


class _Format(NamedTuple):
    """A kind of file.

    Attributes:
        load: puts a file's weights into a model; returns the names that the file lacks, and those that the model lacks.
        save: writes a model's weights.
        needs: the packages of the extra "files" for it.
    """

    load: Callable[[nn.Module, Path], tuple[Iterable[str], Iterable[str]]]
    save: Callable[[nn.Module, Path], None]
    needs: tuple[str, ...] = ()


def load_state_dict(model: nn.Module, path: Path) -> None:
    """Load a file's weights into a model, whose names must be the file's. Any suffix but .safetensors is torch's.

    Raises:
        UsageError: the file cannot be read, holds more than tensors, or does not fit the model.
    """
    form = _format(path, otherwise=".pt")
    try:
        missing, unexpected = form.load(model, path)
    except OSError as error:
        raise UsageError(f"cannot read {path}: {error.strerror or error}") from error
    except Exception as error:  # of torch's and safetensors' own kinds, SafetensorError and pickle's among them
        raise UsageError(f"cannot load {path}: {error}") from error
    lists = [f"it lacks {_listed(missing)}"] if missing else []
    lists += [f"the model has no {_listed(unexpected)}"] if unexpected else []
    if lists:
        raise UsageError(f"{path} does not fit the model: {'; '.join(lists)}. Give the weights of this model")


def check_state_dict_path(path: Path) -> None:
    """Check that weights can be written to a path, before work is done that would be lost.

    Raises:
        UsageError: an unknown suffix, a missing package, or a path that cannot be written to.
    """
    _format(path)
    check_writable(path)


def check_writable(path: Path) -> None:
    """Check that a file can be written to a path.

    Raises:
        UsageError: it cannot.
    """
    if path.is_dir() or not path.parent.is_dir() or not os.access(path.parent, os.W_OK):
        raise UsageError(f"cannot write to {path}; it must be a file in a folder that is there and can be written to")


def save_state_dict(model: nn.Module, path: Path) -> None:
    """Write a model's weights: a whole file or none, and until it is whole the old one stays.

    Raises:
        UsageError: it cannot be written.
    """
    form = _format(path)
    with atomic_write(path) as temporary:
        form.save(model, temporary)


@contextmanager
def atomic_write(path: Path) -> Iterator[Path]:
    """A temporary path to write to; it becomes `path` at the end, if there is no error.

    Raises:
        UsageError: it cannot be written.
    """
    temporary = path.with_name(f"{path.name}.tmp{path.suffix}")  # torch.export wants its own suffix
    try:
        yield temporary
        temporary.replace(path)
    except (OSError, RuntimeError, ValueError) as error:
        raise UsageError(f"cannot write to {path}: {error}") from error
    finally:
        temporary.unlink(missing_ok=True)


def _load_torch(model: nn.Module, path: Path) -> tuple[list[str], list[str]]:
    try:
        state = torch.load(path, weights_only=True, map_location="cpu")
    except pickle.UnpicklingError as error:
        raise ValueError(
            "it holds other things than tensors, which can run code when they are read, or is no file of torch.save. "
            "Write one with torch.save(model.state_dict(), FILE)"
        ) from error
    if not isinstance(state, Mapping):
        raise ValueError(f"it holds an object of type {type(state).__name__}; it must be a state_dict")
    missing, unexpected = model.load_state_dict(state, strict=False)
    return missing, unexpected


def _save_torch(model: nn.Module, path: Path) -> None:
    torch.save(model.state_dict(), path)


def _load_safetensors(model: nn.Module, path: Path) -> tuple[list[str], list[str]]:
    from safetensors.torch import load_model

    missing, unexpected = load_model(model, path, strict=False)
    return sorted(missing), unexpected


def _save_safetensors(model: nn.Module, path: Path) -> None:
    from safetensors.torch import save_model

    save_model(model, str(path))


_FORMATS = {
    ".safetensors": _Format(_load_safetensors, _save_safetensors, ("safetensors",)),
    ".pt": _Format(_load_torch, _save_torch),
    ".pth": _Format(_load_torch, _save_torch),
}


def _format(path: Path, otherwise: str | None = None) -> _Format:
    suffix = path.suffix if path.suffix in _FORMATS else otherwise
    if suffix is None:
        raise UsageError(f"got {path}; the name of a file of weights must end with {', '.join(_FORMATS)}")
    form = _FORMATS[suffix]
    if form.needs:
        extras.require("files", f"a {suffix} file", *form.needs)
    return form


def _listed(names: Iterable[str]) -> str:
    several = list(names)
    more = f" and {len(several) - _SHOWN} more" if len(several) > _SHOWN else ""
    return ", ".join(several[:_SHOWN]) + more
