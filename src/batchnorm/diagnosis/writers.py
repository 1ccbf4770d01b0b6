"""Where a monitor's records go: a list, a file of JSON Lines, or what draws curves, such as TensorBoard."""

from __future__ import annotations

import os
from abc import ABC, abstractmethod
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from torch import Tensor

from batchnorm.diagnosis.measuring import Measured
from batchnorm.diagnosis.records import LayerRecord
from batchnorm.errors import OptionError
from batchnorm.files import writing
from batchnorm.models.norm_layers import display_name

HISTOGRAMS = ("shift", "log_variance_ratio", "weight", "bias")


class Writer(ABC):
    """What takes records."""

    @abstractmethod
    def write(self, measured: Sequence[Measured]) -> None:
        """Take those of one step."""

    def close(self) -> None:  # noqa: B027 - most have nothing to close
        """There are no more."""


class Memory(Writer):
    """Keeps the records.

    Args:
        records: where.
    """

    def __init__(self, records: list[LayerRecord]) -> None:
        self._records = records

    def write(self, measured: Sequence[Measured]) -> None:
        """Take those of one step."""
        self._records += [each.record for each in measured]


class JsonLines(Writer):
    """Appends a line for each layer and step, each in one write.

    Args:
        path: the file; made where it is not there.

    Raises:
        UsageError: it cannot be written, here and later.
    """

    def __init__(self, path: Path) -> None:
        self._path, self._run = path, os.urandom(4).hex()
        with writing(path):
            self._file = path.open("ab", buffering=0)

    def write(self, measured: Sequence[Measured]) -> None:
        """Take those of one step."""
        with writing(self._path):
            for each in measured:
                self._file.write(each.record.to_json(self._run).encode() + b"\n")

    def close(self) -> None:
        """Close the file."""
        self._file.close()


class Curves(Writer):
    """Hands numbers to `add_scalar`, and vectors to `add_histogram` where there is one.

    Args:
        writer: TensorBoard's SummaryWriter, or the like. It stays open.
    """

    def __init__(self, writer: Any) -> None:  # noqa: ANN401 - whatever has these methods
        self._scalar = writer.add_scalar
        self._histogram = getattr(writer, "add_histogram", None)

    def write(self, measured: Sequence[Measured]) -> None:
        """Take those of one step."""
        for each in measured:
            record = each.record
            for tag, value in tagged(record):
                self._scalar(tag, value, record.step)
            for name in HISTOGRAMS:
                finite = _finite(each.vectors.get(name))
                if finite is not None and self._histogram is not None:
                    self._histogram(f"batchnorm/{display_name(record.layer)}/{name}", finite, record.step)


def tagged(record: LayerRecord) -> list[tuple[str, float]]:
    """A record's numbers by the names that curves have: batchnorm/LAYER/QUANTITY."""
    return [(f"batchnorm/{display_name(record.layer)}/{name}", value) for name, value in record.scalars()]


def writer_for(writer: Any, records: list[LayerRecord]) -> Writer:  # noqa: ANN401 - what users give
    """What takes the records.

    Args:
        writer: `Monitor`'s argument.
        records: where they are kept without one.

    Raises:
        OptionError: it is none of what may be given.
        UsageError: the file cannot be written.
    """
    if writer is None:
        return Memory(records)
    if isinstance(writer, Writer):
        return writer
    if isinstance(writer, (str, os.PathLike)):
        return JsonLines(Path(writer))
    if callable(getattr(writer, "add_scalar", None)):
        return Curves(writer)
    raise OptionError(
        f"got a writer of type {type(writer).__name__}; it must be the path of a file, or have add_scalar(tag, value, "
        f"step), as torch.utils.tensorboard.SummaryWriter has, or be None for monitor.records"
    )


def _finite(vector: Tensor | None) -> Tensor | None:
    """What is finite of a vector; None of nothing."""
    if vector is None:
        return None
    finite = vector[vector.isfinite()]
    return finite if finite.numel() else None
