"""What adapting running statistics to corrupted data is worth, and where it hurts, as Markdown.

Small residual networks and perceptrons learn scikit-learn's handwritten digits. The test digits are then corrupted in
six ways, each at three strengths (for the perceptrons, the middle ones), and classified by the statistics of training,
by those that `batchnorm.adapt` makes of them online, at several priors and batch sizes, and by the exact ones of all
digits that are shown. Digits come in random order, or sorted by class.

    python benchmarks/adaptation.py
    python benchmarks/adaptation.py --seeds 2 --samples 40
"""

from __future__ import annotations

import argparse
import itertools
import statistics
import warnings
from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import batchnorm
from batchnorm.study.dataset import Data, Part, digits
from batchnorm.study.formatting import cell
from batchnorm.study.networks import OURS, perceptron, residual
from batchnorm.study.statistics import mean_interval
from batchnorm.study.training import accuracy, descend, one_thread, predict

SEEDS = 5
STEPS, RATE, BATCH = 400, 0.1, 32  # of the training
WIDTH, BLOCKS = 16, 1  # of the residual network, with three layers of batch norm
HIDDEN = (64, 64)  # of the perceptron, with two
PRIORS = (0.0, 4.0, 16.0, 64.0)
SIZES = (1, 8, 64)
ALONE, STREAM = "each batch alone", "all so far"  # decay=0, and no decay
DECAYS = {ALONE: 0.0, STREAM: None}
SHUFFLED, SORTED = "shuffled", "sorted by class"
CLEAN = "clean"


def noise(x: Tensor, strength: float, generator: torch.Generator) -> Tensor:
    """Of a normal distribution with this standard deviation; the brightest pixel is 1."""
    return x + strength * torch.randn(x.shape, generator=generator)


def blur(x: Tensor, strength: float, _: torch.Generator) -> Tensor:
    """By a Gaussian with this standard deviation, in pixels."""
    offsets = torch.arange(-4.0, 5.0)
    kernel = torch.exp(-(offsets**2) / (2 * strength**2))
    plane = torch.outer(kernel, kernel) / kernel.sum() ** 2
    return F.conv2d(x, plane[None, None], padding=4)


def contrast(x: Tensor, strength: float, _: torch.Generator) -> Tensor:
    """What is left of the distance to the image's mean is 1 - strength."""
    mean = x.mean((1, 2, 3), keepdim=True)
    return mean + (1 - strength) * (x - mean)


def brightness(x: Tensor, strength: float, _: torch.Generator) -> Tensor:
    """Every pixel is brighter by this."""
    return x + strength


def pixelate(x: Tensor, strength: float, _: torch.Generator) -> Tensor:
    """Blocks of one value, of which there are 8 - strength each way: by area, on a grid of 24 x 24 for 6, 4 and 3."""
    blocks = F.avg_pool2d(F.interpolate(x, size=24), 24 // (8 - int(strength)))
    return F.avg_pool2d(F.interpolate(blocks, size=24), 3)


def invert(x: Tensor, strength: float, _: torch.Generator) -> Tensor:
    """So much of the negative, and the rest of the image: 1 is the negative."""
    return (1 - strength) * x + strength * (1 - x)


CORRUPTIONS: dict[str, tuple[Callable[[Tensor, float, torch.Generator], Tensor], tuple[float, ...]]] = {
    "noise": (noise, (0.2, 0.4, 0.8)),
    "blur": (blur, (0.6, 0.9, 1.3)),
    "contrast": (contrast, (0.5, 0.75, 0.9)),
    "brightness": (brightness, (0.25, 0.5, 1.0)),
    "pixelate": (pixelate, (2, 4, 5)),
    "inversion": (invert, (0.3, 0.7, 1.0)),
}


class Setting(NamedTuple):
    """Online: how batches come, and what they are joined with."""

    order: str
    memory: str
    size: int
    prior: float


RESIDUAL, PERCEPTRON = "residual network", "perceptron"
NETWORKS: dict[str, Callable[[torch.Generator], nn.Module]] = {
    RESIDUAL: lambda g: residual((1, 8, 8), WIDTH, BLOCKS, 10, placement="before", layers=OURS, generator=g),
    PERCEPTRON: lambda g: perceptron(64, HIDDEN, 10, placement="before", layers=OURS, generator=g),
}
SETTINGS = [
    setting
    for setting in itertools.starmap(Setting, itertools.product((SHUFFLED, SORTED), DECAYS, SIZES, PRIORS))
    if (setting.order, setting.memory, setting.size) != (SORTED, ALONE, 1)  # the order does not matter there
]

# A setting, or the name of statistics that stay the same; then (corruption, strength): an accuracy for each seed.
Case = tuple[str, float]
Results = dict[Setting | str, dict[Case, list[float]]]
SOURCE, EXACT = "source", "exact, prior {:g}"
EXACT_PRIORS = (0.0, 16.0)


def trained(kind: str, part: Part, seed: int) -> nn.Module:
    """A network, by its running averages."""
    generator = torch.Generator().manual_seed(seed)
    network = NETWORKS[kind](generator)
    descent = descend(network, part, learning_rate=RATE, batch_size=BATCH, generator=generator)
    for _ in itertools.islice(descent, STEPS):
        pass
    return network.eval()


def cases(kind: str, x: Tensor, generator: torch.Generator) -> Iterator[tuple[Case, Tensor]]:
    """The images as they are, and corrupted in every way."""
    yield (CLEAN, 0.0), x
    for name, (corrupt, strengths) in CORRUPTIONS.items():
        for strength in strengths if kind == RESIDUAL else strengths[1:2]:
            yield (name, strength), corrupt(x, strength, generator)


def online(network: nn.Module, x: Tensor, setting: Setting) -> Tensor:
    """The classes, batch after batch."""
    with torch.no_grad(), batchnorm.adapt(network, prior=setting.prior, decay=DECAYS[setting.memory]):
        return torch.cat([network(batch).argmax(1) for batch in x.split(setting.size)])


def of_seed(kind: str, data: Data, seed: int, samples: int) -> Iterator[tuple[Setting | str, Case, float]]:
    """The accuracies of one network."""
    network = trained(kind, data.train, seed)
    generator = torch.Generator().manual_seed(1000 + seed)
    order = torch.randperm(len(data.test.labels), generator=generator)[:samples]
    x, labels = data.test.inputs[order], data.test.labels[order]
    by_class = labels.argsort(stable=True)
    for case, corrupted in cases(kind, x, generator):
        yield SOURCE, case, accuracy(predict(network, corrupted), labels)
        for prior in EXACT_PRIORS:
            with batchnorm.adapt(network, [corrupted], prior=prior):
                yield EXACT.format(prior), case, accuracy(predict(network, corrupted), labels)
        for setting in SETTINGS:
            if kind == PERCEPTRON and setting.size == 1 and not setting.prior:
                continue  # one value for each channel has no variance
            drawn = by_class if setting.order == SORTED else torch.arange(len(labels))
            yield setting, case, accuracy(online(network, corrupted[drawn], setting), labels[drawn])


def measure(kind: str, seeds: Sequence[int], samples: int) -> Results:
    """Everything of one kind of network, for every seed."""
    data = digits()
    results: Results = {}
    with one_thread(), warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="layer .* is adapted by")  # what the tables show
        for seed in seeds:
            for setting, case, share in of_seed(kind, data, seed, samples):
                results.setdefault(setting, {}).setdefault(case, []).append(share)
    return results


