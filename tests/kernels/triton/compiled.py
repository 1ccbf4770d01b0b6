"""Compile every kernel for a device that is not here, with the arguments that the operations start it with.

    python compiled.py {sm_80,sm_90,sm_120,gfx942}

Prints a line for each: shape, dtype, kernel, registers, bytes of stack, loads of 16 bytes, stores of 16 bytes.
"""

from __future__ import annotations

import re
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.runtime.driver import driver

from batchnorm.kernels.triton import operations, passes


class FakeDriver:
    """A driver that knows for what to compile, and no device."""

    def __init__(self, target: GPUTarget) -> None:
        self.target = target

    def get_current_target(self) -> GPUTarget:
        return self.target

    def get_current_device(self) -> int:
        return 0

    def get_current_stream(self, device: int = 0) -> int:
        return 0

    def get_active_torch_device(self) -> torch.device:
        return torch.device("cpu")

    def map_python_to_cpp_type(self, name: str) -> str:
        return name


def usage(compiled: Any) -> tuple[int, int, int, int]:
    """Registers, bytes of stack, loads and stores of 16 bytes."""
    if "amdgcn" in compiled.asm:
        code = compiled.asm["amdgcn"]
        registers, spills = (int(re.search(rf"\.{n}: *(\d+)", code)[1]) for n in ("vgpr_count", "vgpr_spill_count"))
        loads, stores = (len(re.findall(rf"_{word}_dwordx4", code)) for word in ("load", "store"))
        return registers, spills, loads, stores
    tool = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(compiled.asm["cubin"])
        file.flush()
        told, code = (
            subprocess.run([tool, option, file.name], capture_output=True, text=True, check=True)
            for option in ("-res-usage", "-sass")
        )
    registers, stack = map(int, re.search(r"REG:(\d+) STACK:(\d+)", told.stdout + told.stderr).groups())
    loads, stores = (len(re.findall(rf"{word}[.A-Z0-9]*[.]128", code.stdout)) for word in ("LDG", "STG"))
    return registers, stack, loads, stores


def main(architecture: str, shapes: list[tuple[tuple[int, ...], bool]]) -> None:
    kind, number = re.match(r"(sm_|gfx)(.+)", architecture).groups()
    driver.set_active(
        FakeDriver(GPUTarget("cuda", int(number), 32) if kind == "sm_" else GPUTarget("hip", architecture, 64))
    )
    started: list[tuple[str, Any]] = []

    def compile_only(kernel: Any, grid: Any, arguments: Any, constants: Any, warps: int, device: torch.device) -> None:
        compiled = kernel.warmup(*arguments, *constants, grid=grid, num_warps=warps)
        started.append((kernel.fn.__name__, compiled))

    passes.launch = compile_only
    for shape, last in shapes:
        for dtype in (torch.float32, torch.bfloat16):
            memory_format = torch.channels_last if last else torch.contiguous_format
            x = torch.empty(shape, device="meta", dtype=dtype).to(memory_format=memory_format)
            v = torch.empty(shape[1], device="meta")
            counters = torch.empty((), device="meta", dtype=torch.int64), v.long()
            affine = (v, v, x, 1e-5, 1, "relu")
            started.clear()
            _, *moments = operations.forward_commit(x, *affine, None, v, v, *counters, 0.1)
            operations.backward(x, x, *moments, *affine)
            for name, compiled in started:
                print("x".join(map(str, shape)), "last" if last else "first", dtype, name, *usage(compiled), flush=True)


SHAPES = [((256, 64, 56, 56), False), ((256, 64, 56, 56), True), ((8, 64, 16, 32), False), ((128, 64, 1, 1), False)]

if __name__ == "__main__":
    main(sys.argv[1], SHAPES)
