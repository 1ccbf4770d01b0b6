"""Models as programs in files: of torch.export (`.pt2`), and ONNX."""

from __future__ import annotations

import io
import logging
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager, redirect_stderr
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from batchnorm import extras
from batchnorm.errors import UsageError
from batchnorm.files import check_writable, replacing, steady, writing
from batchnorm.loading import state_dict
from batchnorm.loading.state_dict import save_state_dict
from batchnorm.messages import described
from batchnorm.models.nested import map_leaves


def check_program_path(path: Path) -> None:
    """Check that a model, or its weights, can be written to a path, before work is done that would be lost.

    Raises:
        UsageError: an unknown suffix, a missing package, or a path that cannot be written to.
    """
    if path.suffix not in SUFFIXES:
        raise UsageError(f"got {path}; the name of a folded model must end with {', '.join(SUFFIXES)}")
    if path.suffix not in _PROGRAMS:
        state_dict.check_state_dict_path(path)
    elif path.suffix == ".onnx":
        extras.require("onnx", "a .onnx file")
    check_writable(path)


def save_program(model: nn.Module, inputs: Any, path: Path) -> None:  # noqa: ANN401 - what the model takes
    """Write a model in inference mode as a program that runs without its code, or its weights, as the suffix says.

    The first dimension of the inputs may be of any size where it is at least 2 and the model allows it.

    Args:
        model: in inference mode.
        inputs: a tensor, a tuple of arguments or a dict of keywords.
        path: `.pt2`, `.onnx`, or of weights.

    Raises:
        UsageError: torch cannot export the model, or the file cannot be written.
    """
    if path.suffix not in _PROGRAMS:
        save_state_dict(model, path)
        return
    arguments, keywords = ((), inputs) if isinstance(inputs, dict) else (inputs, {})
    arguments = (arguments,) if isinstance(arguments, Tensor) else tuple(arguments)
    program = _exported(model, arguments, keywords)
    with writing(path), replacing(path, suffix=path.suffix) as temporary, _quiet():  # torch wants its own suffix
        _PROGRAMS[path.suffix](program, temporary)


def _exported(model: nn.Module, arguments: tuple[Any, ...], keywords: dict[str, Any]) -> torch.export.ExportedProgram:
    shapes = map_leaves((arguments, keywords), _dynamic_shape)
    try:
        with _quiet():
            return torch.export.export(model, arguments, keywords, dynamic_shapes=(*shapes[0], *shapes[1].values()))
    except KeyboardInterrupt:
        raise
    except BaseException as error:  # of many kinds: whatever the model's code and torch.export raise
        first = described(error).split("; ")[0]
        raise UsageError(
            f"torch.export cannot make a program of this model ({type(error).__name__}: {first}). "
            f"Write its weights instead: a name that ends with .safetensors or .pt"
        ) from error


@contextmanager
def _quiet() -> Iterator[None]:
    """Without what torch says about its own internals; errors say what matters."""
    logger = logging.getLogger("torch.fx.experimental.symbolic_shapes")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings(), redirect_stderr(io.StringIO()):
            warnings.simplefilter("ignore")
            yield
    finally:
        logger.setLevel(level)


def _dynamic_shape(value: object) -> dict[int, Any] | None:
    """An input's dynamic shape for torch.export: the first dimension is of any size where it is at least 2."""
    several = isinstance(value, Tensor) and value.dim() > 0 and value.shape[0] > 1
    return {0: torch.export.Dim.AUTO} if several else None


def _save_export(program: torch.export.ExportedProgram, path: Path) -> None:
    with steady(path) as file:
        torch.export.save(program, file)


def _save_onnx(program: torch.export.ExportedProgram, path: Path) -> None:
    # In one file, which the format allows up to 2 GB.
    torch.onnx.export(program, f=path, dynamo=True, verbose=False, external_data=False)


_PROGRAMS: dict[str, Callable[[torch.export.ExportedProgram, Path], None]] = {".pt2": _save_export, ".onnx": _save_onnx}
SUFFIXES = (*_PROGRAMS, ".safetensors", ".pt", ".pth")
