"""What the callbacks that monitor have in common."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any

from torch import nn

from batchnorm.diagnosis.measuring import Measured
from batchnorm.diagnosis.monitor import Monitor
from batchnorm.diagnosis.writers import Writer, tagged

# What a trainer's log gets of each layer: it may be printed. A writer of one's own gets everything.
_LOGGED = (
    *("shift/min", "shift/max", "log_variance_ratio/min", "log_variance_ratio/max", "noise", "dead"),
    *("weight_gradient", "effective_learning_rate", "non_finite"),
)


class Log(Writer):
    """Hands the numbers of a step to a function.

    Args:
        log: called with a dict of numbers by name.
    """

    def __init__(self, log: Callable[[dict[str, float]], object]) -> None:
        self._log = log

    def write(self, measured: Sequence[Measured]) -> None:
        """Take those of one step."""
        numbers = {tag: value for each in measured for tag, value in tagged(each.record) if tag.endswith(_LOGGED)}
        self._log(numbers)


class Monitoring:
    """`batchnorm.Monitor` for the model that is trained; and, if asked, `batchnorm.check` at the end.

    Args:
        every: as `Monitor` has it.
        writer: likewise; by default the trainer's loggers, where it has some.
        check: whether to check the model after the last step.
        batches: what `check` looks at: an iterable, or a callable that returns one; None for the layers' state alone.

    Attributes:
        monitor: the monitor; None before training, and in processes other than the first.
        report: what `check` found; None before.
    """

    def __init__(
        self,
        every: int = 10,
        writer: Any = None,  # noqa: ANN401 - see Monitor
        *,
        check: bool = False,
        batches: Iterable[Any] | Callable[[], Iterable[Any]] | None = None,
    ) -> None:
        self.monitor: Monitor | None = None
        self.report: Any = None
        self._every, self._writer, self._check, self._batches = every, writer, check, batches

    def _start(self, model: nn.Module, log: Writer | None, kind: type[Monitor] = Monitor) -> None:
        """Monitor from now on."""
        self._stop()
        self.monitor = kind(model, self._every, log if self._writer is None else self._writer).start()

    def _stop(self) -> None:
        """Detach, where training began; what an interrupted step left is dropped."""
        if self.monitor is not None and self.monitor.started:
            self.monitor.stop()

    def _end(self, model: nn.Module) -> None:
        """After the last step."""
        self._stop()
        if self._check and self.monitor is not None:
            from batchnorm.diagnosis.check import check  # it brings the checks

            batches = self._batches() if callable(self._batches) else self._batches
            self.report = check(model, batches)
