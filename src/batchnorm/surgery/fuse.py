"""Batch norm, the addition of a residual and the activation behind it become one call, for training."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, NamedTuple

from torch import fx, nn

from batchnorm.models.hooks import has_hooks
from batchnorm.models.norm_layers import NormLayer, display_name, named_norm_layers
from batchnorm.surgery.convert import become_ours
from batchnorm.surgery.patterns import Match, match
from batchnorm.surgery.report import Entry, attach, check_free
from batchnorm.surgery.rewriting import residual_for, restore, rewrite
from batchnorm.surgery.tracing import Region, Regions, in_modes, plain_call, regions

_MODES = (True, False)


class _Found(NamedTuple):
    """A layer with what it takes in: the same in all its calls.

    Attributes:
        match: one of these.
        chain: the modules whose forwards its calls lie in, from the region inwards to the one that has all of them.
        inner: those further in, whose code has to become part of that one's.
    """

    match: Match
    chain: tuple[nn.Module, ...]
    inner: frozenset[nn.Module]


def fuse(model: nn.Module) -> nn.Module:
    """Make each batch norm -> addition -> activation of a model one call of ours, in place.

        y = activation(norm(x) + residual)    becomes    y = norm(x, residual=residual, activation=activation)

    either part may be missing. Outputs, gradients and statistics are the same within rounding. Parameters, buffers,
    state_dict keys, hooks and modules stay the same objects, so that optimizers stay valid: layers of torch.nn become
    ours as in `convert`, and the innermost module whose forward has the whole pattern gets a subclass of its class with
    that forward rewritten. `revert` undoes all of it; fusing again begins with that.

    Only how it is executed changes: the layers stay plain, and whoever calls the parts one by one gets what they gave.
    A rewritten forward runs while everything is as it was: the children and flags of the modules whose code it is, no
    hooks at what is fused, and optional arguments at their defaults. Otherwise the class's own forward runs.

    Patterns are found in graphs: of the whole model where torch.fx can trace it, else of the largest parts that it can.

    A layer is fused if all its calls fit the same pattern: the output has no other reader, the residual is of the
    input's shape or broadcasts to it, and the activation is one of ours with torch's default parameters. Otherwise it
    is left, and the report says why.

    Args:
        model: any module.

    Returns:
        `model`, the same object, with a `report`: what each layer was fused with, or why not.

    Raises:
        OptionError: the model has a `report` of its own.
    """
    check_free(model)
    unfuse(model)
    become_ours(model)
    paths = {norm: path for path, norm in named_norm_layers(model)}
    found = regions(model, plain_call, _MODES)
    chosen, why = _choose(found)
    why |= {norm: found.reason(path) for norm, path in paths.items() if norm not in chosen and norm not in why}
    done: dict[nn.Module, str] = {}
    names = {module: path for path, module in model.named_modules()}
    for root, graph, region in _plans(chosen, why, found.with_options()):
        norms = _rewrite(region, root, graph, chosen)
        done |= {norm: f"with {chosen[norm].match}, in {display_name(names[root])}" for norm in norms}
    entries = (Entry(path, norm in done, done.get(norm) or why[norm]) for norm, path in paths.items())
    return attach(model, "fused", entries)


def unfuse(model: nn.Module) -> None:
    """Undo what `fuse` rewrote."""
    for module in model.modules():
        restore(module)


def _choose(found: Regions) -> tuple[dict[nn.Module, _Found], dict[nn.Module, str]]:
    """The layers whose calls all fit, and why others do not."""
    sites: dict[nn.Module, list[tuple[Region, Match | str]]] = {}
    for region, node, module in found.nodes():
        if isinstance(module, NormLayer):
            sites.setdefault(module, []).append((region, match(region, node)))
    why: dict[nn.Module, str] = {}
    chosen: dict[nn.Module, _Found] = {}
    for norm, calls in sites.items():
        pattern = _same([answer for _, answer in calls])
        if isinstance(pattern, str):
            why[norm] = pattern
            continue
        around = _around([(region, answer) for region, answer in calls if isinstance(answer, Match)])
        if isinstance(around, str):
            why[norm] = around
        else:
            chosen[norm] = _Found(pattern, *around)
    # Of two layers whose outputs are added, the one less far inside does it; of equals, the later.
    additions: dict[fx.Node, nn.Module] = {}
    for norm in sorted(chosen, key=lambda norm: len(chosen[norm].inner), reverse=True):
        for _, answer in sites[norm]:
            assert isinstance(answer, Match)
            if answer.addition is not None:
                loser = additions.get(answer.addition)
                additions[answer.addition] = norm
                if loser is not None and loser is not norm and chosen.pop(loser, None) is not None:
                    why[loser] = "what its output is added to takes in the addition"
    return chosen, why


def _same(answers: list[Match | str]) -> Match | str:
    """The pattern of all calls, or why there is none."""
    for answer in answers:
        if isinstance(answer, str):
            return answer if len(answers) == 1 else f"of its {len(answers)} calls, one does not fit: {answer}"
    matches = [answer for answer in answers if isinstance(answer, Match)]
    if len({found.activation for found in matches}) > 1:
        return f"its {len(matches)} calls have different activations"
    return matches[0]


def _around(calls: list[tuple[Region, Match]]) -> tuple[tuple[nn.Module, ...], frozenset[nn.Module]] | str:
    """The chain of modules around a layer's pattern and those further in, or why it cannot be rewritten there."""
    chains, inner = set(), set()
    for region, found in calls:
        stacks = [region.around(node) for node in found.nodes]
        depth = 0
        while all(len(s) > depth for s in stacks) and len({s[depth] for s in stacks}) == 1:
            depth += 1
        chains.add((region.module, *stacks[0][:depth]))
        inner |= {module for stack in stacks for module in stack[depth:]}
    if len({chain[-1] for chain in chains}) > 1:
        return "it is called in several modules"
    if any(has_hooks(module) for module in inner):
        return "a module around it has hooks, which would not be called"
    return chains.pop(), frozenset(inner)


