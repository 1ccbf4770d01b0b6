"""Containers of tensors: what models take and return, and what batches are.

A container is a tuple, a named tuple, a list, a mapping, or what is registered with torch as such, of any depth.
Everything else is a leaf.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Mapping
from typing import Any, NamedTuple

from torch import Tensor

from batchnorm import _torch


class _Opened(NamedTuple):
    """A container: what is in it, what else distinguishes it from others of its type, and how to make one like it."""

    items: list[Any]
    context: object
    rebuild: Callable[[list[Any]], Any]


def leaves(value: object) -> Iterator[Any]:
    """What is in a container and is no container itself, in order; a leaf alone is its own."""
    opened = _open(value)
    if opened is None:
        yield value
    else:
        for item in opened.items:
            yield from leaves(item)


def tensors(value: object) -> Iterator[Tensor]:
    """The leaves that are tensors."""
    return (leaf for leaf in leaves(value) if isinstance(leaf, Tensor))


def map_leaves(value: Any, change: Callable[[Any], Any]) -> Any:  # noqa: ANN401 - containers are of any type
    """The same containers with every leaf changed."""
    opened = _open(value)
    return change(value) if opened is None else opened.rebuild([map_leaves(item, change) for item in opened.items])


def map_tensors(value: Any, change: Callable[[Tensor], Any]) -> Any:  # noqa: ANN401 - as `map_leaves`
    """The same containers with every tensor changed; everything else as it is."""
    return map_leaves(value, lambda leaf: change(leaf) if isinstance(leaf, Tensor) else leaf)


def same_structure(a: object, b: object) -> bool:
    """Whether two values are the same but for their leaves: containers of the same types, with the same keys."""
    first, second = _open(a), _open(b)
    if first is None or second is None:
        return first is second
    return (
        type(a) is type(b)
        and first.context == second.context
        and len(first.items) == len(second.items)
        and all(map(same_structure, first.items, second.items))
    )


def _open(value: Any) -> _Opened | None:  # noqa: ANN401 - as `map_leaves`
    """None for a leaf."""
    if isinstance(value, Tensor):
        return None
    if isinstance(value, (tuple, list)):
        named = hasattr(value, "_fields")
        return _Opened(list(value), None, lambda items: type(value)(*items) if named else type(value)(items))
    if isinstance(value, Mapping):
        keys = list(value)
        return _Opened([value[key] for key in keys], keys, lambda items: _mapping_like(value, keys, items))
    return _open_registered(value)


def _mapping_like(value: Any, keys: list[Any], items: list[Any]) -> Any:  # noqa: ANN401 - as `map_leaves`
    """A copy, so that it is of the same type and has what else that type keeps."""
    other = copy.copy(value)
    for key, item in zip(keys, items, strict=True):
        other[key] = item
    return other


def _open_registered(value: object) -> _Opened | None:
    """What torch itself can take apart and rebuild: dataclasses, deques, caches of other libraries."""
    node = _torch.registered_tree(type(value))
    if node is None:
        return None
    items, context = node.flatten_fn(value)
    return _Opened(items, context, lambda changed: node.unflatten_fn(changed, context))
