"""What every method is given, and what it gives back."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

from torch import Tensor, nn

from batchnorm.choosing import choose, layers_with_domains
from batchnorm.distributed import Group
from batchnorm.errors import CountError, NonFiniteError
from batchnorm.moments import Moments
from batchnorm.population.batches import Batch, Batches, Forward, nothing_to_learn_from
from batchnorm.population.interrupts import caller
from batchnorm.population.layers import CallHooks, Layer
from batchnorm.population.result import MemoryUse, Population


class LayerCall(NamedTuple):
    """A layer's call, the moments of its input, and the batch's index."""

    layer: Layer
    moments: Moments
    batch: int


class MethodResult(NamedTuple):
    """A method's answer: the statistics of the layers that were called with any value, and the memory that it took."""

    populations: dict[Layer, Population]
    memory: MemoryUse | None = None


@dataclass
class Progress:
    """How far it is, in calls of layers.

    Attributes:
        report: called with the calls done so far, and all that there will be, or None where that is not known yet.
        batches: how many batches there will be, or None.
        calls: how many calls one batch makes, or None.
        done: calls so far.
    """

    report: Callable[[int, int | None], object] | None
    batches: int | None
    calls: int | None = None
    done: int = 0

    def tell(self) -> None:
        """Report what is done."""
        if self.report is not None:
            known = self.batches is not None and self.calls is not None
            with caller():
                self.report(self.done, self.batches * self.calls if known else None)  # type: ignore[operator]  # `known`


@dataclass(eq=False)
class Context:
    """What a method works with.

    Attributes:
        model: in the modes that the method asked for.
        layers: those that take part.
        batches: to be read once.
        forward: what runs the model on a batch.
        group: the processes that share the work.
        progress: to be told of calls.
        devices: the kinds of devices in use.
        memory_limit: bytes of suspended activations; None for the default.
        checkpoint: a file that progress is kept in, or None.
        running: whether `run` is at work.
    """

    model: nn.Module
    layers: Sequence[Layer]
    batches: Batches
    forward: Forward
    group: Group
    progress: Progress
    devices: set[str]
    memory_limit: int | None = None
    checkpoint: Path | None = None
    running: bool = False

    def run(self, batch: Batch, hooks: CallHooks) -> None:
        """One forward pass; its exceptions say which batch it was."""
        self.running = True
        self.choose(batch)
        try:
            with caller():
                self.forward(self.model, batch.content)
        except Exception as error:
            if sys.version_info >= (3, 11):
                error.add_note(f"in the forward pass of batch {batch.index}")
            raise
        finally:
            self.running = False
        hooks.check()

    def choose(self, batch: Batch) -> None:
        """Have the layers know the domain of the batch whose forward pass begins or goes on."""
        if batch.domain is not None:
            choose(layers_with_domains(self.model), batch.domain)

    def gathered(self, tensors: Sequence[Tensor]) -> list[list[Tensor]]:
        """What every process has from all its data, in the order of ranks.

        Raises:
            CountError: no process had any.
        """
        with caller():  # others may take long
            label, shares = self.group.all_gather("the end of the data" if self.batches.used else None, tensors)
        if label is None:
            raise nothing_to_learn_from(self.batches.read)
        return shares


def check_finite(calls: Iterable[LayerCall]) -> None:
    """All moments are finite.

    Raises:
        NonFiniteError: naming the first call whose are not.
    """
    for layer, moments, batch in calls:
        if not bool((moments.mean.isfinite() & moments.m2.isfinite()).all()):
            raise NonFiniteError(
                f'layer "{layer.name}": got activations that are inf or NaN in batch {batch}; statistics need finite '
                f"ones. Look at that batch, and at the layers before this one"
            )


def population(layer: Layer, moments: Moments) -> Population | None:
    """The statistics that moments stand for: biased, because the data are the population; None of nothing.

    Raises:
        CountError: there is one value for each channel.
    """
    count = moments.count.item()
    if count == 0:
        return None
    if count == 1 and not moments.count.is_floating_point():
        raise CountError(
            f'layer "{layer.name}": got one value for each channel in all batches together; a variance needs more. '
            f"Give more samples"
        )
    return Population(count, moments.mean, moments.var())
