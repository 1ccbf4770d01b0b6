"""torch.nn's batch-norm layers become ours, in place."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import nn

from batchnorm._torch import buffers_of, children_of, parameters_of
from batchnorm.call import check_sync, check_virtual_batch_size
from batchnorm.layer_state import LayerState, check_domains
from batchnorm.models.norm_layers import NormLayer, display_name, named_norm_layers, uninitialized
from batchnorm.modules import BatchNorm, BatchNorm1d, BatchNorm2d, BatchNorm3d
from batchnorm.surgery.norm_act import NormAct, is_timm_norm_act, norm_act_class
from batchnorm.surgery.split import auxiliary, is_timm_split, names_of, take_over, without_auxiliary

OUR_CLASSES: dict[type[nn.Module], type[BatchNorm]] = {
    nn.BatchNorm1d: BatchNorm1d,
    nn.BatchNorm2d: BatchNorm2d,
    nn.BatchNorm3d: BatchNorm3d,
    nn.SyncBatchNorm: BatchNorm,
}
ORIGIN = "_origin"  # a layer's attribute: what it was before


class Origin(NamedTuple):
    """What a layer was before it became ours.

    Attributes:
        cls: its class.
        dtypes: of its parameters and buffers, by name.
        options: what it has of ours that is not the default.
    """

    cls: type[nn.Module]
    dtypes: dict[str, torch.dtype]
    options: dict[str, Any]


def convert(
    model: nn.Module,
    *,
    sync: bool = False,
    process_group: dist.ProcessGroup | None = None,
    virtual_batch_size: int | None = None,
    domains: Sequence[str] | None = None,
    own_affine: bool = False,
) -> nn.Module:
    """Make every `torch.nn.BatchNorm1d`, `2d`, `3d` and `SyncBatchNorm` of a model one of ours, in place.

    A layer stays the object that it was and only changes its class: its parameters, buffers, hooks, flags and other
    attributes stay, and whoever refers to it still does: a second parent, an optimizer, another model. Only running
    statistics of half precision become new tensors, of float32 and equal values. Layers that are ours already are left.
    A `SyncBatchNorm` becomes a `BatchNorm`, which takes any rank as it does, with `sync=True` and its own group.
    timm's `BatchNormAct2d` becomes a `BatchNorm2d` that is an instance of timm's class too, with its activation inside
    where that is one of ours and it drops nothing. `revert` undoes all of this. timm's `SplitBatchNorm2d` becomes one
    with domains, "main", "aux_0" and so on unless `domains` has names for all its parts, each with its own affine.

    A layer is left that may mean something else than torch's: of another subclass, or with an attribute of its own
    where ours have one, such as a replaced `forward`; one UserWarning names all of these. With `sync=True` it names
    those that were ours already and do not share their statistics, too.

    Args:
        model: any module; it may be a batch-norm layer itself.
        sync: of the layers that become ours: whether processes share their statistics.
        process_group: with sync, these processes; None for all. A `SyncBatchNorm` keeps its own.
        virtual_batch_size: of the layers that become ours, for ghost batches.
        domains: names of populations, for each of which a layer gets running statistics of its own: docs/domains.md.
            All begin as those that it has, the first keeps them. Layers that are ours already get them, too.
        own_affine: with domains, whether each has a weight and a bias of its own.

    Returns:
        `model`, the same object.

    Raises:
        OptionError: `virtual_batch_size` is no positive number, or does not go with the others; `domains` are no names;
            nothing is changed.
    """
    check_virtual_batch_size(virtual_batch_size)
    check_sync(sync, process_group, virtual_batch_size)
    skipped = [
        f"{display_name(path)} ({type(layer).__qualname__}, ours already, with sync=False)"
        for path, layer in named_norm_layers(model)
        if sync and isinstance(layer, BatchNorm) and not layer.sync
    ]
    options: dict[str, Any] = {
        "sync": sync,
        "process_group": process_group,
        "virtual_batch_size": virtual_batch_size,
    }
    if of_each := check_domains(domains, own_affine, affine=True, track=True):
        options |= {"domains": of_each, "own_affine": own_affine}
    skipped += become_ours(model, options)
    names = {cls.__name__ for cls in OUR_CLASSES}
    skipped += [
        f"{display_name(path)} (a scripted {module.original_name}: convert before torch.jit)"
        for path, module in model.named_modules()
        if isinstance(module, torch.jit.ScriptModule) and module.original_name in names
    ]
    if skipped:
        warnings.warn(
            f"left as they are: {', '.join(skipped)}. Only layers that are exactly torch.nn.BatchNorm1d, 2d, 3d or "
            f"SyncBatchNorm, or timm's BatchNormAct2d or SplitBatchNorm2d, are converted. Replace these by hand if "
            f"ours are to stand in for them",
            UserWarning,
            stacklevel=2,
        )
    return model


def become_ours(model: nn.Module, options: dict[str, Any] | None = None) -> list[str]:
    """`convert` without its warning: the layers that are left, with the reason."""
    skipped = []
    options = options or {}
    parts: set[nn.Module] = set()  # of split layers
    for path, layer in list(named_norm_layers(model)):
        if layer in parts:
            continue
        if isinstance(layer, BatchNorm):
            obstacle = _why_no_domains(layer, options)
            if obstacle:
                skipped.append(f"{display_name(path)} ({obstacle})")
            elif options.get("domains") and not layer.domains:
                layer._add_domains(options["domains"], options["own_affine"])
            continue
        if is_timm_split(layer):
            parts |= set(auxiliary(layer))
        if obstacle := _become_ours(layer, path, options):
            skipped.append(f"{display_name(path)} ({obstacle})")
    return skipped


def _become_ours(layer: NormLayer, path: str, options: dict[str, Any]) -> str | None:
    """Change the layer's class, or say what keeps it from changing."""
    if obstacle := _why_no_domains(layer, options):
        return obstacle
    before = type(layer)
    auxiliary_layers: list[nn.BatchNorm2d] = []
    if is_timm_split(layer):
        auxiliary_layers = auxiliary(layer)
        names = options.get("domains") or names_of(layer)
        if len(names) != len(auxiliary_layers) + 1:
            return f"{before.__qualname__} of {len(auxiliary_layers) + 1} parts for {len(names)} domains"
        options = options | {"domains": names, "own_affine": layer.affine}
        without_auxiliary(layer)
        before = type(layer)
    if is_timm_norm_act(layer):
        after: type[BatchNorm] = norm_act_class(before)  # type: ignore[arg-type]  # mypy doubts its hash
    elif before in OUR_CLASSES:
        after = OUR_CLASSES[before]
        if isinstance(layer, nn.SyncBatchNorm):
            if options.get("virtual_batch_size") is not None:
                return f"{before.__qualname__}, whose statistics processes share: ghost batches are the contrary"
            options = options | {"sync": True, "process_group": layer.process_group}
    else:
        return before.__qualname__
    added, buffers = additions(after, before)
    defined = {name for cls in after.__mro__ if issubclass(cls, LayerState) for name in vars(cls)}
    own = vars(layer).keys() | parameters_of(layer).keys() | buffers_of(layer).keys() | children_of(layer).keys()
    if clash := sorted(own & (added.keys() | buffers | defined | {ORIGIN})):
        return f"{before.__qualname__} with its own {', '.join(clash)}"
    tensors = {**parameters_of(layer), **buffers_of(layer)}
    dtypes = {name: tensor.dtype for name, tensor in tensors.items() if tensor is not None}
    # The class of an object, and not a new object: that would leave the old one with whoever else refers to it, and a
    # compiled call would go on calling the old one. torch's parametrizations and lazy layers change class like this.
    layer.__class__ = after
    vars(layer).update({**added, **options, "label": path, ORIGIN: Origin(before, dtypes, options)})
    assert isinstance(layer, BatchNorm)
    if options.get("domains"):
        layer._add_domains(options["domains"], options["own_affine"])
        if auxiliary_layers:
            take_over(layer, auxiliary_layers)
    layer._complete()
    return None


