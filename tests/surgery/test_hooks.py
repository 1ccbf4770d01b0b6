"""What counts as a hook."""

from __future__ import annotations

import pytest
from torch import nn

from batchnorm.surgery.hooks import hooked


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
