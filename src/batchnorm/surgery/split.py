"""timm's `SplitBatchNorm2d`, whose auxiliary layers are domains: each normalises a part of the batch of its own."""

from __future__ import annotations

import sys
from typing import Any

from torch import nn

from batchnorm import activations
from batchnorm._torch import buffers_of, children_of, parameters_of
from batchnorm.layer_state import FIRST
from batchnorm.modules import BatchNorm

_TIMM_CLASS = "timm.layers.split_batchnorm.SplitBatchNorm2d"


def is_timm_split(layer: nn.Module) -> bool:
    """Whether a layer is exactly timm's `SplitBatchNorm2d`, recognised where timm is not imported."""
    return activations.qualified_name(type(layer)) == _TIMM_CLASS


def auxiliary(layer: nn.Module) -> list[nn.BatchNorm2d]:
    """The layers of the second part of a batch and on."""
    layers: list[nn.BatchNorm2d] = list(layer.get_submodule("aux_bn"))  # type: ignore[call-overload]  # a list of them
    return layers


def names_of(layer: nn.Module) -> tuple[str, ...]:
    """The names of its domains where nobody gives others: timm's numbers of the auxiliary layers are in them."""
    return ("main", *(f"aux_{number}" for number in range(len(auxiliary(layer)))))


def without_auxiliary(layer: nn.Module) -> None:
    """Make it what it was before it was split, in place: torch's layer, or timm's with an activation inside."""
    del children_of(layer)["aux_bn"], vars(layer)["num_splits"]
    inside: Any = nn.BatchNorm2d
    if "act" in children_of(layer):
        inside = sys.modules["timm.layers.norm_act"].BatchNormAct2d  # timm is there, as its layer is
    layer.__class__ = inside


def take_over(layer: BatchNorm, parts: list[nn.BatchNorm2d]) -> None:
    """Have the domains after the first keep what these layers kept: the same parameters and buffers."""
    for row, part in zip(layer._rows[1:], parts, strict=True):
        for name, first in zip(row[1:6], FIRST[1:6], strict=True):
            if name != first:
                of_layer, of_part = (
                    (parameters_of(m) if first in ("weight", "bias") else buffers_of(m)) for m in (layer, part)
                )
                of_layer[name] = of_part[first]  # type: ignore[assignment]  # of either
