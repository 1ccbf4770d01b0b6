"""What statistics of their own are worth to two domains: digits and inverted digits, one network, as a Markdown table.

    python benchmarks/domain_training.py

A residual network learns both from the same steps, half of each batch of either domain, by the study's plain SGD. It is
judged on the test images of each domain, by the running statistics that inference uses. Seeds are paired: equal weights
at the start and equal batches. An interval is 95% of the mean over seeds.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

import batchnorm as bn
from batchnorm.study.dataset import Data, Part, digits
from batchnorm.study.networks import OURS, residual
from batchnorm.study.statistics import mean_interval
from batchnorm.study.training import accuracy, batches, gradient_step, one_thread, predict

SEEDS = 6
STEPS = 400
BATCH = 32  # images of each domain
RATE = 0.05
WIDTH, BLOCKS = 16, 2
DOMAINS = ("digits", "inverted")
# A network and the images of both domains to the outputs, in training.
Forward = Callable[[nn.Module, Tensor], Tensor]


def together(network: nn.Module, images: Tensor) -> Tensor:
    """All in one batch, which is normalised as one."""
    outputs: Tensor = network(images)
    return outputs


def in_turn(network: nn.Module, images: Tensor) -> Tensor:
    """A pass for each domain, both into the same running statistics."""
    return torch.cat([network(part) for part in images.chunk(2)])


def by_domain(network: nn.Module, images: Tensor) -> Tensor:
    """One pass, each domain normalised by its own samples."""
    with bn.domain(network, torch.arange(len(images)) * 2 // len(images)):
        outputs: Tensor = network(images)
    return outputs


# What is compared: whether layers have domains, whether these have a weight and bias each, and how batches go through.
WAYS: dict[str, tuple[bool, bool, Forward]] = {
    "one set, both in one batch": (False, False, together),
    "one set, a pass for each": (False, False, in_turn),
    "a set for each": (True, False, by_domain),
    "a set, weight and bias for each": (True, True, by_domain),
}


def inverted(images: Tensor) -> Tensor:
    """Black for white."""
    return 1 - images


def trained(data: Data, seed: int, way: str) -> nn.Module:
    """A network after its steps."""
    has_domains, own_affine, forward = WAYS[way]
    generator = torch.Generator().manual_seed(seed)
    network: nn.Module = residual(
        data.shape, WIDTH, BLOCKS, data.classes, placement="before", layers=OURS, generator=generator
    )
    if has_domains:
        bn.convert(network, domains=DOMAINS, own_affine=own_affine)
    parameters = list(network.parameters())
    order = batches(len(data.train.labels), BATCH, generator)
    for _ in range(STEPS):
        first, second = next(order), next(order)
        images = torch.cat([data.train.inputs[first], inverted(data.train.inputs[second])])
        labels = torch.cat([data.train.labels[first], data.train.labels[second]])
        loss = nn.functional.cross_entropy(forward(network.train(), images), labels)
        gradient_step(parameters, torch.autograd.grad(loss, parameters), RATE)
    return network


def judged(network: nn.Module, test: Part) -> tuple[float, float]:
    """The accuracy on each domain, in percent, by its own statistics where there are any."""
    scores = []
    for name, images in zip(DOMAINS, (test.inputs, inverted(test.inputs)), strict=True):
        if any(getattr(layer, "domains", ()) for layer in network.modules()):
            with bn.domain(network, name):
                predictions = predict(network, images)
        else:
            predictions = predict(network, images)
        scores.append(100 * accuracy(predictions, test.labels))
    return scores[0], scores[1]


def cell(values: list[float], *, signed: bool = False) -> str:
    """A mean with its interval."""
    found, plus = mean_interval(values), "+" if signed else ""
    return f"{found.estimate:{plus}.2f} [{found.low:{plus}.2f}, {found.high:{plus}.2f}]"


def main() -> None:
    """Print the table."""
    data = digits()
    with one_thread():
        scores = {way: [judged(trained(data, seed, way), data.test) for seed in range(SEEDS)] for way in WAYS}
    means = {way: [sum(of_seed) / 2 for of_seed in scores[way]] for way in WAYS}
    first = means[next(iter(WAYS))]
    print("| running statistics | digits, % | inverted, % | mean of both beside the first, points |")
    print("|---|---|---|---|")
    for way, of_seeds in scores.items():
        each = [cell([of_seed[i] for of_seed in of_seeds]) for i in range(2)]
        differences = [a - b for a, b in zip(means[way], first, strict=True)]
        beside = "" if means[way] is first else cell(differences, signed=True)
        print(f"| {way} | {each[0]} | {each[1]} | {beside} |")


if __name__ == "__main__":
    main()
