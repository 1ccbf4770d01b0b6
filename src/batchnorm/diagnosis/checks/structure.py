"""BN2..: where layers stand, and what they are given there."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor, nn

from batchnorm.diagnosis.definition import Check
from batchnorm.diagnosis.dropout import dropout_ratio
from batchnorm.diagnosis.finding import Finding
from batchnorm.diagnosis.graph import Graph, graph
from batchnorm.diagnosis.noise import BEYOND_NOISE, Difference, difference, rms, share_of_samples
from batchnorm.diagnosis.observation import ObservedLayer
from batchnorm.diagnosis.operations import Kind, Operation, is_per_channel, one_a_channel
from batchnorm.diagnosis.subject import LayerState, Subject, expression
from batchnorm.models.norm_layers import NormLayer, display_name
from batchnorm.modules import BatchNorm
from batchnorm.report.document import Table
from batchnorm.surgery import scale_shift
from batchnorm.surgery.linear import LinearLayer

ROWS = 8  # of a table of evidence

# A ratio of variances that is nearer to 1 than this makes no difference that anyone could measure in a prediction.
DROPOUT_MATTERS = 0.02
# Calls whose moments differ by less share one set of statistics rightly: a tenth of a standard deviation, a fifth of
# the variance. What they share is off by half of it for each.
CALLS_APART = Difference(torch.tensor(0.1), torch.tensor(0.2))

_LINEAR: tuple[Kind, ...] = (
    "linear",
    "identity",
    "scale",
    "average",
    "reshape",
    "transpose",
    "concatenation",
)
_POINTWISE: tuple[Kind, ...] = ("elementwise", "identity", "scale", "dropout", "join", "norm", "item")


def dead_bias(subject: Subject) -> Iterator[Finding]:
    """A bias right before the layer, which it takes away again."""
    found = graph(subject)
    if found is None:
        return
    for layer in subject.layers:
        source = found.dead_biases.get(layer.name)
        if not isinstance(source, LinearLayer):
            continue
        name, bias = found.names[source.module], source.parameters()[1]
        assert bias is not None
        yield Finding(
            "BN201",
            "info",
            layer.name,
            f"it subtracts the bias of {display_name(name)}: {bias.numel()} parameters without effect or gradient",
            "bn.remove_dead_biases(model, x)  # x: what the model is called with",
            weight=float(bias.numel()),
        )


# Statistics that are as near to inference's, in the logarithm of the variance, are recalibrated ones: dropout moves
# them by more wherever it matters. Inference is then right, and only training on would make it wrong again.
STATISTICS_OF_INFERENCE = 0.02


def dropout_before(subject: Subject) -> Iterator[Finding]:
    """Dropout upstream, and nothing but linear operations between."""
    found = graph(subject)
    if found is None:
        return
    dropped: dict[LayerState, list[Operation]] = {}
    for layer in subject.layers:
        if _normalises_by_running_statistics(layer):
            continue
        above = [met for call in found.calls(layer) for met in found.upstream(call, *_LINEAR) if met.kind == "dropout"]
        if above:
            dropped[layer] = above
    switches = {_switch(met) for above in dropped.values() for met in above}
    ratios = dropout_ratio(subject, dropped.keys(), switches) if dropped else {}
    for layer, above in dropped.items():
        ratio = ratios.get(layer.name)
        typical = None if ratio is None or not ratio.numel() else float(ratio.median())
        if typical is not None and abs(typical - 1) < DROPOUT_MATTERS:
            continue
        sources = list(dict.fromkeys(f"{found.where(met)} (p={met.probability:g})" for met in above))
        measured = "" if typical is None else f": in training the variance is {typical:.2f} times that in inference"
        far = subject.far.get(layer.name)
        right = far is not None and far.moved < STATISTICS_OF_INFERENCE
        yield Finding(
            "BN202",
            "info" if right else "warning",
            layer.name,
            f"only linear operations between it and dropout, {', '.join(sources)}{measured}",
            _move(found, layer, above),
            None if ratio is None else _ratios(ratio),
            weight=0.0 if typical is None else abs(typical - 1),
        )


def _switch(met: Operation) -> nn.Module:
    """The module whose mode decides whether a dropout drops."""
    if met.module is not None:
        return met.module
    around = met.region.around(met.node)
    return around[-1] if around else met.region.module


def _move(found: Graph, layer: LayerState, above: list[Operation]) -> str:
    lines = []
    for met in above:
        if met.module is None:
            lines.append(f"# in forward: drop behind {layer.path}, and not before: {found.where(met)}")
        else:
            lines.append(f"{expression(found.names[met.module])}.p = 0.0  # and drop behind {layer.path} instead")
    return "\n".join(dict.fromkeys(lines))


def _ratios(ratio: Tensor) -> Table:
    worst = ratio.log().abs().argsort(descending=True)[:ROWS].tolist()
    return Table(
        "variance in training in parts of that in inference",
        ("channel", "ratio"),
        [(str(channel), f"{float(ratio[channel]):.3f}") for channel in worst],
    )


def _normalises_by_running_statistics(layer: LayerState) -> bool:
    return layer.ours is not None and layer.ours.frozen.normalization


def shared_layer(subject: Subject) -> Iterator[Finding]:
    """A layer that is called more than once in a forward pass, and how far its calls' inputs are apart."""
    for layer, seen in subject.observed():
        if seen.calls < 2:
            continue
        calls = [moments for moments in seen.by_call if moments.count > 0]
        apart = _apart(layer, seen) if len(calls) > 1 and seen.population is not None else None
        times = f"called {seen.calls} times in a forward pass"
        if apart is None:
            yield Finding(
                "BN203", "info", layer.name, f"{times}, with inputs of the same moments", _split(subject, layer)
            )
            continue
        shift, log_ratio = (rms(value) for value in apart)
        yield Finding(
            "BN203",
            "warning",
            layer.name,
            f"{times}; one set of statistics for inputs whose means are up to {shift:.2g} SD from the common one and "
            f"whose variances differ from it by a factor of {torch.tensor(log_ratio).exp():.2f}",
            _split(subject, layer),
            _by_call(layer, seen),
            weight=max(shift, log_ratio),
        )


