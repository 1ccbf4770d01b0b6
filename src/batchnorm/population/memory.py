"""The budget for suspended forward passes: what goes beyond it waits in a file, or is computed again."""

from __future__ import annotations

import weakref
from collections.abc import Iterable
from contextlib import AbstractContextManager, ExitStack, nullcontext
from types import TracebackType

import torch
from torch import nn
from typing_extensions import Self

from batchnorm.kernels.cpu import resizable_outputs
from batchnorm.population.available import hand_back
from batchnorm.population.lockstep import Lockstep, Pass
from batchnorm.population.result import MemoryUse
from batchnorm.population.spill import Spill
from batchnorm.population.storages import Storages, storages, watching

# Freed memory goes back to the system whenever it is this share of the limit, but not in pieces below the second.
HANDED_BACK = 0.25
LEAST_HANDED_BACK = 2**26


def spilling_is_cheaper(size: int, bytes_per_second: float, seconds: float) -> bool:
    """Whether writing and reading `size` bytes takes less time than computing for `seconds` again."""
    return 2 * size / bytes_per_second < seconds


class Memory:
    """Lets passes run on, and keeps what they hold while they wait within a limit. To be used as a context.

    The passes come around in turn, so the best is to keep a fixed part of them: who comes first stays, and who finds no
    room is put out until its next turn.

    Args:
        steps: the passes; they have to be ended before the end of this context.
        model: what they run; its parameters and buffers are nobody's activations.
        limit: bytes; None for no limit.
    """

    def __init__(self, steps: Lockstep, model: nn.Module, limit: int | None) -> None:
        self._steps = steps
        self._model = model
        self._limit = limit
        # What is not one pass's alone: parameters, buffers, batches, and what two passes have seen.
        self._common: Storages = weakref.WeakSet(storages([*model.parameters(), *model.buffers()]))
        self._seen: dict[Pass, Storages] = {}
        self._first_seen: weakref.WeakKeyDictionary[torch.UntypedStorage, Pass] = weakref.WeakKeyDictionary()
        self._held: dict[Pass, int] = {}
        self._total = 0
        self._peak = 0
        self._freed = 0  # since the system was given memory back
        self._replays = 0
        self._spill = Spill(self._common)
        self._can_spill = True
        self._asked_for_resizable = False
        self._exit = ExitStack()

    @property
    def use(self) -> MemoryUse:
        """What it took so far."""
        return MemoryUse(self._limit, self._peak, self._spill.written, self._replays)

    def proceed(self, one: Pass) -> None:
        """Let a pass run on until it waits again or ends, with all that it holds in memory."""
        if self._limit is None:
            self._steps.proceed(one)
            return
        self._let_go(self._held.pop(one, 0))
        self._recall(one)
        self._steps.proceed(one)
        if one.at is not None:
            self._admit(one, self._limit)

    def guarding(self) -> AbstractContextManager[object]:
        """Inside, others than the passes' own code may use tensors: what was put out comes back to whoever uses it."""
        return self._spill if len(self._spill) else nullcontext()

    def next_round(self) -> None:
        """All passes had their turn."""
        self._spill.next_round()

    def _let_go(self, size: int) -> None:
        self._total -= size
        self._freed += size
        if self._limit is not None and self._freed > max(self._limit * HANDED_BACK, LEAST_HANDED_BACK):
            hand_back()
            self._freed = 0

    def _recall(self, one: Pass) -> None:
        """All that a pass holds is in memory again."""
        # A function of its own, so that no name of it keeps a storage that the pass lets go of.
        for storage in self._seen.setdefault(one, weakref.WeakSet()):
            self._spill.get(storage)
        self._common.update(storages(one.batch.content))

    def _note(self, found: Iterable[torch.UntypedStorage]) -> None:
        one = self._steps.current
        if one is not None:
            for storage in found:
                self._seen[one].add(storage)
                if self._first_seen.setdefault(storage, one) is not one:
                    self._common.add(storage)

    def _admit(self, one: Pass, limit: int) -> None:
        """Find room for a pass that waits, or put it out."""
        own = [s for s in self._seen[one] if s not in self._common]
        size = sum(s.nbytes() for s in own)
        if self._total + size > limit:
            self._put_out(one, own, size)
            self._freed += size
            size = 0
        self._held[one] = size
        self._total += size
        self._peak = max(self._peak, self._total)

    def _put_out(self, one: Pass, own: list[torch.UntypedStorage], size: int) -> None:
        """Spill what a pass holds, or end it, so that it begins anew at its next turn."""
        if self._can_spill and spilling_is_cheaper(size, self._spill.bytes_per_second, one.seconds):
            if all(s.resizable() for s in own):
                if self._spilled(own):
                    return
            elif not self._asked_for_resizable:  # in time for this pass's repetition, and for all that come after it
                self._asked_for_resizable = True
                self._exit.enter_context(resizable_outputs())
        self._steps.stop(one)
        self._replays += 1

    def _spilled(self, own: list[torch.UntypedStorage]) -> bool:
        """Put storages into a file; False where there is no room, and then all of them are in memory."""
        try:
            for storage in own:
                self._spill.put(storage)
        except OSError:  # from now on all is computed again
            self._can_spill = False
            for storage in own:
                self._spill.get(storage)
        return self._can_spill

    def __enter__(self) -> Self:
        self._steps.around = self.guarding
        if self._limit is not None:
            self._exit.enter_context(watching(self._model, self._note))
        self._exit.callback(self._spill.close)
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, _: TracebackType | None) -> None:
        self._exit.close()
