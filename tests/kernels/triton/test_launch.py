"""Compiled kernels are held by all that they are compiled for."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from batchnorm.kernels.triton import launch as module
from batchnorm.kernels.triton.launch import launch

HERE = torch.device("cpu")


class Kernel:
    """Counts what it is compiled for, and how often that runs."""

    def __init__(self) -> None:
        self.compiled = 0
        self.grids: list[tuple[int, ...]] = []

    def __getitem__(self, grid: tuple[int, ...]) -> Any:
        def run(*_: object, num_warps: int) -> Any:
            self.compiled += 1
            return self.Held(self)

        return run

    class Held:
        def __init__(self, kernel: Kernel) -> None:
            self.kernel = kernel

        def __getitem__(self, grid: tuple[int, ...]) -> Any:
            return lambda *_: self.kernel.grids.append(grid)


def test_one_compilation_for_each_specialization(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "_HELD", {})
    kernel, x = Kernel(), torch.zeros(64)
    for arguments in ((x, 32, 0.5, None), (x[4:], 64, 0.1, None)):  # as far as the code goes, the same
        launch(kernel, (3,), arguments, ("relu", 4), 4, HERE)
    assert (kernel.compiled, kernel.grids) == (1, [(3, 1, 1)])
    different = [
        ((x[1:], 32, 0.5, None), ("relu", 4), 4),  # alignment
        ((x.double(), 32, 0.5, None), ("relu", 4), 4),
        ((x, 33, 0.5, None), ("relu", 4), 4),  # divisibility
        ((x, 1, 0.5, None), ("relu", 4), 4),
        ((x, 2**32, 0.5, None), ("relu", 4), 4),
        ((x, 32, 0.5, x), ("relu", 4), 4),
        ((x, 32, 0.5, None), ("silu", 4), 4),
        ((x, 32, 0.5, None), ("relu", 4), 8),
    ]
    for number, (arguments, constants, warps) in enumerate(different):
        launch(kernel, (3, 2), arguments, constants, warps, HERE)
        assert kernel.compiled == 2 + number
    assert len(kernel.grids) == 1
