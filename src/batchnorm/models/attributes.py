"""The attributes of a model's modules: read by path, and put back."""

from __future__ import annotations

import copy
import itertools
import operator
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from torch import nn

from batchnorm._torch import buffers_of, children_of, parameters_of

_Container = list[Any] | dict[Any, Any] | set[Any]


def attribute_at(model: nn.Module, path: str) -> object:
    """What a path such as "layer1.0.weight" leads to: a parameter, a buffer, a module, anything."""
    return operator.attrgetter(path)(model)


@contextmanager
def preserved_attributes(model: nn.Module) -> Iterator[set[str]]:
    """Undo what a forward sets on modules or keeps in their lists, dicts and sets.

    Yields:
        The names of what had to be undone, complete after the end.
    """
    changed: set[str] = set()
    dicts = [
        (d, {**d})
        for m in model.modules()
        for d in (vars(m), parameters_of(m), buffers_of(m), children_of(m))
        if d is not None
    ]
    containers = [
        (name, container, copy.copy(container))
        for module in model.modules()
        for name, value in vars(module).items()
        for container in _containers(value)
    ]
    try:
        yield changed
    finally:
        for current, before in dicts:
            names = current.keys() | before.keys()
            changed |= {n for n in names if n not in current or n not in before or current[n] is not before[n]}
            if changed:
                current.clear()
                current.update(before)
        for name, container, contents in containers:
            if _identities(container) != _identities(contents):
                changed.add(name)
                container.clear()
                (container.extend if isinstance(container, list) else container.update)(contents)


def _containers(value: object) -> Iterator[_Container]:
    """A list, dict or set, and those inside it; not what modules and tensors have inside."""
    if isinstance(value, (list, dict, set)):
        yield value
        for inner in value.values() if isinstance(value, dict) else value:
            yield from _containers(inner)


def _identities(container: _Container) -> list[int]:
    """What is in it, without asking a proxy whether it equals something."""
    items = itertools.chain.from_iterable(container.items()) if isinstance(container, dict) else container
    return [id(item) for item in items]
