"""The run on a GPU: the device's clock, inputs outside of its cache, replays of graphs, shares of a copy's speed.

A contender's time is that between two events on the device, and its inputs are others each time, so that more than the
L2 cache holds lies between two uses of one. Small inputs take the device less time than Python takes to start the
kernels; for them a CUDA graph of many steps is replayed, too.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import asdict, dataclass
from functools import partial
from typing import Any, Protocol

import torch
from torch import Tensor

import batchnorm
from batchnorm.bench.contenders import PHASES, Inputs, TorchModule, ours, torch_compile, torch_nn
from batchnorm.bench.measure import Row, compare, take_turns
from batchnorm.bench.suites import DTYPES, Case
from batchnorm.errors import UsageError

DEVICE = torch.device("cuda")
# As measure's: about so many seconds a row; a turn long enough that starting it does not weigh.
SECONDS, TURN = 0.3, 5e-3
# Between two uses of an input so many times the L2's bytes are touched.
BEYOND_L2 = 2
# Inputs of at most so many bytes are replayed as graphs, too, of so many steps.
SMALL, STEPS = 8 << 20, 20
GRAPH = " graph"  # what the name of a contender's replays ends with
WARM_UP = 3  # steps before one is recorded: compiling and first allocations are no part of a graph
COPIED = 256 << 20  # bytes that are copied to know how fast a copy is, at least


class Clock(Protocol):
    """Marks on the device's time line."""

    def mark(self) -> Any:  # noqa: ANN401 - torch's event, or a test's
        """A mark after all that was started so far."""

    def seconds(self, first: Any, second: Any) -> float:  # noqa: ANN401 - likewise
        """From one mark to a later one; waits for it."""


class Events:
    """The clock of the current CUDA device."""

    def mark(self) -> torch.cuda.Event:
        """An event on the current stream."""
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event

    def seconds(self, first: torch.cuda.Event, second: torch.cuda.Event) -> float:
        """Between two events."""
        second.synchronize()
        milliseconds: float = first.elapsed_time(second)
        return milliseconds / 1e3


@dataclass(frozen=True)
class Gpu:
    """What is measured on.

    Attributes:
        name: of the device.
        l2_bytes: of its cache.
        copy_bytes_per_second: read and written, by a copy from the device to itself, in this run.
    """

    name: str
    l2_bytes: int
    copy_bytes_per_second: float


class OnDevice(TorchModule):
    """A torch module on a GPU."""

    def setting(self) -> AbstractContextManager[object]:
        """What holds while it works."""
        return nullcontext()

    def answer(self) -> list[Tensor]:
        """The output and the gradients."""
        with self.setting():
            return super().answer()


class WithoutCudnn(OnDevice):
    """torch.nn's layer by torch's own kernels."""

    def setting(self) -> AbstractContextManager[object]:
        """No cuDNN, also for the backward pass of what was computed inside."""
        flags: AbstractContextManager[object] = torch.backends.cudnn.flags(enabled=False)
        return flags


def check() -> None:
    """Raise unless there is a GPU.

    Raises:
        UsageError: torch finds none.
    """
    if not torch.cuda.is_available():
        raise UsageError(
            "got --device cuda, but torch finds no GPU that it can use here. Run it where there is one, or leave out "
            "--device"
        )


def run(cases: Sequence[Case], *, compile: bool, advance: Callable[[Row], None]) -> tuple[list[Row], Gpu]:
    """Measure on the current CUDA device.

    Args:
        cases: what to measure.
        compile: whether torch.compile takes part.
        advance: called with each row as soon as it is measured.

    Returns:
        The rows, and the device.

    Raises:
        AnswersDifferError: a contender computes another answer than ours.
        UsageError: there is no GPU.
    """
    check()
    clock, properties = Events(), torch.cuda.get_device_properties(torch.cuda.current_device())
    l2_bytes = properties.L2_cache_size
    gpu = Gpu(properties.name, l2_bytes, copy_bytes_per_second(clock, DEVICE, max(COPIED, 4 * l2_bytes)))
    contenders = [OnDevice("ours", ours), OnDevice("torch", torch_nn), WithoutCudnn("native", torch_nn)]
    contenders += [OnDevice("compile", torch_compile)] if compile else []
    rows = []
    for case in cases:
        inputs = rotated(Inputs.of(case), DEVICE, l2_bytes)
        for contender in contenders:
            contender.hold(case, inputs)
        compare(case, contenders)
        for phase in PHASES:
            row = measure(case, phase, contenders, gpu, clock)
            rows.append(row)
            advance(row)
        for contender in contenders:
            contender.close()
        del inputs
        torch.cuda.empty_cache()
    return rows, gpu


