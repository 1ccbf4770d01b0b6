"""What an operation did with each batch-norm layer, and why not."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass

from torch import nn

from batchnorm.errors import OptionError


@dataclass(frozen=True)
class Entry:
    """One layer.

    Attributes:
        layer: its path in the model; "" is the model itself.
        done: whether the operation did with it what it is for.
        what: what it did, or why not.
        short_of_it: where something less than that was done, what: it is counted apart.
    """

    layer: str
    done: bool
    what: str
    short_of_it: str = ""


@dataclass(frozen=True)
class Report:
    """The layers of a model, in its order; iterates over entries and prints well.

    Attributes:
        operation: what was done, as a participle.
        entries: one for each layer.
        error: the largest difference of the changed model's outputs from the original's on the example inputs,
            relative to the largest value of that output; None where nothing was run.
    """

    operation: str
    entries: tuple[Entry, ...]
    error: float | None = None

    def __iter__(self) -> Iterator[Entry]:
        return iter(self.entries)

    def __len__(self) -> int:
        return len(self.entries)

    @property
    def done(self) -> dict[str, str]:
        """What was done, by layer."""
        return {entry.layer: entry.what for entry in self.entries if entry.done}

    @property
    def left(self) -> dict[str, str]:
        """Why nothing was done, by layer."""
        return {entry.layer: entry.what for entry in self.entries if not entry.done}

    def __str__(self) -> str:
        less = Counter(entry.short_of_it for entry in self.entries if entry.done and entry.short_of_it)
        head = f"{len(self.done) - less.total()} of {len(self)} {self.operation}"
        head += "".join(f", {count} {what}" for what, count in less.items())
        if self.error is not None:
            head += f", outputs differ by at most {self.error:.1e} of their largest value"
        width = max((len(entry.layer) for entry in self.entries), default=0)
        mark = {True: "", False: "left: "}
        return "\n".join([head, *(f"{e.layer:<{width}}  {mark[e.done]}{e.what}" for e in self.entries)])


def attach(model: nn.Module, operation: str, entries: Iterable[Entry], error: float | None = None) -> nn.Module:
    """Set `model.report`.

    Returns:
        `model`, the same object.
    """
    vars(model)["report"] = Report(operation, tuple(entries), error)
    return model


def check_free(model: nn.Module) -> None:
    """A model has room for a `report`.

    Raises:
        OptionError: it has something else of that name.
    """
    if not isinstance(getattr(model, "report", Report("", ())), Report):
        raise OptionError(
            f"got a model of {type(model).__qualname__} that has a `report` of its own; the result's report goes by "
            f"that name. Rename the model's, or put the model into a torch.nn.Sequential"
        )
