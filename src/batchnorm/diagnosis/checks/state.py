"""BN0..: what layers hold."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from batchnorm.diagnosis.channels import FADED, Channels, count_of, indices
from batchnorm.diagnosis.definition import Check
from batchnorm.diagnosis.finding import Finding, Severity
from batchnorm.diagnosis.subject import LayerState, Subject

# BN003. With 0.01 of eps as variance, eps makes 99 % of what the scale is made from. Layers of small inputs come near
# that in healthy networks (0.007 in torchvision's mobilenet_v3_small, whose eps is 1e-3), but then all of their
# channels do: a channel counts that is a thousand times below the layer's median, or below eps.
OF_EPS = 1e-2
OUTLIER = 1e-3
# Outputs are of order 1 beside a gamma of 1: where gamma is below this, nobody notices the channel.
GAMMA_MATTERS = 1e-2
# The largest scale of a channel that varies, in 34 healthy networks, was 168; 1e3 turns float32's rounding, 6e-8, into
# 6e-5 and bfloat16's into 4.
LARGEST_SCALE = 1e3
# An input without variance that is further from 0 than this, in units of the output: what differs a little from it is
# far off. Channels behind a ReLU that lets next to nothing through are at 0.
FAR_FROM_ZERO = 1.0
# That takes a scale of its own: ten times the median of the layer's, and ten at least. Where all channels are alike,
# the layer's inputs are small, as in networks with small initial weights (transformers' MobileViT).
OWN_SCALE = 10.0
# A channel whose values are all equal up to float32's rounding is a constant, and comes out as beta. Healthy networks
# have some: behind channels that are dead, the sum of several branches is their betas' (timm's mobileone_s0).
CONSTANT = torch.finfo(torch.float32).eps ** 2
# BN006. An output that varies by less, beside others of order 1, is constant.
ZERO_GAMMA = 1e-12


def untrained_statistics(subject: Subject) -> Iterator[Finding]:
    """Statistics that are still 0 and 1."""
    states = [(layer, Channels.of(layer)) for layer in subject.layers]
    tracked = [(layer, state) for layer, state in states if state.statistics() is not None]
    untouched = [(layer, state) for layer, state in tracked if _initial(state)]
    if not untouched:
        return
    why = {layer.name: reason for layer, state in untouched if (reason := _moved(layer, state))}
    others = len(tracked) - len(untouched)
    elsewhere = any(_moved(layer, state) for layer, state in states if state.statistics() is None)
    if not why and not others and not elsewhere and not _stepped(subject):
        first = untouched[0][0]
        yield Finding(
            "BN001",
            "info",
            first.name,
            f"a fresh model: the running statistics of all {len(tracked)} layers are still 0 and 1"
            if len(tracked) > 1
            else "a fresh layer: its running statistics are still 0 and 1",
            "bn.recalibrate(model, batches)  # or train it first",
        )
        return
    for layer, _ in untouched:
        if subject.data is not None and layer.name not in subject.data.layers:
            continue  # nothing comes into it: nothing is normalised by what it holds
        reason = why.get(layer.name) or (
            f"those of {others} other {'layer' if others == 1 else 'layers'} have moved"
            if others
            else "other layers were trained"
            if why or elsewhere
            else "the optimizer has taken steps"
        )
        yield Finding(
            "BN001",
            "error",
            layer.name,
            f"running statistics are still 0 and 1, but {reason}: inference does not normalise",
            "bn.recalibrate(model, batches)",
        )


def _initial(state: Channels) -> bool:
    assert state.mean is not None
    assert state.var is not None
    return state.mean.numel() > 0 and not bool(state.mean.any()) and bool((state.var == 1).all())


def _moved(layer: LayerState, state: Channels) -> str | None:
    """What shows that a layer was trained; None where nothing does.

    A gamma of many values does not: some draw it at random in the beginning. All at one value, gamma and beta are how
    somebody set them.
    """
    if layer.num_batches_tracked:
        return f"its counter is {layer.num_batches_tracked}"
    beta, gamma = state.beta, state.gamma
    if beta is not None and bool(beta.any()) and (beta.numel() == 1 or not _constant(beta)):
        return "beta has moved" if gamma is None or _constant(gamma) else "gamma and beta have moved"
    if layer.bias is None and gamma is not None and not _constant(gamma):
        return "gamma has moved"
    return None


def _constant(values: Tensor) -> bool:
    return bool((values == values[0]).all())


def _stepped(subject: Subject) -> bool:
    """Whether the optimizer shows that it has changed something. Plain SGD shows nothing."""
    states = () if subject.optimizer is None else subject.optimizer.state.values()
    return any(
        bool(state.get("step", 0)) or (isinstance(state.get("momentum_buffer"), Tensor) and "step" not in state)
        for state in states
        if isinstance(state, dict)
    )


def non_finite_state(subject: Subject) -> Iterator[Finding]:
    """NaN and inf among what a layer holds."""
    for layer in subject.layers:
        state = Channels.of(layer)
        held = {
            "running_mean": state.mean,
            "running_var": state.var,
            "weight": state.gamma,
            "bias": state.beta,
        }
        wrong = {name: ~values.isfinite() for name, values in held.items() if values is not None}
        wrong = {name: mask for name, mask in wrong.items() if bool(mask.any())}
        if not wrong:
            continue
        anywhere = torch.stack(list(wrong.values())).any(0)
        counts = ", ".join(f"{name} ({count_of(int(mask.sum()), layer)})" for name, mask in wrong.items())
        learned = wrong.keys() & {"weight", "bias"}
        yield Finding(
            "BN002",
            "error",
            layer.name,
            f"NaN or inf in {counts}: so are the outputs of these channels",
            "model.load_state_dict(before)  # gamma and beta can only come from a checkpoint"
            if learned
            else "bn.recalibrate(model, batches)",
            state.table("channels that are not finite", indices(anywhere)),
            weight=float(anywhere.double().mean()),
        )


def eps_decides(subject: Subject) -> Iterator[Finding]:
    """Channels without a variance to speak of, which eps gives a large scale."""
    for layer in subject.layers:
        state = Channels.of(layer)
        statistics = state.statistics()
        if statistics is None:
            continue
        mean, var = statistics
        gamma = torch.ones_like(var) if state.gamma is None else state.gamma.abs()
        sane = mean.isfinite() & var.isfinite() & gamma.isfinite() & (var >= 0)
        if not bool(sane.any()) or layer.eps < 0:
            continue
        total = var + layer.eps
        scale = torch.where(gamma > 0, gamma / total.sqrt(), 0.0)
        matters = sane & (gamma > GAMMA_MATTERS)
        bound = max(float(var[sane].median()) * OUTLIER, layer.eps * OUTLIER)
        small = matters & (var < layer.eps * OF_EPS) & (var <= bound)
        # Nothing else comes in: the scale has no effect.
        constant = (var <= (mean.square() * CONSTANT).clamp(min=FADED)) & (layer.eps > 0)
        large = matters & (scale > LARGEST_SCALE) & ~constant
        started = small & (mean == 0) & ~constant  # at 0, where averages begin, with a variance on its way down
        own = scale >= OWN_SCALE * max(1.0, float(scale[matters].median()) if bool(matters.any()) else 1.0)
        far = small & own & (mean.abs() * scale >= FAR_FROM_ZERO) & ~constant
        harmful = large | far | started
        found = harmful if bool(harmful.any()) else small
        if not bool(found.any()):
            continue
        yield _eps_finding(layer, state, found, small & found, scale, "warning" if bool(harmful.any()) else "info")


def _eps_finding(
    layer: LayerState, state: Channels, found: Tensor, small: Tensor, scale: Tensor, severity: Severity
) -> Finding:
    count, largest = int(found.sum()), float(scale[found].max())
    assumed = ", which torch has unless told otherwise" if layer.module is None else ""
    if bool(small.any()):
        assert state.var is not None
        what = (
            f"eps = {layer.eps:g}{assumed} decides in {count_of(count, layer)}: "
            f"running variance down to {float(state.var[small].min()):.2g}"
        )
    else:
        what = f"{count_of(count, layer)} have a scale beyond {LARGEST_SCALE:g}"
    harm = (
        f"their input is multiplied by {largest:.3g}" if severity == "warning" else "what comes in there does not vary"
    )
    return Finding(
        "BN003",
        severity,
        layer.name,
        f"{what}; {harm}",
        "bn.recalibrate(model, batches)  # if the data do vary there; else set gamma to 0, or prune the channels:\n"
        f"{layer.path}.weight.data[{indices(found, -scale).tolist()[:SHOWN_IN_CODE]}] = 0"
        if state.gamma is not None
        else "bn.recalibrate(model, batches)  # if the data do vary there; else prune the channels",
        state.table("channels, the largest scale first", indices(found, -scale)),
        weight=largest,
    )


SHOWN_IN_CODE = 32  # channels in a line of a remedy


def negative_variance(subject: Subject) -> Iterator[Finding]:
    """What no average of squares can be."""
    for layer in subject.layers:
        state = Channels.of(layer)
        if state.var is None or not bool((below := state.var < 0).any()):
            continue
        lowest = float(state.var[below].min())
        lost = int((state.var + layer.eps < 0).sum())
        yield Finding(
            "BN004",
            "error",
            layer.name,
            f"running variance below 0 in {count_of(int(below.sum()), layer)}, down to {lowest:.3g}"
            + (f": the output of {lost} is NaN" if lost else ""),
            "bn.recalibrate(model, batches)",
            state.table("channels, the lowest variance first", indices(below, state.var)),
            weight=-lowest,
        )


def half_precision_statistics(subject: Subject) -> Iterator[Finding]:
    """Running averages whose steps are smaller than their rounding."""
    for layer in subject.layers:
        kept = [t.dtype for t in (layer.mean, layer.var) if t is not None and not torch.nn.parameter.is_lazy(t)]
        halves = [dtype for dtype in kept if dtype.is_floating_point and dtype.itemsize < torch.float32.itemsize]
        if not halves:
            continue
        dtype = max(halves, key=lambda d: torch.finfo(d).eps)
        rounding = torch.finfo(dtype).eps / 2  # half a unit in the last place: less is rounded away
        eaten = f"they keep steps above {rounding:.2%} of their value"
        if layer.momentum:
            eaten += (
                f"; at momentum {layer.momentum:g}, a batch that differs from them by less than "
                f"{rounding / layer.momentum:.1%} changes nothing"
            )
        elif layer.module is not None and layer.momentum is None:
            eaten += (
                f"; in an average of all batches, the {round(1 / rounding)}th may be twice as large and change nothing"
            )
        name = str(dtype).removeprefix("torch.")
        yield Finding(
            "BN005",
            "warning",
            layer.name,
            f"running statistics are {name}: {eaten}",
            "bn.convert(model)  # ours stay float32 in a half-precision model"
            if layer.module is not None and layer.ours is None
            else f"{layer.path}.running_mean = {layer.path}.running_mean.float()\n"
            f"{layer.path}.running_var = {layer.path}.running_var.float()",
            weight=rounding,
        )


def dead_channels(subject: Subject) -> Iterator[Finding]:
    """Outputs that are beta, whatever comes in."""
    for layer in subject.layers:
        state = Channels.of(layer)
        if state.gamma is None or not bool((dead := state.gamma.abs() <= ZERO_GAMMA).any()):
            continue
        count = int(dead.sum())
        if count == layer.num_channels and (state.statistics() is None or _initial(state)):
            continue  # how the last layer of a residual block begins
        yield Finding(
            "BN006",
            "info",
            layer.name,
            f"gamma is 0 in {count_of(count, layer)}: their output is beta, whatever comes in",
            f"keep = ({layer.path}.weight != 0).nonzero().flatten()  # prune the others, here and in what reads them",
            state.table("channels with a gamma of 0", indices(dead)),
            weight=count / layer.num_channels,
        )


CHECKS = (
    Check(
        "BN001",
        "untrained-statistics",
        "error",
        "state",
        "running statistics are still exactly 0 and 1, although the network was trained; an info where the "
        "whole model is fresh",
        "recalibrate",
        fixed=True,
        run=untrained_statistics,
    ),
    Check(
        "BN002",
        "non-finite-state",
        "error",
        "state",
        "there is NaN or inf in running statistics, gamma or beta",
        "recalibrate where it is the statistics, load a checkpoint where it is gamma or beta",
        fixed=True,
        run=non_finite_state,
    ),
    Check(
        "BN003",
        "eps-decides",
        "warning",
        "state",
        "channels have so small a running variance that eps sets their scale, or a scale beyond 1000; an info "
        "where their inputs are constant, or next to 0",
        "recalibrate where the data do vary, else prune these channels or set their gamma to 0",
        fixed=False,
        run=eps_decides,
    ),
    Check(
        "BN004",
        "negative-variance",
        "error",
        "state",
        "a running variance is below 0",
        "recalibrate",
        fixed=True,
        run=negative_variance,
    ),
    Check(
        "BN005",
        "half-precision-statistics",
        "warning",
        "state",
        "running statistics are float16 or bfloat16",
        "convert, which keeps them in float32, or `.float()` the buffers",
        fixed=True,
        run=half_precision_statistics,
    ),
    Check(
        "BN006",
        "dead-channels",
        "info",
        "state",
        "gamma is 0 in some channels",
        "prune them",
        fixed=False,
        run=dead_channels,
    ),
)
