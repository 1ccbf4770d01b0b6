"""One commit for several forward passes: joined, or dropped."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from contextlib import contextmanager

from torch import nn

from batchnorm.layer_state import Row
from batchnorm.models.norm_layers import split_by_origin
from batchnorm.modules import BatchNorm
from batchnorm.moments import Moments


class Pending:
    """What the forward passes inside `deferred` proposed, joined for each layer."""

    def __init__(self) -> None:
        self._moments: dict[tuple[BatchNorm, Row], Moments] = {}

    def _receive(self, layer: BatchNorm, row: Row, proposal: Moments) -> None:
        before = self._moments.get((layer, row))
        self._moments[layer, row] = proposal if before is None else before + proposal

    def discard(self) -> None:
        """Drop everything proposed so far: it is not committed."""
        self._moments.clear()

    def moments(self, layer: BatchNorm, domain: str | int = 0) -> Moments | None:
        """The joined moments of what a layer proposed so far for one of its domains; None where it proposed nothing."""
        return self._moments.get((layer, layer.row_of(domain)))


class _Receiver:
    """Where one layer's proposals go inside `deferred`."""

    def __init__(self, pending: Pending, layer: BatchNorm) -> None:
        self._pending, self._layer = pending, layer

    def __call__(self, proposal: Moments, row: Row) -> None:
        self._pending._receive(self._layer, row, proposal)

    def __reduce__(self) -> tuple[type[None], tuple[()]]:
        # A copy of the layer is not in the context, whose end would never come for it: its receiver is None.
        return type(None), ()


@contextmanager
def deferred(model: nn.Module) -> Iterator[Pending]:
    """Forward passes inside propose; one commit of their joined moments at the end.

    With k micro-batches inside, the running statistics become those of one batch of all their samples, and one batch
    is counted. What each forward pass normalises by is still its own micro-batch.

    An exception commits nothing. Inside another `deferred` of the same layers, the joined moments are proposed to that
    one. Each domain of a layer has moments and a commit of its own. A layer that is frozen by the end commits nothing.
    Layers of torch.nn know no proposals and commit at once; a UserWarning names them.

    Args:
        model: its layers of ours, of all depths, are meant; other models are not, copies made inside included.

    Yields:
        A `Pending`, whose `discard()` drops what was proposed.
    """
    pending = Pending()
    layers, others = split_by_origin(model)
    if others:
        warnings.warn(
            f"these layers are torch.nn's and commit at once: {', '.join(others)}. Use batchnorm.convert(model) first",
            UserWarning,
            stacklevel=3,
        )
    outer = [layer._receiver for layer in layers]
    for layer in layers:
        layer._receiver = _Receiver(pending, layer)
    try:
        yield pending
    finally:
        for layer, receiver in zip(layers, outer, strict=True):
            if receiver is None:
                del layer._receiver  # as it was: a compiled call would notice a None
            else:
                layer._receiver = receiver
    for layer in layers:
        for row in layer._rows:
            joined = pending.moments(layer, row.number)
            if joined is not None and not layer.frozen.statistics:
                layer._propose(joined, row)
