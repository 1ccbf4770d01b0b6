"""What a step moves: that the count is what the kernels do, and the numbers of docs/gpu.md."""

from __future__ import annotations

import math
import re
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from triton.runtime.interpreter import InterpreterBuilder

from batchnorm.kernels.triton import operations, passes, traffic
from support.samples import Layout, Sample
from support.torch_traffic import Moved, moved_by_torch

PAGE = Path(__file__).parents[3] / "docs" / "gpu.md"
EPS = 1e-5


class Counted:
    """How often each tensor of the input's shape is gone through by each kernel, counted load by load."""

    def __init__(self, shape: tuple[int, ...], monkeypatch: pytest.MonkeyPatch) -> None:
        self.kernels: list[tuple[str, dict[int, float]]] = []  # by the place of the argument: times
        self._shape, self._values, self._whole = shape, Counter[int](), dict[int, Tensor]()
        start, load, store = (
            passes.launch,
            InterpreterBuilder.create_masked_load,
            InterpreterBuilder.create_masked_store,
        )

        def launch(kernel: Any, grid: Any, arguments: Any, *rest: Any) -> None:
            self._values = Counter()
            self._whole = {
                i: t for i, t in enumerate(arguments) if isinstance(t, Tensor) and t.shape == torch.Size(shape)
            }
            start(kernel, grid, arguments, *rest)
            times = {i: self._values[i] / t.numel() for i, t in self._whole.items()}
            self.kernels.append((kernel.__name__, times))

        def counting_load(builder: Any, pointers: Any, mask: Any, *rest: Any) -> Any:
            self._count(pointers.data, mask.data)
            return load(builder, pointers, mask, *rest)

        def counting_store(builder: Any, pointers: Any, value: Any, mask: Any, *rest: Any) -> Any:
            self._count(pointers.data, mask.data)
            return store(builder, pointers, value, mask, *rest)

        monkeypatch.setattr(passes, "launch", launch)
        monkeypatch.setattr(InterpreterBuilder, "create_masked_load", counting_load)
        monkeypatch.setattr(InterpreterBuilder, "create_masked_store", counting_store)

    def _count(self, pointers: Any, mask: Any) -> None:
        touched = pointers[mask]
        for i, t in self._whole.items():
            first = t.data_ptr()
            inside = (touched >= first) & (touched < first + t.numel() * t.element_size())
            self._values[i] += int(np.count_nonzero(inside))


@pytest.mark.parametrize("activation", ["relu", None])
@pytest.mark.parametrize("residual", [False, True])
@pytest.mark.parametrize("parts", [False, True])
@pytest.mark.parametrize(
    "layout", [Layout("first", (3, 3, 5, 9)), Layout("last", (3, 5, 5, 4), 1, "channels_last")], ids=lambda x: x.name
)
def test_a_kernel_goes_once_through_every_tensor_that_it_is_given(
    layout: Layout,
    parts: bool,
    residual: bool,
    activation: str | None,
    monkeypatch: pytest.MonkeyPatch,
    request: pytest.FixtureRequest,
) -> None:
    if parts:
        request.getfixturevalue("small")
    t = Sample(layout, activation, residual).tensors()
    affine = (t["weight"], t["bias"], t["residual"], EPS, 1, activation)
    running = torch.zeros(layout.channels), torch.ones(layout.channels), torch.tensor(0), None
    expected = traffic.of_step(t["x"], 1, activation, residual=residual)
    counted = Counted(layout.shape, monkeypatch)
    _, *moments = operations.forward_commit(t["x"], *affine, None, *running, 0.1)
    operations.backward(t["dy"], t["x"], *moments, *affine)
    assert len(counted.kernels) == expected["both"].launches
    values = 0.0
    for kernel, times in counted.kernels:
        assert set(times.values()) <= {1.0}, (kernel, times)
        values += sum(times.values())
    assert values * t["x"].numel() * 4 == expected["both"].bytes
    counted.kernels.clear()
    operations.normalize(t["x"], *running[:2], *affine)
    ((_, times),) = counted.kernels
    assert len(times) * t["x"].numel() * 4 == expected["inference"].bytes
    assert set(times.values()) == {1.0}


def test_launches_are_started_again_afterwards() -> None:
    before = passes.launch
    with pytest.raises(IndexError):
        traffic.of_step(torch.empty(4, 3), 2, None, residual=False)
    assert passes.launch is before


