"""A training step of ResNet-50 with torch.nn's batch-norm layers and with ours, as a Markdown table.

All networks start from the same state and see the same batch. "converted" is a copy of torch's with its layers
converted, so ReLU and the sums of residuals stay operations of their own; in "ReLU inside" the layers do a ReLU that
follows them as well. The first step's losses are compared, then steps are timed in turn. A number is the median; the
ratio is torch's median over ours, and beside it stand the least and the largest ratio of one turn: where they lie on
both sides of 1, the run does not say which is faster.

    python benchmarks/resnet50.py --repeats 9
    python benchmarks/resnet50.py --device cuda

On a GPU the activations are bfloat16 (autocast, weights in float32), in channels last alone, the batch is larger, steps
are timed by the device's clock, and below the table stand the ratios that are aimed at.
"""

from __future__ import annotations

import argparse
import copy
import math
import statistics
import time
from dataclasses import dataclass, field

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import batchnorm
from batchnorm.bench.cuda import Clock, Events
from batchnorm.surgery.convert import convert
from libraries import library

CLASSES = 1000
LAYOUTS = {"contiguous": torch.contiguous_format, "channels_last": torch.channels_last}
# Small enough that many steps on one batch of noise stay finite.
LEARNING_RATE = 0.01


@dataclass(frozen=True)
class Setting:
    """How a device is measured.

    Attributes:
        batch, size: of the images.
        layouts: keys of `LAYOUTS`.
        dtype: of the activations.
        loss: how far the first step's losses may be apart, relative: 53 layers round differently, each in the last
            digit of its dtype.
        goals: of the ratio, by what is printed under "layers".
    """

    batch: int
    size: int
    layouts: tuple[str, ...]
    dtype: torch.dtype
    loss: float
    goals: dict[str, float] = field(default_factory=dict)


SETTINGS = {
    "cpu": Setting(16, 160, ("contiguous", "channels_last"), torch.float32, 1e-4),
    # Where batch norm and ReLU are a quarter of torch's step, and the step is otherwise the same: converted layers move
    # as many bytes as torch's in two reads, 26 a value with the ReLU; with the ReLU inside 16.
    "cuda": Setting(128, 224, ("channels_last",), torch.bfloat16, 5e-2, {"converted": 1.0, "ReLU inside": 1.08}),
}


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
        self.model, self.images, self.labels, self.dtype = model, images, labels, dtype
        self.optimizer = torch.optim.SGD(model.parameters(), lr=LEARNING_RATE)
        self.seconds: list[float] = []

    def step(self) -> float:
        """One step, timed: forward, loss, backward, update.

        Returns:
            The loss before the update.
        """
        device = self.images.device.type
        clock: Clock = Events() if device == "cuda" else HostClock()
        start = clock.mark()
        self.optimizer.zero_grad()
        with torch.autocast(device, self.dtype, enabled=self.dtype != torch.float32):
            logits = self.model(self.images).logits
        loss = F.cross_entropy(logits.float(), self.labels)
        loss.backward()
        self.optimizer.step()
        self.seconds.append(clock.seconds(start, clock.mark()))
        return loss.item()


def network() -> nn.Module:
    """ResNet-50 from a fixed seed: what transformers' ResNetConfig describes by default.

    Raises:
        SystemExit: transformers is not installed.
    """
    transformers = library("transformers")
    torch.manual_seed(0)
    model: nn.Module = transformers.ResNetForImageClassification(transformers.ResNetConfig(num_labels=CLASSES))
    return model.train()


def relu_inside(model: nn.Module) -> nn.Module:
    """Have our layers do the ReLU that follows them: transformers' blocks name the two."""
    for block in model.modules():
        normalization = getattr(block, "normalization", None)
        if isinstance(normalization, batchnorm.BatchNorm) and isinstance(getattr(block, "activation", None), nn.ReLU):
            normalization.activation = "relu"
            block.activation = nn.Identity()
    return model


def measure(
    memory_format: torch.memory_format, repeats: int, device: str = "cpu", setting: Setting = SETTINGS["cpu"]
) -> tuple[dict[str, list[float]], float]:
    """Seconds of every network, turn by turn, and the largest relative difference of a first loss from torch's.

    Raises:
        AssertionError: the losses differ, or are no numbers in the end.
    """
    generator = torch.Generator().manual_seed(0)
    images = torch.randn(setting.batch, 3, setting.size, setting.size, generator=generator)
    images = images.to(device).contiguous(memory_format=memory_format)
    labels = torch.randint(CLASSES, (setting.batch,), generator=generator).to(device)
    model = network().to(device, memory_format=memory_format)  # type: ignore[call-overload]  # torch's overloads lack it alone
    models = {
        "torch": model,
        "converted": convert(copy.deepcopy(model)),
        "ReLU inside": relu_inside(convert(copy.deepcopy(model))),
    }
    replaced = sum(isinstance(module, batchnorm.BatchNorm) for module in models["converted"].modules())
    assert replaced == sum(isinstance(module, nn.BatchNorm2d) for module in model.modules()) == 53
    contenders = {name: Contender(m, images, labels, setting.dtype) for name, m in models.items()}
    first = {name: contender.step() for name, contender in contenders.items()}  # the warm-up as well
    difference = max(abs(loss / first["torch"] - 1) for loss in first.values())
    assert difference <= setting.loss, f"the first losses differ by {difference:.1e}: {first}"
    for _ in range(repeats):
        last = [contender.step() for contender in contenders.values()]
    assert all(map(math.isfinite, last)), f"training went astray: last losses {last}"
    return {name: contender.seconds[1:] for name, contender in contenders.items()}, difference


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description="a training step of ResNet-50: torch.nn's batch-norm layers and ours")
    parser.add_argument("--repeats", type=int, default=9, help="timed steps of each network in each layout")
    parser.add_argument("--device", choices=list(SETTINGS), default="cpu", help="where")
    options = parser.parse_args()
    repeats, device = options.repeats, options.device
    if repeats < 1:
        parser.error(f"got --repeats {repeats}; it must be at least 1")
    if device == "cuda" and not torch.cuda.is_available():
        parser.error("got --device cuda, but torch finds no GPU that it can use here")
    setting = SETTINGS[device]
    dtype = str(setting.dtype).removeprefix("torch.")
    served = next(
        (row.implementation for row in batchnorm.kernels() if (row.device, row.dtype) == (device, dtype)), "reference"
    )
    where = torch.cuda.get_device_name() if device == "cuda" else f"{torch.get_num_threads()} threads"
    print(
        f"torch {torch.__version__}, {where}, {served}, "
        f"{dtype}, batch {setting.batch} at {setting.size} x {setting.size}, medians of {repeats}\n"
    )
    print("| layout | layers | torch, ms | ours, ms | ratio | of one turn | first losses differ by |")
    print("|---|---|---|---|---|---|---|")
    for name in setting.layouts:
        seconds, difference = measure(LAYOUTS[name], repeats, device, setting)
        torchs = seconds.pop("torch")
        for layers, ours in seconds.items():
            torch_median, our_median = statistics.median(torchs), statistics.median(ours)
            turns = [t / o for t, o in zip(torchs, ours, strict=True)]
            print(
                f"| {name} | {layers} | {1e3 * torch_median:.0f} | {1e3 * our_median:.0f} "
                f"| {torch_median / our_median:.2f} | {min(turns):.2f} to {max(turns):.2f} | {difference:.1e} |"
            )
    if setting.goals:
        print("\nAimed at: " + ", ".join(f"{layers} {goal}" for layers, goal in setting.goals.items()))


if __name__ == "__main__":
    main()
