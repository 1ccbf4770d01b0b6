"""`recompute`: what is changed in place, a view or a copy is never mistaken for something else."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import batchnorm as bn
from batchnorm.errors import OrderError
from support.networks import Calls
from support.passes import chain, check, conv, images, norm


def with_change(change: Callable[[Tensor], Any]) -> nn.Module:
    """A network that does something with an output before it goes on."""
    torch.manual_seed(0)
    return Calls(lambda net, x: net.b(change(net.n(net.a(x)))), a=conv(3), n=norm("silu"), b=conv())


def without_gradient(change: Callable[[Tensor], Any], then: Callable[[Tensor], Tensor] = lambda y: y) -> Any:
    def call(y: Tensor) -> Tensor:
        with torch.no_grad():
            change(y)
        return then(y)

    return call


CHANGES: dict[str, Callable[[Tensor], Tensor]] = {
    "in place": lambda y: y.mul_(2),
    "in place, of a view": lambda y: (y.view(-1).mul_(2), y)[1],
    "in place, unseen": without_gradient(lambda y: y.mul_(2)),
    "in place, unseen, of a view": without_gradient(lambda y: y[0].mul_(2)),
    "in place, unseen, and an activation": without_gradient(lambda y: y.mul_(2), F.relu),
    "in place, unseen, and an activation in place": without_gradient(lambda y: y.mul_(2), F.relu_),
    "an activation, and in place, unseen": lambda y: without_gradient(lambda r: r.add_(1))(F.silu(y)),
    "an activation in place, and in place, unseen": lambda y: without_gradient(lambda r: r.add_(1))(
        F.silu(y, inplace=True)
    ),
    "in place, unseen, and a pooling": without_gradient(lambda y: y.mul_(2), lambda y: F.max_pool2d(y, 2)),
    "a pooling, and in place, unseen": lambda y: without_gradient(lambda r: r.add_(1))(F.max_pool2d(y, 2)),
    "in place, unseen, and a concatenation": without_gradient(
        lambda y: y.mul_(2), lambda y: torch.cat([y[:, :8], y, y[:, 8:]], 1)[:, 8:24]
    ),
    "a copy": lambda y: y.clone(),
    "detached": lambda y: y.detach(),
    "detached, and in place": lambda y: y.detach().mul_(2),
    "other data": lambda y: y.data.mul(2),
    "a slice": lambda y: y[:, :, 3:, 5:],
    "a permutation": lambda y: y.transpose(2, 3),
}


@pytest.mark.parametrize("change", CHANGES)
def test_a_changed_output(change: str) -> None:
    check(with_change(CHANGES[change]), images())


@pytest.mark.parametrize("change", ["in place", "in place, unseen"])
def test_an_output_that_is_changed_in_place_is_kept(change: str) -> None:
    report = check(with_change(CHANGES[change]), images()).report
    assert "in place" in report.left["n"]


def test_storage_that_is_used_again() -> None:
    """Many outputs of one size, freed at once: each has its own history."""
    torch.manual_seed(0)

    def call(net: nn.Module, x: Tensor) -> Tensor:
        total = net.b(net.n(net.a(x)))
        for i in range(6):
            net.n(net.a(x + i))  # freed
            total = total + net.b(net.n(net.a(x - i)))
        return total

    check(Calls(call, a=conv(3), n=norm(), b=conv()), images())


def test_a_parameter_that_changes_before_the_backward_pass_is_an_error_as_without() -> None:
    for on in (False, True):
        net = chain()
        if on:
            bn.recompute(net)
        y = net(images()).sum()
        with torch.no_grad():
            net[3].weight.add_(1)
        with pytest.raises(RuntimeError, match="modified by an inplace operation"):
            y.backward()


def test_a_parameter_that_has_no_part_in_a_gradient_may_change() -> None:
    net = chain()
    y = net(images())
    (expected,) = torch.autograd.grad(y.sum(), net[6].weight)
    bn.recompute(net)
    y = net(images())
    with torch.no_grad():
        net[5].weight.add_(1)
    (actual,) = torch.autograd.grad(y.sum(), net[6].weight)
    assert torch.equal(actual, expected)


def test_an_input_that_changes_before_the_backward_pass_is_an_error() -> None:
    net = Calls(lambda net, x: (h := net.a(x), net.b(net.n(h))), a=conv(3), n=norm(), b=conv())
    bn.recompute(net)
    h, y = net(images())
    with torch.no_grad():
        h.add_(1)
    with pytest.raises(OrderError, match="at version 1; expected version 0"):
        y.sum().backward()


def test_other_saved_tensors_are_watched_too() -> None:
    net = Calls(lambda net, x: (h := net.a(x), h.sin()), a=conv(3))
    bn.recompute(net)
    h, y = net(images())
    h.detach().add_(1)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        y.sum().backward()
