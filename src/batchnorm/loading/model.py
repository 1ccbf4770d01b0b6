"""MODEL: a callable that returns one, with weights from a file."""

from __future__ import annotations

from pathlib import Path

from torch import nn

from batchnorm.errors import UsageError
from batchnorm.loading.object_reference import blaming, resolve
from batchnorm.loading.state_dict import load_state_dict


def load_model(reference: str, file: Path | None = None) -> nn.Module:
    """The model that the callable returns, with the weights of `file` if there is one.

    Raises:
        UsageError: the reference leads to no model, or the weights do not fit.
    """
    make = resolve(reference, "MODEL")
    if isinstance(make, nn.Module):
        raise UsageError(
            f"got MODEL {reference}, which is a model already; it must be a callable that returns one. "
            f"Write a function that returns it"
        )
    with blaming(reference):
        model = make()
    if not isinstance(model, nn.Module):
        raise UsageError(f"{reference} returned {type(model).__name__}; MODEL must return a torch.nn.Module")
    if file is not None:
        load_state_dict(model, file)
    return model
