"""The run on a GPU, as far as it needs none: the clock is a stand-in, and tensors lie on the CPU."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch

from batchnorm.bench import contenders, cuda, measure, suites
from batchnorm.errors import UsageError

CPU = torch.device("cpu")
CASE = suites.Case("test", (6, 5, 4, 3), suites.LAST, "float32", residual=True)
GPU = cuda.Gpu("a GPU", 10_000, 1e9)


class Ticks:
    """A clock on which every mark is a second after the one before."""

    def __init__(self) -> None:
        self.now = 0

    def mark(self) -> int:
        self.now += 1
        return self.now

    def seconds(self, first: int, second: int) -> float:
        return float(second - first)


class Work(cuda.OnDevice):
    """A contender whose work lets the clock tick, and which writes down what happens."""

    def __init__(self, clock: Ticks, ticks: int) -> None:
        super().__init__("ours", contenders.ours)
        self.clock, self.ticks, self.happened = clock, ticks, []

    def prepare(self, phase: str) -> Any:
        self.happened.append("prepared")
        self.clock.now += 100  # preparing is not part of the work

        def work() -> None:
            self.happened.append("done")
            self.clock.now += self.ticks

        return work


def test_only_the_work_is_timed() -> None:
    clock = Ticks()
    contender = Work(clock, ticks=4)
    assert cuda.repeated(contender, "backward", clock, 3) == 4 + 1  # between the marks
    assert contender.happened == ["prepared", "done"] * 3


@pytest.mark.parametrize(("count", "times"), [(1, 1), (cuda.STEPS, 1), (5 * cuda.STEPS + 1, 5)])
def test_a_graph_holds_several_repetitions(count: int, times: int) -> None:
    clock, replays = Ticks(), []

    class Graph:
        def replay(self) -> None:
            replays.append(clock.now)
            clock.now += 40 * cuda.STEPS

    seconds = cuda.replayed(Graph(), clock, count)
    assert len(replays) == times
    assert seconds == pytest.approx(40, rel=0.01)  # a tick between the marks, too


@pytest.mark.parametrize("l2_bytes", [1, 10_000, 1_000_000])
def test_more_than_the_cache_lies_between_two_uses_of_an_input(l2_bytes: int) -> None:
    copies = cuda.rotated(contenders.Inputs.of(CASE), CPU, l2_bytes)
    tensors = [[t for t in (copy.x, copy.dy, copy.residual) if t is not None] for copy in copies]
    assert all(len(own) == 3 for own in tensors)
    between = sum(t.numel() * t.element_size() for own in tensors[1:] for t in own)
    assert between >= cuda.BEYOND_L2 * l2_bytes > l2_bytes
    addresses = [t.data_ptr() for own in tensors for t in own]
    assert len(set(addresses)) == len(addresses)
    first = contenders.Inputs.of(CASE)
    for copy in copies:
        assert torch.equal(copy.x, first.x)
        assert copy.x.stride() == first.x.stride()


def test_the_copies_are_used_in_turn() -> None:
    contender = cuda.OnDevice("test", contenders.ours)
    copies = cuda.rotated(contenders.Inputs.of(CASE), CPU, 20_000)
    contender.hold(CASE, copies)
    seen: list[int] = []
    contender._layers[0].register_forward_pre_hook(lambda _, given: seen.append(given[0].data_ptr()))
    for _ in range(len(copies) + 1):
        contender.prepare("forward")()
    assert seen == [copy.x.data_ptr() for copy in (*copies, copies[0])]


def test_native_is_without_cudnn() -> None:
    contender, seen = cuda.WithoutCudnn("native", contenders.torch_nn), []
    contender.hold(CASE, [contenders.Inputs.of(CASE)])
    contender._layers[0].register_forward_pre_hook(lambda *_: seen.append(torch.backends.cudnn.enabled))
    before = torch.backends.cudnn.enabled
    contender.answer()
    cuda.repeated(contender, "both", Ticks(), 1)
    assert seen == [False, False]
    assert torch.backends.cudnn.enabled == before


def test_answers_with_a_residual_are_compared() -> None:
    ours, torchs = cuda.OnDevice("ours", contenders.ours), cuda.OnDevice("torch", contenders.torch_nn)
    for contender in (ours, torchs):
        contender.hold(CASE, [contenders.Inputs.of(CASE)])
    assert len(ours.answer()) == 5
    measure.compare(CASE, [ours, torchs])
    torchs.answer = lambda: [*ours.answer()[:4], ours.answer()[4] + 1]  # type: ignore[method-assign]
    with pytest.raises(measure.AnswersDifferError, match="dresidual differs"):
        measure.compare(CASE, [ours, torchs])


def test_a_copys_speed_counts_what_is_read_and_written() -> None:
    assert cuda.copy_bytes_per_second(Ticks(), CPU, 1000) == 2000


def test_the_share_of_a_copys_speed() -> None:
    assert cuda.copy_share(500, 1e-6, GPU) == pytest.approx(0.5)  # 500 bytes in a microsecond, of 1 GB/s
    assert cuda.copy_share(None, 1e-6, GPU) is None


@pytest.mark.parametrize("serves", ["triton", "reference"])
def test_bytes_are_those_of_our_kernels_where_they_serve(serves: str, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("triton", reason="counting launches needs the package triton")
    row = type("Row", (), {"device": "cuda", "dtype": "float32", "implementation": serves})
    monkeypatch.setattr(cuda.batchnorm, "kernels", lambda: (row,))
    case = suites.Case("test", (32, 64, 112, 112), suites.FIRST, "float32")
    expected = {"forward": 12, "backward": 20, "both": 32, "inference": 8}  # docs/gpu.md
    for phase, bytes_a_value in expected.items():
        moved = cuda.our_bytes(case, phase)
        assert moved == (bytes_a_value * math.prod(case.shape) if serves == "triton" else None)


@pytest.mark.parametrize("case", suites.cases("all", residuals=(False, True)), ids=str)
def test_every_case_can_be_counted(case: suites.Case, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("triton", reason="counting launches needs the package triton")
    row = type("Row", (), {"device": "cuda", "dtype": case.dtype, "implementation": "triton"})
    monkeypatch.setattr(cuda.batchnorm, "kernels", lambda: (row,))
    assert cuda.our_bytes(case, "inference") == (2 + case.residual) * cuda.input_bytes(case)


def test_a_row(monkeypatch: pytest.MonkeyPatch) -> None:
    """Medians of turns on a stand-in's clock, replays for what is small, the share by the faster of the two."""
    clock = Ticks()
    monkeypatch.setattr(cuda, "peak", lambda *_: 7)
    monkeypatch.setattr(cuda, "replays", lambda contender, phase, clock: lambda count: 2.0)
    monkeypatch.setattr(cuda, "our_bytes", lambda *_: 4_000_000_000)
    row = cuda.measure(CASE, "both", [Work(clock, ticks=4)], GPU, clock)
    assert row.seconds == {"ours": 5.0, "ours graph": 2.0}
    assert (row.residual, row.copy_share, row.peak_bytes) == (True, 2.0, {"ours": 7})
    monkeypatch.setattr(cuda, "SMALL", 0)
    row = cuda.measure(CASE, "both", [Work(clock, ticks=4)], GPU, clock)
    assert row.seconds == {"ours": 5.0}
    assert row.copy_share == 0.8


