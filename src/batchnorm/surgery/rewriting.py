"""A module whose forward is a graph's code: the same object, of a subclass of its class, and back again."""

from __future__ import annotations

import copyreg
import functools
import importlib
import linecache
import types
from typing import Any

from torch import Tensor, fx, nn

_CODE = "_rewritten"  # a class's attribute: what it was made of


def rewrite(module: nn.Module, graph: fx.Graph, note: tuple[str, ...] = ()) -> None:
    """Give a module a graph's code for its forward, in place.

    Everything else of it stays: hooks, children, state_dict, `isinstance`. Copies and pickles keep the code.

    Args:
        module: the graph's targets are relative to it.
        graph: it has the parameters of the module's forward.
        note: what `restore` returns.
    """
    code = graph.python_code("self")
    used = {name: value for name, value in code.globals.items() if name in code.src}
    names = tuple((name, _portable(value)) for name, value in sorted(used.items()))
    module.__class__ = _subclass(type(module), code.src, names, note)  # type: ignore[arg-type]  # mypy doubts its hash


def restore(module: nn.Module) -> tuple[str, ...] | None:
    """Give a module its own class again.

    Returns:
        The note that `rewrite` was given; None where it has not been rewritten.
    """
    made: tuple[type[nn.Module], str, Any, tuple[str, ...]] | None = vars(type(module)).get(_CODE)
    if made is None:
        return None
    module.__class__ = made[0]
    return made[3]


def residual_for(residual: Tensor, input: Tensor) -> Tensor:
    """A residual in the shape of what it is added to, as an addition would broadcast it."""
    if isinstance(input, fx.Proxy):  # traced again: a call of its own
        call: Tensor = input.tracer.create_proxy("call_function", residual_for, (residual, input), {})
        return call
    return residual if residual.shape == input.shape else residual.expand(input.shape)


class _Module(str):
    """The name of a Python module, for one that cannot be pickled."""

    __slots__ = ()


def _portable(value: object) -> object:
    return _Module(value.__name__) if isinstance(value, types.ModuleType) else value


@functools.cache
def _subclass(base: type[nn.Module], source: str, names: Any, note: tuple[str, ...]) -> type[nn.Module]:  # noqa: ANN401
    """One class for the same code, so that copies share it."""
    space: dict[str, Any] = {
        name: importlib.import_module(value) if isinstance(value, _Module) else value for name, value in names
    }
    file = f"<batchnorm: {base.__qualname__} fused {abs(hash(source)):x}>"
    linecache.cache[file] = len(source), None, source.splitlines(keepends=True), file  # for tracebacks
    exec(compile(source, file, "exec"), space)

    def __reduce_ex__(self: nn.Module, protocol: Any) -> Any:  # noqa: ANN401, N807 - Python's own
        reduced: Any = base.__reduce_ex__(self, protocol)
        if reduced[0] is not copyreg.__newobj__:  # type: ignore[attr-defined]
            return reduced
        return _blank, (base, source, names, note), *reduced[2:]

    members = {
        "forward": space["forward"],
        "__reduce_ex__": __reduce_ex__,
        "__module__": base.__module__,
        "__doc__": base.__doc__,
        _CODE: (base, source, names, note),
    }
    return type(f"Fused{base.__name__}", (base,), members)


def _blank(*made: Any) -> nn.Module:  # noqa: ANN401 - `_subclass`'s
    cls = _subclass(*made)
    return cls.__new__(cls)
