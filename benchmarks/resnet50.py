"""A training step of ResNet-50 with torch.nn's batch-norm layers and with ours, as a Markdown table.

All networks start from the same state and see the same batch. "converted" is a copy of torch's with its layers
converted, so ReLU and the sums of residuals stay operations of their own; in "ReLU inside" the layers do a ReLU that
follows them as well. The first step's losses are compared, then steps are timed in turn. A number is the median; the
ratio is torch's median over ours, and beside it stand the least and the largest ratio of one turn: where they lie on
both sides of 1, the run does not say which is faster.

    python benchmarks/resnet50.py --repeats 9
"""

from __future__ import annotations

import argparse
import copy
import math
import statistics
import time

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import batchnorm
from batchnorm.surgery.convert import convert
from libraries import library

BATCH, SIZE, CLASSES = 16, 160, 1000
LAYOUTS = {"contiguous": torch.contiguous_format, "channels_last": torch.channels_last}
# Small enough that many steps on one batch of noise stay finite.
LEARNING_RATE = 0.01
# Of the first step's loss, relative: 53 layers round differently, each in the seventh digit.
LOSS = 1e-4


class Contender:
    """A network, its optimizer and the batch it is trained on."""

    def __init__(self, model: nn.Module, images: Tensor, labels: Tensor) -> None:
        self.model, self.images, self.labels = model, images, labels
        self.optimizer = torch.optim.SGD(model.parameters(), lr=LEARNING_RATE)
        self.seconds: list[float] = []

    def step(self) -> float:
        """One step, timed: forward, loss, backward, update.

        Returns:
            The loss before the update.
        """
        start = time.perf_counter()
        self.optimizer.zero_grad()
        loss = F.cross_entropy(self.model(self.images).logits, self.labels)
        loss.backward()
        self.optimizer.step()
        self.seconds.append(time.perf_counter() - start)
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


def measure(memory_format: torch.memory_format, repeats: int) -> tuple[dict[str, list[float]], float]:
    """Seconds of every network, turn by turn, and the largest relative difference of a first loss from torch's.

    Raises:
        AssertionError: the losses differ, or are no numbers in the end.
    """
    generator = torch.Generator().manual_seed(0)
    images = torch.randn(BATCH, 3, SIZE, SIZE, generator=generator).contiguous(memory_format=memory_format)
    labels = torch.randint(CLASSES, (BATCH,), generator=generator)
    model = network().to(memory_format=memory_format)  # type: ignore[call-overload]  # torch's overloads lack it alone
    models = {
        "torch": model,
        "converted": convert(copy.deepcopy(model)),
        "ReLU inside": relu_inside(convert(copy.deepcopy(model))),
    }
    replaced = sum(isinstance(module, batchnorm.BatchNorm) for module in models["converted"].modules())
    assert replaced == sum(isinstance(module, nn.BatchNorm2d) for module in model.modules()) == 53
    contenders = {name: Contender(m, images, labels) for name, m in models.items()}
    first = {name: contender.step() for name, contender in contenders.items()}  # the warm-up as well
    difference = max(abs(loss / first["torch"] - 1) for loss in first.values())
    assert difference <= LOSS, f"the first losses differ by {difference:.1e}: {first}"
    for _ in range(repeats):
        last = [contender.step() for contender in contenders.values()]
    assert all(map(math.isfinite, last)), f"training went astray: last losses {last}"
    return {name: contender.seconds[1:] for name, contender in contenders.items()}, difference


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description="a training step of ResNet-50: torch.nn's batch-norm layers and ours")
    parser.add_argument("--repeats", type=int, default=9, help="timed steps of each network in each layout")
    repeats = parser.parse_args().repeats
    if repeats < 1:
        parser.error(f"got --repeats {repeats}; it must be at least 1")
    print(
        f"torch {torch.__version__}, {torch.get_num_threads()} threads, {batchnorm.kernels()[0].implementation}, "
        f"float32, batch {BATCH} at {SIZE} x {SIZE}, medians of {repeats}\n"
    )
    print("| layout | layers | torch, ms | ours, ms | ratio | of one turn | first losses differ by |")
    print("|---|---|---|---|---|---|---|")
    for name, memory_format in LAYOUTS.items():
        seconds, difference = measure(memory_format, repeats)
        torchs = seconds.pop("torch")
        for layers, ours in seconds.items():
            torch_median, our_median = statistics.median(torchs), statistics.median(ours)
            turns = [t / o for t, o in zip(torchs, ours, strict=True)]
            print(
                f"| {name} | {layers} | {1e3 * torch_median:.0f} | {1e3 * our_median:.0f} "
                f"| {torch_median / our_median:.2f} | {min(turns):.2f} to {max(turns):.2f} | {difference:.1e} |"
            )


if __name__ == "__main__":
    main()
