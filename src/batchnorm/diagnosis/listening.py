"""One forward pass listened to: what comes into each batch-norm layer, and what it was when the pass ended."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from batchnorm._torch import in_backward_recompute
from batchnorm.diagnosis.linear_weight import linear_weight
from batchnorm.layout import channel_axis
from batchnorm.models.devices import device
from batchnorm.models.hooks import Uncopied, forward_hooks
from batchnorm.models.norm_layers import NormLayer
from batchnorm.modules import BatchNorm
from batchnorm.moments import Moments

_PLAIN = (Tensor, nn.Parameter)  # not what stands for tensors that are elsewhere


@dataclass(eq=False)
class Heard:
    """What one layer had in one forward pass. Tensors are on its device.

    Attributes:
        name: its path in the model.
        layer: the layer.
        calls: how often it was called.
        moments: of all that came in, of its calls together; None where nothing came.
        highest: (C,) the largest value that came out of each channel.
        linear_weight: the weight of the linear layer whose output came in, or None.
    """

    name: str
    layer: NormLayer
    calls: int = 0
    moments: Moments | None = None
    highest: Tensor | None = None
    linear_weight: Tensor | None = None


class _Ear:
    """Hears one layer. Ours tell the moments that they propose; of others' input they are taken."""

    def __init__(self, name: str, layer: NormLayer) -> None:
        self.heard = Heard(name, layer)
        self._device = device(layer)
        self._proposal: Moments | None = None

    def told(self, layer: BatchNorm, proposal: Moments) -> None:
        """What `BatchNorm` calls with a proposal."""
        if self._meant(layer):
            self._proposal = proposal

    def after(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:  # noqa: ANN401 - a hook's
        """What is called after the layer's forward."""
        x = args[0] if args else kwargs.get("input")
        if not isinstance(x, Tensor) or type(x) not in _PLAIN or type(output) not in _PLAIN:
            return
        if not self._meant(module) or in_backward_recompute():
            return
        heard, axis = self.heard, getattr(module, "channel_dim", 1)
        with torch.no_grad():
            moments, self._proposal = self._proposal, None
            if moments is None:  # torch.nn's layers, frozen ones and those in inference mode propose nothing
                moments = Moments.of(x.detach(), channel_dim=axis, mask=kwargs.get("mask"))
            heard.moments = moments if heard.moments is None else heard.moments + moments
            if output.numel():
                axis = channel_axis(output.dim(), axis)
                highest = output.detach().amax([dim for dim in range(output.dim()) if dim != axis])
                heard.highest = highest if heard.highest is None else torch.maximum(heard.highest, highest)
        heard.calls += 1
        heard.linear_weight = linear_weight(x)

    def _meant(self, module: nn.Module) -> bool:
        """Not a replica on another device: `DataParallel` makes them, hooks included."""
        return module is self.heard.layer or device(module) == self._device


class Listening:
    """From its making to `end`, these layers are listened to.

    Args:
        layers: names and layers.
    """

    def __init__(self, layers: Iterable[tuple[str, NormLayer]]) -> None:
        self._ears = [_Ear(name, layer) for name, layer in layers]
        with ExitStack() as cleanup:
            for ear in self._ears:
                layer = ear.heard.layer
                # Before hooks that may change the output, and before the model's own where the layer is the model.
                cleanup.enter_context(forward_hooks([layer], after=Uncopied(ear.after), first=True))
                if isinstance(layer, BatchNorm):
                    cleanup.callback(_tell(layer, Uncopied(ear.told)))
            self._cleanup = cleanup.pop_all()

    def heard(self) -> list[Heard]:
        """What was heard so far, of those that were called."""
        return [ear.heard for ear in self._ears if ear.heard.calls]

    def end(self) -> None:
        """Stop."""
        self._cleanup.close()


def _tell(layer: BatchNorm, listener: Uncopied) -> Callable[[], None]:
    """Have a layer tell a listener of its proposals; the function that ends it."""
    layer._listeners = (*layer._listeners, listener)

    def end() -> None:
        left = tuple(other for other in layer._listeners if other is not listener)
        if left:
            layer._listeners = left
        else:
            del layer._listeners  # as it was: a compiled call would notice an empty one of its own

    return end