def rotated(inputs: Inputs, device: torch.device, l2_bytes: int) -> list[Inputs]:
    """Copies of inputs on a device, so many that using each in turn touches `BEYOND_L2` times the L2's bytes."""
    x, dy, residual, weight, bias = inputs
    here = Inputs(
        x.to(device),
        dy.to(device),
        None if residual is None else residual.to(device),
        weight.to(device),
        bias.to(device),
    )
    each = sum(t.numel() * t.element_size() for t in here[:3] if t is not None)
    # A clone has the strides of what it is of.
    return [
        here._replace(
            x=here.x.clone(), dy=here.dy.clone(), residual=None if here.residual is None else here.residual.clone()
        )
        for _ in range(1 + -(-BEYOND_L2 * l2_bytes // each))
    ]


def copy_bytes_per_second(clock: Clock, device: torch.device, size: int) -> float:
    """How many bytes a copy from the device to itself reads and writes in a second: the median of several."""
    source, target = (torch.ones(size, dtype=torch.uint8, device=device) for _ in range(2))
    seconds = []
    for _ in range(21):
        first = clock.mark()
        target.copy_(source)
        seconds.append(clock.seconds(first, clock.mark()))
    return 2 * size / statistics.median(seconds)


def measure(case: Case, phase: str, contenders: Sequence[OnDevice], gpu: Gpu, clock: Clock) -> Row:
    """One row: every contender, and replays of its graph where the case is small, in turn."""
    peaks: dict[str, int | None] = {contender.name: peak(contender, phase) for contender in contenders}
    works: dict[str, Callable[[int], float]] = {c.name: partial(repeated, c, phase, clock) for c in contenders}
    if input_bytes(case) <= SMALL and phase != "backward":  # whose forward pass is no part of the work
        works |= {c.name + GRAPH: replays(c, phase, clock) for c in contenders if c.name != "compile"}
    times = take_turns(works, seconds=SECONDS, turn=TURN)
    medians = {name: statistics.median(values) for name, values in times.items()}
    best = min(medians["ours"], medians.get("ours" + GRAPH, medians["ours"]))
    share = copy_share(our_bytes(case, phase), best, gpu)
    return Row(case.suite, case.shape, case.layout, case.dtype, phase, medians, peaks, case.residual, share)


def repeated(contender: OnDevice, phase: str, clock: Clock, count: int) -> float:
    """Mean seconds of one of `count` repetitions, all of which are started before any is waited for."""
    marks = []
    with contender.setting():
        for _ in range(count):
            work = contender.prepare(phase)
            first = clock.mark()
            results = work()
            marks.append((first, clock.mark()))
            del results, work
    return statistics.fmean(clock.seconds(first, second) for first, second in marks)


def replays(contender: OnDevice, phase: str, clock: Clock) -> Callable[[int], float]:
    """`replayed` of a CUDA graph of `STEPS` repetitions."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with contender.setting():
        with torch.cuda.stream(stream):
            for _ in range(WARM_UP):
                contender.prepare(phase)()
        torch.cuda.current_stream().wait_stream(stream)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            for _ in range(STEPS):
                contender.prepare(phase)()

    return partial(replayed, graph, clock)


def replayed(graph: torch.cuda.CUDAGraph, clock: Clock, count: int) -> float:
    """Mean seconds of one of about `count` repetitions, `STEPS` of which are in the graph."""
    times = max(1, count // STEPS)
    first = clock.mark()
    for _ in range(times):
        graph.replay()
    return clock.seconds(first, clock.mark()) / (times * STEPS)


def peak(contender: OnDevice, phase: str) -> int:
    """Bytes of the device's memory that one repetition needed at most, beyond what was taken before."""
    torch.cuda.synchronize()
    with contender.setting():
        work = contender.prepare(phase)
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        results = work()
        torch.cuda.synchronize()
        del results, work
    return torch.cuda.max_memory_allocated() - before


def input_bytes(case: Case) -> int:
    """Of one input x."""
    return torch.Size(case.shape).numel() * DTYPES[case.dtype].itemsize


def our_bytes(case: Case, phase: str) -> int | None:
    """What our kernels move; None where none of ours serve a GPU, so that nobody has counted it."""
    served = {(row.device, row.dtype): row.implementation for row in batchnorm.kernels()}
    if not served.get(("cuda", case.dtype), "reference").startswith("triton"):
        return None
    from batchnorm.kernels.triton import traffic  # imports Triton

    x = case.arrange(torch.empty(case.shape, dtype=DTYPES[case.dtype], device="meta"))
    moved = traffic.of_step(x, case.channel_dim, "relu", residual=case.residual)
    return moved[phase].bytes


def copy_share(moved: int | None, seconds: float, gpu: Gpu) -> float | None:
    """The speed at which bytes are moved, as a share of a copy's."""
    return None if moved is None else moved / seconds / gpu.copy_bytes_per_second


def described(gpu: Gpu) -> dict[str, object]:
    """For a file of results."""
    return {**asdict(gpu), "cuda": torch.version.cuda, "cudnn": torch.backends.cudnn.version()}
