"""What a layer can take in of what follows it, and the reason where it cannot."""

from __future__ import annotations

import operator
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import batchnorm as bn
from batchnorm.surgery.observing import ModuleCall, Spec
from batchnorm.surgery.patterns import Match, match, writes_over_its_input
from batchnorm.surgery.tracing import Region, trace
from support.networks import Calls


def matched(forward: Callable[..., Any], **modules: nn.Module) -> Match | str:
    """The answer for the first call of `bn` in a forward."""
    modules.setdefault("bn", bn.BatchNorm2d(3))
    model = Calls(forward, **modules)
    graph, reason = trace(model, ModuleCall((Spec((), torch.float32),), {}))
    assert graph is not None, reason
    return match(region := Region("", model, graph), next(n for n in graph.nodes if region.called(n) is model.bn))


RELUS: dict[str, Any] = {
    "F.relu": lambda m, x: F.relu(m.bn(x)),
    "F.relu in place": lambda m, x: F.relu(m.bn(x), inplace=True),
    "torch.relu": lambda m, x: torch.relu(m.bn(x)),
    "torch.relu_": lambda m, x: torch.relu_(m.bn(x)),
    "method": lambda m, x: m.bn(x).relu(),
    "method in place": lambda m, x: m.bn(x).relu_(),
    "module": lambda m, x: m.relu(m.bn(x)),
    "module in place": lambda m, x: m.relu_in_place(m.bn(x)),
    "through what does nothing": lambda m, x: m.relu(m.nothing(m.bn(x))),
}
SUMS: dict[str, Any] = {
    "operator": lambda m, x: F.relu(m.bn(x) + x),
    "operator, turned": lambda m, x: F.relu(x + m.bn(x)),
    "operator in place": lambda m, x: F.relu(operator.iadd(m.bn(x), x)),
    "torch.add": lambda m, x: F.relu(torch.add(m.bn(x), x)),
    "torch.add, turned": lambda m, x: F.relu(torch.add(x, m.bn(x))),
    "method": lambda m, x: F.relu(m.bn(x).add(x)),
    "method, turned": lambda m, x: F.relu(x.add(m.bn(x))),
    "method in place": lambda m, x: F.relu(m.bn(x).add_(x)),
    "through what does nothing": lambda m, x: F.relu(m.nothing(m.nothing(m.bn(x)) + x)),
}


def modules() -> dict[str, nn.Module]:
    return {"relu": nn.ReLU(), "relu_in_place": nn.ReLU(inplace=True), "nothing": nn.Identity()}


@pytest.mark.parametrize("form", RELUS)
def test_every_form_of_relu(form: str) -> None:
    found = matched(RELUS[form], **modules())
    assert isinstance(found, Match)
    assert str(found) == "relu"
    assert found.addition is None
    assert found.last is found.action


@pytest.mark.parametrize("form", SUMS)
def test_every_form_of_an_addition(form: str) -> None:
    found = matched(SUMS[form], **modules())
    assert isinstance(found, Match)
    assert str(found) == "the addition and relu"
    assert found.residual.target == "x"


@pytest.mark.parametrize(
    ("module", "name"),
    [
        (nn.SiLU(), "silu"),
        (nn.GELU(), "gelu"),
        (nn.Hardswish(), "hardswish"),
        (nn.ELU(), "elu"),
        (nn.LeakyReLU(), "leaky_relu"),
    ],
    ids=str,
)
def test_every_activation(module: nn.Module, name: str) -> None:
    found = matched(lambda m, x: m.act(m.bn(x)), act=module)
    assert isinstance(found, Match)
    assert found.activation == name


def test_an_addition_alone() -> None:
    found = matched(lambda m, x: m.bn(x) + x)
    assert isinstance(found, Match)
    assert str(found) == "the addition"
    assert found.last is found.addition


def test_an_addition_whose_activation_is_none_of_ours() -> None:
    found = matched(lambda m, x: F.softplus(m.nothing(m.bn(x) + x)), nothing=nn.Identity())
    assert isinstance(found, Match)
    assert (str(found), found.last) == ("the addition", found.addition)


def test_an_addition_with_more_readers() -> None:
    found = matched(lambda m, x: F.relu(y := m.bn(x) + x) + y)
    assert isinstance(found, Match)
    assert str(found) == "the addition"


class Mine(nn.BatchNorm2d):
    """May do anything."""


def hooked(module: nn.Module) -> nn.Module:
    module.register_forward_hook(lambda *_: None)
    return module


