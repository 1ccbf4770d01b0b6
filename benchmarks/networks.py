"""A training step of whole networks, with torch.nn's batch-norm layers and with ours, as a Markdown table.

    python benchmarks/networks.py [NETWORK ...] [--layouts NAME ...] [--repeats N] [--threads N] [--compile]
    python benchmarks/networks.py --device cuda

All networks start from the same state and see the same batch. "converted" is a copy whose layers are ours, so ReLU and
the sums of residuals stay operations of their own; in "fused" the layers do what follows them as well. The first step's
losses are compared, then steps are timed in turns, each in another order. A number is the median; the ratio is torch's
median over ours, and beside it stand the least and the largest ratio of one turn: where they lie on both sides of 1,
the run does not say which is faster.

With --compile every network goes through torch.compile (Inductor), and the table has what that did: the graphs that it
made, the breaks between them, and how often it compiled again for a batch of another size.

On a GPU the activations are bfloat16 (autocast, weights in float32), in channels last alone, the batch is larger, steps
are timed by the device's clock, and below the table stand the ratios that are aimed at.
"""

from __future__ import annotations

import argparse
import copy
import itertools
import math
import random
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import batchnorm
from batchnorm.bench.cuda import Clock, Events
from libraries import library

LAYOUTS = {"contiguous": torch.contiguous_format, "channels_last": torch.channels_last}
# Small enough that many steps on one batch of noise stay finite.
LEARNING_RATE = 0.01
FEWER = 3  # images than in a batch, for a size that a compiled network has not seen


@dataclass(frozen=True)
class Setting:
    """How a device is measured.

    Attributes:
        layouts: keys of `LAYOUTS`.
        dtype: of the activations.
        loss: how far the first step's losses may be apart, relative: many layers round differently, each in the last
            digit of its dtype.
        goals: of the ratio, by what is printed under "layers".
    """

    layouts: tuple[str, ...]
    dtype: torch.dtype
    loss: float
    goals: dict[str, float] = field(default_factory=dict)


SETTINGS = {
    "cpu": Setting(("contiguous", "channels_last"), torch.float32, 1e-4),
    # Where batch norm and ReLU are a quarter of torch's step, and the step is otherwise the same: converted layers move
    # as many bytes as torch's in two reads, 26 a value with the ReLU; with the ReLU inside 16.
    "cuda": Setting(("channels_last",), torch.bfloat16, 5e-2, {"converted": 1.0, "fused": 1.08}),
}


@dataclass(frozen=True)
class Network:
    """A network and what it is trained on.

    Attributes:
        build: makes it.
        batch, size: of the images, on the CPU; on a GPU the batch is eight times as large.
        classes: of the labels.
    """

    build: Callable[[], nn.Module]
    batch: int
    size: int
    classes: int = 1000


