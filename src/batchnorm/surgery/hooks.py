"""Hooks: what a caller attached to a module, and what would see other values if the module's place changed."""

from __future__ import annotations

from torch import nn

_CALLED = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")


def hooked(module: nn.Module) -> bool:
    """Whether something is called when the module is."""
    return any(getattr(module, hooks) for hooks in _CALLED)