@pytest.mark.skipif(torch.cuda.is_available(), reason="says what happens where torch finds no GPU")
def test_without_a_gpu() -> None:
    with pytest.raises(UsageError, match="torch finds no GPU"):
        cuda.run([CASE], compile=False, advance=lambda _: None)


def test_a_run(monkeypatch: pytest.MonkeyPatch) -> None:
    """All of it, with the CPU for a device and ticks for its clock."""
    properties = type("Properties", (), {"name": "a GPU", "L2_cache_size": 10_000})
    for name, result in {"is_available": True, "current_device": 0, "get_device_properties": properties}.items():
        monkeypatch.setattr(torch.cuda, name, lambda *_, result=result: result)
    monkeypatch.setattr(torch.cuda, "empty_cache", lambda: None)
    monkeypatch.setattr(cuda, "DEVICE", CPU)
    monkeypatch.setattr(cuda, "COPIED", 1 << 20)
    monkeypatch.setattr(cuda, "Events", Ticks)
    monkeypatch.setattr(cuda, "peak", lambda *_: 7)
    monkeypatch.setattr(cuda, "replays", lambda *_: lambda count: 2.0)
    seen: list[measure.Row] = []
    cases = [CASE, suites.Case("test", (6, 5, 4, 3), suites.FIRST, "bfloat16")]
    rows, gpu = cuda.run(cases, compile=False, advance=seen.append)
    assert gpu == cuda.Gpu("a GPU", 10_000, 2 << 20)
    assert rows == seen
    assert [(row.dtype, row.residual, row.phase) for row in rows] == [
        (case.dtype, case.residual, phase) for case in cases for phase in contenders.PHASES
    ]
    eager = dict.fromkeys(("ours", "torch", "native"), 1.0)
    graphs = {name + cuda.GRAPH: 2.0 for name in eager}
    for row in rows:
        assert row.seconds == (eager if row.phase == "backward" else eager | graphs)
