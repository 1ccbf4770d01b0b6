"""What `batchnorm.check` says of healthy networks, whom it blames for planted faults, and what it costs.

    python benchmarks/check.py --healthy --json healthy.json      # architectures, trained a little and recalibrated
    python benchmarks/check.py --attribution                      # one wrong layer in each of 20 networks
    python benchmarks/check.py --cost                             # ResNet-50: beside inference over the same data

Networks are those of benchmarks/surgery_networks.py, with random weights, of whichever libraries are installed. Data
are noise with a pattern for each class.
"""

from __future__ import annotations

import argparse
import json
import math
import statistics
import time
import warnings
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

import batchnorm as bn
from surgery_networks import architectures

CLASSES = 10
BATCH, BATCHES = 16, 4
STEPS, LEARNING_RATE = 8, 0.01
LARGEST = 1.2e7  # parameters
MOST_PIXELS = 128 * 128  # of an image: larger ones take minutes and show nothing new
PLANTED = (0.3, 3.0)  # standard deviations

Batch = tuple[Any, Tensor]


def logits(output: Any) -> Tensor:  # noqa: ANN401 - whatever networks return
    """(N, CLASSES) of a network's first output, of images the mean over positions."""
    first: Tensor = tree_leaves(dict(output) if isinstance(output, dict) else output)[0]
    return (first.flatten(2).mean(2) if first.dim() > 2 else first)[:, :CLASSES]


def loss(output: Any, target: Tensor) -> Tensor:  # noqa: ANN401 - as above
    """Cross-entropy of what a network returns."""
    return F.cross_entropy(logits(output), target)


def forward(model: nn.Module, batch: Batch) -> Any:  # noqa: ANN401 - as above
    """A batch's first item are keywords."""
    return model(**batch[0])


def batches_like(inputs: dict[str, Any], seed: int) -> list[Batch]:
    """Noise around a pattern for each class, in the shapes of inputs."""
    generator = torch.Generator().manual_seed(seed)
    patterns = {
        key: torch.randn(CLASSES, *value.shape[1:], generator=torch.Generator().manual_seed(99))
        for key, value in inputs.items()
        if isinstance(value, Tensor)
    }
    made = []
    for _ in range(BATCHES):
        target = torch.randint(CLASSES, (BATCH,), generator=generator)
        shapes = {key: (BATCH, *pattern.shape[1:]) for key, pattern in patterns.items()}
        x = {key: 0.5 * p[target] + torch.randn(shapes[key], generator=generator) for key, p in patterns.items()}
        made.append((inputs | x, target))
    return made


def trained(model: nn.Module, batches: list[Batch]) -> torch.optim.Optimizer:
    """A few steps of SGD; afterwards the statistics are the population's."""
    norms = [p for m in model.modules() if isinstance(m, nn.modules.batchnorm._BatchNorm) for p in m.parameters()]
    others = [p for p in model.parameters() if not any(p is q for q in norms)]
    groups: list[dict[str, Any]] = [{"params": others, "weight_decay": 1e-4}, {"params": norms}]
    optimizer = torch.optim.SGD(groups, LEARNING_RATE, 0.9)
    model.train()
    for step in range(STEPS):
        batch = batches[step % len(batches)]
        optimizer.zero_grad()
        loss(forward(model, batch), batch[1]).backward()
        optimizer.step()
    optimizer.zero_grad()
    bn.recalibrate(model, batches, forward=forward)
    return optimizer


def healthy(build: Callable[[], Any], largest: float = LARGEST, *, unseen: bool = False) -> dict[str, Any] | None:
    """What a check of a network that was trained a little says; None of one that is too large to be tried here.

    Args:
        build: makes the network and its inputs.
        largest: the most parameters.
        unseen: check with two data sets that it was not trained on.
    """
    torch.manual_seed(0)
    model, inputs = build()
    pixels = max(math.prod(t.shape[2:]) for t in inputs.values() if isinstance(t, Tensor))
    if sum(p.numel() for p in model.parameters()) > largest or pixels > MOST_PIXELS:
        return None
    if not any(isinstance(m, nn.modules.batchnorm._BatchNorm) for m in model.modules()):
        return None
    batches = batches_like(inputs, 0)
    optimizer = trained(model, batches)
    start = time.perf_counter()
    data, second = batches_like(inputs, 2) if unseen else batches, batches_like(inputs, 1)
    report = bn.check(model, data, second=second, forward=forward, loss=loss, optimizer=optimizer)
    found = Counter(f.code for f in report.findings if f.severity == "info")
    above = [f"{f.code} {f.layer}: {f.message}" for f in report.findings if f.severity != "info"]
    return {
        "layers": len(report.layers),
        "above": above,
        "info": dict(sorted(found.items())),
        "skipped": len(report.skipped),
        "seconds": time.perf_counter() - start,
    }


