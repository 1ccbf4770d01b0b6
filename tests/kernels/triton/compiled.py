"""Compile every kernel for a device that is not here, with the arguments that the operations start it with.

    python compiled.py {sm_80,sm_90,sm_120,gfx942} [steps]

Prints a line for each: case, kernel, registers, bytes of stack, loads of 16 bytes, stores of 16 bytes.

- A training step, and a backward pass, on each of the four paths in float32, bfloat16 and float16, with ReLU and a
  residual. With "steps", nothing else:
- On two of them, in bfloat16: without a residual, and masks of bool and float32; the other operations, and commits.
- Every other activation on one path, in float32, where its arithmetic is nearest to all there are of registers.
- Unaligned tensors on one path.

Left out is what differs in nothing that decides registers: other activations in other dtypes and on other paths, masks
of half precision, which are loaded as x is, and shapes with other tiles. TRITON_INTERPRET must not be set.
"""

from __future__ import annotations

import re
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import triton
from torch import Tensor
from triton.backends.compiler import GPUTarget
from triton.runtime.driver import driver

from batchnorm.kernels import triton as kernels
from batchnorm.kernels.triton import operations, passes

# Two launches each way, three, and one, of each order in memory.
PATHS = {
    "first": ((256, 64, 56, 56), torch.contiguous_format),
    "last": ((256, 64, 56, 56), torch.channels_last),
    "whole": ((8, 64, 16, 32), torch.contiguous_format),
    "whole_last": ((128, 64, 1, 1), torch.contiguous_format),
}
EPS, MOMENTUM = 0.1, 0.1  # no float32 is 0.1


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


class Case:
    """Tensors without values on one path, and the operations on them."""

    def __init__(self, path: str, dtype: torch.dtype, *, offset: int = 0) -> None:
        self.name = f"{path},{str(dtype).removeprefix('torch.')}" + ",unaligned" * (offset > 0)
        shape, memory_format = PATHS[path]
        self.x = torch.empty(shape, device="meta", dtype=dtype).to(memory_format=memory_format)
        if offset:
            flat = torch.empty(self.x.numel() + offset, device="meta", dtype=dtype)[offset:]
            self.x = flat.as_strided(shape, self.x.stride(), offset)
        self.v = torch.empty(shape[1], device="meta")
        self.tracked, self.skipped = torch.empty((), device="meta", dtype=torch.int64), self.v.long()

    def mask(self, dtype: torch.dtype) -> Tensor:
        return self.x[:, 0].to(dtype)

    def step(self, activation: str | None = "relu", *, residual: bool = True, mask: Tensor | None = None) -> None:
        affine = (self.v, self.v, self.x if residual else None, EPS, 1, activation)
        _, *moments = operations.forward_commit(
            self.x, *affine, mask, self.v, self.v, self.tracked, self.skipped, MOMENTUM
        )
        operations.backward(self.x, self.x, *moments, *affine, mask)

    def others(self, mask: Tensor | None = None) -> None:
        """The operations of which a step has no part: statistics that are given, and sums and means of their own."""
        operations.batch_moments(self.x, 1, mask)
        wide = self.v.double()
        given = (wide, wide, self.v, self.v, self.x, EPS, 1, "silu")
        operations.normalize(self.x, *given)
        operations.backward_sums(self.x, self.x, *given, mask)
        operations.backward_input(self.x, self.x, *given, wide, wide, mask)
        operations.backward_input(self.x, self.x, *given, None, None, mask)

    def commits(self) -> None:
        for momentum in (MOMENTUM, None):
            counted = (self.tracked, self.v.double(), self.v.double())
            operations.commit(self.v, self.v, self.tracked, self.skipped, *counted, momentum)


def cases(*, steps: bool) -> list[tuple[str, Callable[[], None]]]:
    """A name without spaces for each, and what starts its kernels."""
    found: list[tuple[str, Callable[[], None]]] = []

    def add(case: Case, options: str, start: Callable[[], None]) -> None:
        found.append((case.name + f",{options}" * bool(options), start))

    for path in PATHS:
        for dtype in kernels.DTYPES:
            case = Case(path, dtype)
            add(case, "", case.step)
    if steps:
        return found
    for path in ("first", "last", "whole_last"):
        case = Case(path, torch.bfloat16)
        for dtype in (torch.bool, torch.float32):
            mask, name = case.mask(dtype), f"mask_{str(dtype).removeprefix('torch.')}"
            add(case, name, lambda case=case, mask=mask: case.step(mask=mask))
        add(case, "without_residual", lambda case=case: case.step(residual=False))
    for path in ("first", "last"):
        case = Case(path, torch.bfloat16)
        add(case, "others", case.others)
    add(case, "others,mask", lambda: case.others(case.mask(torch.bool)))
    add(case, "commit", case.commits)
    whole = Case("whole", torch.float32)
    for activation in sorted(kernels.ACTIVATIONS - {"relu"}, key=str):
        add(whole, str(activation), lambda activation=activation: whole.step(activation))
    for dtype in (torch.float32, torch.bfloat16):
        case_of_offset = Case("first", dtype, offset=1)
        add(case_of_offset, "", case_of_offset.step)
    return found


def main(architecture: str, *, steps: bool) -> None:
    kind, number = re.match(r"(sm_|gfx)(.+)", architecture).groups()
    driver.set_active(
        FakeDriver(GPUTarget("cuda", int(number), 32) if kind == "sm_" else GPUTarget("hip", architecture, 64))
    )
    started: list[tuple[str, Any]] = []

    def compile_only(kernel: Any, grid: Any, arguments: Any, constants: Any, warps: int, device: torch.device) -> None:
        compiled = kernel.warmup(*arguments, *constants, grid=grid, num_warps=warps)
        name = kernel.fn.__name__
        for key, argument in zip(kernel.arg_names, arguments, strict=False):  # constants come after these
            taken = compiled.src.signature[key]
            assert not isinstance(argument, float) or taken == "fp64", f"{name} takes {key} for {taken}"
        started.append((name, compiled))

    passes.launch = compile_only
    for case, start in cases(steps=steps):
        started.clear()
        start()
        for name, compiled in started:
            print(case, name, *usage(compiled), flush=True)


if __name__ == "__main__":
    main(sys.argv[1], steps="steps" in sys.argv[2:])