REFUSED: dict[str, tuple[Any, dict[str, nn.Module], str]] = {
    "two readers": (lambda m, x: F.relu(y := m.bn(x)) + y, {}, "its output has 2 readers"),
    "added to itself": (lambda m, x: F.relu((y := m.bn(x)) + y), {}, "its output has 2 readers"),
    "returned": (lambda m, x: m.bn(x), {}, "nothing comes after it"),
    "returned as well": (lambda m, x: (F.relu(y := m.bn(x)), y), {}, "its output has 2 readers"),
    "none of ours": (lambda m, x: F.softplus(m.bn(x)), {}, "after it, softplus is not one of our activations"),
    "a method": (lambda m, x: m.bn(x).sin(), {}, "after it, sin is not one of our activations"),
    "a module": (
        lambda m, x: m.act(m.bn(x)),
        {"act": nn.Softplus()},
        "after it, Softplus is not one of our activations",
    ),
    "other parameters": (lambda m, x: m.act(m.bn(x)), {"act": nn.ELU(2.0)}, "after it, ELU has alpha=2.0, ours 1.0"),
    "a function's parameters": (lambda m, x: F.elu(m.bn(x), 2.0), {}, "after it, elu is not one of our activations"),
    "hooks behind": (
        lambda m, x: m.act(m.bn(x)),
        {"act": hooked(nn.ReLU())},
        "act after it has hooks, which would not be called",
    ),
    "hooks": (
        lambda m, x: F.relu(m.bn(x)),
        {"bn": hooked(bn.BatchNorm2d(3))},
        "it has hooks, which would see another output",
    ),
    "hooks on nothing": (
        lambda m, x: F.relu(m.act(m.bn(x))),
        {"act": hooked(nn.Identity())},
        "act after it has hooks, which would not be called",
    ),
    "another class": (lambda m, x: F.relu(m.bn(x)), {"bn": Mine(3)}, "Mine is none of ours"),
    "an activation inside": (
        lambda m, x: F.relu(m.bn(x)),
        {"bn": bn.BatchNorm2d(3, activation="silu")},
        "it has an activation inside, silu",
    ),
    "a mask": (lambda m, x: F.relu(m.bn(x, mask=x)), {}, "it is called with more than its input"),
    "a number": (lambda m, x: F.relu(m.bn(x) + 1.0), {}, "what is added to its output is no activation"),
    "a size": (lambda m, x: F.relu(m.bn(x) + x.size(0)), {}, "what is added to its output is no activation"),
    "a factor": (lambda m, x: F.relu(torch.add(m.bn(x), x, alpha=2)), {}, "the addition after it has other operands"),
    "the residual written": (
        lambda m, x: F.relu(operator.iadd(m.act(x), m.bn(x))),
        {"act": nn.Sigmoid()},
        "the addition after it writes over its other operand",
    ),
    "the input written": (
        lambda m, x: F.relu(m.bn(y := torch.sigmoid(x)) + y.mul_(2)),
        {},
        "something is written in place before its output is added",
    ),
    "the input written by a module": (
        lambda m, x: F.relu(m.bn(y := torch.sigmoid(x)) + m.act(y)),
        {"act": nn.ReLU(inplace=True)},
        "something is written in place before its output is added",
    ),
    "called again": (lambda m, x: F.relu(m.bn(x) + m.bn(x * 2)), {}, "it is called again before its output is added"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_is_refused(name: str) -> None:
    forward, others, reason = REFUSED[name]
    answer = matched(forward, **others)
    assert isinstance(answer, str)
    assert answer.startswith(reason)


def test_what_is_written_beside_a_convolutions_output_does_not_matter() -> None:
    found = matched(
        lambda m, x: F.relu(m.bn(m.conv(x)) + m.act(x * 2)), conv=nn.Conv2d(3, 3, 1), act=nn.ReLU(inplace=True)
    )
    assert isinstance(found, Match)


@pytest.mark.parametrize(
    ("target", "kwargs", "expected"),
    [
        (operator.iadd, {}, True),
        (operator.add, {}, False),
        (operator.invert, {}, False),
        (operator.setitem, {}, True),
        (F.relu, {"inplace": True}, True),
        (F.relu, {}, False),
        (F.relu_, {}, True),
        (torch.relu_, {}, True),
        ("add_", {}, True),
        ("add", {}, False),
        (torch.add, {"out": 1}, True),
        ("__add__", {}, False),
    ],
)
def test_what_writes_over_its_input(target: Any, kwargs: dict[str, Any], expected: bool) -> None:
    assert writes_over_its_input(target, kwargs) is expected
