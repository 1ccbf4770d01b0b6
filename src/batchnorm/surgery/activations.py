"""Which activation of ours a module or a function of others is."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

# What has to be so for an activation to be ours: torch's default parameters.
_DEFAULTS: dict[str, dict[str, object]] = {
    "relu": {},
    "leaky_relu": {"negative_slope": 0.01},
    "silu": {},
    "gelu": {"approximate": "none"},
    "hardswish": {},
    "elu": {"alpha": 1.0},
}
_MODULES: dict[str, str] = {
    "torch.nn.modules.activation.ReLU": "relu",
    "torch.nn.modules.activation.LeakyReLU": "leaky_relu",
    "torch.nn.modules.activation.SiLU": "silu",
    "torch.nn.modules.activation.GELU": "gelu",
    "torch.nn.modules.activation.Hardswish": "hardswish",
    "torch.nn.modules.activation.ELU": "elu",
    "timm.layers.activations.GELU": "gelu",  # the same with an argument that does nothing
}
MODULES: dict[str, type[nn.Module]] = {
    "relu": nn.ReLU,
    "leaky_relu": nn.LeakyReLU,
    "silu": nn.SiLU,
    "gelu": nn.GELU,
    "hardswish": nn.Hardswish,
    "elu": nn.ELU,
}
# Functions of an input and the parameters in order; a name is a method of tensors.
_FUNCTIONS: dict[object, tuple[str, tuple[str, ...]]] = {
    **dict.fromkeys((F.relu, F.relu_, torch.relu, torch.relu_, "relu", "relu_"), ("relu", ())),
    **dict.fromkeys((F.leaky_relu, F.leaky_relu_), ("leaky_relu", ("negative_slope",))),
    F.silu: ("silu", ()),
    F.gelu: ("gelu", ()),
    F.hardswish: ("hardswish", ()),
    **dict.fromkeys((F.elu, F.elu_), ("elu", ("alpha",))),
}


def qualified(cls: type) -> str:
    """A class by module and name, so that it is recognised where its library is not imported."""
    return f"{cls.__module__}.{cls.__qualname__}"


def of_module(module: nn.Module) -> tuple[str | None, str]:
    """Our name of what a module computes; None and the reason where it is none of ours."""
    cls = type(module)
    name = _MODULES.get(qualified(cls))
    if name is None:
        return None, f"{cls.__qualname__} is none of our activations"
    return _with_defaults(name, cls.__qualname__, vars(module))


def of_function(target: Callable[..., Any] | str, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> str | None:
    """Our name of what a function or method computes of its first argument; None where it is none of ours."""
    if target not in _FUNCTIONS:
        return None
    name, parameters = _FUNCTIONS[target]
    given = {**dict(zip(parameters, args[1:], strict=False)), **kwargs}
    return _with_defaults(name, name, given)[0]


def _with_defaults(name: str, shown: str, given: Mapping[str, Any]) -> tuple[str | None, str]:
    for parameter, default in _DEFAULTS[name].items():
        if given.get(parameter, default) != default:
            return None, f"{shown} has {parameter}={given[parameter]}, ours {default}"
    return name, ""