# --- the table of docs/gpu.md ----------------------------------------------------------------------------------------

SHAPES = {
    "channels first": ((256, 64, 56, 56), torch.contiguous_format),
    "channels last": ((256, 64, 56, 56), torch.channels_last),
    "a channel fits a tile": ((8, 64, 16, 32), torch.contiguous_format),
}
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}


def test_what_is_left_out_is_little() -> None:
    """Of parts, which every program of a channel reads: the largest of what `Traffic` does not count."""
    for shape, memory_format in SHAPES.values():
        x = torch.empty(shape, device="meta", dtype=torch.bfloat16).to(memory_format=memory_format)
        plan = operations.arrange(x, 1).plan
        joined = 1 if plan.last else plan.splits  # by every program, or by one for each channel
        parts = 0 if plan.whole else (3 + 2) * 8 * plan.splits * shape[1] * (1 + joined)
        assert parts < 0.01 * traffic.of_step(x, 1, "relu", residual=False)["both"].bytes


def rows() -> dict[tuple[str, str], list[str]]:
    """The table of bytes: the cells of each line by who and the input."""
    table = re.search(r"^\| who \|.*?\n\n", PAGE.read_text(), flags=re.M | re.S)
    assert table is not None
    lines = [[cell.strip() for cell in line.split("|")[1:-1]] for line in table[0].strip().splitlines()[2:]]
    return {(who, input_): cells for who, input_, *cells in lines}


def of_ours(input_: str, dtype: str, residual: bool) -> list[Moved]:
    shape, memory_format = SHAPES[input_]
    x = torch.empty(shape, device="meta", dtype=DTYPES[dtype]).to(memory_format=memory_format)
    counted = traffic.of_step(x, 1, "relu", residual=residual)
    return [
        Moved(counted[phase].launches, counted[phase].bytes / math.prod(shape)) for phase in ("forward", "backward")
    ]


def of_torch(reads: int) -> Any:
    def count(input_: str, dtype: str, residual: bool) -> list[Moved]:
        shape, memory_format = SHAPES[input_]
        x = torch.empty(shape, device="meta", dtype=DTYPES[dtype]).to(memory_format=memory_format)
        return moved_by_torch(x, residual=residual, reads=reads)

    return count


def of_the_least(passes: int) -> Any:
    """Two passes over all that the sums need and then over all that the results need; or one."""

    def count(input_: str, dtype: str, residual: bool) -> list[Moved]:
        read, written = 1 + residual, 1
        forward = (passes - 1) + read + written
        backward = passes * (2 + residual) + (1 + residual)
        size = DTYPES[dtype].itemsize
        return [Moved(passes, forward * size), Moved(passes, backward * size)]

    return count


WHO = {
    "ours": of_ours,
    "torch, two reads": of_torch(2),
    "torch, one read": of_torch(1),
    "two passes": of_the_least(2),
    "one read": of_the_least(1),
}


LINES = [("ours", input_) for input_ in SHAPES] + [(who, "any") for who in WHO if who != "ours"]


def cells(who: str, input_: str) -> list[str]:
    """What a line of the table has to say."""
    found = []
    for residual in (False, True):
        for dtype in DTYPES:
            shape = "channels first" if input_ == "any" else input_
            forward, backward = WHO[who](shape, dtype, residual)
            if dtype == "float32":
                found.append(f"{forward.kernels} + {backward.kernels}")
            found.append(f"{forward.bytes:g} + {backward.bytes:g} = {forward.bytes + backward.bytes:g}")
    return found


@pytest.mark.parametrize(("who", "input_"), LINES)
def test_the_table_says_what_is_counted(who: str, input_: str) -> None:
    assert rows()[who, input_] == cells(who, input_)


def test_the_table_has_no_other_lines() -> None:
    assert list(rows()) == LINES


def test_reading_once_is_what_a_tile_that_holds_a_channel_does() -> None:
    for residual in (False, True):
        small = of_ours("a channel fits a tile", "float32", residual)
        assert [part.bytes for part in small] == [part.bytes for part in of_the_least(1)("", "float32", residual)]
        large = of_ours("channels first", "float32", residual)
        assert [part.bytes for part in large] == [part.bytes for part in of_the_least(2)("", "float32", residual)]
