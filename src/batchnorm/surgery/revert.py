"""Our layers become again what they were: torch.nn's, in place."""

from __future__ import annotations

import warnings
from collections.abc import Mapping

import torch
from torch import nn

from batchnorm._torch import buffers_of, parameters_of
from batchnorm.choosing import settle
from batchnorm.models.norm_layers import display_name, named_norm_layers
from batchnorm.modules import BatchNorm, BatchNorm1d, BatchNorm2d, BatchNorm3d
from batchnorm.surgery.convert import ORIGIN, Origin, additions
from batchnorm.surgery.fuse import unfuse
from batchnorm.surgery.norm_act import TIMMS_OPTIONS, NormAct

TORCH_CLASSES: dict[type[BatchNorm], type[nn.Module]] = {
    BatchNorm1d: nn.BatchNorm1d,
    BatchNorm2d: nn.BatchNorm2d,
    BatchNorm3d: nn.BatchNorm3d,
}
_STATISTICS = ("running_mean", "running_var")


def revert(model: nn.Module, *, domain: str | int | Mapping[str, float] | None = None) -> nn.Module:
    """Make every layer of ours in a model one of torch.nn's, in place, without loss: `convert` and `fuse` are undone.

    A layer stays the object that it was, with its parameters, buffers, hooks, flags and other attributes, and gets the
    class back that it had before `convert`; one made as ours gets that of its namesake, or of `SyncBatchNorm` if it has
    `sync=True`. Running statistics that were of half precision are so again. What `convert` added to it (an activation
    of timm's layer, ghost batches, sharing) goes.

    A layer that torch.nn cannot express is left, and one UserWarning names all of these with the reason: an option of
    ours that `convert` did not set, frozen parts (`unfreeze` first), `BatchNorm`, which takes any rank, or a subclass.

    A layer with several domains keeps one of them, `domain`, and loses the others; without a `domain` it is left.

    Args:
        model: any module; it may be a layer itself.
        domain: for layers with domains, the name or number of the one to keep, or the weights of a mixture, as
            `batchnorm.domain` takes them.

    Returns:
        `model`, the same object.

    Raises:
        OptionError: a layer has no such `domain`; nothing is changed.
    """
    if domain is not None:
        settle(model, domain)
    unfuse(model)
    skipped = []
    for path, layer in list(named_norm_layers(model)):
        if isinstance(layer, BatchNorm) and (obstacle := _become_torchs(layer)):
            skipped.append(f"{display_name(path)} ({obstacle})")
    if skipped:
        warnings.warn(
            f"left as they are: {', '.join(skipped)}. torch.nn has no such layers. Set these options back where you "
            f"can do without them, and revert again",
            UserWarning,
            stacklevel=2,
        )
    return model


def _become_torchs(layer: BatchNorm) -> str | None:
    """Change the layer's class, or say what keeps it from changing."""
    ours = type(layer)
    origin = vars(layer).get(ORIGIN) or _namesake(layer)
    if origin is None:
        return ours.__qualname__
    timms = TIMMS_OPTIONS if isinstance(layer, NormAct) else ()
    beyond = [
        f"{name}={value}"
        for name, value in layer.options().items()
        if name not in timms and origin.options.get(name) != value
    ]
    if len(layer.domains) > 1:
        beyond = [f"domains={layer.domains}: pass domain= to keep one"]
    if beyond:
        return f"{ours.__qualname__} with {', '.join(beyond)}"
    layer._drop_domains(layer._rows[0])
    attributes, buffers = additions(ours, origin.cls)
    for name in (*attributes, ORIGIN, "_skipped"):
        vars(layer).pop(name, None)
    for name in buffers:
        delattr(layer, name)
    layer.__class__ = origin.cls  # type: ignore[assignment]
    for name in _STATISTICS:
        if (buffer := buffers_of(layer)[name]) is not None:
            buffers_of(layer)[name] = buffer.to(_dtype(layer, origin, name, buffer))
    return None


def _namesake(layer: BatchNorm) -> Origin | None:
    """What would have become this layer, where it was made as ours."""
    ours = type(layer)
    if layer.sync and ours in (BatchNorm, *TORCH_CLASSES):
        return Origin(nn.SyncBatchNorm, {}, {"sync": True, "process_group": layer.process_group})
    return Origin(TORCH_CLASSES[ours], {}, {}) if ours in TORCH_CLASSES else None


def _dtype(layer: nn.Module, origin: Origin, name: str, buffer: torch.Tensor) -> torch.dtype:
    """What torch.nn's layer would keep a statistic in."""
    weight = parameters_of(layer).get("weight")
    if weight is not None and weight.dtype != origin.dtypes.get("weight"):
        return weight.dtype  # made as ours, or moved since: torch moves both
    return origin.dtypes.get(name, buffer.dtype)
