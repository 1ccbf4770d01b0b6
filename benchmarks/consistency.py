"""Whether population statistics are those of what inference shows the layers: many architectures, as Markdown tables.

For each: untrained, and after a few steps of SGD on scikit-learn's digits; batches of 2, 8 and 64; every method. Then
all layers are in inference mode over the same data, and the moments of what comes into each are collected here, by
hooks of this script, in float64. A gap is the worst channel's of all layers: the larger of
|mean - running_mean| / sqrt(var + eps) and |log((var + eps) / (running_var + eps))|.

    python benchmarks/consistency.py --results consistency.json
    python benchmarks/consistency.py --results consistency.json --seconds 200   # goes on where the last one ended
    python benchmarks/consistency.py resnet18 PatchTST                          # these alone

What it needs besides is said in consistency_networks.py.
"""

from __future__ import annotations

import argparse
import copy
import json
import math
import statistics
import sys
import time
import warnings
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.optim.swa_utils import update_bn
from torch.utils._pytree import tree_leaves

import batchnorm
from batchnorm.errors import OrderError
from batchnorm.study.dataset import digits
from consistency_networks import ARCHITECTURES, Architecture

CLAIM = 1e-5  # the largest gap that method "exact" is to leave
IMAGES = 125  # so that the last batch is smaller
BATCH_SIZES = (2, 8, 64)
MOST_BATCHES = 32  # so that batches of 2 do not take all the time
UNEVEN = 8  # the batch size at which torch's update_bn is run too
# What "exact" leaves, seen in inference in the same batches, and in batches of SEEN_IN, where convolutions round in
# other ways. The other methods' gaps are seen in the latter.
SEEN_IN = 64
SAME, OTHER, OTHER_FLOAT64 = "exact", "exact, other batches", "exact, other batches, float64"
STEPS, TRAINED_ON, LEARNING_RATE = 16, 16, 0.01
# Larger than torch's 0.1, so that after these few steps 1% of a running average is left of where it began, and not 19%.
MOMENTUM = 0.25

STATES = ("untrained", "trained")

Statistics = tuple[int, Tensor, Tensor]


def batch_norms(model: nn.Module) -> list[nn.modules.batchnorm._BatchNorm]:
    """A model's layers."""
    return [m for m in model.modules() if isinstance(m, nn.modules.batchnorm._BatchNorm)]


def moments(x: Tensor) -> Statistics:
    """Count, mean and sum of squared deviations of each channel of (N, C, *S), in two passes in float64."""
    rows = x.detach().double().transpose(0, 1).flatten(1)
    mean = rows.mean(1)
    return rows.shape[1], mean, (rows - mean[:, None]).square().sum(1)


def joined(a: Statistics, b: Statistics) -> Statistics:
    """The same of both together: Chan's formula."""
    n, apart = a[0] + b[0], b[1] - a[1]
    return n, a[1] + apart * (b[0] / n), a[2] + b[2] + apart.square() * (a[0] * b[0] / n)


def seen_in_inference(model: nn.Module, batches: Iterable[Tensor]) -> dict[nn.Module, Statistics]:
    """The statistics of what comes into each layer."""
    seen: dict[nn.Module, Statistics] = {}

    def look(layer: nn.Module, args: tuple[Tensor]) -> None:
        new = moments(args[0])
        seen[layer] = joined(seen[layer], new) if layer in seen else new

    model.eval()
    hooks = [layer.register_forward_pre_hook(look) for layer in batch_norms(model)]
    try:
        with torch.no_grad():
            for x in batches:
                model(x)
    finally:
        for hook in hooks:
            hook.remove()
    return seen


def gap(layer: Any, mean: Tensor, var: Tensor) -> float:  # noqa: ANN401 - torch's buffers may be None
    """The larger of the two gaps of a layer's worst channel; NaN where one is not a number."""
    off = (layer.running_mean.double() - mean).abs() / (var + layer.eps).sqrt()
    ratio = ((layer.running_var.double() + layer.eps) / (var + layer.eps)).log().abs()
    return float(torch.cat([off, ratio]).max())


def worst(model: nn.Module, batches: Iterable[Tensor]) -> float:
    """The worst layer's gap."""
    gaps = [gap(layer, mean, m2 / n) for layer, (n, mean, m2) in seen_in_inference(model, batches).items()]
    return largest(gaps)


