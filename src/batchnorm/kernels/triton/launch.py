"""Starting kernels: those that are compiled are held, by all that Triton compiles them for.

Triton's own way from a call to the compiled kernel takes several times as long, which small inputs feel.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

Argument = Tensor | int | float | str | bool | None
Grid = tuple[int, ...]

_HELD: dict[tuple[object, ...], Any] = {}
_ON_ROCM = torch.version.hip is not None


def _specialization(argument: Argument) -> object:
    """What the code for an argument depends on."""
    if isinstance(argument, Tensor):
        aligned = argument.data_ptr() % 16 == 0
        # ROCm addresses up to 2 GiB in another way.
        return argument.dtype, aligned, _ON_ROCM and argument.untyped_storage().nbytes() < 2**31
    if isinstance(argument, int):
        return argument == 1, argument % 16 == 0, -(2**31) <= argument < 2**31
    return type(argument)


def launch(
    kernel: Any,  # noqa: ANN401 - Triton's types are not exported
    grid: Grid,
    arguments: tuple[Argument, ...],
    constants: tuple[Argument, ...],
    warps: int,
    device: torch.device,
) -> None:
    """Start a kernel on the current stream of a device.

    Args:
        kernel: a function of Triton's.
        grid: how many programs.
        arguments: those of the kernel's that are given when it runs, in its order.
        constants: those that it is compiled for, which come after these.
        warps: of a program.
        device: where the tensors are.
    """
    if device.type == "cuda" and device.index != torch.cuda.current_device():
        with torch.cuda.device(device):
            return launch(kernel, grid, arguments, constants, warps, device)
    key = (kernel, device.index, warps, constants, *map(_specialization, arguments))
    held = _HELD.get(key)
    if held is None:
        compiled = kernel[grid](*arguments, *constants, num_warps=warps)
        if compiled is not None:  # Triton's interpreter compiles nothing
            _HELD[key] = compiled
    else:
        held[(*grid, 1, 1)[:3]](*arguments, *constants)
    return None
