"""What a forward needs, and which calls give it no more than that."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

from batchnorm.surgery.signatures import Signature, signature


class Plain(nn.Module):
    def forward(self, x: Any, y: Any, rate: Any = None, scale: float = 1.0, *, flag: bool = False) -> None: ...


class Open(nn.Module):
    def forward(self, x: Any, **options: Any) -> None: ...


def test_a_signature() -> None:
    expected = Signature(("x", "y"), ("x", "y", "rate", "scale"), {"rate": None, "scale": 1.0, "flag": False})
    assert signature(Plain.forward) == (expected, "")
    assert signature(Open.forward) == (Signature(("x",), ("x",), {}), "")


@pytest.mark.parametrize(
    ("cls", "args", "kwargs", "expected"),
    [
        (Plain, (1, 2), {}, [1, 2]),
        (Plain, (1,), {"y": 2}, [1, 2]),
        (Plain, (), {"y": 2, "x": 1}, [1, 2]),
        (Plain, (1, 2, None, 1.0), {"flag": False}, [1, 2]),
        (Plain, (1, 2, None, float("1")), {}, [1, 2]),
        (Plain, (1,), {}, None),
        (Plain, (1, 2, None, 1.0, False), {}, None),
        (Plain, (1, 2), {"x": 1}, None),
        (Plain, (1, 2), {"other": 1}, None),
        (Plain, (1, 2, 0), {}, None),
        (Plain, (1, 2), {"flag": True}, None),
        (Plain, (1, 2), {"flag": 0}, None),
        (Plain, (1, 2), {"scale": torch.ones(())}, None),
        (Plain, (1, 2), {"rate": torch.ones(2)}, None),
        (Open, (1,), {}, [1]),
        (Open, (1,), {"more": None}, None),
    ],
)
def test_what_a_call_gives(cls: type[nn.Module], args: Any, kwargs: Any, expected: Any) -> None:
    found = signature(cls.forward)[0]
    assert found is not None
    assert found.needed_of(args, kwargs) == expected


def test_what_has_none() -> None:
    class Many(nn.Module):
        def forward(self, *xs: Any) -> None: ...

    class ByKeyword(nn.Module):
        def forward(self, x: Any, *, y: Any) -> None: ...

    assert signature(Many.forward) == (None, "its forward takes any number of arguments")
    assert signature(ByKeyword.forward) == (None, "its forward needs arguments by keyword")
