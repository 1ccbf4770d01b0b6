"""What comes after a batch-norm layer and can be part of it: an addition, an activation."""

from __future__ import annotations

import inspect
import operator
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx, nn

from batchnorm import activations
from batchnorm.models.hooks import has_hooks
from batchnorm.modules import BatchNorm
from batchnorm.surgery import linear
from batchnorm.surgery.norm_act import has_our_forward, inside
from batchnorm.surgery.tracing import Region, arguments

_ADDITIONS = (operator.add, operator.iadd, torch.add, "add", "add_", "__add__", "__iadd__")
_IN_PLACE = (operator.iadd, "add_", "__iadd__")


@dataclass(frozen=True)
class Match:
    """One call of a layer with what follows it.

    Attributes:
        norm: the layer.
        node: its call.
        addition: the addition of its output to a residual.
        residual: the other operand.
        action: the activation behind.
        activation: its name.
        nothing: modules between these that do nothing.
    """

    norm: BatchNorm
    node: fx.Node
    addition: fx.Node | None
    residual: fx.Node | None
    action: fx.Node | None
    activation: str | None
    nothing: tuple[fx.Node, ...] = ()

    @property
    def last(self) -> fx.Node:
        """The node that has the result."""
        return self.nodes[-1]

    @property
    def nodes(self) -> list[fx.Node]:
        """Those that become one, in order."""
        return sorted(node for node in (self.node, self.addition, self.action, *self.nothing) if node is not None)

    def __str__(self) -> str:
        parts = [*(["the addition"] if self.addition else []), *([self.activation] if self.activation else [])]
        return " and ".join(parts)


def match(region: Region, node: fx.Node) -> Match | str:
    """What a call of a layer can take in; or why nothing."""
    norm = region.called(node)
    if not isinstance(norm, BatchNorm) or not has_our_forward(norm):
        return f"{type(norm).__qualname__} is none of ours"
    if len(node.args) != 1 or node.kwargs:
        return "it is called with more than its input"
    if has_hooks(norm):
        return "it has hooks, which would see another output"
    if (own := inside(norm)) is not None:
        return f"it has an activation inside, {own}"
    nothing: list[fx.Node] = []
    before, user = _next(region, node, nothing)
    if user is None:
        return f"its output has {_readers(before)} readers"
    addition = residual = None
    if user.target in _ADDITIONS:
        found = _added(user, before)
        if isinstance(found, str):
            return found
        addition, residual = user, found
        behind: list[fx.Node] = []
        _, user = _next(region, addition, behind)
        if user is None:
            return _checked(region, Match(norm, node, addition, residual, None, None, tuple(nothing)))
        nothing = [*nothing, *behind] if _activation(region, user)[0] is not None else nothing
    activation, why = _activation(region, user)
    if activation is None and addition is None:
        return why
    action = None if activation is None else user
    return _checked(region, Match(norm, node, addition, residual, action, activation, tuple(nothing)))


def _next(region: Region, node: fx.Node, nothing: list[fx.Node]) -> tuple[fx.Node, fx.Node | None]:
    """The last of a node and of those after it that do nothing, and the only one that reads it, if there is one.

    Args:
        region: where the node is.
        node: where to begin.
        nothing: gets those that do nothing.
    """
    while _readers(node) == 1:
        (user,) = node.users
        module = region.called(user)
        if type(module) is not nn.Identity or has_hooks(module) or user.args != (node,):
            return node, user
        nothing.append(user)
        node = user
    return node, None


def _readers(node: fx.Node) -> int:
    """How many there are; one that reads twice counts twice, and the region's output is one."""
    return sum(argument is node for user in node.users for argument in arguments(user))


def _added(addition: fx.Node, node: fx.Node) -> fx.Node | str:
    """The other operand, or why it is no residual."""
    if len(addition.args) != 2 or addition.kwargs:
        return "the addition after it has other operands than two"
    first, second = addition.args
    other = second if first is node else first
    if not isinstance(other, fx.Node) or other.op == "get_attr" or other.target in (getattr, "size", "dim"):
        return "what is added to its output is no activation"
    if addition.target in _IN_PLACE and first is not node:
        return "the addition after it writes over its other operand"
    return other


def _activation(region: Region, node: fx.Node) -> tuple[str | None, str]:
    """The name of the activation that a node is; None and what it is instead."""
    module = region.called(node)
    if module is not None:
        if has_hooks(module):
            return None, f"{region.where(node)} after it has hooks, which would not be called"
        name, why = activations.of_module(module)
        return name, f"after it, {why}"
    if node.op in ("call_function", "call_method"):
        name = activations.of_function(node.target, node.args, node.kwargs)
        return name, f"after it, {getattr(node.target, '__name__', node.target)} is not one of our activations"
    return None, "nothing comes after it"


def _checked(region: Region, found: Match) -> Match | str:
    """A match, if the layer may as well be called where its last node is."""
    source = found.node.args[0]
    assert isinstance(source, fx.Node)
    came = region.called(source)
    fresh = came is not None and linear.is_of_torch(came) and _readers(source) == 1
    between = found.node.next
    while between is not found.last:
        if region.called(between) is found.norm:
            return "it is called again before its output is added"
        if between not in found.nodes and not fresh and _writes(region, between):
            return "something is written in place before its output is added"
        between = between.next
    return found


def _writes(region: Region, node: fx.Node) -> bool:
    module = region.called(node)
    if module is not None:
        return getattr(module, "inplace", False) is True
    return node.op in ("call_function", "call_method") and writes_over_its_input(node.target, node.kwargs)


def writes_over_its_input(target: Callable[..., Any] | str, kwargs: Mapping[str, Any]) -> bool:
    """Whether a function or method changes its first argument, by torch's conventions."""
    name = target if isinstance(target, str) else getattr(target, "__name__", "")
    if kwargs.get("inplace") is True or kwargs.get("out") is not None or name in ("setitem", "delitem"):
        return True
    if name.endswith("_") and not name.endswith("__"):
        return True
    # The operators of augmented assignment are iadd, imul, ...
    return (
        inspect.isbuiltin(target)
        and getattr(target, "__module__", "") == "_operator"
        and name.startswith("i")
        and (name not in ("invert", "inv", "index", "indexOf", "is_", "is_not", "itemgetter"))
    )
