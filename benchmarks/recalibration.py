"""What `recalibrate` costs beside one plain inference pass over the same data, and what it leaves, as Markdown tables.

ResNet-50 as in networks.py. The passes are timed in turn; a number is the median, and a ratio is of medians. A gap is
the difference between a layer's running statistics and the moments of what comes into it in inference: of the mean in
standard deviations, and of the log of the variance. The largest of all layers and channels is shown.

    python benchmarks/recalibration.py --images 2048 --repeats 1
    python benchmarks/recalibration.py --images 256 --repeats 3 --tenth
    python benchmarks/recalibration.py --images 256 --gaps
    python benchmarks/recalibration.py --stacks
"""

from __future__ import annotations

import argparse
import copy
import statistics
import threading
import time
from collections.abc import Callable, Iterable

import greenlet
import torch
from torch import Tensor, nn

import batchnorm
from batchnorm import Moments
from batchnorm.population.available import hand_back
from batchnorm.population.recalibrate import METHODS
from batchnorm.population.result import MemoryUse
from networks import build

GAP = 1e-5  # what method "exact" may leave: statistics are stored in float32, and 53 layers follow one another


def batches(images: int, batch: int, size: int) -> list[Tensor]:
    """Noise with a mean and a spread of its own in each batch."""
    made = []
    for i in range(images // batch):
        generator = torch.Generator().manual_seed(i)
        made.append(torch.randn(batch, 3, size, size, generator=generator) * (0.5 + i % 3) + i % 5)
    return made


def inference(model: nn.Module, data: Iterable[Tensor]) -> None:
    """One plain pass."""
    with torch.no_grad():
        for x in data:
            model.eval()(x)


def gap(model: nn.Module, data: Iterable[Tensor]) -> tuple[float, float]:
    """The largest differences between what layers have and what inference shows them, over layers and channels."""
    seen: dict[nn.Module, Moments] = {}

    def look(layer: nn.Module, args: tuple[Tensor]) -> None:
        moments = Moments.of(args[0])
        seen[layer] = seen[layer] + moments if layer in seen else moments

    layers = [m for m in model.modules() if isinstance(m, nn.modules.batchnorm._BatchNorm)]
    hooks = [layer.register_forward_pre_hook(look) for layer in layers]
    inference(model, data)
    for hook in hooks:
        hook.remove()
    means, variances = [], []
    for layer in layers:
        assert layer.running_mean is not None
        assert layer.running_var is not None
        mean, var = seen[layer].mean, seen[layer].var()
        means.append(float(((layer.running_mean - mean).abs() / (var + layer.eps).sqrt()).max()))
        variances.append(float(((layer.running_var + layer.eps) / (var + layer.eps)).log().abs().max()))
    return max(means), max(variances)


def costs(data: list[Tensor], repeats: int, tenth: bool) -> None:
    """The first table."""
    model = build("resnet50")
    copies = {name: copy.deepcopy(model) for name in ("pooled", "exact", "exact, a tenth of the memory")}
    memory: dict[str, MemoryUse | None] = {}

    def recalibrate(name: str, method: str, limit: int | None = None) -> None:
        memory[name] = batchnorm.recalibrate(copies[name], data, method=method, memory_limit=limit).memory

    def within_a_tenth() -> None:
        whole = memory["exact"]
        assert whole is not None
        recalibrate("exact, a tenth of the memory", "exact", whole.peak // 10)

    runs: dict[str, Callable[[], None]] = {
        "inference": lambda: inference(model, data),
        "pooled": lambda: recalibrate("pooled", "pooled"),
        "exact": lambda: recalibrate("exact", "exact"),
    }
    if tenth:
        runs["exact, a tenth of the memory"] = within_a_tenth
    seconds: dict[str, list[float]] = {name: [] for name in runs}
    inference(model, data[:2])
    # Inference comes first and last, so that a machine that gets slower or faster is not counted for or against it.
    for name in [*list(runs) * repeats, "inference"]:
        start = time.perf_counter()
        runs[name]()
        seconds[name].append(time.perf_counter() - start)
    plain = statistics.median(seconds["inference"])
    print("| pass | s | of inference | GB held | GB written | passes repeated |")
    print("|---|---|---|---|---|---|")
    for name, measured in seconds.items():
        median, used = statistics.median(measured), memory.get(name)
        what = "| | |" if used is None else f"{used.peak / 1e9:.2f} | {used.spilled / 1e9:.2f} | {used.replays} |"
        print(f"| {name} | {median:.1f} | {median / plain:.2f} | {what}")
    assert max(gap(copies["exact"], data)) <= GAP


def gaps(data: list[Tensor]) -> None:
    """The second table."""
    print("| method | largest gap, mean | largest gap, log variance |")
    print("|---|---|---|")
    for method in METHODS:
        model = build("resnet50")
        batchnorm.recalibrate(model, data, method=method)
        mean, variance = gap(model, data)
        print(f"| {method} | {mean:.1e} | {variance:.1e} |")


def of_this_process(name: str) -> int:
    """A number as Linux has it: VmRSS, the resident memory in KB, or Threads, OpenMP's included."""
    hand_back()
    with open("/proc/self/status") as status:
        return next(int(line.split()[1]) for line in status if line.startswith(f"{name}:"))


class Nested(nn.Module):
    """Work for all threads that leaves one number, some calls deep, and a stop after it."""

    def __init__(self, depth: int, stop: Callable[[], object]) -> None:
        super().__init__()
        self.inner = Nested(depth - 1, stop) if depth else None
        self.stop = stop

    def forward(self, x: Tensor) -> Tensor:
        """The sum, after the stop."""
        if self.inner is not None:
            return self.inner(x)  # type: ignore[no-any-return]  # a module's call has no type
        total = x.exp().sum()
        self.stop()
        return total


def row(number: int, kind: str, begun: float, there: float, memory: int, count: int) -> str:
    """Of the third table."""
    return f"| {number} | {kind} | {begun:.2f} | {1e6 * there / number:.0f} | {memory / number:.0f} | {count} |"


def greenlets(number: int, x: Tensor) -> str:
    """Passes as greenlets."""
    before, start, outside = of_this_process("VmRSS"), time.perf_counter(), greenlet.getcurrent()
    model = Nested(10, outside.switch)
    passes = [greenlet.greenlet(model) for _ in range(number)]
    for forward_pass in passes:
        forward_pass.switch(x)
    begun = time.perf_counter() - start
    memory, count = of_this_process("VmRSS") - before, of_this_process("Threads")
    start = time.perf_counter()
    for forward_pass in passes:
        forward_pass.switch()
    return row(number, "greenlets", begun, time.perf_counter() - start, memory, count)


def threads(number: int, x: Tensor) -> str:
    """Passes as threads, of which one runs at a time."""
    before, start = of_this_process("VmRSS"), time.perf_counter()
    turns, mine = iter([threading.Semaphore(0) for _ in range(number)]), threading.Semaphore(0)
    waiting: list[threading.Semaphore] = []

    def stop() -> None:
        mine_is = next(turns)
        waiting.append(mine_is)
        mine.release()
        mine_is.acquire()

    model = Nested(10, stop)

    def run() -> None:
        model(x)
        mine.release()

    workers = [threading.Thread(target=run) for _ in range(number)]
    for worker in workers:
        worker.start()
        mine.acquire()
    begun = time.perf_counter() - start
    memory, count = of_this_process("VmRSS") - before, of_this_process("Threads")
    start = time.perf_counter()
    for turn in waiting:
        turn.release()
        mine.acquire()
    there = time.perf_counter() - start
    for worker in workers:
        worker.join()
    return row(number, "threads", begun, there, memory, count)


def stacks(number: int) -> None:
    """The third table: a suspended pass as a greenlet, and as a thread."""
    x = torch.randn(2**17)  # enough for more than one OpenMP thread
    x.exp().sum()
    print("| suspended passes | as | s to begin | us to go on, and back | KB of each | threads of the system |")
    print("|---|---|---|---|---|---|")
    print(greenlets(number, x))
    print(threads(number, x))


def main() -> None:
    """Print a table."""
    parser = argparse.ArgumentParser(description="the cost of recalibrate beside one inference pass")
    parser.add_argument("--images", type=int, default=256)
    parser.add_argument("--batch", type=int, default=32)
    parser.add_argument("--size", type=int, default=128)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--tenth", action="store_true", help="also with a tenth of the memory that exact takes")
    parser.add_argument("--gaps", action="store_true", help="instead, what each method leaves")
    parser.add_argument("--stacks", action="store_true", help="instead, what a suspended pass costs by itself")
    parser.add_argument("--passes", type=int, default=1000, help="how many of them")
    options = parser.parse_args()
    if options.stacks:
        stacks(options.passes)
        return
    print(
        f"torch {torch.__version__}, {torch.get_num_threads()} threads, {batchnorm.kernels()[0].implementation}, "
        f"{options.images} images of {options.size} x {options.size} in batches of {options.batch}\n"
    )
    data = batches(options.images, options.batch, options.size)
    if options.gaps:
        gaps(data)
    else:
        costs(data, options.repeats, options.tenth)


if __name__ == "__main__":
    main()