def all_healthy(results: Path | None, only: str, seconds: float, largest: float = LARGEST, *, unseen: bool) -> None:
    """A table of all of them."""
    rows: dict[str, Any] = json.loads(results.read_text()) if results is not None and results.exists() else {}
    end = time.monotonic() + seconds
    for library, name, build in architectures():
        key = f"{library}: {name}"
        if only in key and key not in rows and time.monotonic() < end:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                row = healthy(build, largest, unseen=unseen)
            if row is None:
                continue
            rows[key] = row
            print(key, row["layers"], *row["above"][:5], flush=True)
            if results is not None:
                results.write_text(json.dumps(rows, indent=1))
    print("\n| network | layers | above info | info |\n|---|---|---|---|")
    for key, row in rows.items():
        info = ", ".join(f"{code} x {n}" for code, n in row["info"].items())
        print(f"| {key} | {row['layers']} | {len(row['above'])} | {info} |")
    wrong = [key for key, row in rows.items() if row["above"]]
    print(f"\n{len(rows)} networks, {len(wrong)} with a finding above info: {', '.join(wrong) or 'none'}")


def attribution() -> None:
    """Plant one wrong layer in each of 20 networks, and see whom the check names first."""
    generator = torch.Generator().manual_seed(0)
    names = [
        *("resnet18", "resnet34", "mobilenet_v2", "mobilenet_v3_small", "shufflenet_v2_x0_5", "mnasnet0_5"),
        *("regnet_x_400mf", "vgg11_bn", "resnet26d", "ghostnet_050", "lcnet_050", "tinynet_e", "selecsls42"),
        *("MobileNetV1", "MobileNetV2", "RegNet", "ResNet, basic", "LeViT", "repvgg_a0", "dla46_c"),
    ]
    builds: dict[str, Callable[[], Any]] = {name: build for _, name, build in architectures()}
    first = 0
    print(
        "| network | layers off | planted | off by, SD | first in the attribution | passes |\n|---|---|---|---|---|---|"
    )
    for name in names:
        torch.manual_seed(0)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            model, inputs = builds[name]()
            batches = batches_like(inputs, 0)
            trained(model, batches)
        norms = {n: m for n, m in model.named_modules() if isinstance(m, nn.modules.batchnorm._BatchNorm)}
        chosen = list(norms)[int(torch.randint(len(norms), (), generator=generator))]
        low, high = PLANTED
        off = low + (high - low) * float(torch.rand((), generator=generator))
        layer: Any = norms[chosen]
        sign = torch.randint(2, layer.running_mean.shape, generator=generator) * 2 - 1
        layer.running_mean += off * sign * (layer.running_var + layer.eps).sqrt()
        report = bn.check(model, batches, forward=forward, loss=loss, select="BN301")
        parts = report.attribution or ()
        told = parts[0].layer if parts else "(no gap)"
        first += told == chosen
        print(
            f"| {name} | {len(parts)} of {len(norms)} | {chosen} | {off:.2f} | {told} | {2 + 2 * len(parts)} |",
            flush=True,
        )
    print(f"\nthe planted layer is first in {first} of {len(names)}")


def cost(repeats: int) -> None:
    """A check of ResNet-50 with data, without attribution, beside inference over the same data, in turn."""
    torch.manual_seed(0)
    builds: dict[str, Callable[[], Any]] = {name: build for _, name, build in architectures()}
    model, inputs = builds["resnet50"]()
    batches = [({"x": torch.randn(16, 3, 128, 128)}, torch.randint(CLASSES, (16,))) for _ in range(8)]
    bn.recalibrate(model, batches, forward=forward)
    model.eval()
    assert list(inputs) == ["x"]

    def inference() -> None:
        with torch.no_grad():
            for batch in batches:
                forward(model, batch)

    passes: list[float] = []
    works: dict[str, Callable[[], object]] = {
        "inference": inference,
        "check": lambda: passes.append(bn.check(model, batches, forward=forward).passes),
        "check, with a loss": lambda: passes.append(bn.check(model, batches, forward=forward, loss=loss).passes),
    }
    times: dict[str, list[float]] = {name: [] for name in works}
    for _ in range(repeats):
        for name, work in works.items():
            start = time.perf_counter()
            work()
            times[name].append(time.perf_counter() - start)
    base = statistics.median(times["inference"])
    print("| work | seconds | x inference |\n|---|---|---|")
    for name, values in times.items():
        print(f"| {name} | {statistics.median(values):.2f} | {statistics.median(values) / base:.2f} |")
    print(f"\npasses, as the report counts them: {max(passes):.2f}")


def main() -> None:
    """What was asked for."""
    parser = argparse.ArgumentParser(description="what batchnorm.check says, of whom, and what it costs")
    parser.add_argument("--healthy", action="store_true", help="architectures that nothing is wrong with")
    parser.add_argument("--attribution", action="store_true", help="planted faults")
    parser.add_argument("--cost", action="store_true", help="time beside inference")
    parser.add_argument(
        "--json", type=Path, help="of --healthy: where results are kept; what is there is not done again"
    )
    parser.add_argument("--only", default="", help="of --healthy: names that contain this")
    parser.add_argument("--seconds", type=float, default=math.inf, help="of --healthy: begin no other after these")
    parser.add_argument("--largest", type=float, default=LARGEST, help="of --healthy: the most parameters")
    parser.add_argument("--unseen", action="store_true", help="of --healthy: with data that it was not trained on")
    parser.add_argument("--repeats", type=int, default=5, help="of --cost")
    options = parser.parse_args()
    if options.healthy:
        all_healthy(options.json, options.only, options.seconds, options.largest, unseen=options.unseen)
    if options.attribution:
        attribution()
    if options.cost:
        cost(options.repeats)


if __name__ == "__main__":
    main()