def largest(gaps: Iterable[float], none: float = math.nan) -> float:
    """Of any, a NaN before all others; `none` where there are none."""
    return max(gaps, key=lambda g: math.inf if math.isnan(g) else g, default=none)


def between(a: nn.Module, b: nn.Module) -> float:
    """The worst layer's gap between the statistics of two copies of a model."""
    pairs: Any = zip(batch_norms(a), batch_norms(b), strict=True)
    return largest(gap(x, y.running_mean.double(), y.running_var.double()) for x, y in pairs)


def logits(output: object) -> Tensor:
    """(N, CLASSES) of whatever a network returns: its first tensor, of images the mean over positions."""
    first: Tensor = tree_leaves(dict(output) if isinstance(output, dict) else output)[0]
    return first.flatten(2).mean(2) if first.dim() > 2 else first


def train(model: nn.Module, images: Tensor, labels: Tensor) -> None:
    """A few steps of SGD.

    Raises:
        AssertionError: the loss is no number in the end.
    """
    model.train()
    for layer in batch_norms(model):
        layer.momentum = MOMENTUM
    optimizer = torch.optim.SGD(model.parameters(), lr=LEARNING_RATE, momentum=0.9)
    for chosen in torch.arange(STEPS * TRAINED_ON).split(TRAINED_ON):
        optimizer.zero_grad()
        loss = F.cross_entropy(logits(model(images[chosen])), labels[chosen])
        loss.backward()
        optimizer.step()
    assert loss.isfinite(), f"training went astray: last loss {loss}"


def exact_gaps(model: nn.Module, used: Tensor, size: int) -> dict[str, float]:
    """What "exact" leaves: seen in the batches that it was given, in others, and those in float64 where they show more.

    Raises:
        OrderError: "exact" has no answer.
    """
    changed = copy.deepcopy(model)
    batchnorm.recalibrate(changed, used.split(size))
    found = {SAME: worst(changed, used.split(size)), OTHER: worst(changed, used.split(SEEN_IN))}
    if not found[OTHER] <= CLAIM:
        double, used = copy.deepcopy(model).double(), used.double()
        batchnorm.recalibrate(double, used.split(size))
        found[OTHER_FLOAT64] = worst(double, used.split(SEEN_IN))
    return found


def other_gap(model: nn.Module, used: Tensor, size: int, method: str) -> float:
    """What another method leaves."""
    changed = copy.deepcopy(model)
    batchnorm.recalibrate(changed, used.split(size), method=method)
    return worst(changed, used.split(SEEN_IN))


def off_update_bn(model: nn.Module, used: Tensor) -> float:
    """How far "average" is from torch's own function, in float64, so that rounding does not stand in the way."""
    ours, torchs = copy.deepcopy(model).double(), copy.deepcopy(model).double()
    batches = used.double().split(UNEVEN)
    torch.manual_seed(0)  # dropout is on in both
    batchnorm.recalibrate(ours, batches, method="average")
    torch.manual_seed(0)
    update_bn(batches, torchs)
    return between(ours, torchs)


def gaps_of(model: nn.Module, data: Tensor) -> dict[str, Any]:
    """What each method leaves at each batch size, without those of "exact" where it has no answer."""
    found: dict[str, Any] = {"update_bn": off_update_bn(model, data)}
    for size in BATCH_SIZES:
        used = data[: size * MOST_BATCHES]
        try:
            gaps = exact_gaps(model, used, size)
        except OrderError:
            gaps = {}
        for method in ("pooled", "average"):
            gaps[method] = other_gap(model, used, size, method)
        found[str(size)] = gaps
    return found


def measure(architecture: Architecture) -> dict[str, Any]:
    """One row's numbers."""
    start = time.perf_counter()
    part, generator = digits().train, torch.Generator().manual_seed(0)
    images = architecture.data(part.inputs[: STEPS * TRAINED_ON].flatten(1), generator)
    data = images[:IMAGES]
    torch.manual_seed(0)
    model = architecture.make()
    row: dict[str, Any] = {"layers": len(batch_norms(model)), "shape": list(data.shape[1:])}
    row["untrained"] = gaps_of(model, data)
    torch.manual_seed(0)
    train(model, images, part.labels)
    row["running"] = worst(model, data.split(SEEN_IN))
    row["trained"] = gaps_of(model, data)
    row["seconds"] = time.perf_counter() - start
    return row


