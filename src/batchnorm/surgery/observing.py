"""How the modules of a model are called: seen on example inputs."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from batchnorm.errors import OptionError


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
class Call:
    """One call of a module: its arguments, where a `Spec` stands for each tensor."""

    args: tuple[Any, ...]
    kwargs: dict[str, Any]

    def alike(self, other: Call) -> bool:
        """Whether both are the same but for the tensors' shapes and dtypes."""
        here, there = (pytree.tree_flatten((call.args, call.kwargs)) for call in (self, other))
        return here[1] == there[1] and all(
            isinstance(b, Spec) if isinstance(a, Spec) else a is b or a == b
            for a, b in zip(here[0], there[0], strict=True)
        )


Calls = dict[nn.Module, list[Call]]


def forwarded(model: nn.Module, example_inputs: Any) -> Any:  # noqa: ANN401 - whatever models take and return
    """Call a model: with a tensor, a tuple or list of arguments, or a dict of keywords.

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


@contextmanager
def inference(model: nn.Module) -> Iterator[None]:
    """Inside, a model is in inference mode and no gradients are recorded; afterwards each module is as it was."""
    modes = [(module, module.training) for module in model.modules()]
    try:
        for module, _ in modes:
            module.training = False
        with torch.no_grad():
            yield
    finally:
        for module, training in modes:
            module.training = training


@contextmanager
def hooks_on(
    modules: list[nn.Module],
    before: Callable[[nn.Module, tuple[Any, ...], dict[str, Any]], None] | None = None,
    after: Callable[[nn.Module, tuple[Any, ...], dict[str, Any], Any], None] | None = None,
) -> Iterator[None]:
    """Inside, `before` and `after` are called when these modules are."""
    handles = []
    try:
        for module in modules:
            if before is not None:
                handles.append(module.register_forward_pre_hook(before, with_kwargs=True))
            if after is not None:
                handles.append(module.register_forward_hook(after, with_kwargs=True))
        yield
    finally:
        for handle in handles:
            handle.remove()


def observe(model: nn.Module, example_inputs: Any) -> tuple[Calls, Any]:  # noqa: ANN401 - as `forwarded`
    """Every module's calls in one inference pass, in order; and what the model returned."""
    calls: Calls = {}

    def note(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        args, kwargs = pytree.tree_map_only(Tensor, lambda t: Spec(tuple(t.shape), t.dtype), (args, kwargs))
        calls.setdefault(module, []).append(Call(args, kwargs))

    with inference(model), hooks_on(list(model.modules()), before=note):
        return calls, forwarded(model, example_inputs)
