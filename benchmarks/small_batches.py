"""What statistics are worth at inference where batches are small: a residual network on the digits, as Markdown tables.

The network is trained by SGD in batches of 2, 4, 8 and 16, at a constant rate for one half and towards 0 in the other.
After each half, copies of it are given population statistics of the training images, in batches as in training, and
judged on the test images beside the network with its running averages. All have the same weights, so differences are
paired: the mean over seeds, and a 95% interval by Student's t. The layers are torch.nn's.

    python benchmarks/small_batches.py
    python benchmarks/small_batches.py --batch 2 --results small.json   # in pieces, which add up in a JSON file
"""

from __future__ import annotations

import argparse
import copy
import json
import math
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from scipy.special import stdtrit
from torch import Tensor, nn
from torch.optim.swa_utils import update_bn

import batchnorm
from batchnorm.study.dataset import Data, digits
from batchnorm.study.training import batches, one_thread

BATCH_SIZES = (2, 4, 8, 16)
SEEDS = 6
EPOCHS = 4
LEARNING_RATE = 0.02  # in batches of 16; smaller ones take shorter steps in proportion
MOMENTS = ("halfway", "at the end")

# From a copy of the network and batches of training images to the copy with other statistics.
METHODS: dict[str, Callable[[nn.Module, Sequence[Tensor]], object]] = {
    "running average": lambda model, data: None,
    "update_bn": lambda model, data: update_bn(data, model),
    "pooled": lambda model, data: batchnorm.recalibrate(model, data, method="pooled"),
    "exact": lambda model, data: batchnorm.recalibrate(model, data),
}


