"""Which modules are linear layers: told by what they call, whatever their class is."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from batchnorm._torch import parameters_of
from batchnorm.models.hooks import forward_hooks
from batchnorm.models.nested import tensors
from batchnorm.models.norm_layers import NormLayer
from batchnorm.surgery.linear import LinearLayer, is_of_torch

_PRODUCT = ("input", "weight", "bias")
_CONVOLUTION = (*_PRODUCT, "stride", "padding", "dilation", "groups")
_TRANSPOSED = (*_PRODUCT, "stride", "padding", "output_padding", "groups", "dilation")
# torch's functions, and the names of what they take.
_LINEAR: dict[object, tuple[str, ...]] = {
    F.linear: _PRODUCT,
    **dict.fromkeys((F.conv1d, F.conv2d, F.conv3d), _CONVOLUTION),
    **dict.fromkeys((F.conv_transpose1d, F.conv_transpose2d, F.conv_transpose3d), _TRANSPOSED),
}

# By module, of those that were called: what it is, or why it is none; None where it calls nothing of the kind.
LinearLayers = dict[nn.Module, LinearLayer | str | None]


@contextmanager
def linear_layers(model: nn.Module) -> Iterator[LinearLayers]:
    """Inside, it is watched what a model's modules call; the result grows meanwhile.

    A module is a linear layer if it calls one of torch's functions of convolution or `linear` once, itself, with
    parameters of its own for weight and bias, and returns what comes out. What it does before with its input, padding
    for example, may be anything.
    """
    found: LinearLayers = {}
    running: list[_Forward] = []

    def before(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        running.append(_Forward(module, (*args, *kwargs.values())))

    def after(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: object) -> None:
        answer = running.pop().linear_layer(output)
        known = found.setdefault(module, answer)
        if known != answer:
            found[module] = "its calls compute different things"

    with _Watch(running), forward_hooks(model.modules(), before=before, after=after):
        yield found


@dataclass
class _Call:
    """One call of a linear function: its name's table, what it got and what came out."""

    function: object
    given: Mapping[str, Any]
    result: object


@dataclass
class _Forward:
    """One call of a module, while it runs.

    Attributes:
        module: which one.
        inputs: what it got.
        calls: the linear functions that it called.
        more: whether it, or a module inside, called others.
        changed: whether others got the result of a linear one.
    """

    module: nn.Module
    inputs: tuple[Any, ...]
    calls: list[_Call] = field(default_factory=list)
    more: bool = False
    changed: bool = False

    def note(self, function: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any], result: object) -> None:
        """A function that the module itself called."""
        operands = (*args, *kwargs.values())
        self.changed |= any(call.result is operand for call in self.calls for operand in operands)
        if function in _LINEAR:
            given = dict(zip(_LINEAR[function], args, strict=False)) | kwargs
            self.calls.append(_Call(function, given, result))
        else:
            self.more = True

    def linear_layer(self, output: object) -> LinearLayer | str | None:
        """What the module is, at its end."""
        if not self.calls:
            return None
        call, *others = self.calls
        own = {id(parameter): name for name, parameter in parameters_of(self.module).items() if parameter is not None}
        weight, added = call.given["weight"], call.given.get("bias")
        bias = "bias" if added is None else own.get(id(added))
        if others:
            return f"calls {len(self.calls)} linear functions"
        if call.result is not output or self.changed:
            return "does more with what its linear function gives"
        if id(weight) not in own or bias is None:
            return "computes the weight or bias that it uses"
        if bias not in parameters_of(self.module):
            return "has no place for a bias"
        if not isinstance(weight, Tensor) or weight.dim() < 2:
            return "gives no channels"
        if any(isinstance(inside, NormLayer) for inside in self.module.modules()):
            return "has batch norm inside"
        turned, groups = _LINEAR[call.function] is _TRANSPOSED, call.given.get("groups", 1)
        return LinearLayer(self.module, own[id(weight)], bias, turned, groups, self._why_not_before(call))

    def _why_not_before(self, call: _Call) -> str | None:
        if _LINEAR[call.function] is _TRANSPOSED:
            return "the outputs of a transposed convolution see different parts of its weight"
        if is_of_torch(self.module) and getattr(self.module, "padding_mode", "zeros") != "zeros":
            return None  # what is repeated at the border is shifted, too
        if self.more or not any(call.given["input"] is given for given in self.inputs):
            return "it does something with its input before"
        return "the convolution pads with zeros, which are not shifted" if _pads(call.given) else None


def _pads(given: Mapping[str, Any]) -> bool:
    """Whether a convolution's own padding adds something."""
    padding = given.get("padding", 0)
    if padding == "same":
        return any(size > 1 for size in given["weight"].shape[2:])
    return padding != "valid" and any(padding if isinstance(padding, tuple | list) else (padding,))


class _Watch(TorchFunctionMode):
    """Tells the innermost running forward of each function that torch is asked for."""

    def __init__(self, running: list[_Forward]) -> None:
        super().__init__()
        self._running = running

    def __torch_function__(
        self, func: Callable[..., Any], types: object, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:  # noqa: ANN401 - torch's own
        kwargs = kwargs or {}
        result = func(*args, **kwargs)
        # Not what only reads a property: its shape, its dtype.
        if self._running and (result is None or any(True for _ in tensors(result))):
            for outer in self._running[:-1]:
                outer.more = True
            self._running[-1].note(func, args, kwargs, result)
        return result
