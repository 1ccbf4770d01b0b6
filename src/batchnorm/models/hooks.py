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


class Uncopied:
    """A hook that copies of its module, pickled ones too, do not have: theirs does nothing, and goes when it is called.

    Args:
        hook: what is called.
    """

    def __init__(self, hook: Callable[..., None]) -> None:
        self._hook = hook

    def __call__(self, *args: Any) -> None:  # noqa: ANN401 - handed on
        """Call the hook."""
        self._hook(*args)

    def __deepcopy__(self, memo: dict[int, Any]) -> Callable[..., None]:
        return gone

    def __reduce__(self) -> tuple[Callable[[], Callable[..., None]], tuple[()]]:
        return _gone, ()


def gone(module: nn.Module, *args: Any) -> None:  # noqa: ANN401 - a hook's
    """What a copied module has in place of an `Uncopied` hook: it removes itself."""
    for name in HOOK_DICTS:
        hooks = getattr(module, name)
        for key in [key for key, hook in hooks.items() if hook is gone]:
            del hooks[key]


def _gone() -> Callable[..., None]:
    return gone


@contextmanager
def forward_hooks(
    modules: Iterable[nn.Module], before: PreHook | None = None, after: Hook | None = None, *, first: bool = False
) -> Iterator[None]:
    """Inside, hooks are called when these modules are; afterwards they are gone.

    Args:
        modules: which modules.
        before: called as `before(module, args, kwargs)` before each forward.
        after: called as `after(module, args, kwargs, output)` after each forward.
        first: whether they come before the hooks that a module has already, and not after them.
    """
    with ExitStack() as handles:
        for module in modules:
            if before is not None:
                handle = module.register_forward_pre_hook(before, with_kwargs=True, prepend=first)
                handles.callback(handle.remove)
            if after is not None:
                handles.callback(module.register_forward_hook(after, with_kwargs=True, prepend=first).remove)
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
