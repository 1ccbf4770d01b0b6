"""Where batch-norm layers stand directly beside linear ones: all calls of one with all calls of the other."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import NamedTuple

from torch import fx, nn

from batchnorm._torch import parameters_of
from batchnorm.models.attributes import attribute_at
from batchnorm.models.hooks import has_hooks
from batchnorm.models.norm_layers import NormLayer
from batchnorm.surgery import linear, scale_shift
from batchnorm.surgery.linear import LinearLayer
from batchnorm.surgery.observing import Calls, Spec
from batchnorm.surgery.recognising import LinearLayers
from batchnorm.surgery.tracing import Region, Regions, arguments

# What does nothing in scale_shift.
_NONE_BEFORE = "no linear layer stands directly before it"
_NOTHING = (nn.Identity, nn.Dropout, nn.Dropout1d, nn.Dropout2d, nn.Dropout3d, nn.AlphaDropout, nn.FeatureAlphaDropout)


class Site(NamedTuple):
    """One call of a module in a graph."""

    region: Region
    node: fx.Node


@dataclass
class Chain:
    """A linear layer and the batch-norm layers whose only business is with it, in the order of computing."""

    layer: LinearLayer
    path: str
    before: list[NormLayer] = field(default_factory=list)
    after: list[NormLayer] = field(default_factory=list)


class Flow:
    """Who feeds whom in a model, from its graphs and from what example inputs showed.

    Args:
        model: the whole.
        regions: its graphs.
        calls: what was seen.
        linear_layers: which of its modules are linear.
        training: whether it is to hold in training, too, where dropout does something.
    """

    def __init__(
        self,
        model: nn.Module,
        regions: Regions,
        calls: Calls,
        linear_layers: LinearLayers,
        *,
        training: bool = False,
    ) -> None:
        self.calls = calls
        self._linear_layers = linear_layers
        self._nothing = (nn.Identity,) if training else _NOTHING
        self.sites: dict[nn.Module, list[Site]] = {}
        for region, node, module in regions.nodes():
            self.sites.setdefault(module, []).append(Site(region, node))
        owners: dict[int, int] = {}
        for module in model.modules():
            for parameter in parameters_of(module).values():
                owners[id(parameter)] = owners.get(id(parameter), 0) + 1
        for region in regions.traced:
            for node in region.graph.nodes:
                if node.op == "get_attr":
                    tensor = attribute_at(region.module, str(node.target))
                    owners[id(tensor)] = owners.get(id(tensor), 0) + 1
        self._owners = owners

    def where(self, module: nn.Module) -> str:
        """A module's path in the model, by its first call."""
        region, node = self.sites[module][0]
        return region.where(node)

    def source(self, site: Site) -> tuple[nn.Module | None, str]:
        """The module that a call gets its only tensor from, if that one gives it to nobody else; None and why not."""
        node = site.node
        if len(node.args) != 1 or not isinstance(node.args[0], fx.Node):
            return None, "it is not called with one tensor"
        came = node.args[0]
        while True:
            module = site.region.called(came)
            if module is None:
                return None, _NONE_BEFORE
            readers = sum(argument is came for reader in came.users for argument in arguments(reader))
            if readers != 1:
                return None, f"the output of {site.region.where(came)} has {readers} readers"
            if any(has_hooks(around) for around in {*site.region.around(came)} ^ {*site.region.around(node)}):
                return None, f"a module around {site.region.where(came)} or it has hooks"
            if type(module) not in self._nothing or has_hooks(module):
                return module, ""
            if len(came.args) != 1 or not isinstance(came.args[0], fx.Node):
                return None, _NONE_BEFORE
            came = came.args[0]

    def only_source(self, module: nn.Module) -> tuple[nn.Module | None, str]:
        """The one module that all calls of another get their input from, and that is never called otherwise."""
        sources: set[nn.Module] = set()
        for site in self.sites[module]:
            source, reason = self.source(site)
            if source is None:
                return None, reason
            sources.add(source)
        if len(sources) > 1:
            return None, f"it is called {len(self.sites[module])} times, after different modules"
        (source,) = sources
        seen = [len(group.get(m, [])) for group in (self.sites, self.calls) for m in (source, module)]
        if seen[0] != seen[1] or seen[2] != seen[3]:
            return None, f"{self.where(source)} is called {max(seen[0], seen[2])} times, not always before it"
        return source, ""

    def linear(self, module: nn.Module) -> LinearLayer | str:
        """The linear layer that a module is, or why none stands here."""
        found = self._linear_layers.get(module)
        if isinstance(found, str):
            return f"no linear layer stands directly before it: {self.where(module)} {found}"
        return found or _NONE_BEFORE

    def linear_layers(self) -> list[LinearLayer]:
        """Those that the graphs call, in the order of their first calls."""
        found = (self._linear_layers.get(module) for module in self.sites)
        return [layer for layer in found if isinstance(layer, LinearLayer)]

    def why_not_changed(self, layer: LinearLayer) -> str | None:
        """Why a linear layer's weights cannot change without others noticing; None where they can."""
        where = self.where(layer.module)
        if has_hooks(layer.module):
            return f"{where} has hooks, which would see other values"
        if any(parameter is not None and self._owners[id(parameter)] > 1 for parameter in layer.parameters()):
            return f"others use the parameters of {where} too"
        return None

    def why_not_aligned(self, layer: LinearLayer, norm: NormLayer) -> str | None:
        """Why what a linear layer has for each channel is none for the batch-norm layer; None where it is."""
        for call in self.calls[norm]:
            spec = call.args[0]
            assert isinstance(spec, Spec)
            rank = len(spec.shape)
            norm_axis, linear_axis = scale_shift.channel_dim(norm) % rank, linear.channel_axis(layer, rank)
            if norm_axis != linear_axis:
                return (
                    f"its channels are dimension {norm_axis} of {spec.shape}, those of {self.where(layer.module)} "
                    f"{'none' if linear_axis is None else f'dimension {linear_axis}'}"
                )
        return None

    def with_keywords(self, module: nn.Module) -> bool:
        """Whether a call passes more than the input: a residual, a mask."""
        return any(site.node.kwargs for site in self.sites[module]) or any(call.kwargs for call in self.calls[module])


