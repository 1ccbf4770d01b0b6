"""The budget for suspended forward passes: what goes beyond it waits in a file, or is computed again."""

from __future__ import annotations

import contextlib
import weakref
from collections.abc import Iterable
from contextlib import ExitStack
from types import TracebackType

import torch
from torch import nn
from typing_extensions import Self

from batchnorm.kernels.cpu import resizable_outputs
from batchnorm.models.buffers import SavedBuffers
from batchnorm.models.devices import device
from batchnorm.population.available import default_limit, hand_back
from batchnorm.population.lockstep import Lockstep, Pass
from batchnorm.population.result import MemoryUse
from batchnorm.population.spill import Spill, available, can_spill, left_in_memory
from batchnorm.population.storages import Storages, every_storage, storages, watch_storages

# Freed memory goes back to the system whenever so much was allocated as is this share of the limit, but not in pieces
# below the second. What is allocated inside a pass counts too: in the last round nothing else is.
HANDED_BACK = 0.25
LEAST_HANDED_BACK = 2**26
# The rest of the limit is for what stays in memory of passes that wait in a file: small tensors, and parts of pages.
FOR_WHOLE_PASSES = 0.9


def spilling_is_cheaper(size: int, bytes_per_second: float, seconds: float) -> bool:
    """Whether writing and reading `size` bytes takes less time than computing for `seconds` again."""
    return 2 * size / bytes_per_second < seconds


