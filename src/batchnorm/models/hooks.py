"""Hooks of modules: whether there are any, attached for a while, set aside for a while."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

from torch import nn

from batchnorm._torch import HOOK_DICTS

PreHook = Callable[[nn.Module, tuple[Any, ...], dict[str, Any]], None]
Hook = Callable[[nn.Module, tuple[Any, ...], dict[str, Any], Any], None]


def has_hooks(module: nn.Module) -> bool:
    """Whether something is called when the module is."""
    return any(getattr(module, hooks) for hooks in HOOK_DICTS)


@contextmanager
def forward_hooks(
    modules: Iterable[nn.Module], before: PreHook | None = None, after: Hook | None = None, *, first: bool = False
) -> Iterator[None]:
    """Inside, hooks are called when these modules are; afterwards they are gone.

    Args:
        modules: which modules.
        before: called as `before(module, args, kwargs)` before each forward.
        after: called as `after(module, args, kwargs, output)` after each forward.
        first: whether `before` comes before the hooks that a module has already, and not after them.
    """
    with ExitStack() as handles:
        for module in modules:
            if before is not None:
                handle = module.register_forward_pre_hook(before, with_kwargs=True, prepend=first)
                handles.callback(handle.remove)
            if after is not None:
                handles.callback(module.register_forward_hook(after, with_kwargs=True).remove)
        yield


@contextmanager
def without_hooks(model: nn.Module) -> Iterator[None]:
    """Inside, no hooks of a model's modules are called."""
    set_aside = [(m, name, getattr(m, name)) for m in model.modules() if has_hooks(m) for name in HOOK_DICTS]
    try:
        for module, name, _ in set_aside:
            setattr(module, name, OrderedDict())
        yield
    finally:
        for module, name, hooks in set_aside:
            setattr(module, name, hooks)
