"""The batch-norm layers of a model: ours and torch.nn's, subclasses included."""

from __future__ import annotations

from collections.abc import Iterator

from torch import nn
from torch.nn.modules.lazy import LazyModuleMixin

from batchnorm._torch import BatchNormBase, children_of
from batchnorm.modules import BatchNorm

NormLayer = BatchNormBase  # torch's, from which all of them come


def named_norm_layers(model: nn.Module) -> Iterator[tuple[str, NormLayer]]:
    """Every batch-norm layer with its path in the model, once each, under the first path; "" is the model itself."""
    for path, module in model.named_modules():
        if isinstance(module, NormLayer):
            yield path, module


def uninitialized(module: nn.Module) -> bool:
    """Whether a module waits for its first input to know its sizes."""
    return isinstance(module, LazyModuleMixin) and module.has_uninitialized_params()


def uncompiled(module: nn.Module) -> nn.Module:
    """What `torch.compile` was given to make a module; any other module itself."""
    if type(module).__name__ != "OptimizedModule":
        return module
    inner = children_of(module).get("_orig_mod")
    return module if inner is None else uncompiled(inner)


def unwrapped(model: nn.Module) -> nn.Module:
    """The model inside what runs it on several devices or in several processes, or compiled; any other itself."""
    inner = uncompiled(model)
    if isinstance(inner, (nn.DataParallel, nn.parallel.DistributedDataParallel)):
        inner = inner.module
    return model if inner is model else unwrapped(inner)


def display_name(path: str) -> str:
    """A module's path, in words where it is empty."""
    return path or "the model itself"


def split_by_origin(model: nn.Module) -> tuple[list[BatchNorm], list[str]]:
    """The layers that are ours, and the names of torch.nn's, which know neither proposals nor freezing."""
    ours, torch_names = [], []
    for path, layer in named_norm_layers(model):
        if isinstance(layer, BatchNorm):
            ours.append(layer)
        else:
            torch_names.append(display_name(path))
    return ours, torch_names
