"""The memory and the time of a training step with and without `batchnorm.recompute`, as a Markdown table.

Networks are fused, and the same weights and the same batch serve all ways. "saved" is what a forward pass leaves
allocated for its backward pass: on the CPU by the allocator's events, on a GPU by its counter. "peak" is the largest
amount that is allocated in a step, above what was there before. Steps are timed in turn, each in a process of its own
that has nothing else to do; a number is the median, the ratio the median of the ratios of one turn.

    python benchmarks/memory.py --repeats 7
    python benchmarks/memory.py --networks ResNet-50 --batch 16 --size 160

The last column is computed: what in-place activated batch norm would save if all activations behind batch norm were
leaky ReLUs, which it needs an inverse of; of ReLU, SiLU and GELU it saves nothing.
"""

from __future__ import annotations

import argparse
import contextlib
import copy
import statistics
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor, nn

import batchnorm as bn
from batchnorm.kernels import cpu
from memory_networks import NETWORKS, with_checkpoints

MIB = 2**20


@dataclass(frozen=True)
class Measured:
    """One way of training.

    Attributes:
        saved: bytes that are left allocated between forward and backward.
        peak: bytes, the most in a step.
        gradients: of all parameters, after one step.
    """

    saved: int
    peak: int
    gradients: list[Tensor]


def step(model: nn.Module, x: Tensor) -> None:
    """One training step without an optimizer's."""
    torch.manual_seed(1)  # dropout draws the same
    model(x).float().square().mean().backward()


def events(run: Callable[[], object]) -> tuple[int, int]:
    """What a call leaves allocated on the CPU, and the most that it had, in bytes."""
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profiler:
        result = run()
    # Of each operator what it leaves, and apart what is freed outside of any; not what it has for a while itself.
    allocated = [(event.time_range.start, event.self_cpu_memory_usage) for event in profiler.events()]
    now = most = 0
    for _, size in sorted(allocated, key=lambda pair: pair[0]):
        now += size
        most = max(most, now)
    del result
    return now, most


def counters(run: Callable[[], object]) -> tuple[int, int]:
    """The same on a GPU."""
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    result = run()
    left, most = torch.cuda.memory_allocated() - before, torch.cuda.max_memory_allocated() - before
    del result
    return left, most


@contextlib.contextmanager
def outputs_of_torch() -> Iterator[None]:
    """Outputs in torch's own memory: its events do not tell of the kernels' own."""
    with cpu.resizable_outputs():
        yield


def measure(model: nn.Module, x: Tensor) -> Measured:
    """The memory of a step, with gradients that are there already."""
    look = counters if x.device.type == "cuda" else events
    with outputs_of_torch():
        step(model, x)
        gradients = [p.grad.clone() for p in model.parameters() if p.grad is not None]
        saved, _ = look(lambda: model(x))
        _, peak = look(lambda: step(model, x))
    return Measured(saved, peak, gradients)


def in_place_savings(model: nn.Module, x: Tensor) -> int:
    """Bytes of the inputs of layers with an activation and no residual: in-place batch norm writes over them."""
    sizes = []

    def look(layer: bn.BatchNorm, args: tuple[Tensor, ...], kwargs: dict[str, object]) -> None:
        if kwargs.get("activation", layer.activation) is not None and kwargs.get("residual") is None:
            sizes.append(args[0].numel() * args[0].element_size())

    original = bn.BatchNorm.forward

    def forward(self: bn.BatchNorm, *args: Tensor, **kwargs: object) -> Tensor:
        look(self, args, kwargs)
        return original(self, *args, **kwargs)  # type: ignore[arg-type]  # handed on

    bn.BatchNorm.forward = forward  # type: ignore[method-assign]  # for this pass
    try:
        with torch.no_grad():
            model(x)
    finally:
        bn.BatchNorm.forward = original  # type: ignore[method-assign]  # as it was
    return sum(sizes)


def times(models: dict[str, nn.Module], x: Tensor, repeats: int) -> dict[str, list[float]]:
    """Seconds of steps, in turn."""
    wait: Callable[[], object] = torch.cuda.synchronize if x.device.type == "cuda" else lambda: None
    found: dict[str, list[float]] = {name: [] for name in models}
    for turn in range(repeats + 1):
        for name, model in models.items():
            wait()
            start = time.perf_counter()
            step(model, x)
            wait()
            if turn:  # the first warms up
                found[name].append(time.perf_counter() - start)
    return found


def row(name: str, batch: int, size: int, repeats: int, device: str) -> str:
    """One network's line."""
    network = NETWORKS[name]
    torch.manual_seed(0)
    plain = network.make().to(device).train()
    x = torch.randn(batch, 3, size, size, device=device)
    fused = bn.fuse(copy.deepcopy(plain))
    checkpointed = with_checkpoints(copy.deepcopy(plain), network.blocks)
    recomputed = copy.deepcopy(fused)
    handle = bn.recompute(recomputed)
    models = {"torch.nn": plain, "ours": fused, "recompute": recomputed, "checkpoint": checkpointed}
    found = {way: measure(model, x) for way, model in models.items()}
    for ours, again in zip(found["ours"].gradients, found["recompute"].gradients, strict=True):
        assert torch.equal(ours, again), f"{name}: gradients differ"
    seconds = times(models, x, repeats) if repeats else {}
    base = found["ours"]
    in_place = in_place_savings(fused, x) / base.saved

    def cells(way: str) -> list[str]:
        it = found[way]
        ratio = "-"
        if repeats:
            ratio = f"{statistics.median(a / b for a, b in zip(seconds[way], seconds['ours'], strict=True)):.2f}"
        return [f"{it.saved / MIB:.0f}", f"{1 - it.saved / base.saved:.0%}", f"{it.peak / MIB:.0f}", ratio]

    assert handle.report.recomputed
    shown = [name, f"{found['torch.nn'].saved / MIB:.0f}", f"{base.saved / MIB:.0f}", f"{base.peak / MIB:.0f}"]
    shown += [*cells("recompute"), f"{network.goal:.0%}", *cells("checkpoint"), f"{in_place:.0%}"]
    return f"| {' | '.join(shown)} |"


HEAD = """\
| network | torch.nn saved | ours saved | ours peak | recompute saved | less | peak | time | goal | checkpoint saved | \
less | peak | time | in-place, leaky ReLU: less |
|---|---|---|---|---|---|---|---|---|---|---|---|---|---|"""


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--networks", nargs="*", default=list(NETWORKS), choices=list(NETWORKS), metavar="NETWORK")
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--size", type=int, default=128, help="of the images")
    parser.add_argument("--repeats", type=int, default=7, help="timed steps; 0 for memory alone")
    parser.add_argument("--device", default="cpu")
    given = parser.parse_args()
    print(HEAD)
    for name in given.networks:
        print(row(name, given.batch, given.size, given.repeats, given.device), flush=True)


if __name__ == "__main__":
    main()
