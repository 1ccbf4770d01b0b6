"""Which memory a forward pass holds: storages of what went into modules and came out of them, while they live."""

from __future__ import annotations

import gc
import weakref
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from typing import Any

import torch
from torch import Tensor, nn

from batchnorm.models.hooks import forward_hooks
from batchnorm.models.nested import tensors

# References do not keep memory: a pass lets go of an activation, and it is gone.
Storages = weakref.WeakSet[torch.UntypedStorage]


def storages(value: object) -> Iterator[torch.UntypedStorage]:
    """The storages of the plain tensors in `value`; others keep their values in ways of their own."""
    for t in tensors(value):
        if t.layout == torch.strided and type(t) in (Tensor, nn.Parameter) and not t.is_meta:
            yield t.untyped_storage()


def every_storage() -> Iterator[torch.UntypedStorage]:
    """The storages of all plain tensors that Python has now."""
    return storages([t for t in gc.get_objects() if type(t) in (Tensor, nn.Parameter)])


def watch_storages(
    model: nn.Module, note: Callable[[Iterator[torch.UntypedStorage]], None]
) -> AbstractContextManager[None]:
    """Inside, `note` is given the storages of every module's inputs and outputs.

    A storage lives as long as any tensor that shares it, so views count as what they view. What goes into no module and
    comes out of none is not seen.
    """

    def before(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        note(storages((args, kwargs)))

    def after(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: object) -> None:
        note(storages(output))

    # TorchScript takes no hooks: what it holds is seen where it comes out.
    hooked = [module for module in model.modules() if not isinstance(module, torch.jit.ScriptModule)]
    return forward_hooks(hooked, before, after)
