"""Who is told of our outputs while a forward pass runs, and of how each can be computed again."""

from __future__ import annotations

from collections.abc import Callable
from typing import Protocol

from torch import Tensor


class Recorder(Protocol):
    """What collects the outputs of one forward pass."""

    def record(
        self,
        output: Tensor,
        inputs: tuple[Tensor, ...],
        make: Callable[[], Callable[..., Tensor]],
        owner: Tensor | None,
    ) -> None:
        """Take note of an output.

        Args:
            output: as the caller gets it; its history is that of our operator.
            inputs: what it was computed from, of its shape.
            make: gives a function that computes the same values from the inputs' values, bit for bit. To be called now,
                and where it is needed: it copies the parameters.
            owner: a parameter or a buffer of the layer, to know it by; None where there is none.
        """


# By thread: forward passes of several threads do not meet.
RECORDERS: dict[int, Recorder] = {}
