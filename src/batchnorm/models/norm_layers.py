"""The batch-norm layers of a model: ours and torch.nn's, subclasses included."""

from __future__ import annotations

from collections.abc import Iterator

from torch import nn

from batchnorm._torch import BatchNormBase
from batchnorm.modules import BatchNorm

NormLayer = BatchNormBase  # torch's, from which all of them come


def named_norm_layers(model: nn.Module) -> Iterator[tuple[str, NormLayer]]:
    """Every batch-norm layer with its path in the model, once each, under the first path; "" is the model itself."""
    for path, module in model.named_modules():
        if isinstance(module, NormLayer):
            yield path, module


def display_name(path: str) -> str:
    """A module's path, in words where it is empty."""
    return path or "the model itself"


def our_layers(model: nn.Module) -> list[BatchNorm]:
    """The layers that are ours."""
    return [layer for _, layer in named_norm_layers(model) if isinstance(layer, BatchNorm)]


def torch_layer_names(model: nn.Module) -> list[str]:
    """The names of the layers that are torch.nn's, which know neither proposals nor freezing."""
    return [display_name(path) for path, layer in named_norm_layers(model) if not isinstance(layer, BatchNorm)]