def _apart(layer: LayerState, seen: ObservedLayer) -> Difference | None:
    """The largest difference of a call's moments from the common ones; None if none is beyond noise."""
    assert seen.population is not None
    share = share_of_samples(seen)
    samples = len(seen.sample_means)
    noise = 1.0 if not samples else (1.0 if share is None else share) / samples  # of a mean, squared, in variances
    found: Difference | None = None
    for moments in seen.by_call:
        if not moments.count > 0:
            continue
        apart = difference(seen.population, moments, layer.eps)
        least = (BEYOND_NOISE * noise, BEYOND_NOISE * 2 * noise)
        large = [
            rms(value) > max(float(size), limit**0.5)
            for value, size, limit in zip(apart, CALLS_APART, least, strict=True)
        ]
        if any(large) and (found is None or max(map(rms, apart)) > max(map(rms, found))):
            found = apart
    return found


def _by_call(layer: LayerState, seen: ObservedLayer) -> Table:
    assert seen.population is not None
    rows = []
    for number, moments in enumerate(seen.by_call[:ROWS], 1):
        if moments.count > 0:
            shift, log_ratio = difference(seen.population, moments, layer.eps)
            rows.append((str(number), f"{rms(shift):.3f}", f"{rms(log_ratio):.3f}"))
    return Table("each call against all of them, rms over channels", ("call", "mean, SD", "log variance ratio"), rows)


def _split(subject: Subject, layer: LayerState) -> str:
    """A layer for each place: by assignment where it has several names, else in forward."""
    assert subject.model is not None
    paths = [name for name, m in subject.model.named_modules(remove_duplicate=False) if m is layer.module]
    if len(paths) > 1:
        copies = [f"{expression(path)} = copy.deepcopy({layer.path})" for path in paths[1:]]
        return "\n".join(["import copy", *copies])
    return f"import copy\n{layer.path}_2 = copy.deepcopy({layer.path})  # and call this one in the second place"


def never_called(subject: Subject) -> Iterator[Finding]:
    """Layers that no batch reached in inference."""
    if subject.data is None or not subject.data.layers:
        return
    skipped = {name for name, _ in subject.data.skipped}
    for layer in subject.layers:
        seen = subject.data.layers.get(layer.name)
        if layer.name in skipped or display_name(layer.name) in skipped or (seen is not None and seen.calls):
            continue
        yield Finding(
            "BN204",
            "info",
            layer.name,
            f"not called in inference in {subject.data.batches} batches: its running statistics are of nothing that "
            f"inference uses",
            f"# {layer.path} is not reached: remove it, or call it in forward",
        )


