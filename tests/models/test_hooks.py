"""What counts as a hook; hooks for a while, and none for a while."""

from __future__ import annotations

import copy
import pickle
from typing import Any

import pytest
import torch
from torch import nn

from batchnorm.models.hooks import Uncopied, forward_hooks, has_hooks, without_hooks


@pytest.mark.parametrize(
    "register",
    [
        "register_forward_hook",
        "register_forward_pre_hook",
        "register_full_backward_hook",
        "register_full_backward_pre_hook",
    ],
)
def test_hooks_of_calls_are_seen_until_they_go(register: str) -> None:
    layer = nn.ReLU()
    assert not has_hooks(layer)
    handle = getattr(layer, register)(lambda *_: None)
    assert has_hooks(layer)
    handle.remove()
    assert not has_hooks(layer)


def test_hooks_are_set_aside_and_come_back_after_an_error() -> None:
    layer, calls = nn.ReLU(), []
    handle = layer.register_forward_hook(lambda *_: calls.append(1))

    def fails() -> None:
        with without_hooks(nn.Sequential(layer)):
            layer(torch.zeros(1))
            assert not has_hooks(layer)
            raise KeyError

    with pytest.raises(KeyError):
        fails()
    layer(torch.zeros(1))
    assert calls == [1]
    handle.remove()
    assert not has_hooks(layer)


def test_hooks_of_forwards_see_arguments_and_outputs_and_go() -> None:
    model, seen = nn.Bilinear(1, 1, 1), []
    x = torch.ones(1)
    with forward_hooks(
        [model], lambda m, args, kwargs: seen.append((m, args, kwargs)), lambda m, args, kwargs, y: seen.append(y)
    ):
        y = model(x, input2=x)
    assert seen == [(model, (x,), {"input2": x}), y]
    model(x, x)
    assert len(seen) == 2
    assert not has_hooks(model)


@pytest.mark.parametrize("first", [False, True])
def test_hooks_come_after_others_or_first(first: bool) -> None:
    model, order = nn.ReLU(), []
    model.register_forward_pre_hook(lambda *_: order.append("other"))
    with forward_hooks([model], before=lambda *_: order.append("ours"), first=first):
        model(torch.ones(1))
    assert order == (["ours", "other"] if first else ["other", "ours"])


def test_hooks_go_after_an_error() -> None:
    model = nn.Linear(2, 2)
    with pytest.raises(RuntimeError), forward_hooks(model.modules(), lambda *_: None, lambda *_: None):
        model(torch.ones(3))
    assert not has_hooks(model)


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda module: pickle.loads(pickle.dumps(module))])
def test_copies_lose_a_hook_that_is_not_copied(copied: Any) -> None:
    calls: list[int] = []
    layer = nn.ReLU()
    layer.register_forward_pre_hook(Uncopied(lambda *_: calls.append(1)), with_kwargs=True)
    layer.register_forward_hook(Uncopied(lambda *_: calls.append(2)))
    other = copied(copied(layer))
    for _ in range(2):
        other(torch.zeros(1))
    assert not calls
    assert not has_hooks(other)
    layer(torch.zeros(1))
    assert calls == [1, 2]


def test_hooks_that_come_first() -> None:
    layer, calls = nn.ReLU(), []
    layer.register_forward_pre_hook(lambda *_: calls.append("old before"))
    layer.register_forward_hook(lambda *_: calls.append("old after"))
    hooks = {"before": lambda *_: calls.append("before"), "after": lambda *_: calls.append("after")}
    for first in (True, False):
        with forward_hooks([layer], **hooks, first=first):
            layer(torch.zeros(1))
    assert calls == [
        *("before", "old before", "after", "old after"),
        *("old before", "before", "old after", "after"),
    ]
