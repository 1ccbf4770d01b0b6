"""The operations as torch operators, and the choice of an implementation.

An operation is described once, by its function in `kernels.reference`: its schema is that function's signature, its
fake is that function, and so, a few channels at a time, is every device's implementation that has no better one. The
native extension, where it loads, replaces it on the CPU, the kernels in Triton on CUDA and ROCm. This is the only file
that speaks to `torch.ops.batchnorm`.
"""

from __future__ import annotations

import inspect
import sys
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from batchnorm._torch import current_backward, in_functorch, is_exported, is_traced
from batchnorm.kernels import aten, compiled, cpu, fallback, reference, slices, triton
from batchnorm.kernels.backend import Backend, Operations

_STATISTICS = ("running_mean", "running_var", "num_batches_tracked", "num_batches_skipped")
_MAX_RANK = 16  # of the kernels
# Any layout will do: Inductor, which lays convolutions out channels last, would else put a copy before every call.
_TAGS = (torch.Tag.pt2_compliant_tag, torch.Tag.flexible_layout)
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
    described: Callable[..., object],
    changed: tuple[str, ...],
    *,
    fake: Callable[..., object],
    function: Callable[..., object] | None = None,
) -> None:
    library.define(torch.library.infer_schema(described, op_name=name, mutates_args=changed), tags=_TAGS)
    library.impl(name, function or described, "CompositeExplicitAutograd")
    # Gradients are the concern of `autograd`; the dispatcher need not stop here to find that out.
    library.impl(name, torch.library.fallthrough_kernel, "Autograd")
    torch.library.register_fake(f"batchnorm::{name}", fake, lib=library)


def _on_cuda(name: str) -> Callable[..., object]:
    """An operator that anybody may call, with anything: by a kernel in Triton, or the reference where there is none."""
    kernel, otherwise = triton.operation(name), slices.operation(name)
    parameters = tuple(inspect.signature(getattr(reference, name)).parameters)

    def operator(*args: Any) -> object:  # noqa: ANN401 - of the operation
        given = dict(zip(parameters, args, strict=False))  # without those at the end that have their defaults
        served = _runs(args[0].device) and given.get("domain") is None
        if "x" in given:
            chosen = select(given["x"], given.get("mask"), given.get("activation"))
            served = served and chosen.forward is _operator("forward")
        return (kernel if served else otherwise)(*args)

    return operator


def _runs(device: torch.device) -> bool:
    """Whether kernels in Triton run on a device. Where they do not, it says so, and they are not chosen again."""
    if torch.cuda.is_current_stream_capturing():  # where nothing can be tried
        return True
    reason = triton.failure(device)
    if reason and any(key[0] == device.type for key in _TABLE):
        for key in [key for key in _TABLE if key[0] == device.type]:
            del _TABLE[key]
        warnings.warn(
            f"the kernels in Triton do not run on {device}; torch's batch norm takes their place, which is slower. "
            f"This is what they raised: {reason}",
            UserWarning,
            stacklevel=2,
        )
    return not reason


def _define() -> torch.library.Library:
    library = torch.library.Library("batchnorm", "DEF")
    for name, changed in OPERATIONS.items():
        described = getattr(reference, name)
        _register(library, name, described, changed, fake=described, function=slices.operation(name))
        if triton.AVAILABLE:
            library.impl(name, _on_cuda(name), "CUDA")
    _register(library, "unless_repeated", _unless_repeated, (), fake=lambda count, _: torch.empty_like(count))
    return library


# Torch knows them for as long as the process lives, this module only until somebody imports the package again: so the
# definitions are kept where torch keeps the operators.
if "definitions" not in vars(torch.ops.batchnorm):
    vars(torch.ops.batchnorm)["definitions"] = _define()


def _operator(name: str) -> Callable[..., Any]:
    operator: Callable[..., Any] = getattr(torch.ops.batchnorm, name).default
    return operator


def define_train_gradients(function: Callable[..., list[Tensor]]) -> None:
    """Have graphs made in C++ call `function`, which autograd sees through, where the gradients get a graph.

    The first one stays: see above.
    """
    kept = vars(torch.ops.batchnorm)
    if cpu.AUTOGRAD and "train_gradients_definition" not in kept:
        library = torch.library.Library("batchnorm", "FRAGMENT")
        library.define(torch.library.infer_schema(function, op_name="train_gradients", mutates_args=()))
        library.impl("train_gradients", function, "CompositeImplicitAutograd")
        kept["train_gradients_definition"] = library


def unless_repeated(count: Tensor, running_mean: Tensor) -> Tensor:
    """The count of what a graph is to commit to running_mean; 0 where a backward pass repeats the graph's pass.

    Whether it does has to be asked when the graph runs, so an operator asks.
    """
    counted: Tensor = torch.ops.batchnorm.unless_repeated.default(count, running_mean)
    return counted


DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)
# A device with kernels of its own is one entry.
BACKENDS: tuple[Backend, ...] = ()
if cpu.AVAILABLE:
    _train = tuple(map(_operator, ("train", "train_domains"))) if cpu.AUTOGRAD else ()
    BACKENDS += (
        Backend(
            lambda: f"native ({cpu.level()})",
            ("cpu",),
            DTYPES,
            cpu.ACTIVATIONS,
            _operator,
            lambda name: compiled.operation(name, _operator),
            *_train,
        ),
    )
