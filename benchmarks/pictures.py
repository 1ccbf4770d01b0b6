"""The pictures of docs/pictures, drawn from numbers that are kept, each in one place.

The speeds are those of the first table of docs/numbers/performance.md. The others are measured here, in five minutes on
one core, and kept as JSON beside the pictures: their networks are those of small_batches.py, trained on the digits.

    python benchmarks/pictures.py             # draws them again
    python benchmarks/pictures.py --measure   # trains the networks first, and writes the JSON files anew
"""

from __future__ import annotations

import argparse
import copy
import json
import math
import re
import statistics
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch.nn.functional as F

import batchnorm
from batchnorm.bench.measure import geometric_mean, run_information
from batchnorm.report import charts
from batchnorm.report.document import Chart, Curve
from batchnorm.study.dataset import Data, digits
from batchnorm.study.training import one_thread
from small_batches import interval, score, training

DOCS = Path(__file__).parents[1] / "docs"
PICTURES = DOCS / "pictures"
SEEDS, BATCH_SIZE = 5, 16
EVERY = 12  # steps between two points of the picture of recalibration
CHECKED = 60  # the step after which the gap of the first network is taken apart
RECALIBRATED = 64  # images in a batch that statistics are computed from


def measured_recalibration(data: Data) -> dict[str, Any]:
    """Test accuracy in per cent during training, by step and seed: of the network, and of its recalibrated copy."""
    running: list[list[float]] = []
    exact: list[list[float]] = []
    steps: list[int] = []
    for seed in range(SEEDS):
        steps.clear()
        running.append([])
        exact.append([])
        for step, _, model in training(data, BATCH_SIZE, seed):
            if step % EVERY == 0:
                recalibrated = copy.deepcopy(model)
                batchnorm.recalibrate(recalibrated, data.train.inputs.split(RECALIBRATED))
                for kept, network in ((running, model), (exact, recalibrated)):
                    kept[-1].append(round(score(network, data.test.inputs, data.test.labels)[0], 2))
                steps.append(step)
    return {"step": steps, "running": running, "exact": exact}


def measured_gap(data: Data) -> dict[str, Any]:
    """What `check` says of the first network in the middle of its training: losses, and whose the gap is."""
    model = next(model for step, _, model in training(data, BATCH_SIZE, 0) if step == CHECKED).eval()
    pairs = zip(data.train.inputs.split(RECALIBRATED), data.train.labels.split(RECALIBRATED), strict=True)
    report = batchnorm.check(model, list(pairs), loss=F.cross_entropy)
    assert report.attribution is not None
    assert report.modes is not None
    shares = {entry.layer: entry for entry in report.attribution}
    layers = [(layer.name, shares[layer.name]) for layer in report.layers if layer.name in shares]
    return {
        "step": CHECKED,
        "loss": {mode.name: round(mode.loss, 4) for mode in report.modes if mode.loss is not None},
        "layers": [[name, round(share.closes, 4), round(share.remains, 4)] for name, share in layers],
    }


MEASURED: dict[str, Callable[[Data], dict[str, Any]]] = {"recalibration": measured_recalibration, "gap": measured_gap}


