"""What counts as a hook."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from batchnorm.surgery.hooks import hooked, without_hooks


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
    assert not hooked(layer)
    handle = getattr(layer, register)(lambda *_: None)
    assert hooked(layer)
    handle.remove()
    assert not hooked(layer)


def test_hooks_are_set_aside_and_come_back_after_an_error() -> None:
    layer, calls = nn.ReLU(), []
    handle = layer.register_forward_hook(lambda *_: calls.append(1))

    def fails() -> None:
        with without_hooks(nn.Sequential(layer)):
            layer(torch.zeros(1))
            assert not hooked(layer)
            raise KeyError

    with pytest.raises(KeyError):
        fails()
    layer(torch.zeros(1))
    assert calls == [1]
    handle.remove()
    assert not hooked(layer)