if triton.AVAILABLE:  # ROCm's devices are called "cuda", too
    BACKENDS += (Backend(lambda: "triton", ("cuda",), triton.DTYPES, triton.ACTIVATIONS, _operator),)


@dataclass(frozen=True)
class _Choice:
    """One implementation as it is called now, and as a graph that is traced calls it."""

    eager: Operations
    traced: Operations


# For transforms of torch.func, and for tensors that only torch can compute with.
DIFFERENTIABLE = Operations(lambda name: getattr(reference, name), differentiable=True)
# Torch's own operators: for graphs that others read. There are no gradients among them.
ATEN = Operations(lambda name: getattr(aten, name, None), differentiable=True)
_REFERENCE = _Choice(
    Operations(slices.operation, eager=True),
    # Plain torch, which Inductor fuses.
    Operations(lambda name: getattr(reference, name)),
)
# Torch's own operators again, for devices without kernels of ours.
_FALLBACK = _Choice(*[Operations(fallback.operation, differentiable=True)] * 2)
# Where the reference is better than torch's layers, and no slower than it has to be.
_WITHOUT_FALLBACK = ("cpu",)
# Where the kernels take samples of several domains.
_WITH_DOMAINS = ("cpu",)
_TABLE: dict[tuple[str, torch.dtype, str | None], _Choice] = {}
for _backend in BACKENDS:
    _native = Operations(_backend.find, eager=True, train=_backend.train, train_domains=_backend.train_domains)
    _choice = _Choice(_native, Operations(_backend.in_graphs or _backend.find))
    for _device in _backend.devices:
        for _dtype in _backend.dtypes:
            _TABLE |= {(_device, _dtype, activation): _choice for activation in _backend.activations}


def _is_distributed(x: Tensor) -> bool:
    """Whether it is a `DTensor`. The import takes a second, and where nobody else has done it there are none."""
    module = sys.modules.get("torch.distributed.tensor")
    return module is not None and isinstance(x, module.DTensor)


def read_by_others() -> bool:
    """Whether a graph is recorded that is read where this package is not."""
    return is_exported() or (not torch.compiler.is_dynamo_compiling() and is_traced())


def select(
    x: Tensor, mask: Tensor | None = None, activation: str | None = None, *, domains: bool = False
) -> Operations:
    """The implementation for a call: the only place that decides.

    Under transforms of torch.func, and for a `DTensor`, of which processes have parts and with which torch's own
    operators compute as with the whole, it is `DIFFERENTIABLE`; in graphs that are exported or traced it is `ATEN`. A
    device, dtype or activation without kernels of ours goes to torch's batch norm, on the CPU to the reference. An
    empty input, more than 16 dimensions, and a mask go to the reference, too, the mask for which there are kernels only
    with a value for every value of x. So do samples of several domains, but for the CPU's kernels; in graphs that are
    exported they are plain torch.
    """
    if in_functorch() or (type(x) is not Tensor and _is_distributed(x)):
        return DIFFERENTIABLE
    device = x.device.type
    choice = _TABLE.get((device, x.dtype, activation))
    if domains:
        if read_by_others():
            return DIFFERENTIABLE
        choice = _REFERENCE if device not in _WITH_DOMAINS else choice or _REFERENCE
    if choice is None:
        choice = _FALLBACK if mask is None and device not in _WITHOUT_FALLBACK else _REFERENCE
    rank = x.dim()
    if x.numel() == 0 or rank > _MAX_RANK or (mask is not None and mask.dim() == rank):
        choice = _REFERENCE
    if torch.compiler.is_dynamo_compiling():
        return ATEN if is_exported() else choice.traced
    return ATEN if is_exported() or is_traced() else choice.eager


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
        if triton.UNAVAILABLE_REASON and (torch.version.cuda or torch.version.hip):
            lines.append(f"No kernels for GPUs: {triton.UNAVAILABLE_REASON}.")
        return "\n".join(lines)


def kernels() -> KernelTable:
    """Which implementation serves which device and dtype.

    "native (LEVEL)" is the C++ extension with the instruction set that it uses; "triton" are the kernels in Triton,
    for CUDA and ROCm; "reference" is plain torch: the same results, slower; "torch" are torch's own operators, at their
    speed and with their precision, and the reference where these cannot do what is asked: masks, and statistics that
    processes share.
    """
    chosen = {(device, dtype) for device, dtype, _ in _TABLE}
    rows = [
        Kernel(device, str(dtype).removeprefix("torch."), _name(device, dtype) if (device, dtype) in chosen else other)
        for device, other in (("cpu", "reference"), ("cuda", "torch"))
        for dtype in DTYPES
    ]
    return KernelTable([*rows, Kernel("others", "all", "torch")])


def _name(device: str, dtype: torch.dtype) -> str:
    return next(b.name() for b in BACKENDS if device in b.devices and dtype in b.dtypes)
