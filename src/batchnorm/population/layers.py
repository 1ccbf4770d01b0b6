"""The layers that take part: which they are, how their input is read and their statistics are written."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from batchnorm import functional, layout
from batchnorm._torch import buffers_of, in_functorch
from batchnorm.call import Call
from batchnorm.errors import BatchNormError, NonFiniteError, OptionError, OrderError
from batchnorm.kernels.reference import statistics_dtype
from batchnorm.layer_state import FIRST, Row
from batchnorm.models.hooks import forward_hooks
from batchnorm.models.norm_layers import NormLayer, display_name, named_norm_layers, uninitialized
from batchnorm.modules import BatchNorm
from batchnorm.moments import Moments
from batchnorm.population.result import SkippedLayer


@dataclass(frozen=True, eq=False)
class Layer:
    """A layer that takes part.

    Attributes:
        name: its first path in the model.
        module: the layer itself.
        mean: (C,) its buffer.
        var: (C,) its buffer.
        row: the names of the buffers: of several domains, the chosen one's.
    """

    name: str
    module: NormLayer
    mean: Tensor
    var: Tensor
    row: Row = FIRST

    @property
    def num_channels(self) -> int:
        """C."""
        return self.mean.shape[0]

    def moments(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Moments:
        """The moments of what the layer is called with, under the layer's own mask; empty where that is empty.

        Raises: as `call`.
        """
        return functional.batch_moments(self.call(args, kwargs))

    def call(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Call:
        """What the layer is called with, and its own mask.

        Raises:
            ShapeError, DTypeError, OptionError: the layer cannot be called like this.
        """
        x = args[0] if args else kwargs["input"]
        ours = self.module if isinstance(self.module, BatchNorm) else None
        self.check_unmoved()
        mask = None if ours is None else kwargs.get("mask")
        call = Call(x, mask=mask, channel_dim=1 if ours is None else ours.channel_dim)
        layout.channel_axis(x.dim(), call.channel_dim)
        layout.check_vector(self.mean, "running_mean", call.num_channels)
        return call

    def write(self, mean: Tensor, var: Tensor) -> None:
        """Have the layer normalise by these, (C,) each."""
        with torch.inference_mode() if self.mean.is_inference() else torch.no_grad():
            self.mean.copy_(mean)
            self.var.copy_(var)

    def settle(self, mean: Tensor, var: Tensor) -> None:
        """`write`, for good.

        Raises:
            NonFiniteError: rounded to the buffers' dtype they are not finite.
        """
        self.write(mean, var)
        self.check_rounded(mean, var)

    def check_rounded(self, mean: Tensor, var: Tensor) -> None:
        """The buffers hold these, rounded to their dtype.

        Raises:
            NonFiniteError: as `settle`.
        """
        if not math.isfinite(float((self.mean + self.var).sum(dtype=statistics_dtype(self.mean.device)))):
            raise NonFiniteError(
                f'layer "{self.name}": got statistics up to {float(mean.abs().max()):.3g} and {float(var.max()):.3g} '
                f"that {self.var.dtype} cannot hold; they must be finite. Keep running statistics in float32: "
                f"batchnorm.convert(model)"
            )

    def check_unmoved(self) -> None:
        """What is written has to be what the layer reads: not so in a replica, or under `functional_call`.

        Raises:
            OptionError: it is not.
        """
        mean, var = (getattr(self.module, name) for name in (self.row.mean, self.row.var))
        if in_functorch() or mean is not self.mean or var is not self.var:
            raise OptionError(
                "got a call with other buffers than the model's own, or inside a transform of torch.func; "
                "its statistics are being computed, and are written to the model's buffers. Call the model itself: not "
                "a replica of DataParallel's, and not through torch.func"
            )


def select_layers(model: nn.Module, *, frozen: bool = False) -> tuple[list[Layer], list[SkippedLayer]]:
    """A model's layers that take part, and those that do not.

    A layer that the model holds more than once is one, under its first name. Layers that have not been initialised yet
    are skipped here, and refused where they are called. Of a layer with several domains, the statistics are those of
    the one that `batchnorm.domain` has chosen.

    Args:
        model: any module.
        frozen: whether layers take part whose statistics stand still: where these are read only.

    Raises:
        OptionError: statistics without data, on the device "meta"; several domains, and none of them chosen.
    """
    layers, skipped = [], []
    for path, module in named_norm_layers(model):
        name, row = display_name(path), FIRST
        if isinstance(module, BatchNorm):
            if module.frozen.statistics and not frozen:
                skipped.append(SkippedLayer(name, "frozen"))
                continue
            row = _chosen(name, module)
        mean, var = (buffers_of(module).get(which) for which in (row.mean, row.var))
        if mean is None or var is None:
            skipped.append(SkippedLayer(name, "no running statistics"))
        elif uninitialized(module):
            skipped.append(SkippedLayer(name, "not initialised yet"))
        elif mean.is_meta:
            raise OptionError(
                f'layer "{name}": got statistics on the device "meta", which hold no data; they are needed. Load the '
                f"model's weights first"
            )
        else:
            layers.append(Layer(name, module, mean, var, row))
    return layers, skipped


def _chosen(name: str, layer: BatchNorm) -> Row:
    """The row of the domain that a layer's samples are of.

    Raises:
        OptionError: nobody has chosen one of several, or more than one.
    """
    if isinstance(layer._row, Row):
        return layer._row
    names = ", ".join(f'"{domain}"' for domain in layer.domains)
    raise OptionError(
        f'layer "{name}": got the domains {names} and no choice of one; each has statistics of its own. Call this '
        f'inside "with batchnorm.domain(model, "{layer.domains[0]}"):"'
    )


Receive = Callable[[Layer, tuple[Any, ...], dict[str, Any]], None]


class CallHooks:
    """Hooks of the layers' calls.

    Args:
        receive: what is called before each layer's forward.
        expected: whether a forward pass of ours runs: other calls are refused.

    Attributes:
        refused: the first of our own errors that was raised in a call. A model may catch it; it is raised again.
    """

    def __init__(self, receive: Receive, expected: Callable[[], bool]) -> None:
        self._receive = receive
        self._expected = expected
        self.refused: BatchNormError | None = None

    @contextmanager
    def on(self, model: nn.Module, layers: Sequence[Layer]) -> Iterator[None]:
        """Inside, `receive(layer, args, kwargs)` is called before each layer's forward, after all other hooks."""
        by_module: dict[nn.Module, Layer] = {layer.module: layer for layer in layers}
        waiting = [module for module in model.modules() if uninitialized(module)]

        def before(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            self._called(by_module[module], args, kwargs)

        # First of all hooks: the module's own would initialise it.
        with forward_hooks(waiting, _refuse_uninitialized, first=True), forward_hooks(by_module, before):
            yield

    def _called(self, layer: Layer, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        self.check()
        try:
            if not self._expected():
                raise OrderError(
                    "got a call while no batch's forward pass was running; its statistics are being computed. Compute "
                    "what the batches need with another copy of the model, or beforehand"
                )
            self._receive(layer, args, kwargs)
        except BatchNormError as error:
            self.refused = error.within(f'layer "{layer.name}"')
            raise self.refused from error

    def check(self) -> None:
        """Raise what was refused."""
        if self.refused is not None:
            raise self.refused


def _refuse_uninitialized(module: nn.Module, *_: object) -> None:
    raise OptionError(
        f"got a model with a {type(module).__name__} that has not been initialised yet; recalibration needs an "
        f"initialised model. Run one batch through the model first"
    )
