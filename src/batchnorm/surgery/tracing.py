"""Graphs of what a model computes: of the whole where torch.fx can trace it, else of its largest parts.

A trace is believed only if it tells all: not if it depends on the mode of training, asks for the type of an input, sets
attributes, keeps something in them for the next call, or makes tensors of its own.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Collection, Iterator
from typing import Any, NamedTuple

import torch
from torch import fx, nn
from torch.fx.proxy import TraceError

from batchnorm._torch import called_by, children_of
from batchnorm.models.attributes import preserved_attributes
from batchnorm.models.hooks import without_hooks
from batchnorm.models.modes import preserved_modes, set_training
from batchnorm.models.nested import leaves, map_leaves
from batchnorm.models.norm_layers import NormLayer
from batchnorm.surgery.observing import Calls, ModuleCall, Spec
from batchnorm.surgery.signatures import signature

# What a module is called with, or None and why that cannot be said.
CallOf = Callable[[nn.Module], tuple[ModuleCall | None, str]]
_WITH_OPTIONS = "called_with_optional_arguments"  # of a node: modules of its graph


class Region(NamedTuple):
    """A part of a model, and the graph of its calls of modules, whose targets are relative to it."""

    path: str
    module: nn.Module
    graph: fx.Graph

    def called(self, node: fx.Node) -> nn.Module | None:
        """The module that a node calls."""
        if node.op != "call_module":
            return None
        return self.module.get_submodule(str(node.target))

    def around(self, node: fx.Node) -> tuple[nn.Module, ...]:
        """The modules inside the region whose forwards a node lies in, from the outermost."""
        paths = [path for path, _ in node.meta.get("nn_module_stack", {}).values()]
        return tuple(self.module.get_submodule(path) for path in (paths[:-1] if node.op == "call_module" else paths))

    def where(self, node: fx.Node) -> str:
        """The path in the model of what a node calls."""
        return f"{self.path}.{node.target}".lstrip(".")


def arguments(node: fx.Node) -> list[fx.Node]:
    """The nodes among a node's arguments, as often as they stand there."""
    found: list[fx.Node] = []

    def note(argument: fx.Node) -> fx.Node:
        found.append(argument)
        return argument

    fx.node.map_arg((node.args, node.kwargs), note)
    return found


class Regions(NamedTuple):
    """Traced parts of a model, and why others are not, by path."""

    traced: list[Region]
    reasons: dict[str, str]

    def nodes(self) -> Iterator[tuple[Region, fx.Node, nn.Module]]:
        """Every call of a module in the graphs."""
        for region in self.traced:
            for node in region.graph.nodes:
                if (module := region.called(node)) is not None:
                    yield region, node, module

    def with_options(self) -> set[nn.Module]:
        """The modules that are called with more than they need."""
        return set[nn.Module]().union(
            *(node.meta.get(_WITH_OPTIONS, ()) for region in self.traced for node in region.graph.nodes)
        )

    def reason(self, path: str) -> str:
        """Why no graph calls the layer at `path`: the reason of the closest module around it, or that there is none."""
        if not path:
            return "it is the model itself"
        while path:
            path = path.rpartition(".")[0]
            if path in self.reasons:
                return f"{f'{path} is' if path else 'the model is'} not traceable: {self.reasons[path]}"
        return "no forward calls it"


class _Input(fx.Proxy):
    """A proxy that does not let itself be taken for something that is no tensor."""

    @property  # type: ignore[misc]  # what isinstance asks for
    def __class__(self) -> type:
        if not called_by("torch", 1):
            raise TraceError("it asks for the type of a tensor")
        return _Input


def _in_place(function: Callable[..., Any]) -> Callable[[fx.Proxy, object], fx.Proxy]:
    return lambda proxy, other: proxy.tracer.create_proxy("call_function", function, (proxy, other), {})


# torch.fx would take x += y for x = x + y, and others who have x would not see it change.
for _name in ("iadd", "isub", "imul", "itruediv", "ifloordiv", "imod", "ipow", "iand", "ior", "ixor", "imatmul"):
    setattr(_Input, f"__{_name}__", _in_place(getattr(operator, _name)))


