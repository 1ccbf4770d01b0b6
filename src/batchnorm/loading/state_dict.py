"""Weights in files: `.safetensors`, or `.pt` and `.pth` as torch.save writes a state_dict."""

from __future__ import annotations

import pickle
import zipfile
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from batchnorm import extras
from batchnorm.errors import UsageError
from batchnorm.files import check_writable, reading, replacing, steady, writing
from batchnorm.loading.object_reference import blaming

_SHOWN = 5  # names of a list in a message


class _Format(NamedTuple):
    """A kind of file.

    Attributes:
        load: puts a file's weights into a model; returns the names that the file lacks, and those that the model lacks.
        save: writes a model's weights.
        read: a file's weights.
        refuses: why a value of a state_dict cannot be written; None if it can.
        needs: the packages of the extra "files" for it.
    """

    load: Callable[[nn.Module, Path], tuple[Iterable[str], Iterable[str]]]
    save: Callable[[nn.Module, Path], None]
    read: Callable[[Path], Mapping[str, object]]
    refuses: Callable[[object], str | None]
    needs: tuple[str, ...] = ()


class Weights(nn.Module):
    """A state_dict without its model, where a model is asked for its own.

    Args:
        state: what to answer.
    """

    def __init__(self, state: dict[str, Any]) -> None:
        super().__init__()
        self._state = state

    def state_dict(self) -> dict[str, Any]:  # type: ignore[override]  # there is nothing to ask for in other ways
        """The dict itself."""
        return self._state


def load_state_dict(model: nn.Module, path: Path) -> None:
    """Load a file's weights into a model, whose names must be the file's. Any suffix but .safetensors is torch's.

    Raises:
        UsageError: the file cannot be read, holds more than tensors, or does not fit the model.
    """
    form = _format(path, otherwise=".pt")
    with reading(path, verb="load"):
        missing, unexpected = form.load(model, path)
    lists = [f"it lacks {_listed(missing)}"] if missing else []
    lists += [f"the model has no {_listed(unexpected)}"] if unexpected else []
    if lists:
        raise UsageError(f"{path} does not fit the model: {'; '.join(lists)}. Give the weights of this model")


def read_state_dict(path: Path) -> Mapping[str, object]:
    """A file's weights, without a model.

    Raises:
        UsageError: the file cannot be read, holds more than tensors, or no state_dict; or its suffix is unknown.
    """
    form = _format(path)
    with reading(path, verb="load"):
        return form.read(path)


def check_state_dict_path(path: Path) -> None:
    """Check that weights can be written to a path, before work is done that would be lost.

    Raises:
        UsageError: an unknown suffix, a missing package, or a path that cannot be written to.
    """
    _format(path)
    check_writable(path)


def check_state_dict(model: nn.Module, path: Path) -> None:
    """Check that a model's weights can be written to a path, before work is done that would be lost.

    Raises:
        UsageError: the format cannot hold them, or there is no room.
    """
    form = _format(path)
    state = _state(model)
    for name, value in state.items():
        why = form.refuses(value)
        if why is not None:
            raise UsageError(
                f"got {path} for a model whose state_dict has {name}, {why}; {path.suffix} holds dense tensors of "
                f"plain dtypes alone. Give a name that ends with .pt"
            )
    tensors = {id(value): value for value in state.values() if isinstance(value, Tensor) and not value.is_meta}
    check_writable(path, size=sum(t.numel() * t.element_size() for t in tensors.values() if _dense(t)))


def save_state_dict(model: nn.Module, path: Path) -> None:
    """Write a model's weights: a whole file or none, and until it is whole the old one stays.

    Raises:
        UsageError: it cannot be written.
    """
    form = _format(path)
    check_state_dict(model, path)
    with writing(path), replacing(path) as temporary:
        form.save(model, temporary)


def _state(model: nn.Module) -> Mapping[str, object]:
    with blaming("the model's state_dict"):
        state = model.state_dict()
    if not isinstance(state, Mapping):
        raise UsageError(f"the model's state_dict is of type {type(state).__name__}; it must be a dict of tensors")
    return state


def _dense(tensor: Tensor) -> bool:
    return tensor.layout == torch.strided and not tensor.is_quantized


def _anything(_: object) -> None:
    """torch.save writes what can be pickled."""


def _not_for_safetensors(value: object) -> str | None:
    """Why a value of a state_dict cannot be in a .safetensors file; None if it can."""
    if not isinstance(value, Tensor):
        return f"an object of type {type(value).__name__}"
    if value.is_meta:
        return 'on the device "meta", without data'
    if not _dense(value) or value.dtype.is_complex:
        return f"a tensor of {value.dtype} and layout {value.layout}"
    return None


def _check_archive(path: Path) -> None:
    """What torch.save writes is a zip archive with checksums, which torch.load does not look at.

    Raises:
        ValueError: a checksum is another; also of the kinds of zipfile.
    """
    if not zipfile.is_zipfile(path):
        return  # as torch wrote before 1.6, without checksums
    with zipfile.ZipFile(path) as archive:
        # All zero where torch.serialization.set_crc32_options has switched them off.
        damaged = archive.testzip() if any(entry.CRC for entry in archive.infolist()) else None
    if damaged is not None:
        raise ValueError(f"it is damaged: the checksum of its part {damaged} does not match. Get the file again")


def _read_torch(path: Path) -> Mapping[str, object]:
    _check_archive(path)
    try:
        state = torch.load(path, weights_only=True, map_location="cpu")
    except pickle.UnpicklingError as error:
        raise ValueError(
            "it holds other things than tensors, which can run code when they are read, or is not a file of "
            "torch.save. Write one with torch.save(model.state_dict(), FILE)"
        ) from error
    if not isinstance(state, Mapping):
        raise ValueError(f"it holds an object of type {type(state).__name__}; it must be a state_dict")
    return state


def _load_torch(model: nn.Module, path: Path) -> tuple[list[str], list[str]]:
    missing, unexpected = model.load_state_dict(_read_torch(path), strict=False)
    return missing, unexpected


def _save_torch(model: nn.Module, path: Path) -> None:
    with steady(path) as file:
        torch.save(model.state_dict(), file)


def _load_safetensors(model: nn.Module, path: Path) -> tuple[list[str], list[str]]:
    from safetensors.torch import load_model

    missing, unexpected = load_model(model, path, strict=False)
    return sorted(missing), unexpected


def _read_safetensors(path: Path) -> Mapping[str, object]:
    from safetensors.torch import load_file

    return load_file(path)


def _save_safetensors(model: nn.Module, path: Path) -> None:
    from safetensors.torch import save_model

    save_model(model, str(path))


_FORMATS = {
    ".safetensors": _Format(
        _load_safetensors, _save_safetensors, _read_safetensors, _not_for_safetensors, ("safetensors",)
    ),
    ".pt": _Format(_load_torch, _save_torch, _read_torch, _anything),
    ".pth": _Format(_load_torch, _save_torch, _read_torch, _anything),
}

SUFFIXES = tuple(_FORMATS)


def _format(path: Path, otherwise: str | None = None) -> _Format:
    suffix = path.suffix if path.suffix in _FORMATS else otherwise
    if suffix is None:
        raise UsageError(f"got {path}; the name of a file of weights must end with {', '.join(_FORMATS)}")
    form = _FORMATS[suffix]
    if form.needs:
        extras.require("files", f"a {suffix} file", *form.needs)
    return form


def _listed(names: Iterable[str]) -> str:
    several = [str(name) for name in names]
    more = f" and {len(several) - _SHOWN} more" if len(several) > _SHOWN else ""
    return ", ".join(several[:_SHOWN]) + more
