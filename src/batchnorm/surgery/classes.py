"""Classes that are made at run time: their instances are copied and pickled by what the class was made of."""

from __future__ import annotations

import copyreg
from collections.abc import Callable
from typing import Any

from torch import nn


def reduced_by(base: type[nn.Module], make: Callable[..., type[nn.Module]], *made_of: object) -> Callable[..., Any]:
    """The `__reduce_ex__` of a class `make(*made_of)` on top of `base`: pickles find no such class by its name.

    What `base` does in ways of its own, torch.fx's modules for example, stays.
    """

    def __reduce_ex__(self: nn.Module, protocol: Any) -> Any:  # noqa: ANN401, N807 - Python's own
        reduced: Any = base.__reduce_ex__(self, protocol)
        if reduced[0] is not copyreg.__newobj__:  # type: ignore[attr-defined]  # not in its stub
            return reduced
        return _blank, (make, *made_of), *reduced[2:]

    return __reduce_ex__


def _blank(make: Callable[..., type[nn.Module]], *made_of: object) -> nn.Module:
    cls = make(*made_of)
    return cls.__new__(cls)
