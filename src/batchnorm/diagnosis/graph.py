"""Who feeds a model's batch-norm layers: its graphs, as far as it can be traced, looked at from each layer upwards."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from weakref import WeakKeyDictionary

from torch import fx, nn
from torch.nn.modules.lazy import LazyModuleMixin

from batchnorm.diagnosis.operations import Kind, Operation, operation
from batchnorm.diagnosis.subject import LayerState, Subject
from batchnorm.models.devices import device_types
from batchnorm.models.norm_layers import named_norm_layers, uncompiled
from batchnorm.population.batches import cut, samples
from batchnorm.population.interrupts import caller
from batchnorm.population.transaction import transaction
from batchnorm.surgery import linear
from batchnorm.surgery.biases import dead_biases
from batchnorm.surgery.chains import Flow
from batchnorm.surgery.linear import LinearLayer
from batchnorm.surgery.observing import Calls, ModuleCall, Spec, observe
from batchnorm.surgery.recognising import LinearLayers, linear_layers
from batchnorm.surgery.tracing import CallOf, plain_call, regions, seen_call

SHOWN_SAMPLES = 2  # in the pass that shows how modules are called: one alone is too few for layers without statistics


@dataclass(eq=False)
class Graph:
    """What is known of a model's graphs.

    Attributes:
        operations: the calls of each batch-norm layer, in training.
        dead_biases: by the paths of the layers: the linear layer whose bias the layer takes away, or why none.
        names: the paths of modules.
        flow: who feeds whom, the same in both modes.
        seen: whether an example showed how modules are called; otherwise that is assumed.
    """

    operations: dict[nn.Module, list[Operation]]
    dead_biases: dict[str, LinearLayer | str]
    names: dict[nn.Module, str]
    flow: Flow
    seen: bool

    def upstream(self, call: Operation, *through: Kind) -> Iterator[Operation]:
        """What a call gets its input from, and further up through operations of some kinds, each once."""
        return self.upstream_where(call, lambda met: met.kind in through)

    def upstream_where(self, call: Operation, through: Callable[[Operation], bool]) -> Iterator[Operation]:
        """`upstream`, through what a function says."""
        seen: set[fx.Node] = set()
        ahead = _inputs(call)
        while ahead:
            node = ahead.pop()
            if node in seen:
                continue
            seen.add(node)
            met = operation(call.region, node)
            yield met
            if through(met):
                ahead += _inputs(met)

    def where(self, met: Operation) -> str:
        """A node in words: the path of the module that it calls, or its function and the module that calls that."""
        if met.module is not None:
            return self.names.get(met.module) or "the model itself"
        around = met.region.around(met.node)
        inside = self.names.get(around[-1] if around else met.region.module) or "the model itself"
        target = met.node.target
        return f"{target if isinstance(target, str) else getattr(target, '__name__', target)} in {inside}"

    def calls(self, layer: LayerState) -> list[Operation]:
        """A layer's calls; none where no graph has them."""
        return [] if layer.module is None else self.operations.get(layer.module, [])


_known: WeakKeyDictionary[Subject, Graph | None] = WeakKeyDictionary()


def graph(subject: Subject) -> Graph | None:
    """The graph of a subject's model, made once; None without a model."""
    if subject not in _known:
        _known[subject] = None if subject.model is None else _made(subject, uncompiled(subject.model))
    return _known[subject]


def _made(subject: Subject, model: nn.Module) -> Graph:
    observed = None if subject.example is None else _observed(subject, model)
    if observed is None:
        call_of: CallOf = plain_call
        calls, known = _assumed(model)
    else:
        calls, known = observed
        seen = calls
        call_of = lambda module: seen_call(seen, module)  # noqa: E731 - one expression
    found = regions(model, call_of, modes=(True, False))
    flow = Flow(model, found, calls, known, training=True)
    if observed is None:
        _assume_ranks(model, flow, calls)
    operations: dict[nn.Module, list[Operation]] = {}
    whole = any(region.module is model for region in found.traced)
    in_training = found if whole else regions(model, call_of, modes=(True,))
    for region, node, module in in_training.nodes():
        operations.setdefault(module, []).append(operation(region, node))
    names: dict[nn.Module, str] = {}
    for name, module in (subject.model or model).named_modules():
        names[module] = name
    dead = dead_biases(model, found, flow)
    inside = {path: names[module] for path, module in named_norm_layers(model)}
    return Graph(operations, {inside[path]: answer for path, answer in dead.items()}, names, flow, observed is not None)


def _observed(subject: Subject, model: nn.Module) -> tuple[Calls, LinearLayers] | None:
    """How modules are called, seen in a pass of a few samples, or of the whole example; None where neither runs."""
    if any(isinstance(module, LazyModuleMixin) for module in model.modules()):
        return None
    n = samples(subject.example)

    def forward(model: nn.Module, batch: object) -> object:
        with caller():
            return subject.forward(model, batch)

    for example in [cut(subject.example, SHOWN_SAMPLES)] * (n is not None) + [subject.example]:
        try:
            with transaction(model, (), device_types(model)), linear_layers(model) as known:
                calls, _ = observe(model, example, forward)
        except Exception:  # of the model: it may need a whole batch, or more than one of the data's items
            continue
        if subject.data is not None:
            shown = samples(example)
            whole = None if shown is None or not subject.data.samples else shown / subject.data.samples
            subject.data.passes += 1 / max(subject.data.batches, 1) if whole is None else whole
        return calls, known
    return None


def _assumed(model: nn.Module) -> tuple[Calls, LinearLayers]:
    """Without example inputs, what is linear by its class."""
    known: LinearLayers = {m: linear.of_torch(m) for m in model.modules() if linear.is_of_torch(m)}
    return {}, known


def _assume_ranks(model: nn.Module, flow: Flow, calls: Calls) -> None:
    """Without example inputs, layers behind a convolution get its rank, and those behind a product (N, C)."""
    for _, norm in named_norm_layers(model):
        source = flow.only_source(norm)[0] if norm in flow.sites else None
        if source is None or not linear.is_of_torch(source):
            continue
        rank = linear.of_torch(source).parameters()[0].dim()
        for module in (source, norm):
            shown = ModuleCall((Spec((0,) * rank, next(source.parameters()).dtype),), {})
            calls[module] = [shown] * len(flow.sites[module])


def _inputs(met: Operation) -> list[fx.Node]:
    """The nodes whose values pass through an operation: of a module, its first argument."""
    node = met.node
    if met.kind in ("join", "concatenation"):
        return [n for n in node.all_input_nodes if n.op != "get_attr"]
    first = node.args[0] if node.args else node.kwargs.get("input", next(iter(node.kwargs.values()), None))
    return [first] if isinstance(first, fx.Node) else list(node.all_input_nodes[:1])
