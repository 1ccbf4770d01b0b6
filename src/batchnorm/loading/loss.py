"""LOSS: a callable that takes an output and a target, or a function of torch.nn.functional by its name."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any

from torch import Tensor, nn

from batchnorm.errors import UsageError
from batchnorm.loading.object_reference import blaming, resolve

Loss = Callable[[Any, Any], Tensor]


def load_loss(reference: str) -> Loss:
    """The loss that a reference names; what it raises names the reference.

    Args:
        reference: `package.module:callable` or `path/file.py:callable`, where a class of modules stands for one made
            without arguments; or a function of torch.nn.functional, such as `cross_entropy`.

    Raises:
        UsageError: the reference leads to no loss.
    """
    loss: Any = resolve(reference, "LOSS") if ":" in reference else getattr(nn.functional, reference, None)
    if ":" not in reference and (reference.startswith("_") or not callable(loss)):
        raise UsageError(
            f"got LOSS {reference}; it must be a function of torch.nn.functional, such as cross_entropy, or "
            "package.module:callable or path/file.py:callable"
        )
    if inspect.isclass(loss) and issubclass(loss, nn.Module):
        with blaming(reference):
            loss = loss()

    def blamed(output: Any, target: Any) -> Tensor:  # noqa: ANN401 - of the user's types
        with blaming(reference):
            return loss(output, target)  # type: ignore[no-any-return]  # what is no tensor, check refuses

    return blamed