def find_chains(flow: Flow, foldable: list[NormLayer]) -> tuple[list[Chain], dict[NormLayer, str]]:
    """Chains of linear layers with `foldable` batch-norm layers, and why the others are in none."""
    chains: dict[nn.Module, Chain] = {}  # by its last module so far
    why: dict[NormLayer, str] = {}
    for norm in foldable:
        source, reason = flow.only_source(norm)
        if source is None:
            why[norm] = reason
            continue
        layer = flow.linear(source)
        if isinstance(layer, LinearLayer):
            chain = chains.get(source) or Chain(layer, flow.where(source))
        elif source in chains and isinstance(source, NormLayer) and not _ends(flow, source):
            chain = chains[source]
        else:
            why[norm] = layer
            continue
        if obstacle := flow.why_not_changed(chain.layer) or flow.why_not_aligned(chain.layer, norm):
            why[norm] = obstacle
            continue
        chain.after.append(norm)
        chains[norm] = chain
    complete = list({id(chain): chain for chain in chains.values()}.values())
    by_layer = {chain.layer.module: chain for chain in complete}
    for layer in flow.linear_layers():
        head = layer.module
        while True:
            source = flow.only_source(head)[0]
            if not isinstance(source, NormLayer) or source not in why or _ends(flow, source):
                break
            if obstacle := (
                flow.why_not_changed(layer)
                or flow.why_not_aligned(layer, source)
                or layer.why_not_before
                or ("it is called with more than its input" if flow.with_keywords(layer.module) else None)
            ):
                why[source] += f"; not into {flow.where(layer.module)} either: {obstacle}"
                break
            if layer.module not in by_layer:
                by_layer[layer.module] = Chain(layer, flow.where(layer.module))
                complete.append(by_layer[layer.module])
            by_layer[layer.module].before.insert(0, source)
            del why[source]
            head = source
    return complete, why


def _ends(flow: Flow, norm: NormLayer) -> bool:
    """Whether what comes out of a layer is more than its scale and shift."""
    return scale_shift.activation(norm) is not None or flow.with_keywords(norm)