def _plans(
    chosen: dict[nn.Module, _Found], why: dict[nn.Module, str], with_options: set[nn.Module]
) -> Iterable[tuple[nn.Module, fx.Graph, Region]]:
    """The modules to rewrite and their graphs; layers that turn out not to fit there leave `chosen`."""
    while True:
        inner = frozenset[nn.Module]().union(*(found.inner for found in chosen.values()))
        plans: dict[nn.Module, tuple[fx.Graph, Region]] = {}
        misfits: dict[nn.Module, str] = {}
        for root in dict.fromkeys(found.chain[-1] for found in chosen.values()):
            graph, reason = _graph(root, inner) if root not in with_options else (None, "it is called in another way")
            region = Region("", root, graph or fx.Graph())
            plans[root] = region.graph, region
            fitting = set() if graph is None else _fitting(region, chosen)
            here = {norm for norm, found in chosen.items() if found.chain[-1] is root}
            there = {
                norm for node in region.graph.nodes if (norm := region.called(node)) in chosen and norm is not None
            }
            reason = reason or "a module around it is changed for others, and would compute something else alone"
            misfits |= dict.fromkeys((here | there) - fitting, reason)
        if not misfits:
            return [(root, graph, region) for root, (graph, region) in plans.items()]
        for norm, reason in misfits.items():
            outer = chosen.pop(norm)
            if len(outer.chain) > 1 and not has_hooks(outer.chain[-1]):  # the next module out may do
                chosen[norm] = outer._replace(chain=outer.chain[:-1], inner=outer.inner | {outer.chain[-1]})
            else:
                why[norm] = reason


def _graph(root: nn.Module, inner: frozenset[nn.Module]) -> tuple[fx.Graph | None, str]:
    """The graph of one module's own forward, with the modules in `inner` as part of it."""
    if isinstance(root, fx.GraphModule):
        return None, "its module is of torch.fx and copies itself by its graph"
    return in_modes(root, plain_call, _MODES, leaf=lambda module: module not in inner)


def _fitting(region: Region, chosen: dict[nn.Module, _Found]) -> set[nn.Module]:
    """The chosen layers that have, in all their calls in a region, the pattern that they were chosen for."""
    fits: dict[nn.Module, bool] = {}
    for node in region.graph.nodes:
        norm = region.called(node)
        if norm in chosen:
            answer = match(region, node)
            same = isinstance(answer, Match) and answer.activation == chosen[norm].match.activation
            fits[norm] = fits.get(norm, True) and same
    return {norm for norm, fit in fits.items() if fit}


def _rewrite(region: Region, root: nn.Module, graph: fx.Graph, chosen: dict[nn.Module, _Found]) -> list[nn.Module]:
    """Make the calls in a module's graph one each, and the graph its forward.

    Returns:
        The layers.
    """
    matches = [match(region, node) for node in list(graph.nodes) if region.called(node) in chosen]
    inlined = {module: None for node in graph.nodes for module in region.around(node)}
    norms, unseen = [], []
    for found in matches:
        assert isinstance(found, Match)
        x, path = found.node.args[0], str(found.node.target)
        unseen += [module for node in found.nodes if (module := region.called(node)) is not None]
        norms.append(found.norm)
        with graph.inserting_before(found.last):
            keywords: dict[str, Any] = {}
            if found.addition is not None:
                # Not the operand that was found: what it was may have become another node since.
                (other,) = [argument for argument in found.addition.args if argument not in found.nodes]
                keywords["residual"] = graph.call_function(residual_for, (other, x))
            if found.activation is not None:
                keywords["activation"] = found.activation
            call = graph.call_module(path, (x,), keywords)
        found.last.replace_all_uses_with(call)
        for node in reversed(found.nodes):
            graph.erase_node(node)
    graph.lint()
    rewrite(root, graph, unseen, inlined)
    return list(dict.fromkeys(norms))
