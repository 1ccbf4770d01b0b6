"""Forward passes that take turns: each can wait in the middle, while others run.

A pass is a greenlet: a stack of its own, on this thread, that is left and entered where we say. So passes share what
torch keeps for a thread, and that is exchanged whenever another one runs.
"""

from __future__ import annotations

import contextvars
import sys
import time
from collections.abc import Callable
from types import TracebackType

import greenlet
import torch
from greenlet import GreenletExit
from typing_extensions import Self

from batchnorm._torch import thread_modes
from batchnorm.errors import OrderError
from batchnorm.moments import Moments
from batchnorm.population.batches import Batch
from batchnorm.population.layers import Layer
from batchnorm.population.torch_state import TorchState, seed


class Pass:
    """One batch's forward pass.

    Attributes:
        batch: what it runs on.
        at: the layer that it waits at; None before it began, and after it ended.
        moments: of that layer's input.
        called: the layers that it called, the one that it waits at included.
        seconds: how long it ran, since it last began.
        stopping: it is being ended before its end.
        stack: the greenlet that it runs on; None before it began, and after it was stopped.
    """

    def __init__(self, batch: Batch) -> None:
        self.batch = batch
        self.at: Layer | None = None
        self.moments: Moments | None = None
        self.called: list[Layer] = []
        self.seconds = 0.0
        self.stopping = False
        self.stack: greenlet.greenlet | None = None


class Lockstep:
    """Passes that take turns. As a context: at its end, those that still wait are ended.

    Args:
        run: a forward pass.
        devices: the kinds of devices whose autocast state is exchanged.

    Attributes:
        before_stop: called with a pass before it is ended.
        passes: in the order in which they began.
        current: the pass that runs; None outside of all.
    """

    def __init__(self, run: Callable[[Batch], None], devices: set[str]) -> None:
        self._run = run
        self._devices = sorted(devices)
        self._inference = torch.is_inference_mode_enabled()
        self._modes: tuple[object, ...] = ()
        self._loop: object = None
        self._seed = 0
        self.before_stop: Callable[[Pass], object] = lambda _: None
        self.passes: list[Pass] = []
        self.current: Pass | None = None

    def add(self, batch: Batch) -> Pass:
        """A new pass; `proceed` begins it."""
        self.passes.append(Pass(batch))
        return self.passes[-1]

    def proceed(self, batch_pass: Pass) -> None:
        """Let a pass run on, or from its beginning where it has none, until it waits or ends."""
        outside = TorchState.here(self._devices)
        batch_pass.at = batch_pass.moments = None
        self.current = batch_pass
        start = time.perf_counter()
        try:
            if batch_pass.stack is None:
                batch_pass.called, batch_pass.seconds = [], 0.0
                batch_pass.stack = greenlet.greenlet(self._begin)
                batch_pass.stack.gr_context = contextvars.copy_context()
                seed(self._seed + batch_pass.batch.index)
                batch_pass.stack.switch(batch_pass)
            else:
                batch_pass.stack.switch()
        finally:
            batch_pass.seconds += time.perf_counter() - start
            self.current = None
            outside.restore()

    def check_stopping(self) -> None:
        """Inside a pass: what is being ended goes no further, also where the model caught what was to end it."""
        if self.current is not None and self.current.stopping:
            raise GreenletExit

    def wait(self) -> None:
        """Inside a pass: let others run, until it is let run on.

        Raises:
            OrderError: what torch keeps for the thread is in a state that cannot be exchanged, or this is another
                thread than the pass's.
        """
        batch_pass = self.current
        if batch_pass is None or batch_pass.stack is None or batch_pass.stack is not greenlet.getcurrent():
            raise OrderError(
                'got a call from another thread than the one that the forward pass began in; method "exact" has to '
                'interrupt it there. Use method="pooled"'
            )
        self.check_stopping()
        if thread_modes() != self._modes:
            raise OrderError(
                'got a call inside a mode of torch that a forward pass cannot be interrupted in, such as "with '
                'torch.device(...)" or saved_tensors_hooks; method "exact" has to interrupt it there. Enter it around '
                'the whole of recalibrate, or use method="pooled"'
            )
        if _event_loop() is not self._loop:
            raise OrderError(
                "got a call inside an event loop of asyncio that the forward pass runs, and a thread has only one; "
                'method "exact" has to interrupt the pass there. Use method="pooled"'
            )
        inside = TorchState.here(self._devices)
        try:
            # Leaving it puts back what torch dispatches by, so nothing else may change that while the pass waits.
            with torch.inference_mode(self._inference):
                batch_pass.stack.parent.switch()
        finally:
            inside.restore()

    def _begin(self, batch_pass: Pass) -> None:
        """What a pass's stack runs."""
        self._run(batch_pass.batch)

    def stop(self, batch_pass: Pass) -> None:
        """End a pass where it waits: its `finally`s run, and its memory is free. It can begin again."""
        stack, batch_pass.stack = batch_pass.stack, None
        if stack is None or stack.dead:
            return
        self.before_stop(batch_pass)
        outside = TorchState.here(self._devices)
        batch_pass.stopping = True
        self.current, batch_pass.stack = batch_pass, stack
        try:
            stack.throw()
        finally:
            self.current = batch_pass.stack = None
            batch_pass.stopping = False
            outside.restore()

    def __enter__(self) -> Self:
        self._modes, self._loop = thread_modes(), _event_loop()
        # Each pass has a random stream of its own, that does not depend on when the others run.
        self._seed = int(torch.randint(2**62, ()))
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, _: TracebackType | None) -> None:
        for batch_pass in self.passes:
            try:
                self.stop(batch_pass)
            except Exception:
                # What a model raises while it is cut off must not stand in for the reason that it is cut off for.
                if error is None:
                    raise
        self.passes.clear()


def _event_loop() -> object:
    """The one that runs on this thread; None without."""
    asyncio = sys.modules.get("asyncio")  # otherwise none runs
    try:
        return None if asyncio is None else asyncio.get_running_loop()
    except RuntimeError:
        return None
