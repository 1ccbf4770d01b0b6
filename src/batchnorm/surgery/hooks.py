"""Hooks: what a caller attached to a module, and what would see other values if the module's place changed."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterator
from contextlib import contextmanager

from torch import nn

_CALLED = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")


def hooked(module: nn.Module) -> bool:
    """Whether something is called when the module is."""
    return any(getattr(module, hooks) for hooks in _CALLED)


@contextmanager
def without_hooks(model: nn.Module) -> Iterator[None]:
    """Inside, no hooks of a model's modules are called."""
    set_aside = [(m, name, getattr(m, name)) for m in model.modules() if hooked(m) for name in _CALLED]
    try:
        for module, name, _ in set_aside:
            setattr(module, name, OrderedDict())
        yield
    finally:
        for module, name, hooks in set_aside:
            setattr(module, name, hooks)
