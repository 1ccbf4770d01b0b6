"""How the modules of a model are called: seen on example inputs."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from batchnorm.errors import OptionError
from batchnorm.models.hooks import forward_hooks
from batchnorm.models.modes import inference
from batchnorm.models.nested import leaves, map_tensors, same_structure


@dataclass(frozen=True)
class Spec:
    """What a call was given for a tensor.

    Attributes:
        shape: its shape.
        dtype: its dtype.
    """

    shape: tuple[int, ...]
    dtype: torch.dtype


@dataclass(frozen=True)
class ModuleCall:
    """One call of a module: its arguments, where a `Spec` stands for each tensor."""

    args: tuple[Any, ...]
    kwargs: dict[str, Any]

    def alike(self, other: ModuleCall) -> bool:
        """Whether both are the same but for the tensors' shapes and dtypes."""
        here, there = (self.args, self.kwargs), (other.args, other.kwargs)
        return same_structure(here, there) and all(
            isinstance(b, Spec) if isinstance(a, Spec) else a is b or a == b
            for a, b in zip(leaves(here), leaves(there), strict=True)
        )


Calls = dict[nn.Module, list[ModuleCall]]


def forward(model: nn.Module, example_inputs: Any) -> Any:  # noqa: ANN401 - whatever models take and return
    """ModuleCall a model: with a tensor, a tuple or list of arguments, or a dict of keywords.

    Raises:
        OptionError: `example_inputs` is none of these.
    """
    if isinstance(example_inputs, Tensor):
        return model(example_inputs)
    if isinstance(example_inputs, Mapping):
        return model(**example_inputs)
    if isinstance(example_inputs, tuple | list):
        return model(*example_inputs)
    raise OptionError(
        f"got example_inputs of {type(example_inputs).__name__}; it must be a tensor, a tuple of the model's arguments "
        f"or a dict of its keywords. Pass what the model is called with"
    )


def observe(model: nn.Module, example_inputs: Any, run: Callable[[nn.Module, Any], Any] = forward) -> tuple[Calls, Any]:  # noqa: ANN401 - as `forward`
    """Every module's calls in one inference pass, in order; and what the model returned.

    Args:
        model: any module.
        example_inputs: what `run` takes.
        run: what calls the model.
    """
    calls: Calls = {}

    def note(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        args, kwargs = map_tensors((args, kwargs), lambda t: Spec(tuple(t.shape), t.dtype))
        calls.setdefault(module, []).append(ModuleCall(args, kwargs))

    with inference(model), forward_hooks(model.modules(), before=note):
        return calls, run(model, example_inputs)