class Memory:
    """Lets passes run on, and keeps what they hold while they wait within a limit. To be used as a context.

    The passes come around in turn, so the best is to keep a fixed part of them: who comes first stays, and who finds no
    room is put out until its next turn.

    Args:
        lockstep: the passes; they have to be ended before the end of this context.
        model: what they run; its parameters and buffers are nobody's activations.
        limit: bytes; None for `default_limit`, as it is where this context begins.
    """

    def __init__(self, lockstep: Lockstep, model: nn.Module, limit: int | None) -> None:
        self._lockstep = lockstep
        self._model = model
        self._limit = limit
        # What does not belong to one pass alone: parameters, buffers, batches, and what two passes have seen.
        self._common: Storages = weakref.WeakSet()
        self._seen: dict[Pass, Storages] = {}
        self._first_seen: weakref.WeakKeyDictionary[torch.UntypedStorage, Pass] = weakref.WeakKeyDictionary()
        self._held: dict[Pass, int] = {}
        self._total = 0
        self._peak = 0
        self._allocated = 0  # since the system was given memory back; all of it is freed sooner or later
        self._replays = 0
        self._spill = Spill()
        self._can_spill = available()
        # From the first pass that finds no room: before, nothing has to be known of what is whose.
        self._careful = False
        # Looks at all there is, one before each pass begins: in which one a storage was first found, and each pass's.
        self._looks = 0
        self._found: weakref.WeakKeyDictionary[torch.UntypedStorage, int] = weakref.WeakKeyDictionary()
        self._began: dict[Pass, int] = {}
        self._exit = ExitStack()

    @property
    def use(self) -> MemoryUse:
        """What it took so far."""
        return MemoryUse(self._limit, self._peak, self._spill.written, self._replays)

    def proceed(self, batch_pass: Pass) -> None:
        """Let a pass run on until it waits again or ends, with all that it holds in memory."""
        if self._limit is None:
            self._lockstep.proceed(batch_pass)
            return
        self._release(self._held.pop(batch_pass, 0))
        if self._careful and batch_pass.stack is None:  # it begins
            self._look(batch_pass)
        self._load(batch_pass)
        self._lockstep.proceed(batch_pass)
        if batch_pass.at is not None:
            self._admit(batch_pass, self._limit)

    def end(self, batch_pass: Pass) -> None:
        """End a pass that is to begin again at its next turn, as if it had not been.

        What it does and raises meanwhile is nobody's.
        """
        buffers = SavedBuffers(self._model)
        try:
            with contextlib.suppress(Exception):
                self._lockstep.stop(batch_pass)
        finally:
            buffers.restore()
        self._replays += 1

    def drop(self, batch_pass: Pass) -> None:
        """End a pass that is not to go on, as if it had not been."""
        self._release(self._held.pop(batch_pass, 0))
        self.end(batch_pass)
        self._replays -= 1
        self._lockstep.passes.remove(batch_pass)

    def _release(self, size: int) -> None:
        self._total -= size
        if self._limit is not None and self._allocated > max(self._limit * HANDED_BACK, LEAST_HANDED_BACK):
            hand_back()
            self._allocated = 0

    def _load(self, batch_pass: Pass) -> None:
        """All that a pass holds is in memory again."""
        # A function of its own, so that no name of it keeps a storage that the pass lets go of.
        for storage in self._seen.setdefault(batch_pass, weakref.WeakSet()):
            self._spill.get(storage)
            self._allocated += storage.nbytes()
        self._common.update(storages(batch_pass.batch.content))

    def _look(self, batch_pass: Pass) -> None:
        """What there is before a pass begins is not the pass's."""
        self._looks += 1
        self._began[batch_pass] = self._looks
        for storage in every_storage():
            self._found.setdefault(storage, self._looks)

    def _is_older(self, storage: torch.UntypedStorage, batch_pass: Pass) -> bool:
        began = self._began.get(batch_pass)
        return began is not None and self._found.get(storage, began + 1) <= began

    def _note(self, found: Iterable[torch.UntypedStorage]) -> None:
        self._lockstep.check_stopping()
        batch_pass = self._lockstep.current
        if batch_pass is not None:
            for storage in found:
                if storage not in self._first_seen:
                    self._allocated += storage.nbytes()
                self._seen[batch_pass].add(storage)
                if self._first_seen.setdefault(storage, batch_pass) is not batch_pass:
                    self._common.add(storage)

    def _admit(self, batch_pass: Pass, limit: int) -> None:
        """Find room for a pass that waits, or put it out."""
        own = [s for s in self._seen[batch_pass] if s not in self._common and not self._is_older(s, batch_pass)]
        size = sum(s.nbytes() for s in own)
        if self._total + size > limit * FOR_WHOLE_PASSES:
            size = self._evict(batch_pass, own, size, limit - self._total)
        self._held[batch_pass] = size
        self._total += size
        self._peak = max(self._peak, self._total)

    def _evict(self, batch_pass: Pass, own: list[torch.UntypedStorage], size: int, room: int) -> int:
        """Spill what a pass holds, or end it, so that it begins again at its next turn.

        Returns:
            The bytes that it still holds in memory, at most `room`.
        """
        if self._can_spill and spilling_is_cheaper(size, self._spill.bytes_per_second, batch_pass.seconds):
            self._begin_to_be_careful()
            fit = [s for s in own if can_spill(s)]
            left = size - sum(s.nbytes() - left_in_memory(s) for s in fit)
            if batch_pass in self._began and left <= room and self._spilled(fit):
                return left
        self.end(batch_pass)
        return 0

    def _begin_to_be_careful(self) -> None:
        """In time for a pass's repetition, and for all that come after it."""
        if not self._careful:
            self._careful = True
            self._exit.enter_context(resizable_outputs())

    def _spilled(self, own: list[torch.UntypedStorage]) -> bool:
        """Put storages into files; False where there is no room, and then all of them are in memory."""
        try:
            self._can_spill = self._spill.has_room()
            for storage in own if self._can_spill else ():
                self._spill.put(storage)
        except OSError:  # from now on all is computed again
            self._can_spill = False
            for storage in own:
                self._spill.get(storage)
        return self._can_spill

    def _before_stop(self, batch_pass: Pass) -> None:
        """What is freed has to be memory, for whoever gets it next."""
        for storage in self._seen.get(batch_pass, ()):
            self._spill.get(storage)

    def __enter__(self) -> Self:
        self._lockstep.before_stop = self._before_stop
        self._common.update(storages([*self._model.parameters(), *self._model.buffers()]))
        if self._limit is None:
            self._limit = default_limit(device(self._model))
        if self._limit is not None:
            self._exit.enter_context(watch_storages(self._model, self._note))
        self._exit.callback(self._spill.close)
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, _: TracebackType | None) -> None:
        self._exit.close()
