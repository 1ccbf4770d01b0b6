"""`recompute`: training with less memory, bit for bit the same."""

from __future__ import annotations

from threading import get_ident
from types import TracebackType
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks
from typing_extensions import Self

from batchnorm import _torch
from batchnorm.memory.report import Entry, Report
from batchnorm.memory.session import UNREAD, Note, Session
from batchnorm.models.hooks import Uncopied
from batchnorm.models.norm_layers import display_name, named_norm_layers, uncompiled
from batchnorm.modules import BatchNorm
from batchnorm.recording import RECORDERS

_NOT_RUN = "nothing yet: the model has not been called for gradients since"
_COMPILED = "nothing: inside torch.compile, which decides itself what to keep"
_UNCONVERTED = "it is torch.nn's, whose outputs are kept. Use batchnorm.convert(model) first"
_UNCALLED = (
    "no output with a gradient of an operator of ours: it is not called, it is compiled, its device has no kernels of "
    "ours, or its batches are ghost batches"
)

_Open = tuple[Session, saved_tensors_hooks]


class Recomputing:
    """What `recompute` returns: a handle, and a context that removes it."""

    def __init__(self, model: nn.Module) -> None:
        self._model = uncompiled(model)
        self._paths: dict[int, str] = {}
        self._last: Session | None = None
        self._compiled = False
        # Of each thread: its forward passes that are running, None for one that is left alone.
        self._running: dict[int, list[_Open | None]] = {}
        self._handles = (
            self._model.register_forward_pre_hook(Uncopied(self._enter), prepend=True),
            self._model.register_forward_hook(Uncopied(self._leave), always_call=True),
        )

    def remove(self) -> None:
        """Keep everything again, from the next forward pass on. What a pass has let go of is computed again all the same."""
        for handle in self._handles:
            handle.remove()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.remove()

    @property
    def report(self) -> Report:
        """What the last forward pass kept, and why."""
        session = self._last
        notes = {} if session is None else session.notes
        why = "" if session is not None else _COMPILED if self._compiled else _NOT_RUN
        entries = [_entry(path, layer, notes.get(path)) for path, layer in named_norm_layers(self._model)]
        if (unknown := notes.get("")) is not None and (unknown.saved or unknown.kept):
            entries.append(Entry("layers without parameters", unknown.saved, unknown.kept, "; ".join(unknown.why)))
        if session is None:
            return Report(tuple(entries), 0, 0, why)
        return Report(tuple(entries), session.kept, session.between - session.copied, why)

    def _enter(self, module: nn.Module, args: object) -> None:
        if torch.compiler.is_compiling():
            self._compiled = True
            return
        thread = get_ident()
        running = self._running.setdefault(thread, [])
        if _is_left_alone() or thread in RECORDERS:
            running.append(None)
            return
        session = Session(self._path)
        hooks = saved_tensors_hooks(session.pack, session.unpack)
        hooks.__enter__()
        RECORDERS[thread] = session
        running.append((session, hooks))

    def _leave(self, module: nn.Module, args: object, output: object) -> None:
        if torch.compiler.is_compiling():
            return
        thread = get_ident()
        running = self._running.get(thread)
        if not running:  # another hook has failed before the pass began
            return
        opened = running.pop()
        if not running:
            del self._running[thread]
        if opened is not None:
            self._last, hooks = opened
            del RECORDERS[thread]
            hooks.__exit__()

    def _path(self, owner: Tensor) -> str | None:
        """The path of the layer with this parameter. By its memory: a detached one is another object."""
        place = owner.data_ptr()
        if place not in self._paths:  # or others stand where parameters were: those of shards come and go
            self._paths = {}
            for path, layer in named_norm_layers(self._model):
                for name in ("running_mean", "bias", "weight"):
                    if isinstance(tensor := getattr(layer, name, None), Tensor) and type(tensor).__name__ != "DTensor":
                        self._paths[tensor.data_ptr()] = path
        return self._paths.get(place)


def _is_left_alone() -> bool:
    """Whether this pass keeps nothing, or what it keeps is somebody else's concern."""
    return (
        not torch.is_grad_enabled()
        or _torch.in_functorch()
        or _torch.is_traced()
        or _torch.is_exported()
        or _torch.in_backward_recompute()
    )


def _entry(path: str, layer: nn.Module, note: Note | None) -> Entry:
    if note is not None:
        return Entry(path, note.saved, note.kept, "; ".join(note.why) or ("" if note.saved else UNREAD))
    return Entry(path, 0, 0, _UNCALLED if isinstance(layer, BatchNorm) else _UNCONVERTED)


def recompute(model: nn.Module) -> Recomputing:
    return Recomputing(model)