class Block(nn.Module):
    """Two convolutions and a shortcut."""

    def __init__(self, inputs: int, outputs: int, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(inputs, outputs, 3, stride, 1, bias=False)
        self.conv2 = nn.Conv2d(outputs, outputs, 3, 1, 1, bias=False)
        self.bn1, self.bn2 = nn.BatchNorm2d(outputs), nn.BatchNorm2d(outputs)
        self.shortcut = nn.Identity() if inputs == outputs else nn.Conv2d(inputs, outputs, 1, stride)

    def forward(self, x: Tensor) -> Tensor:
        """(N, inputs, H, W) to (N, outputs, H / stride, W / stride)."""
        return F.relu(self.bn2(self.conv2(F.relu(self.bn1(self.conv1(x))))) + self.shortcut(x))


def network() -> nn.Sequential:
    """Three blocks, seven layers of batch normalization: from (N, 1, 8, 8) to (N, 10)."""
    return nn.Sequential(
        *(nn.Conv2d(1, 16, 3, padding=1, bias=False), nn.BatchNorm2d(16), nn.ReLU()),
        *(Block(16, 16, 1), Block(16, 32, 2), Block(32, 32, 1)),
        *(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(32, 10)),
    )


@dataclass(frozen=True)
class Result:
    """What one network with one method's statistics comes to on the test images: percent right, mean cross-entropy."""

    batch_size: int
    moment: str
    seed: int
    method: str
    accuracy: float
    loss: float


def score(model: nn.Module, images: Tensor, labels: Tensor) -> tuple[float, float]:
    """Accuracy and loss in inference mode."""
    with torch.no_grad():
        outputs = model.eval()(images)
    right = (outputs.argmax(1) == labels).double().mean()
    return 100 * float(right), float(F.cross_entropy(outputs.double(), labels))


def judged(model: nn.Module, data: Data, batch_size: int) -> dict[str, tuple[float, float]]:
    """The scores of copies of a network, by method."""
    scores = {}
    for method, recompute in METHODS.items():
        changed = copy.deepcopy(model)
        recompute(changed, data.train.inputs.split(batch_size))
        scores[method] = score(changed, data.test.inputs, data.test.labels)
    return scores


def training(data: Data, batch_size: int, seed: int) -> Iterator[tuple[int, int, nn.Module]]:
    """Train one network: after each step its number, how many there will be, and the network."""
    torch.manual_seed(seed)
    model = network()
    order = batches(len(data.train.labels), batch_size, torch.Generator().manual_seed(seed))
    steps = EPOCHS * (len(data.train.labels) // batch_size)
    rate = LEARNING_RATE * batch_size / 16
    optimizer = torch.optim.SGD(model.parameters(), lr=rate, momentum=0.9)
    decay = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: min(1.0, 2 * (1 - step / steps)))
    for step in range(1, steps + 1):
        chosen = next(order)
        optimizer.zero_grad()
        loss = F.cross_entropy(model.train()(data.train.inputs[chosen]), data.train.labels[chosen])
        loss.backward()
        optimizer.step()
        decay.step()
        yield step, steps, model


def trained(data: Data, batch_size: int, seed: int) -> list[Result]:
    """One network's training, and what it comes to at both moments."""
    results = []
    for step, steps, model in training(data, batch_size, seed):
        if step in (steps // 2, steps):
            moment = MOMENTS[step == steps]
            scores = judged(model, data, batch_size)
            results += [Result(batch_size, moment, seed, method, *both) for method, both in scores.items()]
    return results


def interval(values: Sequence[float]) -> tuple[float, float]:
    """The mean, and what its 95% interval by Student's t reaches to either side."""
    n = len(values)
    return statistics.mean(values), float(stdtrit(n - 1, 0.975)) * statistics.stdev(values) / math.sqrt(n)


def table(results: Sequence[Result], quantity: str, digits_shown: int) -> list[str]:
    """One quantity: of the running average itself, of the others less that, and of exact less update_bn."""
    baseline, *others = METHODS
    pairs = [(method, baseline) for method in others] + [("exact", "update_bn")]
    head = [f"{a} - {'running' if b == baseline else b}" for a, b in pairs]
    lines = [f"| {quantity}, batches of | | {baseline} | {' | '.join(head)} |", "|---" * (len(pairs) + 3) + "|"]
    for size in BATCH_SIZES:
        for moment in MOMENTS:
            rows = [r for r in results if (r.batch_size, r.moment) == (size, moment)]
            if len({r.seed for r in rows}) < 2:  # no interval yet
                continue
            of = {method: {r.seed: getattr(r, quantity) for r in rows if r.method == method} for method in METHODS}
            cells = [f"{statistics.mean(of[baseline].values()):.{digits_shown}f}"]
            for a, b in pairs:
                mean, reach = interval([of[a][seed] - of[b][seed] for seed in of[a]])
                cells.append(f"{mean:+.{digits_shown}f} ± {reach:.{digits_shown}f}")
            lines.append(f"| {size} | {moment} | {' | '.join(cells)} |")
    return lines


def main() -> None:
    """Train, and print the tables."""
    parser = argparse.ArgumentParser(description="population statistics at inference after training in small batches")
    parser.add_argument("--batch", type=int, choices=BATCH_SIZES, action="append", help="one size; all by default")
    parser.add_argument("--seeds", type=int, default=SEEDS, help="networks of each size, at least 2")
    parser.add_argument("--results", type=Path, help="a JSON file that adds up")
    options = parser.parse_args()
    if options.seeds < 2:
        parser.error(f"got --seeds {options.seeds}; an interval takes at least 2")
    results: list[Result] = []
    if options.results is not None and options.results.exists():
        results = [Result(**row) for row in json.loads(options.results.read_text())]
    start, data, done = time.perf_counter(), digits(), {(r.batch_size, r.seed) for r in results}
    with one_thread():
        for size in options.batch or BATCH_SIZES:
            for seed in range(options.seeds):
                if (size, seed) in done:
                    continue
                results += trained(data, size, seed)
                if options.results is not None:
                    options.results.write_text(json.dumps([asdict(r) for r in results]))
    seconds = time.perf_counter() - start
    print(f"torch {torch.__version__}, 1 thread, {batchnorm.kernels()[0].implementation}, {seconds:.0f} s")
    print(f"{options.seeds} seeds, {EPOCHS} epochs of {len(data.train.labels)} images\n")
    print("\n".join([*table(results, "accuracy", 2), "", *table(results, "loss", 4)]))


if __name__ == "__main__":
    main()
