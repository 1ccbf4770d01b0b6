"""What a monitor costs a step of training: a residual network on the CPU, with and without, taken in turns.

The same steps run on copies of one network: without a monitor, with one that never records, and with one that records
every tenth step. A round is ten steps of each, in an order that turns; the medians are over rounds. The answers are
compared: the networks must be the same in the end, bit for bit. Times are of the processor, of all threads together,
so that other programs on the machine matter less.

    python benchmarks/monitor.py
    python benchmarks/monitor.py --network resnet18+ours --batch 16 --size 64 --threads 1 --rounds 9
"""

from __future__ import annotations

import argparse
import copy
import statistics
import time
from contextlib import AbstractContextManager, ExitStack, nullcontext

import torch
import torch.nn.functional as F
from torch import nn

import batchnorm
from libraries import library
from small_batches import Block

EVERY = 10
NEVER = 10**9
WAYS = ("without", "between records", "every 10")


def network(name: str) -> nn.Module:
    """A residual network of eleven layers of torch.nn's, or one of torchvision's; "ours" in its name converts it."""
    kind, _, ours = name.partition("+")
    net: nn.Module
    if kind == "small":
        net = nn.Sequential(
            *(nn.Conv2d(3, 32, 3, padding=1, bias=False), nn.BatchNorm2d(32), nn.ReLU()),
            *(Block(32, 32, 1), Block(32, 64, 2), Block(64, 64, 1), Block(64, 128, 2), Block(128, 128, 1)),
            *(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(128, 10)),
        )
    else:
        net = getattr(library("torchvision.models"), kind)(num_classes=10)
    return batchnorm.convert(net) if ours else net


def monitored(way: str, net: nn.Module) -> AbstractContextManager[object]:
    """What a round of steps runs in."""
    if way == "without":
        return nullcontext()
    return batchnorm.Monitor(net, every=EVERY if way == "every 10" else NEVER)


class Contender:
    """A network, its optimizer, and how it is monitored."""

    def __init__(self, way: str, net: nn.Module) -> None:
        self.way, self.net = way, net
        self.optimizer = torch.optim.SGD(net.parameters(), lr=0.01, momentum=0.9)
        self.monitor = monitored(way, net)

    def steps(self, images: torch.Tensor, labels: torch.Tensor) -> float:
        """Processor seconds of `EVERY` steps, of which a monitor that records every tenth records one."""
        start = time.process_time()
        for _ in range(EVERY):
            self.optimizer.zero_grad()
            F.cross_entropy(self.net(images), labels).backward()
            self.optimizer.step()
        return time.process_time() - start


def measured(net: nn.Module, images: torch.Tensor, labels: torch.Tensor, rounds: int) -> dict[str, list[float]]:
    """By way, the milliseconds of a step in each round; the answers are the same, or it is an error."""
    contenders = [Contender(way, copy.deepcopy(net)) for way in WAYS]
    times: dict[str, list[float]] = {way: [] for way in WAYS}
    with ExitStack() as running:
        for contender in contenders:
            running.enter_context(contender.monitor)
        for i in range(-1, rounds):
            first = (i + 1) % len(contenders)
            for contender in contenders[first:] + contenders[:first]:
                seconds = contender.steps(images, labels)
                if i >= 0:  # one round to warm up
                    times[contender.way].append(1000 * seconds / EVERY)
    states = [list(contender.net.state_dict().values()) for contender in contenders]
    if not all(torch.equal(a, b) for other in states[1:] for a, b in zip(states[0], other, strict=True)):
        raise AssertionError("the monitored networks have other weights or statistics in the end")
    return times


def table(name: str, times: dict[str, list[float]]) -> list[str]:
    """Medians, the least, and the median, least and largest of the rounds' ratios to the one without."""
    lines = []
    for way, values in times.items():
        ratios = [value / plain for value, plain in zip(values, times["without"], strict=True)]
        lines.append(
            f"| {name} | {way} | {statistics.median(values):.1f} | {min(values):.1f} | {statistics.median(ratios):.3f} "
            f"({min(ratios):.3f} to {max(ratios):.3f}) |"
        )
    return lines


def main() -> None:
    """Measure, and print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--network", nargs="+", default=["small", "small+ours"])
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--size", type=int, default=32)
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--threads", type=int, default=1)
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    print("| network | monitor | ms a step, median | least | ratio of a round, median (least to largest) |")
    print("|---|---|---|---|---|")
    for name in arguments.network:
        torch.manual_seed(0)
        images = torch.randn(arguments.batch, 3, arguments.size, arguments.size)
        labels = torch.randint(10, (arguments.batch,))
        for line in table(name, measured(network(name), images, labels, arguments.rounds)):
            print(line, flush=True)


if __name__ == "__main__":
    main()