def sequence_axis(subject: Subject) -> Iterator[Finding]:
    """(N, L, C) normalised over L."""
    found = graph(subject)
    if found is None:
        return
    for layer, seen in subject.observed():
        shape, axis = seen.input.shape, seen.input.channel_dim
        if len(shape) != 3 or axis != 1:
            continue
        producers = [_features_last(found, call) for call in found.calls(layer)]
        source = next((producer for producer in producers if producer is not None), None)
        if source is None:
            continue
        yield Finding(
            "BN206",
            "error",
            layer.name,
            f"the input {shape} of {found.where(source)} has its {shape[2]} features last, and dimension 1, "
            f"{shape[1]} positions, is normalised",
            _last(layer, shape[2]),
        )


def _features_last(found: Graph, call: Operation) -> Operation | None:
    """What gives a call its input, if it has its features in the last dimension."""
    for met in found.upstream(call, *_POINTWISE):
        if met.kind == "features":
            return met
        # A product may mix positions on purpose, of an input whose dimensions were turned.
        if met.is_product and all(
            above.kind in _POINTWISE or above.is_product or above.kind in ("features", "input", "constant")
            for above in found.upstream_where(met, lambda m: m.kind in _POINTWISE or m.is_product)
        ):
            return met
    return None


def _last(layer: LayerState, features: int) -> str:
    if layer.num_channels == features and layer.ours is not None:
        return f"{layer.path}.channel_dim = -1"
    options = f"{features}, channel_dim=-1, eps={layer.eps:g}, momentum={layer.momentum}"
    return f"{layer.path} = bn.BatchNorm1d({options})"


def normalised_twice(subject: Subject) -> Iterator[Finding]:
    """A second layer with nothing between that it could undo."""
    found = graph(subject)
    if found is None:
        return
    for layer in subject.layers:
        calls = found.calls(layer)
        firsts = [_first(found, layer, call) for call in calls]
        if not calls or any(first is None for first in firsts):
            continue
        names = list(dict.fromkeys(found.where(first) for first in firsts if first is not None))
        yield Finding(
            "BN207",
            "info",
            layer.name,
            f"what comes in was normalised by {', '.join(names)} already; nothing but scales and shifts of channels "
            f"lies between",
            f"{layer.path} = torch.nn.Identity()",
        )


def _first(found: Graph, layer: LayerState, call: Operation) -> Operation | None:
    """The layer that normalised a call's input."""
    second, channels = layer.module, layer.num_channels
    assert second is not None

    def between(met: Operation) -> bool:
        return (
            met.kind == "identity"
            or (met.kind == "scale" and one_a_channel(met, channels))
            or is_per_channel(met.module)
        )

    for met in found.upstream_where(call, between):
        first = met.module
        if between(met):
            continue
        if (
            isinstance(first, NormLayer)
            and first is not second
            and scale_shift.known(first)
            and scale_shift.known(second)
            and scale_shift.activation(first) is None
            and not set(met.node.kwargs) - {"input"}
            and scale_shift.channel_dim(first) == scale_shift.channel_dim(second)
            and vars(first).get("num_features") == channels
            and _frozen(first) == _frozen(second)
        ):
            return met
        return None
    return None


def _frozen(layer: NormLayer) -> object:
    return layer.frozen if isinstance(layer, BatchNorm) and any(layer.frozen) else None


CHECKS = (
    Check(
        "BN201",
        "dead-bias",
        "info",
        "model",
        "a convolution or linear layer right before the layer adds a bias, which the layer subtracts again",
        "`bn.remove_dead_biases`",
        fixed=True,
        run=dead_bias,
    ),
    Check(
        "BN202",
        "dropout-before",
        "warning",
        "model",
        "dropout is upstream with only linear operations between: the variance in training is not that in inference; "
        "an info where data show that the running statistics are those of inference",
        "move it after the layer",
        fixed=False,
        run=dropout_before,
    ),
    Check(
        "BN203",
        "shared-layer",
        "warning",
        "data",
        "the layer is called more than once in a forward pass; a warning where the calls' moments differ",
        "one layer for each place",
        fixed=False,
        run=shared_layer,
    ),
    Check(
        "BN204",
        "never-called",
        "info",
        "data",
        "the layer is not reached in inference",
        "remove it, or call it",
        fixed=False,
        run=never_called,
    ),
    Check(
        "BN206",
        "sequence-axis",
        "error",
        "data",
        "an input of three dimensions has its features last, and dimension 1 is normalised",
        "`channel_dim=-1`",
        fixed=False,
        run=sequence_axis,
    ),
    Check(
        "BN207",
        "normalised-twice",
        "info",
        "model",
        "what comes in was normalised already, with nothing but one scale and shift a channel between",
        "remove one of the two",
        fixed=False,
        run=normalised_twice,
    ),
)
