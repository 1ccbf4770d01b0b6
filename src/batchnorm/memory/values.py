"""Values that a backward pass asks for: kept, or computed again from others."""

from __future__ import annotations

import threading
import weakref
from collections.abc import Callable

import torch
from torch import Tensor

from batchnorm._torch import version
from batchnorm.errors import OrderError

# One for all: what is computed for one reader is computed from what others read.
_LOCK = threading.RLock()


class Value:
    """What one operation gave: a tensor that is kept, or how to compute it again.

    Computed again, it lives until its last reader has it: once for all, if they are on one stream.

    Args:
        tensor: what it is the value of, as it is now.
        again: computes it from the inputs' values.
        inputs: what it is computed from.

    Attributes:
        kept: the tensor, without its history; None where it is computed again.
        inputs: as given; none where it is kept.
        depth: how many values one after the other have to be computed for it; 0 for one that is kept.
        version: how often the tensor was changed in place before.
        shape, stride, dtype, bytes: the tensor's; bytes are its storage's.
        label: the layer whose output it is; None for everything else.
        decided: whether somebody reads it, so that it is settled what becomes of it.
    """

    __slots__ = (
        "__weakref__",
        "_again",
        "_computed",
        "_readers",
        "_watch",
        "bytes",
        "decided",
        "depth",
        "dtype",
        "inputs",
        "kept",
        "label",
        "shape",
        "stride",
        "version",
    )

    def __init__(
        self, tensor: Tensor, again: Callable[..., Tensor] | None = None, inputs: tuple[Value, ...] = ()
    ) -> None:
        self.kept: Tensor | None = None
        self._again, self.inputs = again, inputs
        self.depth: int = 1 + max((value.depth for value in inputs), default=0)
        self.version = version(tensor)
        self.shape, self.stride, self.dtype = tensor.shape, tensor.stride(), tensor.dtype
        self.bytes = tensor.untyped_storage().nbytes()
        self.label: str | None = None
        self.decided = False
        # Its version is the tensor's for ever, and it holds none of the tensor's memory.
        self._watch = tensor.detach()
        self._computed: tuple[Tensor, object] | None = None
        self._readers: list[weakref.ref[Saved]] = []
        if again is None:
            self.keep(tensor)
        else:
            self._watch.data = tensor.new_empty(0)

    def keep(self, tensor: Tensor) -> None:
        """Keep the tensor, and nothing of what it would be computed from."""
        self.kept = self._watch = tensor.detach()
        self._again, self.inputs, self.depth, self.decided = None, (), 0, True

    @property
    def unchanged(self) -> bool:
        """Whether the tensor was not changed in place since; its views are the same tensor."""
        return version(self._watch) == self.version

    @property
    def changed_once(self) -> bool:
        """Whether the tensor was changed in place exactly once."""
        return version(self._watch) == self.version + 1

    def get(self, reader: Saved | None = None) -> Tensor:
        """The values.

        Raises:
            OrderError: it was kept, and changed in place since.
        """
        if self.kept is not None:
            if not self.unchanged:
                raise changed(self.kept, self.version)
            return self.kept
        assert self._again is not None
        with _LOCK:
            computed, anew = self._computed, False
            if computed is None or computed[1] != _stream(computed[0]):
                if torch.is_grad_enabled():  # with create_graph=True
                    with torch.no_grad():
                        result = self._compute(self._again)
                else:
                    result = self._compute(self._again)
                computed, anew = (result, _stream(result)), True
            self._computed = computed if self._awaiting(reader, anew=anew) else None
            return computed[0]

    def _compute(self, again: Callable[..., Tensor]) -> Tensor:
        """The same values in the order that they had."""
        result = again(*[value.get() for value in self.inputs])
        if result.stride() == self.stride:
            return result
        return torch.empty_strided(self.shape, self.stride, dtype=self.dtype, device=result.device).copy_(result)

    def read_by(self, reader: Saved) -> None:
        """Count on one more reader."""
        self._readers.append(weakref.ref(reader))

    def _awaiting(self, reader: Saved | None = None, *, anew: bool) -> bool:
        """Whether readers other than this one are left that have not got what is computed; no one has what is new."""
        left = False
        for ref in self._readers:
            if (other := ref()) is not None:
                other.has_read = other is reader or (other.has_read and not anew)
                left = left or not other.has_read
        return left


class Saved:
    """What autograd keeps instead of a tensor.

    Args:
        kept: the tensor; None if there is a value.
        value: where the tensor comes from.

    Attributes:
        kept, value: as given; a tensor that is kept may become a value that is computed again.
        has_read: whether it has got what is computed now.
    """

    __slots__ = ("__weakref__", "_version", "has_read", "kept", "value")

    def __init__(self, kept: Tensor | None = None, value: Value | None = None) -> None:
        self.has_read = False
        self.kept, self.value = kept, value
        # Tensors of inference mode have no version.
        self._version = 0 if kept is None or kept.is_inference() else version(kept)
        if value is not None:
            value.read_by(self)

    def become(self, value: Value) -> None:
        """Let go of the tensor."""
        self.kept, self.value = None, value
        value.read_by(self)

    def get(self) -> Tensor:
        """The tensor, or its values.

        Raises:
            OrderError: it was changed in place since.
        """
        if self.kept is None:
            assert self.value is not None
            return self.value.get(self)
        if not self.kept.is_inference() and version(self.kept) != self._version:
            raise changed(self.kept, self._version)
        return self.kept


def changed(tensor: Tensor, saved: int) -> OrderError:
    """Autograd's own error, which it leaves to whoever keeps tensors for it."""
    return OrderError(
        f"one of the variables needed for gradient computation has been modified by an inplace operation: a tensor of "
        f"shape {tuple(tensor.shape)} and dtype {tensor.dtype} is at version {version(tensor)}; expected version "
        f"{saved}, as in the forward pass. Change it after the backward pass, or change a copy"
    )


def _stream(tensor: Tensor) -> object:
    """The stream that works on a device now: what another one has computed would have to be waited for."""
    return torch.cuda.current_stream(tensor.device) if tensor.device.type == "cuda" else None