class ResidualBlock(nn.Module):
    """The basic block of He et al. 2016, with padding by zero channels where they become more."""

    def __init__(self, before: int, after: int) -> None:
        super().__init__()
        self.stride, self.more = after // before, after - before
        self.conv1 = nn.Conv2d(before, after, 3, self.stride, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(after)
        self.relu1 = nn.ReLU()
        self.conv2 = nn.Conv2d(after, after, 3, 1, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(after)
        self.relu2 = nn.ReLU()

    def forward(self, x: Tensor) -> Tensor:
        """The input, and what the block adds to it."""
        out = self.bn2(self.conv2(self.relu1(self.bn1(self.conv1(x)))))
        if self.more:
            x = F.pad(x[:, :, :: self.stride, :: self.stride], (0, 0, 0, 0, 0, self.more))
        y: Tensor = self.relu2(out + x)
        return y


def resnet20() -> nn.Module:
    """ResNet-20 for images of 32 x 32, as in He et al. 2016, section 4.2: many small layers."""
    widths = (16, 16, 16, 16, 32, 32, 32, 64, 64, 64)
    return nn.Sequential(
        nn.Sequential(nn.Conv2d(3, 16, 3, 1, 1, bias=False), nn.BatchNorm2d(16), nn.ReLU()),
        *[ResidualBlock(before, after) for before, after in itertools.pairwise(widths)],
        nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(64, 10)),
    )


def torchvision(name: str) -> Callable[[], nn.Module]:
    """A builder of one of torchvision's networks.

    Raises:
        SystemExit: torchvision does not import.
    """
    return lambda: library("torchvision.models").get_model(name, weights=None)


NETWORKS = {
    "resnet20": Network(resnet20, 32, 32, 10),
    "resnet18": Network(torchvision("resnet18"), 8, 96),
    "resnet50": Network(torchvision("resnet50"), 16, 160),
    "vgg11_bn": Network(torchvision("vgg11_bn"), 8, 96),
    "mobilenet_v3_small": Network(torchvision("mobilenet_v3_small"), 16, 96),
    "efficientnet_b0": Network(torchvision("efficientnet_b0"), 8, 96),
    "densenet121": Network(torchvision("densenet121"), 8, 96),
}
USUAL = ("resnet20", "resnet50")


class HostClock:
    """The CPU's clock, for work that is done when it returns."""

    def mark(self) -> float:
        """Now."""
        return time.perf_counter()

    def seconds(self, first: float, second: float) -> float:
        """From one mark to another."""
        return second - first


class Contender:
    """A network, its optimizer and the batch it is trained on."""

    def __init__(self, model: nn.Module, images: Tensor, labels: Tensor, dtype: torch.dtype) -> None:
        self.model: Callable[[Tensor], Tensor] = model
        self.images, self.labels, self.dtype = images, labels, dtype
        self.optimizer = torch.optim.SGD(model.parameters(), lr=LEARNING_RATE)
        self.seconds: list[float] = []
        self.compiled = ""

    def step(self, batch: int | None = None) -> float:
        """One step, timed: forward, loss, backward, update; of the first images alone, if a number is given.

        Returns:
            The loss before the update.
        """
        torch.manual_seed(0)  # for dropout and the like
        device = self.images.device.type
        clock: Clock = Events() if device == "cuda" else HostClock()
        start = clock.mark()
        self.optimizer.zero_grad()
        with torch.autocast(device, self.dtype, enabled=self.dtype != torch.float32):
            logits = self.model(self.images[:batch])
        loss = F.cross_entropy(logits.float(), self.labels[:batch])
        loss.backward()
        self.optimizer.step()
        self.seconds.append(clock.seconds(start, clock.mark()))
        return loss.item()

    def compile(self) -> float:
        """Compile the network, and note what that takes; a batch of another size comes last.

        Returns:
            The first step's loss.
        """
        from torch._dynamo.utils import counters

        torch._dynamo.reset()
        counters.clear()
        self.model = torch.compile(self.model)
        first = self.step()
        graphs, breaks = counters["stats"]["unique_graphs"], sum(counters["graph_break"].values())
        self.step(len(self.images) - FEWER)
        again = counters["stats"]["unique_graphs"] - graphs
        self.compiled = f"{graphs} / {breaks} / {again}"
        return first


def build(name: str) -> nn.Module:
    """A network from a fixed seed, in training mode."""
    torch.manual_seed(0)
    return NETWORKS[name].build().train()


def contenders(name: str, layout: str, setting: Setting, device: str) -> dict[str, Contender]:
    """The network with torch's layers, and with ours."""
    network = NETWORKS[name]
    generator = torch.Generator().manual_seed(0)
    batch = network.batch * (8 if device == "cuda" else 1)
    images = torch.randn(batch, 3, network.size, network.size, generator=generator)
    images = images.to(device).contiguous(memory_format=LAYOUTS[layout])
    labels = torch.randint(network.classes, (batch,), generator=generator).to(device)
    model = build(name).to(device, memory_format=LAYOUTS[layout])  # type: ignore[call-overload]  # torch's overloads lack it alone
    models = {
        "torch": model,
        "converted": batchnorm.convert(copy.deepcopy(model)),
        "fused": batchnorm.fuse(copy.deepcopy(model)),
    }
    layers = sum(isinstance(module, nn.BatchNorm2d) for module in model.modules())
    for ours in (models["converted"], models["fused"]):
        assert sum(isinstance(module, batchnorm.BatchNorm) for module in ours.modules()) == layers
    return {key: Contender(m, images, labels, setting.dtype) for key, m in models.items()}


def measure(name: str, layout: str, repeats: int, device: str, compiled: bool) -> tuple[dict[str, Contender], float]:
    """Every contender with its seconds, turn by turn, and the largest relative difference of a first loss from torch's.

    Raises:
        AssertionError: the losses differ, or are no numbers in the end.
    """
    setting = SETTINGS[device]
    running = contenders(name, layout, setting, device)
    first = {key: c.compile() if compiled else c.step() for key, c in running.items()}  # the warm-up as well
    difference = max(abs(loss / first["torch"] - 1) for loss in first.values())
    assert difference <= setting.loss, f"the first losses differ by {difference:.1e}: {first}"
    if compiled:  # the last one would else keep its graph for any size of batch, and the others one for this size
        torch.compiler.reset()
    for contender in running.values():
        contender.step()
        contender.seconds.clear()
    order, last = random.Random(0), []
    for _ in range(repeats):  # memory that one frees serves the next: so nobody always comes after the same one
        last = [contender.step() for contender in order.sample(list(running.values()), len(running))]
    assert all(map(math.isfinite, last)), f"training went astray: last losses {last}"
    return running, difference


def rows(name: str, layout: str, repeats: int, device: str, compiled: bool) -> list[str]:
    """The lines of the table for a network in a layout."""
    measured, difference = measure(name, layout, repeats, device, compiled)
    torchs = measured.pop("torch")
    lines = []
    for layers, ours in measured.items():
        medians = [statistics.median(contender.seconds) for contender in (torchs, ours)]
        turns = [t / o for t, o in zip(torchs.seconds, ours.seconds, strict=True)]
        cells = [name, layout, layers, *(f"{1e3 * median:.1f}" for median in medians), f"{medians[0] / medians[1]:.2f}"]
        cells += [f"{min(turns):.2f} to {max(turns):.2f}", f"{difference:.1e}"]
        cells += [torchs.compiled, ours.compiled] if compiled else []
        lines.append(f"| {' | '.join(cells)} |")
    return lines


def table(names: Sequence[str], layouts: Sequence[str], repeats: int, device: str, compiled: bool) -> None:
    """Print all lines, each when it is known."""
    heads = ["network", "layout", "layers", "torch, ms", "ours, ms", "ratio", "of one turn", "first losses differ by"]
    heads += ["torch: graphs / breaks / compiled again", "ours"] if compiled else []
    print(f"| {' | '.join(heads)} |\n|{'---|' * len(heads)}")
    for name in names:
        for layout in layouts:
            print("\n".join(rows(name, layout, repeats, device, compiled)), flush=True)


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description="a training step of whole networks: torch.nn's batch norm and ours")
    parser.add_argument("networks", nargs="*", metavar="NETWORK", help=f"of {', '.join(NETWORKS)}")
    parser.add_argument("--layouts", nargs="+", choices=list(LAYOUTS), help="of the images and weights")
    parser.add_argument("--repeats", type=int, default=9, help="timed steps of each network in each layout")
    parser.add_argument("--threads", type=int, help="of torch")
    parser.add_argument("--compile", action="store_true", help="all through torch.compile")
    parser.add_argument("--device", choices=list(SETTINGS), default="cpu", help="where")
    options = parser.parse_args()
    device, compiled = options.device, options.compile
    names = options.networks or (("resnet50",) if device == "cuda" else USUAL)
    if unknown := [name for name in names if name not in NETWORKS]:
        parser.error(f"got {', '.join(unknown)}; the networks are {', '.join(NETWORKS)}")
    if options.repeats < 1:
        parser.error(f"got --repeats {options.repeats}; it must be at least 1")
    if device == "cuda" and not torch.cuda.is_available():
        parser.error("got --device cuda, but torch finds no GPU that it can use here")
    if options.threads:
        torch.set_num_threads(options.threads)
    setting = SETTINGS[device]
    dtype = str(setting.dtype).removeprefix("torch.")
    served = next(
        (row.implementation for row in batchnorm.kernels() if (row.device, row.dtype) == (device, dtype)), "reference"
    )
    where = torch.cuda.get_device_name() if device == "cuda" else f"{torch.get_num_threads()} threads"
    how = "compiled, " if compiled else ""
    print(f"torch {torch.__version__}, {where}, {served}, {dtype}, {how}medians of {options.repeats}\n")
    table(names, options.layouts or setting.layouts, options.repeats, device, compiled)
    if setting.goals:
        print("\nAimed at: " + ", ".join(f"{layers} {goal}" for layers, goal in setting.goals.items()))


if __name__ == "__main__":
    main()
