"""What the callbacks of all libraries have in common."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

from torch import nn

from batchnorm.errors import OptionError
from batchnorm.integrations.loader import aside
from batchnorm.population.batches import Forward
from batchnorm.population.recalibrate import METHODS, recalibrate
from batchnorm.population.result import Recalibration

WHEN = ("validation", "end")


class Recalibrator:
    """Population statistics for the model that is trained.

    The new statistics stay: running averages go on from there, and checkpoints hold them. Training does not notice, but
    for layers that normalise by running statistics in training mode, which are frozen ones and those with `renorm`.
    Training flags, torch's random streams and the order of the training data are undisturbed.

    Args:
        batches: what the statistics are of: an iterable, which is read again each time, or a callable that returns one.
            By default the trainer's training data.
        when: "validation": before each validation of a training run; "end": after its last step.
        method: as `batchnorm.recalibrate` has it.
        forward: likewise.
        max_samples: likewise.

    Attributes:
        result: what the last recalibration did; None before.

    Raises:
        OptionError: an unknown `when` or `method`.
    """

    def __init__(
        self,
        batches: Iterable[Any] | Callable[[], Iterable[Any]] | None = None,
        *,
        when: str = "validation",
        method: str = "exact",
        forward: Forward | None = None,
        max_samples: int | None = None,
    ) -> None:
        for name, value, known in (("when", when, WHEN), ("method", method, METHODS)):
            if value not in known:
                choice = ", ".join(f'"{word}"' for word in known)
                raise OptionError(f"got {name}={value!r}; it must be one of {choice}")
        self.result: Recalibration | None = None
        self._batches = batches
        self._when = when
        self._method = method
        self._forward = forward
        self._max_samples = max_samples

    def _recalibrate(self, when: str, model: nn.Module, training_data: Any) -> None:  # noqa: ANN401 - hosts have no type
        """Do it, if it is to be done then."""
        if when != self._when:
            return
        batches = training_data if self._batches is None else self._batches
        self.result = recalibrate(
            model,
            aside(batches() if callable(batches) else batches),
            method=self._method,
            forward=self._forward,
            max_samples=self._max_samples,
        )