def recalibration(numbers: dict[str, Any]) -> Chart:
    """Accuracy over the steps: means over the seeds, with their intervals."""
    curves, words = [], []
    for label, key in (("running averages", "running"), ("after bn.recalibrate", "exact")):
        ends = [interval(values) for values in zip(*numbers[key], strict=True)]
        means = [mean for mean, _ in ends]
        low, high = [m - reach for m, reach in ends], [min(100.0, m + reach) for m, reach in ends]
        curves.append(Curve(label, numbers["step"], means, low, high))
        halfway = len(means) // 2
        middle = statistics.mean(means[halfway // 2 : halfway])
        words.append(
            f"{label}: {middle:.1f} % on average in the second quarter of training, {means[-1]:.1f} % at the end"
        )
    return Chart(
        title="Test accuracy during training, before and after recalibration",
        description=f"A small residual network on handwritten digits, batches of {BATCH_SIZE}, a constant learning "
        f"rate for the first half, then towards 0; means and 95 % intervals of {len(numbers['running'])} networks: "
        f"{'; '.join(words)}.",
        x_label="training steps",
        y_label="test accuracy (%)",
        curves=curves,
    )


def gap(numbers: dict[str, Any]) -> Chart:
    """Each layer's share of the gap, both ways."""
    names = [name for name, *_ in numbers["layers"]]
    closes, remains = ([100 * entry[i] for entry in numbers["layers"]] for i in (1, 2))
    loss, positions = numbers["loss"], list(range(len(names)))
    largest = max(range(len(names)), key=closes.__getitem__)
    return Chart(
        title="The gap between training and inference, by layer",
        description=f"A residual network after {numbers['step']} steps of training: its loss is {loss['running']:.3f} "
        f"by running statistics and {loss['exact']:.3f} by exact ones. Put right alone, layer {names[largest]} closes "
        f"{closes[largest]:.0f} % of that, the most of all {len(names)}; the shares: "
        + ", ".join(f"{name} {share:.0f} %" for name, share in zip(names, closes, strict=True))
        + ". They need not add up to 100 %.",
        x_label="batch norm layer",
        y_label="of the gap in the loss (%)",
        curves=[
            Curve("closed if it alone is put right", positions, closes, points=True),
            Curve("left if it alone is wrong", positions, remains, points=True),
        ],
        names=list(enumerate(names)),
        mark=0.0,
    )


def speed(page: str) -> Chart:
    """Forward and backward of every case: how many times as fast as torch, by the size of the input."""
    table = page.split("### float32, fresh outputs\n\n", 1)[1].split("\n\n", 1)[0]
    head, _, *rows = ([cell.strip() for cell in line.strip("|").split("|")] for line in table.splitlines())
    first = head.index("both, ms") + 1  # the ratios of forward and backward stand behind it
    over_ours = {head[i].removeprefix("x "): i for i in range(first, head.index("floor"))}
    megabytes = [4e-6 * math.prod(map(int, re.findall(r"\d+", row[0]))) for row in rows]
    torchs = [float(row[over_ours["torch"]]) for row in rows]
    labels = {"compile": "torch.compile", "jax": "JAX", "tensorflow": "TensorFlow"}
    curves, words = [Curve("ours", megabytes, torchs, points=True)], []
    for name, label in labels.items():
        cells = [
            (size, torch_ours, row[over_ours[name]])
            for size, torch_ours, row in zip(megabytes, torchs, rows, strict=True)
        ]
        points = [(size, torch_ours / float(cell)) for size, torch_ours, cell in cells if cell]
        curves.append(Curve(label, [size for size, _ in points], [value for _, value in points], points=True))
    for curve in curves:
        values = [value for value in curve.middle if value is not None]
        words.append(f"{curve.label} {geometric_mean(values):.2f} times over {len(values)} cases")
    return Chart(
        title="Speed of batch norm and ReLU, forward and backward, beside torch",
        description=f"Float32 on a CPU of two cores, torch's speed being 1; geometric means: {', '.join(words)}. Ours "
        f"are between {min(torchs):.2f} and {max(torchs):.2f} times as fast.",
        x_label="input (MB)",
        y_label="times as fast as torch",
        curves=curves,
        log_x=True,
        log_y=True,
        mark=1.0,
    )


def _run() -> dict[str, object]:
    """The date, the processor and the versions; the system's name does not matter here."""
    information = run_information()
    machine = information["machine"]
    assert isinstance(machine, dict)
    return information | {"machine": {key: value for key, value in machine.items() if key != "platform"}}


def drawn() -> dict[str, str]:
    """Every picture's text by the name of its file."""
    kept = {name: json.loads((PICTURES / f"{name}.json").read_text()) for name in MEASURED}
    made = {
        "recalibration": recalibration(kept["recalibration"]),
        "speed": speed((DOCS / "numbers/performance.md").read_text()),
        "gap": gap(kept["gap"]),
    }
    return {f"{name}.svg": charts.file(chart, name) + "\n" for name, chart in made.items()}


def main(arguments: Sequence[str] | None = None) -> None:
    """Measure if asked to, and draw."""
    parser = argparse.ArgumentParser(description="the pictures of docs/pictures")
    parser.add_argument("--measure", action="store_true", help="train the networks again, and keep new numbers")
    PICTURES.mkdir(exist_ok=True)
    if parser.parse_args(arguments).measure:
        data = digits()
        for name, measure in MEASURED.items():
            with one_thread():
                numbers = measure(data) | {"run": _run()}
            (PICTURES / f"{name}.json").write_text(json.dumps(numbers) + "\n")
    for name, text in drawn().items():
        (PICTURES / name).write_text(text)
        print(f"{PICTURES / name}: {len(text) / 1e3:.0f} KB")


if __name__ == "__main__":
    main()
