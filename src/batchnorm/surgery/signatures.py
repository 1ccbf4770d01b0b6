"""What a module's forward needs, and whether a call gives it more than that."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any, NamedTuple

# Values that may stand for a default without being the same object.
SIMPLE = (bool, int, float, complex, str, bytes)


class Signature(NamedTuple):
    """The arguments of a forward, without `self`.

    Attributes:
        needed: the names of those without a default.
        positional: the names of those that can be given by position, in order.
        defaults: of the others, by name.
    """

    needed: tuple[str, ...]
    positional: tuple[str, ...]
    defaults: dict[str, object]

    def needed_of(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> list[Any] | None:
        """What a call gives for the needed arguments, in order, where all else is at its default; None elsewhere."""
        if len(args) > len(self.positional):
            return None
        given = dict(zip(self.positional, args, strict=False))
        for name, value in kwargs.items():
            if name in given:
                return None
            given[name] = value
        for name, value in given.items():
            if name not in self.needed and (name not in self.defaults or not _same(value, self.defaults[name])):
                return None
        return [given[name] for name in self.needed] if all(name in given for name in self.needed) else None


def signature(forward: Callable[..., Any]) -> tuple[Signature | None, str]:
    """A forward's signature; None and the reason where the needed arguments cannot be told or given by position."""
    parameters = list(inspect.signature(forward).parameters.values())[1:]
    needed = [p for p in parameters if p.default is p.empty and p.kind is not p.VAR_KEYWORD]
    if any(p.kind is p.VAR_POSITIONAL for p in needed):
        return None, "its forward takes any number of arguments"
    if any(p.kind is p.KEYWORD_ONLY for p in needed):
        return None, "its forward needs arguments by keyword"
    positional = tuple(p.name for p in parameters if p.kind in (p.POSITIONAL_ONLY, p.POSITIONAL_OR_KEYWORD))
    defaults = {p.name: p.default for p in parameters if p.default is not p.empty}
    return Signature(tuple(p.name for p in needed), positional, defaults), ""


def _same(value: object, default: object) -> bool:
    return value is default or (isinstance(default, SIMPLE) and type(value) is type(default) and value == default)
