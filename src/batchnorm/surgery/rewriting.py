"""A module whose forward is a graph's code while all is as it was: the same object, of a subclass of its class."""

from __future__ import annotations

import functools
import importlib
import inspect
import linecache
import types
from collections.abc import Callable, Iterable
from typing import Any, NamedTuple

from torch import Tensor, fx, nn

from batchnorm._torch import any_global_hook, children_of
from batchnorm.models.attributes import attribute_at
from batchnorm.models.hooks import has_hooks
from batchnorm.modules import BatchNorm
from batchnorm.surgery.classes import reduced_by
from batchnorm.surgery.norm_act import has_our_forward, inside
from batchnorm.surgery.signatures import SIMPLE, signature

_CODE = "_rewritten"  # a class's attribute: what it was made of
_BEFORE = "_as_rewritten"  # an instance's attribute: what the code was made for
_UNHEEDED = {"training", "inplace", "report"}  # they change nothing that is computed
_NO_FLAGS = frozenset(vars(nn.Module())) | _UNHEEDED


class _Before(NamedTuple):
    """What a graph's code holds for: a module as it was.

    Attributes:
        children: of the module, of those whose code has become part of it, and of containers that lead to others.
        flags: attributes that the code was made with.
        unseen: modules that the code does not call as the module did: they must not have hooks.
        norms: those of them that are batch-norm layers.
    """

    children: tuple[tuple[nn.Module, dict[str, nn.Module | None]], ...]
    flags: tuple[tuple[nn.Module, str, object], ...]
    unseen: tuple[nn.Module, ...]
    norms: tuple[BatchNorm, ...]


def rewrite(
    module: nn.Module, graph: fx.Graph, unseen: Iterable[nn.Module] = (), inlined: Iterable[nn.Module] = ()
) -> None:
    """Give a module a graph's code for its forward, in place, as long as nothing that the code was made for changes.

    Everything else of it stays: hooks, children, state_dict, `isinstance`. Copies and pickles keep the code. At each
    call it is checked that the module and `inlined` have the children and flags that they have now, and that `unseen`
    have no hooks; the class's own forward runs otherwise, and where an optional argument is not at its default.

    Args:
        module: the graph's targets are relative to it.
        graph: it has the first parameters of the module's forward; the others are at their defaults.
        unseen: modules that the code does not call, or calls for something else than the module does.
        inlined: modules whose code has become part of the graph.
    """
    code = graph.python_code("self")
    used = {name: value for name, value in code.globals.items() if name in code.src}
    names = tuple((name, _portable(value)) for name, value in sorted(used.items()))
    before = _before(module, graph, tuple(dict.fromkeys(unseen)), tuple(inlined))
    module.__class__ = _subclass(type(module), code.src, names)  # type: ignore[arg-type]  # mypy doubts its hash
    vars(module)[_BEFORE] = before


def restore(module: nn.Module) -> bool:
    """Give a module its own class again.

    Returns:
        Whether it was rewritten.
    """
    made: tuple[type[nn.Module], str, Any] | None = vars(type(module)).get(_CODE)
    vars(module).pop(_BEFORE, None)
    if made is None:
        return False
    module.__class__ = made[0]
    return True


def residual_for(residual: Tensor, input: Tensor) -> Tensor:
    """A residual in the shape of what it is added to, as an addition would broadcast it."""
    return residual if residual.shape == input.shape else residual.expand(input.shape)


def _before(
    module: nn.Module, graph: fx.Graph, unseen: tuple[nn.Module, ...], inlined: tuple[nn.Module, ...]
) -> _Before:
    coded = dict.fromkeys([module, *inlined])
    containers = dict(coded)
    for node in graph.nodes:
        if node.op in ("call_module", "get_attr"):
            *parents, _ = str(node.target).split(".")
            for depth in range(1, len(parents) + 1):
                container = attribute_at(module, ".".join(parents[:depth]))
                assert isinstance(container, nn.Module)
                containers[container] = None
    flagged = [*coded, *(m for m in unseen if m not in coded and not isinstance(m, BatchNorm))]
    flags = [(m, name, value) for m in flagged for name, value in vars(m).items() if name not in _NO_FLAGS]
    return _Before(
        tuple((container, dict(children_of(container))) for container in containers),
        tuple(flags),
        tuple(dict.fromkeys([*unseen, *inlined])),
        tuple(m for m in unseen if isinstance(m, BatchNorm)),
    )


def _holds(before: _Before) -> bool:
    """Whether everything is as it was."""
    if any_global_hook():
        return False
    for container, children in before.children:
        now = children_of(container)
        if len(now) != len(children):
            return False
        for name, child in children.items():
            if name not in now or now[name] is not child:
                return False
    for module in before.unseen:
        if "forward" in vars(module) or has_hooks(module):
            return False
    for norm in before.norms:
        if inside(norm) is not None or not has_our_forward(norm):
            return False
    for module, name, value in before.flags:
        if name not in vars(module):
            return False
        now_value = vars(module)[name]
        if now_value is not value and not (isinstance(value, SIMPLE) and now_value == value):
            return False
    return True


class _Module(str):
    """The name of a Python module, for one that cannot be pickled."""

    __slots__ = ()


def _portable(value: object) -> object:
    return _Module(value.__name__) if isinstance(value, types.ModuleType) else value


@functools.cache
def _subclass(base: type[nn.Module], source: str, names: Any) -> type[nn.Module]:  # noqa: ANN401 - see `rewrite`
    """One class for the same code, so that copies share it."""
    space: dict[str, Any] = {
        name: importlib.import_module(value) if isinstance(value, _Module) else value for name, value in names
    }
    file = f"<batchnorm: {base.__qualname__} fused {abs(hash(source)):x}>"
    linecache.cache[file] = len(source), None, source.splitlines(keepends=True), file  # for tracebacks
    exec(compile(source, file, "exec"), space)

    members = {
        "forward": _either(base.forward, space["forward"]),
        "__reduce_ex__": reduced_by(base, _subclass, base, source, names),
        "__module__": base.__module__,
        "__doc__": base.__doc__,
        _CODE: (base, source, names),
    }
    return type(f"Fused{base.__name__}", (base,), members)


def _either(own: Callable[..., Any], code: Callable[..., Any]) -> Callable[..., Any]:
    """A forward that is a graph's code where that holds, and a class's own elsewhere."""
    takes, _ = signature(own)
    parameters = tuple(inspect.signature(code).parameters)[1:]

    @functools.wraps(own)
    def forward(self: nn.Module, *args: Any, **kwargs: Any) -> Any:  # noqa: ANN401 - whatever models take and return
        before = vars(self).get(_BEFORE)
        if before is None or takes is None:  # a slice
            return own(self, *args, **kwargs)
        needed = args if not kwargs and len(args) == len(parameters) else takes.needed_of(args, kwargs)
        if needed is None or not _holds(before):
            return own(self, *args, **kwargs)
        for argument in needed:
            if isinstance(argument, fx.Proxy):  # whoever traces wants to see what there is
                return own(self, *args, **kwargs)
        return code(self, *needed)

    return forward
