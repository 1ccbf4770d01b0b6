"""The activations: one row for each, and which modules and functions of torch compute them.

A new activation is one row of `ACTIVATIONS` here, and one of `kernels/cpu/loops/activations.hpp`; without the second it
works all the same, slower. All have torch's default parameters.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from batchnorm.errors import OptionError


@dataclass(frozen=True)
class Activation:
    """One activation: y = formula(z).

    Attributes:
        name: what users call it.
        formula: from z to y.
        gradient: from dy and z to dz = dy * y'(z); at a kink, what torch takes.
        module: torch's module.
        functions: torch's functions, and names of its tensors' methods, that compute it.
        defaults: the parameters, in the functions' order, with the values that the formula has.
        kinks: where the derivative jumps.
        other_modules: modules of other libraries that compute the same, by module and name.
    """

    name: str
    formula: Callable[[Tensor], Tensor]
    gradient: Callable[[Tensor, Tensor], Tensor]
    module: type[nn.Module]
    functions: tuple[Callable[..., Any] | str, ...]
    defaults: Mapping[str, object] = field(default_factory=dict)
    kinks: tuple[float, ...] = ()
    other_modules: tuple[str, ...] = ()


def _silu_gradient(dy: Tensor, z: Tensor) -> Tensor:
    s = z.sigmoid()
    return dy * s * (1 + z * (1 - s))


def _gelu_gradient(dy: Tensor, z: Tensor) -> Tensor:
    distribution = (1 + torch.erf(z / math.sqrt(2))) / 2
    density = torch.exp(-z.square() / 2) / math.sqrt(2 * math.pi)
    return dy * (distribution + z * density)


def _hardswish_gradient(dy: Tensor, z: Tensor) -> Tensor:
    return torch.where(z <= -3, 0, torch.where(z < 3, dy * (z / 3 + 0.5), dy))


def _mish_gradient(dy: Tensor, z: Tensor) -> Tensor:
    t = F.softplus(z).tanh()
    return dy * (t + z * z.sigmoid() * (1 - t.square()))


def _sigmoid_gradient(dy: Tensor, z: Tensor) -> Tensor:
    s = z.sigmoid()
    return dy * s * (1 - s)


_TIMM = "timm.layers.activations."
ACTIVATIONS: dict[str, Activation] = {
    row.name: row
    for row in (
        Activation(
            "relu",
            F.relu,
            lambda dy, z: torch.where(z <= 0, 0, dy),
            nn.ReLU,
            (F.relu, F.relu_, torch.relu, torch.relu_, "relu", "relu_"),
            kinks=(0.0,),
        ),
        Activation(
            "leaky_relu",
            F.leaky_relu,
            lambda dy, z: torch.where(z > 0, dy, dy * 0.01),
            nn.LeakyReLU,
            (F.leaky_relu, F.leaky_relu_),
            {"negative_slope": 0.01},
            kinks=(0.0,),
        ),
        Activation("silu", F.silu, _silu_gradient, nn.SiLU, (F.silu,), other_modules=(f"{_TIMM}Swish",)),
        Activation(
            "gelu",
            F.gelu,
            _gelu_gradient,
            nn.GELU,
            (F.gelu,),
            {"approximate": "none"},
            other_modules=(f"{_TIMM}GELU",),  # with an argument that does nothing
        ),
        Activation(
            "hardswish",
            F.hardswish,
            _hardswish_gradient,
            nn.Hardswish,
            (F.hardswish,),
            kinks=(-3.0, 3.0),
            other_modules=(f"{_TIMM}HardSwish",),
        ),
        Activation(
            "elu",
            F.elu,
            lambda dy, z: torch.where(z > 0, dy, dy * z.exp()),
            nn.ELU,
            (F.elu, F.elu_),
            {"alpha": 1.0},
            kinks=(0.0,),  # of the second derivative
        ),
        Activation(
            "relu6",
            F.relu6,
            lambda dy, z: torch.where((z > 0) & (z < 6), dy, 0),
            nn.ReLU6,
            (F.relu6,),
            kinks=(0.0, 6.0),
        ),
        Activation("mish", F.mish, _mish_gradient, nn.Mish, (F.mish,), other_modules=(f"{_TIMM}Mish",)),
        Activation(
            "sigmoid",
            torch.sigmoid,
            _sigmoid_gradient,
            nn.Sigmoid,
            (torch.sigmoid, torch.sigmoid_, F.sigmoid, torch.special.expit, "sigmoid", "sigmoid_"),
            other_modules=(f"{_TIMM}Sigmoid",),
        ),
        Activation(
            "tanh",
            torch.tanh,
            lambda dy, z: dy * (1 - z.tanh().square()),
            nn.Tanh,
            (torch.tanh, torch.tanh_, F.tanh, "tanh", "tanh_"),
            other_modules=(f"{_TIMM}Tanh",),
        ),
    )
}


def check_activation(name: str | None) -> None:
    """One of the activations' names, or None.

    Raises:
        OptionError: it is neither.
    """
    if name is not None and name not in ACTIVATIONS:
        known = ", ".join(f'"{known}"' for known in ACTIVATIONS)
        raise OptionError(f"got activation={name!r}; it must be one of {known} or None")


# --- which activation something of another library is ---------------------------------------------------------------


def qualified_name(cls: type) -> str:
    """A class by module and name, so that it is recognised where its library is not imported."""
    return f"{cls.__module__}.{cls.__qualname__}"


_BY_MODULE = {name: row for row in ACTIVATIONS.values() for name in (qualified_name(row.module), *row.other_modules)}
_BY_FUNCTION = {function: row for row in ACTIVATIONS.values() for function in row.functions}


def of_module(module: nn.Module) -> tuple[str | None, str]:
    """The name of what a module computes; None and the reason where it is not one of our activations."""
    cls = type(module)
    row = _BY_MODULE.get(qualified_name(cls))
    if row is None:
        return None, f"{cls.__qualname__} is not one of our activations"
    return _with_defaults(row, cls.__qualname__, vars(module))


def of_function(target: Callable[..., Any] | str, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> str | None:
    """The name of what a function or method computes of its first argument; None where it is none of ours."""
    row = _BY_FUNCTION.get(target)
    if row is None:
        return None
    given = {**dict(zip(row.defaults, args[1:], strict=False)), **kwargs}
    return _with_defaults(row, row.name, given)[0]


def _with_defaults(row: Activation, shown: str, given: Mapping[str, Any]) -> tuple[str | None, str]:
    for parameter, default in row.defaults.items():
        if given.get(parameter, default) != default:
            return None, f"{shown} has {parameter}={given[parameter]}, ours {default}"
    return row.name, ""
