"""Layers that stand still, and stay so."""

from __future__ import annotations

import warnings

from torch import nn

from batchnorm._torch import parameters_of
from batchnorm.models.norm_layers import split_by_origin
from batchnorm.modules import BatchNorm
from batchnorm.statistics import Frozen

_STOPPED = "_stopped_learning"  # a layer's attribute: which parameters' requires_grad `freeze` has set to False


def freeze(
    model: nn.Module, *, statistics: bool = True, affine: bool = True, normalization: bool | None = None
) -> nn.Module:
    """Have every layer of ours in a model stand still, whatever mode it is in.

    Sticky: `.train()`, `.eval()`, `requires_grad_()`, deepcopy, load_state_dict and `convert` leave it as it is; only
    `unfreeze` ends it. Layers of torch.nn cannot be frozen like this; a UserWarning names them. Freeze a model before
    DistributedDataParallel wraps it, which waits for a gradient of every parameter that required one by then.

    Args:
        model: any module; it may be a layer itself.
        statistics: the running statistics do not move.
        affine: gamma and beta do not learn: no gradient reaches them, their requires_grad is False, and gradients that
            they have are dropped.
        normalization: normalise by the running statistics in training too; None for the same as `statistics`.

    Returns:
        `model`, the same object.
    """
    frozen = Frozen(statistics if normalization is None else normalization, statistics, affine)
    layers, others = split_by_origin(model)
    for layer in layers:
        _set(layer, frozen)
    if others:
        warnings.warn(
            f"not frozen, because these layers are torch.nn's: {', '.join(others)}. Use batchnorm.convert(model) first",
            UserWarning,
            stacklevel=2,
        )
    return model


def unfreeze(model: nn.Module) -> nn.Module:
    """End what `freeze` began: everything moves and learns again.

    requires_grad of gamma and beta becomes True where `freeze` set it to False, and only there.

    Returns:
        `model`, the same object.
    """
    for layer in split_by_origin(model)[0]:
        _set(layer, Frozen())
    return model


def _set(layer: BatchNorm, frozen: Frozen) -> None:
    stopped: set[str] = vars(layer).pop(_STOPPED, set())
    # Not the attributes: a pruned or parametrized weight is computed, and only a leaf has a requires_grad of its own.
    names = [name for row in layer._rows for name in (row.weight, row.bias)]
    own = {name: p for name in names if (p := parameters_of(layer).get(name)) is not None}
    if frozen.affine:
        for parameter in own.values():
            parameter.grad = None  # an optimizer would still apply it
        vars(layer)[_STOPPED] = stopped | {name for name, parameter in own.items() if parameter.requires_grad}
        for parameter in own.values():
            parameter.requires_grad_(False)
    else:
        for name in stopped & own.keys():
            own[name].requires_grad_()
    layer.frozen = frozen
