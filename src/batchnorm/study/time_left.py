"""How long a run still takes: at first by the costs that its tasks are said to have, then by how quick they were."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence

STARTING = 4.0  # seconds until a new process has imported torch
FINISHING = 3.0  # seconds for conclusions, drawings and the page
# So many seconds of work must be done before what was measured counts as much as the costs that were declared.
_TRUST = 10.0


class TimeLeft:
    """Told what is done, it knows the share and the time left at any moment.

    Args:
        clock: seconds since whenever.
    """

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._total: float | None = None

    def begin(self, costs: Sequence[float], processes: int) -> None:
        """The work is known and starts now.

        Args:
            costs: of each task, about how many seconds it takes on one core.
            processes: how many compute; with 1, none has to be started.
        """
        self._processes = max(min(processes, len(costs)), 1)
        self._done = 0.0
        self._first: tuple[float, float] | None = None  # when the first result came, and the cost that was done then
        self._told = self._clock()
        self._total = sum(costs)
        self._mean = self._total / max(len(costs), 1)
        self._left = self._total / self._processes
        self._soon = self._mean
        if self._processes > 1:
            self._left += STARTING
            self._soon += STARTING

    def advance(self, cost: float) -> None:
        """A task of this cost is done."""
        assert self._total is not None
        self._told = self._clock()
        self._done += cost
        self._first = self._first or (self._told, self._done)
        since, before = self._first
        pace = (_TRUST + (self._told - since) * self._processes) / (_TRUST + self._done - before)
        self._left = pace * (self._total - self._done) / self._processes
        self._soon = pace * self._mean / self._processes

    def now(self) -> tuple[float, float] | None:
        """The share that is done, from 0 to 1, and the seconds left; None before the work is known.

        They pass until the next result is to be expected. While that keeps waiting, no less work is left.
        """
        if self._total is None:
            return None
        share = self._done / self._total if self._total else 1.0
        return share, max(self._left - min(self._clock() - self._told, self._soon), 0.0) + FINISHING