class _Tracer(fx.Tracer):
    """Batch-norm layers, ours and others, are leaves; tensors of one call's arguments are the inputs."""

    proxy_buffer_attributes = True  # so that what changes buffers is part of the graph and does not happen

    def __init__(self, call: ModuleCall, leaf: Callable[[nn.Module], bool]) -> None:
        super().__init__()
        self._call, self._leaf = call, leaf
        self.with_options: set[nn.Module] = set()

    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        return isinstance(m, NormLayer) or self._leaf(m)

    def call_module(
        self, m: nn.Module, forward: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> Any:  # noqa: ANN401 - torch's own
        """torch's, and a note of who is called with more than it needs."""
        found = signature(type(m).forward)[0]
        if found is None or found.needed_of(args, kwargs) is None:
            self.with_options.add(m)
        return super().call_module(m, forward, args, kwargs)

    def proxy(self, node: fx.Node) -> fx.Proxy:
        return _Input(node, self)

    def get_fresh_qualname(self, prefix: str) -> str:
        raise TraceError("it makes tensors of its own")

    def create_args_for_root(
        self, root_fn: Callable[..., Any], is_module: bool, concrete_args: object = None
    ) -> tuple[Any, list[Any]]:
        """Placeholders for tensors; everything else as it is."""
        root = self.root
        names = iter(_names(root_fn, self._call))
        inputs = []

        def placeholder(spec: object) -> object:
            name = next(names)
            if not isinstance(spec, Spec):
                return spec
            inputs.append(self.create_proxy("placeholder", name, (), {}))
            return inputs[-1]

        args, kwargs = map_leaves((self._call.args, self._call.kwargs), placeholder)
        return lambda *_: root_fn(root, *args, **kwargs), []


def is_leaf(module: nn.Module) -> bool:
    """Whether a module is one node by default: torch.nn's, and one without others inside.

    Such a one, like drop path, may do as it likes: it goes on doing it.
    """
    return not children_of(module) or fx.Tracer().is_leaf_module(module, "")


def _names(forward: Callable[..., Any], call: ModuleCall) -> list[str]:
    """A name for each leaf of a call's arguments: those of `forward` where each argument is one leaf."""
    count = len(list(leaves((call.args, call.kwargs))))
    code = getattr(forward, "__code__", None)
    if code is None or call.kwargs or len(call.args) != count or code.co_argcount <= count:
        return [f"argument_{i}" for i in range(count)]
    return list(code.co_varnames[1 : count + 1])


def trace(
    module: nn.Module, call: ModuleCall, *, leaf: Callable[[nn.Module], bool] = is_leaf
) -> tuple[fx.Graph | None, str]:
    """The graph of one call of a module; None and the reason where it cannot be traced.

    Args:
        module: hooks are not part of the graph and are not called.
        call: what it is called with.
        leaf: which modules inside are one node, besides batch-norm layers.
    """
    if "forward" in vars(module):
        return None, "it has a forward of its own"
    with without_hooks(module), preserved_attributes(module) as changed, torch.random.fork_rng(devices=()):
        try:
            tracer = _Tracer(call, leaf)
            graph = tracer.trace(module)
        except Exception as error:
            return None, (str(error) or type(error).__name__).splitlines()[0][:120]
    if changed:
        return None, f"it sets {', '.join(sorted(changed))}"
    for node in graph.nodes:
        node.meta[_WITH_OPTIONS] = tracer.with_options
    return graph, ""


def plain_call(module: nn.Module) -> tuple[ModuleCall | None, str]:
    """A module's call with a tensor for each argument that it needs, and no other; None and the reason without one."""
    found, reason = signature(type(module).forward)
    if found is None:
        return None, reason
    return ModuleCall((Spec((), torch.float32),) * len(found.needed), {}), ""


def seen_call(calls: Calls, module: nn.Module) -> tuple[ModuleCall | None, str]:
    """How a module was called; None and the reason where it was not, or in several ways."""
    seen = calls.get(module, [])
    if not seen:
        return None, "the example inputs do not reach it"
    if not all(call.alike(seen[0]) for call in seen):
        return None, "it is called in several ways"
    return seen[0], ""


def regions(
    model: nn.Module,
    call_of: CallOf,
    modes: Collection[bool],
    *,
    leaf: Callable[[nn.Module], bool] = is_leaf,
) -> Regions:
    """The largest parts of a model that can be traced, of those that contain batch-norm layers.

    Args:
        model: it is as before afterwards.
        call_of: what a module is called with, or why that cannot be said.
        modes: the values of `training` in which a part has to have the same graph.
        leaf: as in `trace`.
    """
    found = Regions([], {})
    seen: set[nn.Module] = set()

    def visit(path: str, module: nn.Module) -> None:
        if (
            module in seen
            or isinstance(module, NormLayer)
            or not any(isinstance(m, NormLayer) for m in module.modules())
        ):
            return
        seen.add(module)
        graph, reason = in_modes(module, call_of, modes, leaf=leaf)
        if graph is not None:
            found.traced.append(Region(path, module, graph))
            seen.update(module.modules())
            return
        if reason:
            found.reasons[path] = reason
        for name, child in module.named_children():
            visit(f"{path}.{name}".lstrip("."), child)

    visit("", model)
    return found


def in_modes(
    module: nn.Module,
    call_of: CallOf,
    modes: Collection[bool],
    *,
    leaf: Callable[[nn.Module], bool] = is_leaf,
) -> tuple[fx.Graph | None, str]:
    """`trace` in each mode; None and the reason too where the graphs differ."""
    if type(module).forward is nn.Module.forward:
        return None, ""  # a list or a dict of modules, that nobody calls
    call, reason = call_of(module)
    if call is None:
        return None, reason
    graphs = []
    with preserved_modes(module):
        for training in modes:
            for inner in module.modules():
                set_training(inner, training)
            graph, reason = trace(module, call, leaf=leaf)
            if graph is None:
                return None, reason
            graphs.append(graph)
    if len({str(graph) for graph in graphs}) > 1:
        return None, "it computes something else in training than in inference"
    return graphs[0], ""
