"""torch.nn's batch-norm layers become ours, in place."""

from __future__ import annotations

import warnings

from torch import nn

from batchnorm.modules import BatchNorm, BatchNorm1d, BatchNorm2d, BatchNorm3d

OURS: dict[type[nn.Module], type[BatchNorm]] = {
    nn.BatchNorm1d: BatchNorm1d,
    nn.BatchNorm2d: BatchNorm2d,
    nn.BatchNorm3d: BatchNorm3d,
}


def convert(model: nn.Module) -> nn.Module:
    """Make every `torch.nn.BatchNorm1d`, `2d` and `3d` of a model one of ours, in place.

    A layer stays the object that it was and only changes its class: its parameters, buffers, hooks, flags and other
    attributes stay, and whoever refers to it still does: a second parent, an optimizer, another model. Only running
    statistics of half precision become new tensors, of float32 and equal values. Layers that are ours already are left.
    So is a layer that may mean something else than torch's: of a subclass, or with an attribute of its own where ours
    have one, such as a replaced `forward`; a UserWarning names all of these.

    Args:
        model: any module; it may be a batch-norm layer itself.

    Returns:
        `model`, the same object.
    """
    left = []
    for path, module in model.named_modules():
        if isinstance(module, BatchNorm) or not isinstance(module, nn.modules.batchnorm._BatchNorm):
            continue
        if obstacle := _become_ours(module):
            left.append(f"{path or 'the model itself'} ({obstacle})")
    if left:
        warnings.warn(
            f"left as they are: {', '.join(left)}. Only layers that are exactly torch.nn.BatchNorm1d, 2d or 3d are "
            f"converted. Replace these by hand if ours are to stand in for them",
            UserWarning,
            stacklevel=2,
        )
    return model


def _become_ours(layer: nn.modules.batchnorm._BatchNorm) -> str | None:
    """Change the layer's class, or say what keeps it from changing."""
    theirs = type(layer)
    if theirs not in OURS:
        return theirs.__qualname__
    ours = OURS[theirs]
    additions, buffers = _additions(ours, theirs)
    defined = {name for cls in ours.__mro__ if issubclass(cls, BatchNorm) for name in vars(cls)}
    own = vars(layer).keys() | layer._parameters.keys() | layer._buffers.keys() | layer._modules.keys()
    if clash := sorted(own & (additions.keys() | buffers | defined)):
        return f"{theirs.__qualname__} with its own {', '.join(clash)}"
    # The class of an object, and not a new object: that would leave the old one with whoever else refers to it, and a
    # compiled call would go on calling the old one. torch's parametrizations and lazy layers change class like this.
    layer.__class__ = ours
    vars(layer).update(additions)
    assert isinstance(layer, BatchNorm)
    layer._complete_buffers()
    return None


def _additions(ours: type[BatchNorm], theirs: type[nn.Module]) -> tuple[dict[str, object], set[str]]:
    """What our constructor sets and torch's does not: attributes at their defaults, and the names of buffers."""
    fresh, torchs = (cls(1, device="meta") for cls in (ours, theirs))
    attributes = {name: value for name, value in vars(fresh).items() if name not in vars(torchs)}
    return attributes, fresh._buffers.keys() - torchs._buffers.keys()
