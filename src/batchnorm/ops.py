"""The operations as torch operators, and the choice of an implementation.

An operation is described once, by its function in `kernels.reference`: its schema is that function's signature, its
fake is that function, and so is every device's implementation that has no better one. The native extension, where it
loads, replaces it on the CPU. This is the only file that speaks to `torch.ops.batchnorm`.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from batchnorm._torch import current_backward, in_functorch, is_traced
from batchnorm.kernels import aten, cpu, reference
from batchnorm.kernels.backend import Backend, Operations

_STATISTICS = ("running_mean", "running_var", "num_batches_tracked", "num_batches_skipped")
# Every operation, and which of its tensors it changes.
OPERATIONS: dict[str, tuple[str, ...]] = {
    "batch_moments": (),
    "normalize": (),
    "normalize_": ("x",),
    "forward": (),
    "backward_sums": (),
    "backward_input": (),
    "backward": (),
    "commit": _STATISTICS,
    "forward_commit": _STATISTICS,
}


def _unless_repeated(count: Tensor, running_mean: Tensor) -> Tensor:
    """`unless_repeated`. running_mean is there so that a compiler does not take the result for a constant."""
    return count.clone() if current_backward() == -1 else torch.zeros_like(count)


def _register(
    library: torch.library.Library,
    name: str,
    function: Callable[..., object],
    changed: tuple[str, ...],
    fake: Callable[..., object],
) -> None:
    library.define(
        torch.library.infer_schema(function, op_name=name, mutates_args=changed), tags=(torch.Tag.pt2_compliant_tag,)
    )
    library.impl(name, function, "CompositeExplicitAutograd")
    # Gradients are the concern of `autograd`; the dispatcher need not stop here to find that out.
    library.impl(name, torch.library.fallthrough_kernel, "Autograd")
    torch.library.register_fake(f"batchnorm::{name}", fake, lib=library)


def _define() -> torch.library.Library:
    library = torch.library.Library("batchnorm", "DEF")
    for name, changed in OPERATIONS.items():
        function = getattr(reference, name)
        _register(library, name, function, changed, function)
    _register(library, "unless_repeated", _unless_repeated, (), lambda count, _: torch.empty_like(count))
    return library


# Torch knows them for as long as the process lives, this module only until somebody imports the package again: so the
# definitions are kept where torch keeps the operators.
if "definitions" not in vars(torch.ops.batchnorm):
    vars(torch.ops.batchnorm)["definitions"] = _define()


def _operator(name: str) -> object:
    return getattr(torch.ops.batchnorm, name).default


def unless_repeated(count: Tensor, running_mean: Tensor) -> Tensor:
    """The count of what a graph is to commit to running_mean; 0 where a backward pass repeats the graph's pass.

    Whether it does has to be asked when the graph runs, so an operator asks.
    """
    counted: Tensor = torch.ops.batchnorm.unless_repeated.default(count, running_mean)
    return counted


_MAX_RANK = 16  # of the kernels
DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)
# A device with kernels of its own is one entry.
BACKENDS: tuple[Backend, ...] = ()
if cpu.AVAILABLE:
    BACKENDS += (Backend(lambda: f"native ({cpu.level()})", ("cpu",), DTYPES, cpu.ACTIVATIONS, _operator),)


@dataclass(frozen=True)
class _Choice:
    """One implementation as it is called now, and as a graph that is traced calls it."""

    eager: Operations
    traced: Operations


# Autograd sees through it: for transforms of torch.func, and for tensors that are distributed.
DIFFERENTIABLE = Operations(lambda name: getattr(reference, name), eager=False)
# Torch's own operators: for graphs that others read. Autograd sees through them: there are no gradients among them.
ATEN = Operations(lambda name: getattr(aten, name, None), eager=False)
_REFERENCE = _Choice(
    Operations(lambda name: getattr(reference, name), eager=True),
    # Plain torch, which Inductor fuses.
    Operations(lambda name: getattr(reference, name), eager=False),
)
_TABLE: dict[tuple[str, torch.dtype, str | None], _Choice] = {}
for _backend in BACKENDS:
    _choice = _Choice(*(Operations(_backend.find, eager=eager) for eager in (True, False)))
    for _device in _backend.devices:
        for _dtype in _backend.dtypes:
            _TABLE |= {(_device, _dtype, activation): _choice for activation in _backend.activations}


def _is_distributed(x: Tensor) -> bool:
    """Whether it is a `DTensor`, which knows torch's operators only; by name, because its import takes long."""
    return type(x).__name__ == "DTensor"


def select(x: Tensor, mask: Tensor | None = None, activation: str | None = None) -> Operations:
    """The implementation for a call: the only place that decides.

    Under transforms of torch.func and for a `DTensor` it is `DIFFERENTIABLE`, in graphs that are exported or traced it
    is `ATEN`. A device, dtype or activation without kernels of ours, an empty input, more than 16 dimensions, and a
    mask with a value for every value of x go to the reference.
    """
    if in_functorch() or (type(x) is not Tensor and _is_distributed(x)):
        return DIFFERENTIABLE
    choice = _TABLE.get((x.device.type, x.dtype, activation), _REFERENCE)
    rank = x.dim()
    if x.numel() == 0 or rank > _MAX_RANK or (mask is not None and mask.dim() == rank):
        choice = _REFERENCE
    if torch.compiler.is_dynamo_compiling():
        return ATEN if torch.compiler.is_exporting() else choice.traced
    return ATEN if torch.compiler.is_exporting() or is_traced() else choice.eager


@dataclass(frozen=True)
class Kernel:
    """Which implementation serves a device and a dtype."""

    device: str
    dtype: str
    implementation: str


class KernelTable(tuple[Kernel, ...]):
    """The answer of `kernels()`: rows to read, a table to print."""

    __slots__ = ()

    def __str__(self) -> str:
        lines = [f"{'device':<8} {'dtype':<10} implementation"]
        lines += [f"{row.device:<8} {row.dtype:<10} {row.implementation}" for row in self]
        if cpu.UNAVAILABLE_REASON:
            lines.append(f"No native kernels: {cpu.UNAVAILABLE_REASON}.")
        return "\n".join(lines)


def kernels() -> KernelTable:
    """Which implementation serves which device and dtype.

    "native (LEVEL)" is the C++ extension with the instruction set that it uses; "reference" is plain torch: the same
    results, slower.
    """
    names = {(device, dtype): b.name() for b in BACKENDS for device in b.devices for dtype in b.dtypes}
    devices = dict.fromkeys(["cpu", *(device for device, _ in names)])
    rows = [
        Kernel(device, str(dtype).removeprefix("torch."), names.get((device, dtype), "reference"))
        for device in devices
        for dtype in DTYPES
    ]
    return KernelTable([*rows, Kernel("others", "all", "reference")])