def over_sizes(row: dict[str, Any], state: str, kind: str) -> float | None:
    """The worst batch size's gap; None where there is none."""
    gaps = [row[state][str(size)][kind] for size in BATCH_SIZES if kind in row[state][str(size)]]
    return largest(gaps) if gaps else None


def cell(*gaps: float | None) -> str:
    """Numbers, short."""
    return " / ".join("refused" if g is None else f"{g:.1e}" for g in gaps)


def by_architecture(rows: dict[str, dict[str, Any]]) -> list[str]:
    """The first table: the worst batch size, untrained / trained."""
    kinds = (SAME, OTHER, "pooled", "average")
    lines = [f"| architecture | layers | {' | '.join(kinds)} | running average |", "|---" * (len(kinds) + 3) + "|"]
    for name, row in rows.items():
        cells = [cell(*(over_sizes(row, state, kind) for state in STATES)) for kind in kinds]
        lines.append(f"| {name} | {row['layers']} | {' | '.join(cells)} | {cell(row['running'])} |")
    return lines


def by_size(rows: dict[str, dict[str, Any]]) -> list[str]:
    """The second table: the median of all rows in both states, and the largest."""
    lines = ["| batches of | exact | pooled | average |", "|---|---|---|---|"]
    for size in map(str, BATCH_SIZES):
        cells = []
        for kind in (SAME, "pooled", "average"):
            found = [row[state][size] for row in rows.values() for state in STATES]
            gaps = [gaps[kind] for gaps in found if kind in gaps]
            cells.append(cell(statistics.median(gaps), largest(gaps)))
        lines.append(f"| {size} | {' | '.join(cells)} |")
    return lines


def summary(rows: dict[str, dict[str, Any]]) -> list[str]:
    """What the tables come to."""

    def every(kind: str, name: str) -> list[float | None]:
        return [over_sizes(rows[name], state, kind) for state in STATES]

    refused = [name for name in rows if None in every(SAME, name)]
    met = {
        kind: [n for n in rows if all(g is not None and g <= CLAIM for g in every(kind, n))] for kind in (SAME, OTHER)
    }
    double = [g for name in rows for g in every(OTHER_FLOAT64, name) if g is not None]
    torchs = largest(row[state]["update_bn"] for row in rows.values() for state in STATES)
    return [
        f"{SAME}: {len(met[SAME])} of {len(rows)} architectures within {CLAIM:.0e}, {len(refused)} refused",
        f"{OTHER}: {len(met[OTHER])} of {len(rows)}; the others in float64: at most {cell(largest(double, 0.0))}",
        f"average: torch's update_bn within {cell(torchs)} in float64",
    ]


def options_given() -> argparse.Namespace:
    """The command line's."""
    parser = argparse.ArgumentParser(description="what each method leaves, in many architectures")
    parser.add_argument("names", nargs="*", default=list(ARCHITECTURES), help="which; all of them by default")
    parser.add_argument("--results", type=Path, help="a JSON file: what is there is not measured again")
    parser.add_argument("--seconds", type=float, default=math.inf, help="begin no architecture after that")
    options = parser.parse_args()
    unknown = set(options.names) - set(ARCHITECTURES)
    if unknown:
        parser.error(f"got {', '.join(sorted(unknown))}; the architectures are {', '.join(ARCHITECTURES)}")
    return options


def main() -> None:
    """Measure, and print the tables."""
    options = options_given()
    rows: dict[str, dict[str, Any]] = {}
    if options.results is not None and options.results.exists():
        rows = json.loads(options.results.read_text())
    end = time.perf_counter() + options.seconds
    for name in options.names:
        if name in rows or time.perf_counter() > end:
            continue
        rows[name] = measure(ARCHITECTURES[name])
        print(f"{name}: {rows[name]['seconds']:.0f} s", file=sys.stderr, flush=True)
        if options.results is not None:
            options.results.write_text(json.dumps(rows, indent=1))
    print(f"torch {torch.__version__}, {torch.get_num_threads()} threads, {batchnorm.kernels()[0].implementation}\n")
    shown = {name: rows[name] for name in ARCHITECTURES if name in rows}
    print("\n".join([*by_architecture(shown), "", *by_size(shown), "", *summary(shown)]))


if __name__ == "__main__":
    warnings.simplefilter("ignore")  # of torch and the libraries, about themselves
    main()
