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
SEEDS = 200


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


def shuffled(labels: Tensor, size: int, generator: torch.Generator) -> Tensor:
    """A random order."""
    return torch.randperm(len(labels), generator=generator)


def in_order(labels: Tensor, size: int, generator: torch.Generator) -> Tensor:
    """In order of classes, at random within."""
    order = shuffled(labels, size, generator)
    return order[labels[order].argsort(stable=True)]


def half_in_order(labels: Tensor, size: int, generator: torch.Generator) -> Tensor:
    """Half of each batch in order of classes."""
    order = shuffled(labels, size, generator)
    first, second = order.chunk(2)
    first = first[labels[first].argsort(stable=True)]
    return torch.cat([first.view(-1, size // 2), second.view(-1, size // 2)], 1).flatten()


def one_class(labels: Tensor, size: int, generator: torch.Generator) -> Tensor:
    """Whole batches of one class, in random order; what is left over is left out."""
    order = in_order(labels, size, generator)
    whole = [part for c in labels.unique() for part in order[labels[order] == c].split(size) if len(part) == size]
    return torch.cat([whole[i] for i in torch.randperm(len(whole), generator=generator).tolist()])


ORDERS: dict[str, Callable[[Tensor, int, torch.Generator], Tensor]] = {
    "shuffled": shuffled,
    "half sorted": half_in_order,
    "sorted": in_order,
    "one class a batch": one_class,
}


def seen_by(model: nn.Module, images: Tensor) -> dict[str, Seen]:
    """What comes into the layers: it depends on no order, as the statistics are those of all images."""
    batchnorm.recalibrate(model, [images])
    names = {layer: name for name, layer in named_norm_layers(model)}
    found: dict[str, Seen] = {}

    def note(module: nn.Module, args: tuple[Tensor, ...], kwargs: dict[str, Tensor]) -> None:
        values = args[0].double().flatten(2) if args[0].dim() > 2 else args[0].double().unsqueeze(2)
        mean = values.mean(2)
        m2 = (values - mean.unsqueeze(2)).square().sum(2)
        found[names[module]] = Seen(tuple(args[0].shape), values.shape[2], mean, m2)  # type: ignore[index]

    with inference(model), forward_hooks(names, before=note):
        model(images)
    return found


def subject(model: nn.Module, seen: dict[str, Seen], order: Tensor, size: int) -> Subject:
    """The model, with the samples in an order."""
    layers = {}
    for name, layer in seen.items():
        mean, m2 = layer.mean[order], layer.m2[order]
        parts = [
            pool(torch.full((len(a),), layer.values), a, b)
            for a, b in zip(mean.split(size), m2.split(size), strict=True)
        ]
        layers[name] = ObservedLayer(
            Input((size, *layer.shape[1:]), torch.float32, False, 1),
            calls=1,
            population=sum(parts, start=Moments.empty(mean.shape[1])),
            batches=parts,
            sample_means=mean,
            batch_of=torch.arange(len(order)) // size,
            channels=torch.arange(mean.shape[1]),
            sample_values=layer.values,
        )
    return subject_of_model(model, data=Observation(layers, -(-len(order) // size), len(order)))


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
                given = subject(model, seen, ORDERS[name](labels[chosen], size, generator), size)
                for i, check in enumerate((batches.batches_not_alike, batches.noisy_statistics)):
                    count[i] += any(True for _ in check(given))
        print(f"\nOf {seeds} networks ({title}), those of which a check speaks:\n")
        print("| order of samples | check | " + " | ".join(f"batches of {size}" for size in SIZES) + " |")
        print("|---|---|" + "---:|" * len(SIZES))
        for name in ORDERS:
            for i, code in enumerate(("BN303", "BN302")):
                cells = " | ".join(f"{counts[name, size][i] / seeds:.1%}" for size in SIZES)
                print(f"| {name} | {code} | {cells} |")


def main() -> None:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, default=SEEDS)
    with one_thread():
        rates(parser.parse_args().seeds)


if __name__ == "__main__":
    main()
