"""`recompute`: training with less memory, bit for bit the same."""

from __future__ import annotations

import inspect
from threading import get_ident
from types import FrameType, TracebackType
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks
from typing_extensions import Self

from batchnorm import _torch
from batchnorm.memory.report import Entry, Report
from batchnorm.memory.session import UNKNOWN, UNREAD, Note, Session
from batchnorm.models.hooks import Uncopied
from batchnorm.models.norm_layers import named_norm_layers, uncompiled
from batchnorm.modules import BatchNorm
from batchnorm.recording import RECORDERS

_NOT_RUN = "nothing yet: the model has not been called for gradients since"
_COMPILED = "nothing: inside torch.compile, which decides itself what to keep"
_UNCONVERTED = "it is torch.nn's, whose outputs are kept. Use batchnorm.convert(model) first"
_UNCALLED = (
    "no output with a gradient of an operator of ours: it is not called, it is compiled, its device has no kernels of "
    "ours, or its batches are ghost batches"
)


class _Pass(NamedTuple):
    """A forward pass that runs.

    Attributes:
        session: None for a pass that is left alone.
        hooks: what is attached to autograd.
        frame: of the call, by which it is seen that an interrupt has ended it: then torch calls no hooks.
    """

    session: Session | None
    hooks: saved_tensors_hooks | None
    frame: FrameType | None


class Recomputing:
    """What `recompute` returns: a handle, and a context that removes it at its end."""

    def __init__(self, model: nn.Module) -> None:
        self._model = uncompiled(model)
        self._layers: dict[int, tuple[str, nn.Module]] = {}
        self._last: Session | None = None
        self._compiled = self._removed = False
        self._running: dict[int, list[_Pass]] = {}  # by thread
        self._before = self._model.register_forward_pre_hook(Uncopied(self._enter), prepend=True)
        self._after = self._model.register_forward_hook(Uncopied(self._leave), always_call=True)

    def remove(self) -> None:
        """Keep everything again, from the next forward pass on.

        What earlier passes have let go of is computed again all the same.
        """
        self._removed = True
        self._before.remove()
        self._close_interrupted()
        if not self._running:  # or the pass that runs removes it
            self._after.remove()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.remove()

    @property
    def report(self) -> Report:
        """What the last forward pass kept, by layer, and why."""
        session = self._last
        notes = {} if session is None else session.notes
        entries = [_entry(path, layer, notes.get(path)) for path, layer in named_norm_layers(self._model)]
        if session is None:
            return Report(tuple(entries), 0, 0, _COMPILED if self._compiled else _NOT_RUN)
        unknown = notes.get(UNKNOWN)
        between = session.between - session.copied + (0 if unknown is None else unknown.saved)
        return Report(tuple(entries), session.kept, between)

    def _enter(self, module: nn.Module, args: object) -> None:
        if torch.compiler.is_compiling():
            self._compiled = True
            return
        self._close_interrupted()
        thread = get_ident()
        running = self._running.setdefault(thread, [])
        if _is_left_alone() or thread in RECORDERS:
            running.append(_Pass(None, None, _caller()))
            return
        session = Session(self._path)
        hooks = saved_tensors_hooks(session.pack, session.unpack)
        hooks.__enter__()
        RECORDERS[thread] = session
        running.append(_Pass(session, hooks, _caller()))

    def _leave(self, module: nn.Module, args: object, output: object) -> None:
        if not torch.compiler.is_compiling() and get_ident() in self._running:  # or another hook failed before ours
            self._close()

    def _close(self) -> None:
        """End this thread's innermost pass."""
        thread = get_ident()
        running = self._running[thread]
        session, hooks, _ = running.pop()
        if not running:
            del self._running[thread]
        if session is not None and hooks is not None:
            session.finish()
            self._last = session
            del RECORDERS[thread]
            hooks.__exit__()
        if self._removed and not self._running:
            self._after.remove()

    def _close_interrupted(self) -> None:
        """End this thread's passes whose calls have ended already."""
        while running := self._running.get(get_ident()):
            frame = inspect.currentframe()
            while frame is not None and frame is not running[-1].frame:
                frame = frame.f_back
            if frame is not None:
                return
            self._close()

    def _path(self, owner: Tensor) -> str | None:
        """The path of the layer with this parameter. By its memory: a detached one is another object."""
        place = owner.data_ptr()
        known = self._layers.get(place)
        if known is not None and getattr(known[1], "weight", None) is owner:  # the quick answer
            return known[0]
        if known is None or place not in _places(known[1]):  # shards come and go, also at places of others
            layers = list(named_norm_layers(self._model))
            self._layers = {at: (path, layer) for path, layer in layers for at in _places(layer)}
            known = self._layers.get(place)
        return None if known is None else known[0]


def _places(layer: nn.Module) -> set[int]:
    """Where a layer's parameters and its running mean lie; of parts of them that are elsewhere nothing."""
    tensors = (getattr(layer, name, None) for name in ("weight", "bias", "running_mean"))
    return {t.data_ptr() for t in tensors if isinstance(t, Tensor) and type(t) in (Tensor, nn.Parameter)}


def _caller() -> FrameType | None:
    """The frame of the call of the module that has called our hook."""
    frame = inspect.currentframe()
    for _ in range(3):  # of this function, of the hook, and of what a copy does not have
        frame = None if frame is None else frame.f_back
    return frame


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
    """Train with less memory: outputs of batch norm are computed again where the backward pass needs them.

        y = activation(norm(x) + residual)    is not kept: x and its statistics are, for the layer's own gradient

    Gradients are the same, bit for bit: y is computed again by the same kernel from the same numbers, once, and lives
    until its last reader has it. So are activations, concatenations and products that follow, if they have not
    been fused. Outputs that are cheap to keep or dear to compute stay; so does every fifth in a chain of
    residuals, so that none is computed again from its beginning.

    It holds for forward passes of this model from now on, in any thread, and for their backward passes whenever those
    come; not in passes without gradients, in torch.compile, in transforms of torch.func, and inside activation
    checkpointing, which keep what they keep. Call `convert` or, better, `fuse` before: layers of torch.nn are left.

        model = bn.fuse(model)
        with bn.recompute(model) as handle:
            model(x).sum().backward()
        print(handle.report)

    Args:
        model: any module; also inside, or around, DistributedDataParallel and fully_shard.

    Returns:
        A handle: `handle.report` says what the last forward pass kept and why, and `handle.remove()` ends it, as does
        the end of a `with` block.

    Raises:
        OrderError: in a backward pass: a tensor that it needs was changed in place since the forward pass. It is a
            RuntimeError, as torch's own.
    """
    return Recomputing(model)
