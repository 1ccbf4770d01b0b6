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
from batchnorm.choosing import layers_with_domains
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
    """A layer that takes part, or one of its domains.

    Attributes:
        name: its first path in the model, and the domain, if it has several.
        module: the layer itself.
        mean: (C,) its buffer.
        var: (C,) its buffer.
        row: under which names the layer has them.
        place: its first path in the model.
    """

    name: str
    module: NormLayer
    mean: Tensor
    var: Tensor
    row: Row = FIRST
    place: str = ""

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
        moved = (getattr(self.module, name) for name in (self.row.mean, self.row.var))
        if in_functorch() or any(a is not b for a, b in zip(moved, (self.mean, self.var), strict=True)):
            raise OptionError(
                "got a call with other buffers than the model's own, or inside a transform of torch.func; "
                "its statistics are being computed, and are written to the model's buffers. Call the model itself: not "
                "a replica of DataParallel's, and not through torch.func"
            )


def statistics_of(module: nn.Module) -> tuple[Tensor | None, Tensor | None]:
    """A layer's running mean and variance."""
    return buffers_of(module).get("running_mean"), buffers_of(module).get("running_var")


def select_layers(
    model: nn.Module, *, all_domains: bool = False, frozen: bool = False
) -> tuple[list[Layer], list[SkippedLayer]]:
    """A model's layers that take part, and those that do not.

    A layer that the model holds more than once is one, under its first name. Layers that have not been initialised yet
    are skipped here, and refused where they are called.

    Args:
        model: any module.
        all_domains: whether each domain of a layer takes part; otherwise the one that is chosen at the moment does.
        frozen: whether layers take part whose statistics stand still: where these are read only.

    Raises:
        OptionError: statistics without data, on the device "meta"; or of several domains none was chosen.
    """
    layers, skipped = [], []
    several = {layer for layer in layers_with_domains(model) if len(layer.domains) > 1}
    for path, module in named_norm_layers(model):
        name = display_name(path)
        mean, var = statistics_of(module)
        if isinstance(module, BatchNorm) and module.frozen.statistics and not frozen:
            skipped.append(SkippedLayer(name, "frozen"))
        elif mean is None or var is None:
            skipped.append(SkippedLayer(name, "no running statistics"))
        elif uninitialized(module):
            skipped.append(SkippedLayer(name, "not initialised yet"))
        elif mean.is_meta:
            raise OptionError(
                f'layer "{name}": got statistics on the device "meta", which hold no data; they are needed. Load the '
                f"model's weights first"
            )
        elif isinstance(module, BatchNorm) and module in several:
            for row in module._rows if all_domains else (_chosen(module),):
                mean, var, *_ = module.statistics_of(row.number)
                layers.append(Layer(f"{name} ({module.domains[row.number]})", module, mean, var, row, name))
        else:
            layers.append(Layer(name, module, mean, var, place=name))
    return layers, skipped


def _chosen(layer: BatchNorm) -> Row:
    row = layer._row
    if not isinstance(row, Row):
        raise OptionError(
            f"got a model whose layers have the domains {', '.join(map(repr, layer.domains))} without saying which the "
            f'samples are of. Call this inside "with batchnorm.domain(model, {layer.domains[0]!r}):"; or pass '
            f"domain_of=lambda batch: ... to recalibrate, a function that returns a batch's domain, or one for each of "
            f"its samples"
        )
    return row


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
        by_module: dict[nn.Module, dict[object, Layer]] = {}
        for layer in layers:
            by_module.setdefault(layer.module, {})[layer.row] = layer
        waiting = [module for module in model.modules() if uninitialized(module)]

        def before(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            of_domains = by_module[module]
            chosen = getattr(module, "_row", FIRST)
            if chosen not in of_domains:
                raise OptionError(
                    f"got a call for samples of other domains than that of {next(iter(of_domains.values())).name}; its "
                    f"statistics are being computed. Choose the domain around the whole of this, not inside the model"
                )
            self._called(of_domains[chosen], args, kwargs)

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
