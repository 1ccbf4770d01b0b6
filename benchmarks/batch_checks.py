"""How often the checks of batches speak: of shuffled data, where they should not, and of sorted data, as Markdown.

Each seed draws 512 of the digits and a network with new weights, whose layers get the population's statistics. Samples
then come in an order, in batches:

- shuffled: a random order;
- half sorted: the first half of each batch in order of classes, the second half at random;
- sorted: in order of classes;
- one class a batch: as sorted, with the batches in random order, each of one class alone.

    python benchmarks/batch_checks.py
    python benchmarks/batch_checks.py --seeds 20
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor, nn

import batchnorm
from batchnorm.diagnosis.checks import batches
from batchnorm.diagnosis.observation import Input, Observation, ObservedLayer
from batchnorm.diagnosis.subject import Subject, subject_of_model
from batchnorm.models.hooks import forward_hooks
from batchnorm.models.modes import inference
from batchnorm.models.norm_layers import named_norm_layers
from batchnorm.moments import Moments, pool
from batchnorm.study.dataset import digits
from batchnorm.study.training import one_thread

SAMPLES = 512
SIZES = (8, 16, 32, 64)
SEEDS = 200  # of shuffled data: rare alarms take many to see
FEWER = 4  # times, of the other orders


class Seen(NamedTuple):
    """One layer's input: its shape, and (N, C) mean and m2 of each sample's values, so many a channel."""

    shape: tuple[int, ...]
    values: int
    mean: Tensor
    m2: Tensor


def mlp() -> nn.Module:
    """Three layers on the pixels."""
    layers: list[nn.Module] = [nn.Flatten()]
    for inputs in (64, 32, 32):
        layers += [nn.Linear(inputs, 32), nn.BatchNorm1d(32), nn.ReLU()]
    return nn.Sequential(*layers)


def cnn() -> nn.Module:
    """Four convolutions, maps of 8 x 8 to 2 x 2."""
    layers: list[nn.Module] = []
    for inputs, outputs, stride in ((1, 16, 1), (16, 16, 2), (16, 32, 1), (32, 32, 2)):
        layers += [nn.Conv2d(inputs, outputs, 3, stride, 1, bias=False), nn.BatchNorm2d(outputs), nn.ReLU()]
    return nn.Sequential(*layers)


def shuffled(labels: Tensor, size: int, generator: torch.Generator) -> list[Tensor]:
    """A random order."""
    return list(torch.randperm(len(labels), generator=generator).split(size))


def in_order(labels: Tensor, size: int, generator: torch.Generator) -> list[Tensor]:
    """In order of classes, at random within."""
    return list(_classes(labels, torch.randperm(len(labels), generator=generator)).split(size))


def half_in_order(labels: Tensor, size: int, generator: torch.Generator) -> list[Tensor]:
    """Half of each batch in order of classes."""
    first, second = torch.randperm(len(labels), generator=generator).chunk(2)
    halves = zip(_classes(labels, first).split(size // 2), second.split(size // 2), strict=True)
    return [torch.cat(both) for both in halves]


def one_class(labels: Tensor, size: int, generator: torch.Generator) -> list[Tensor]:
    """Each batch of one class, and a class's last one smaller; in random order."""
    order = torch.randperm(len(labels), generator=generator)
    parts = [part for c in labels.unique() for part in order[labels[order] == c].split(size)]
    return [parts[i] for i in torch.randperm(len(parts), generator=generator).tolist()]


def _classes(labels: Tensor, order: Tensor) -> Tensor:
    """An order, sorted by classes."""
    return order[labels[order].argsort(stable=True)]


ORDERS: dict[str, Callable[[Tensor, int, torch.Generator], list[Tensor]]] = {
    "shuffled": shuffled,
    "half sorted": half_in_order,
    "sorted": in_order,
    "one class a batch": one_class,
}


def seen_by(model: nn.Module, images: Tensor) -> dict[str, Seen]:
    """What comes into the layers: it depends on no order, as the statistics are those of all images."""
    batchnorm.recalibrate(model, [images])
    names: dict[nn.Module, str] = {layer: name for name, layer in named_norm_layers(model)}
    found: dict[str, Seen] = {}

    def note(module: nn.Module, args: tuple[Tensor, ...], kwargs: dict[str, Tensor]) -> None:
        values = args[0].double().flatten(2) if args[0].dim() > 2 else args[0].double().unsqueeze(2)
        mean = values.mean(2)
        m2 = (values - mean.unsqueeze(2)).square().sum(2)
        found[names[module]] = Seen(tuple(args[0].shape), values.shape[2], mean, m2)

    with inference(model), forward_hooks(names, before=note):
        model(images)
    return found


def subject(model: nn.Module, seen: dict[str, Seen], drawn: list[Tensor]) -> Subject:
    """The model, with the samples in these batches."""
    layers, order = {}, torch.cat(drawn)
    sizes = torch.tensor([len(batch) for batch in drawn])
    for name, layer in seen.items():
        parts = [pool(torch.full((len(i),), layer.values), layer.mean[i], layer.m2[i]) for i in drawn]
        layers[name] = ObservedLayer(
            Input((len(drawn[0]), *layer.shape[1:]), torch.float32, False, 1),
            calls=1,
            population=sum(parts, start=Moments.empty(layer.mean.shape[1])),
            batches=parts,
            sample_means=layer.mean[order],
            batch_of=torch.arange(len(drawn)).repeat_interleave(sizes),
            channels=torch.arange(layer.mean.shape[1]),
            sample_values=layer.values,
        )
    return subject_of_model(model, data=Observation(layers, len(drawn), len(order)))


def rates(seeds: int) -> None:
    """Print a table for each network."""
    data = digits()
    images, labels = data.train.inputs, data.train.labels
    for title, build in (("multi-layer perceptron", mlp), ("convolutional network", cnn)):
        counts = {(order, size): [0, 0] for order in ORDERS for size in SIZES}
        for seed in range(seeds):
            generator = torch.Generator().manual_seed(seed)
            torch.manual_seed(seed)
            chosen = torch.randperm(len(labels), generator=generator)[:SAMPLES]
            model = build()
            seen = seen_by(model, images[chosen])
            for (name, size), count in counts.items():
                if name != "shuffled" and seed >= seeds // FEWER:
                    continue
                given = subject(model, seen, ORDERS[name](labels[chosen], size, generator))
                for i, check in enumerate((batches.batches_not_alike, batches.noisy_statistics)):
                    count[i] += any(True for _ in check(given))
        print(f"\nOf {seeds} networks ({title}; {seeds // FEWER} where not shuffled), those of which a check speaks:\n")
        print("| order of samples | check | " + " | ".join(f"batches of {size}" for size in SIZES) + " |")
        print("|---|---|" + "---:|" * len(SIZES))
        for name in ORDERS:
            drawn = seeds if name == "shuffled" else seeds // FEWER
            for i, code in enumerate(("BN303", "BN302")):
                cells = " | ".join(f"{counts[name, size][i] / drawn:.1%}" for size in SIZES)
                print(f"| {name} | {code} | {cells} |")


def main() -> None:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, default=SEEDS)
    with one_thread():
        rates(parser.parse_args().seeds)


if __name__ == "__main__":
    main()
