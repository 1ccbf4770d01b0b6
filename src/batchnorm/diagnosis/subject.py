"""What is checked: a model's layers and their state, or a state_dict's, and what data showed of them."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy

from batchnorm._torch import buffers_of, parameters_of
from batchnorm.diagnosis.observation import Observation, ObservedLayer
from batchnorm.models.norm_layers import NormLayer, named_norm_layers, uninitialized
from batchnorm.modules import BatchNorm
from batchnorm.population.batches import Forward, default_forward

if TYPE_CHECKING:
    from batchnorm.diagnosis.gap import Far, Gap

EPS = 1e-5  # torch's default: what a state_dict does not tell


@dataclass(eq=False)
class LayerState:
    """One layer as it is. All tensors are the layer's own: look, and change nothing.

    Attributes:
        name: its first path in the model; "" is the model itself.
        module: the layer; None of a state_dict.
        mean: (C,) running mean, or None.
        var: (C,) running variance, or None.
        weight: (C,) gamma, or None.
        bias: (C,) beta, or None.
        num_batches_tracked: its counter, or None.
        eps: of a state_dict, torch's default.
        momentum: None for the average of all batches. Of a state_dict it is not known: see `module`.
    """

    name: str
    module: NormLayer | None
    mean: Tensor | None
    var: Tensor | None
    weight: Tensor | None
    bias: Tensor | None
    num_batches_tracked: int | None
    eps: float = EPS
    momentum: float | None = None

    @property
    def num_channels(self) -> int:
        """C; 0 of a layer that has neither statistics nor parameters and does not say, or waits for its first input."""
        known = [t for t in (self.mean, self.var, self.weight, self.bias) if t is not None and not is_lazy(t)]
        if known or self.module is None:
            return int(known[0].numel()) if known else 0
        return int(vars(self.module).get("num_features", 0))

    @property
    def ours(self) -> BatchNorm | None:
        """The layer, where it is one of ours."""
        return self.module if isinstance(self.module, BatchNorm) else None

    @property
    def path(self) -> str:
        """An expression that leads to the layer, for remedies: `model.layer1[0].bn1`."""
        return expression(self.name)


@dataclass(eq=False)
class Subject:
    """Everything that a check may look at.

    Attributes:
        layers: in the model's order.
        model: None of a state_dict.
        optimizer: or None.
        loss: `loss(output, target)`, or None.
        forward: what runs the model on a batch.
        data: what the data showed, or None without data.
        second: what the second data showed, or None.
        example: an input of the model's, of the data: a batch as it came; None without data.
        far: of the layers with running statistics that data came into, how far these are from the population.
        gap: what that does; None where it was not measured.
        gradients: by the names of parameters, the gradients of a training pass of one batch: filled where there are a
            loss and data.
    """

    layers: list[LayerState]
    model: nn.Module | None = None
    optimizer: torch.optim.Optimizer | None = None
    loss: Callable[[Any, Any], Tensor] | None = None
    forward: Forward = default_forward
    data: Observation | None = None
    second: Observation | None = None
    example: Any = None
    far: dict[str, Far] = field(default_factory=dict)
    gap: Gap | None = None
    gradients: Mapping[str, Tensor | None] = field(default_factory=dict)

    def observed(self) -> list[tuple[LayerState, ObservedLayer]]:
        """The layers that data came into, with what came."""
        if self.data is None:
            return []
        return [(layer, self.data.layers[layer.name]) for layer in self.layers if layer.name in self.data.layers]


def expression(name: str) -> str:
    """An expression that leads to the module of a name: `model.layer1[0].conv1`."""
    path = "model"
    for part in filter(None, name.split(".")):
        path += f"[{part}]" if part.isdigit() else f".{part}" if part.isidentifier() else f'.get_submodule("{part}")'
    return path


def subject_of_model(model: nn.Module, **rest: Any) -> Subject:  # noqa: ANN401 - Subject's other attributes
    """A model's layers, torch.nn's and ours, each once."""
    return Subject([_layer(name, module) for name, module in named_norm_layers(model)], model, **rest)


def _layer(name: str, module: NormLayer) -> LayerState:
    buffers, parameters = buffers_of(module), parameters_of(module)
    if uninitialized(module):
        buffers, parameters = {}, {}  # they say nothing yet, and refuse to be asked
    tracked = buffers.get("num_batches_tracked")
    return LayerState(
        name,
        module,
        buffers.get("running_mean"),
        buffers.get("running_var"),
        parameters.get("weight"),
        parameters.get("bias"),
        None if tracked is None or tracked.is_meta else int(tracked),
        vars(module).get("eps", EPS),  # where it is: `layer.eps` of ours may refuse
        module.momentum,
    )


def subject_of_state_dict(state: Mapping[str, Any]) -> Subject:
    """The layers of a state_dict: every prefix under which there are a running_mean and a running_var of one shape."""
    layers = []
    for key, mean in state.items():
        prefix, dot, name = key.rpartition(".")
        var = state.get(f"{prefix}{dot}running_var")
        if name != "running_mean" or not isinstance(mean, Tensor) or not isinstance(var, Tensor) or is_lazy(mean):
            continue
        weight, bias = (_vector(state.get(f"{prefix}{dot}{name}"), mean) for name in ("weight", "bias"))
        tracked = state.get(f"{prefix}{dot}num_batches_tracked")
        counter = int(tracked) if isinstance(tracked, Tensor) and tracked.numel() == 1 else None
        layers.append(LayerState(prefix, None, mean, var, weight, bias, counter))
    return Subject(layers)


def _vector(value: Any, mean: Tensor) -> Tensor | None:  # noqa: ANN401 - a state_dict may hold anything
    return value if isinstance(value, Tensor) and value.shape == mean.shape else None