def _why_no_domains(layer: NormLayer, options: dict[str, Any]) -> str | None:
    """What keeps a layer from having the domains that are asked for; nothing, where none are."""
    if not options.get("domains"):
        return None
    name = type(layer).__qualname__
    if uninitialized(layer):
        return f"{name}, which has no sizes yet: run one batch through the model first"
    if layer.running_mean is None:
        return f"{name} without running statistics, which a domain is a set of"
    asked = options["domains"], options["own_affine"]
    if isinstance(layer, BatchNorm) and layer.domains and (layer.domains, layer.own_affine) != asked:
        return f"{name}, which has domains={layer.domains}, own_affine={layer.own_affine}"
    return None


def additions(our_class: type[BatchNorm], torch_class: type[nn.Module]) -> tuple[dict[str, object], set[str]]:
    """What our constructor sets and torch's does not: attributes at their defaults, and the names of buffers."""
    like = torch_class if torch_class in OUR_CLASSES else nn.BatchNorm2d
    named = BatchNorm2d if issubclass(our_class, NormAct) else our_class  # timm's constructor is not torch's
    ours, torchs = (cls(1, device="meta") for cls in (named, like))
    attributes = {name: value for name, value in vars(ours).items() if name not in vars(torchs)}
    if issubclass(our_class, NormAct):
        del attributes["activation"]  # computed
    return attributes, buffers_of(ours).keys() - buffers_of(torchs).keys()