def mean_over(results: dict[Case, list[float]], wanted: Callable[[str], bool]) -> str:
    """The mean over the corruptions that are wanted, in per cent, with its interval over the seeds."""
    columns = [values for (name, _), values in results.items() if wanted(name)]
    return cell(mean_interval([statistics.fmean(of_seed) for of_seed in zip(*columns, strict=True)]), times=100)


def corrupted(name: str) -> bool:
    """Every case but one."""
    return name != CLEAN


def row(name: str, cells: Sequence[str]) -> str:
    """Of a table."""
    return f"| {name} | {' | '.join(cells)} |"


def table_of_orders(results: Results, wanted: Callable[[str], bool]) -> list[str]:
    """A row for each prior and memory, a column for each batch size and order."""
    columns = list(itertools.product((SHUFFLED, SORTED), SIZES))
    lines = [row("statistics", [f"{order}, {size}" for order, size in columns]), "|---" * (len(columns) + 1) + "|"]
    for name in (SOURCE, *map(EXACT.format, EXACT_PRIORS)):
        lines.append(row(name, [mean_over(results[name], wanted)] + [""] * (len(columns) - 1)))
    for memory, prior in itertools.product(DECAYS, PRIORS):
        settings = [Setting(order, memory, size, prior) for order, size in columns]
        lines.append(
            row(
                f"{memory}, prior {prior:g}",
                [mean_over(results[one], wanted) if one in results else "" for one in settings],
            )
        )
    return lines


def table_of_corruptions(results: Results) -> list[str]:
    """A row for each corruption and strength: statistics of training, and what batches of 64 make of them."""
    shown: dict[str, Setting | str] = {
        "source": SOURCE,
        "batch of 64 alone, prior 0": Setting(SHUFFLED, ALONE, 64, 0.0),
        "batch of 64 alone, prior 16": Setting(SHUFFLED, ALONE, 64, 16.0),
        "single, all so far, prior 16": Setting(SHUFFLED, STREAM, 1, 16.0),
        "exact, prior 0": EXACT.format(0.0),
    }
    lines = [row("corruption, strength", list(shown)), "|---" * (len(shown) + 1) + "|"]
    for case in results[SOURCE]:
        cells = [cell(mean_interval(results[one][case]), times=100) for one in shown.values()]
        lines.append(row(case[0] if case[0] == CLEAN else f"{case[0]}, {case[1]:g}", cells))
    return lines


def show(kind: str, results: Results, samples: int) -> None:
    """Print the tables of one kind of network."""
    seeds = len(results[SOURCE][CLEAN, 0.0])
    print(f"\n{kind}: accuracy in %, mean and 95 % interval of {seeds} networks, {samples} digits each.")
    print(f"\nMean of {len(results[SOURCE]) - 1} corruptions:\n")
    print(*table_of_orders(results, corrupted), sep="\n")
    print("\nClean digits:\n")
    print(*table_of_orders(results, lambda name: not corrupted(name)), sep="\n")
    print("\nBy corruption:\n")
    print(*table_of_corruptions(results), sep="\n")


def main() -> None:
    """Measure as much as the arguments say."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, default=SEEDS, help="networks of each kind")
    parser.add_argument("--samples", type=int, default=120, help="test digits of each, at most 360")
    arguments = parser.parse_args()
    for kind in NETWORKS:
        show(kind, measure(kind, range(arguments.seeds), arguments.samples), arguments.samples)


if __name__ == "__main__":
    main()
