"""The operations as torch operators: schemas, fakes, registration, and the choice of an implementation.

The schemas are defined here, so that they exist without the native extension too; `kernels.reference` is registered
as every device's implementation, and the extension, where it loads, replaces it on the CPU. This is the only file
that speaks to `torch.ops.batchnorm`.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from batchnorm import layout
from batchnorm.kernels import cpu, reference
from batchnorm.moments import statistics_dtype

_STATISTICS = "Tensor mean, Tensor var"
_RUNNING = (
    "Tensor(a!) running_mean, Tensor(b!) running_var, Tensor(c!)? num_batches_tracked, Tensor(d!)? num_batches_skipped"
)
_AFFINE = "Tensor? weight, Tensor? bias, Tensor? residual, float eps, int channel_dim, str? activation"
SCHEMAS = {
    "batch_moments": "(Tensor x, int channel_dim, Tensor? mask=None) -> (Tensor count, Tensor mean, Tensor m2)",
    "normalize": f"(Tensor x, {_STATISTICS}, {_AFFINE}) -> Tensor",
    "normalize_": f"(Tensor(a!) x, {_STATISTICS}, {_AFFINE}) -> ()",
    "forward": f"(Tensor x, {_AFFINE}, Tensor? mask=None) -> (Tensor y, Tensor count, Tensor mean, Tensor m2)",
    "backward_sums": f"(Tensor dy, Tensor x, {_STATISTICS}, {_AFFINE}, Tensor? mask=None)"
    " -> (Tensor sum_dz, Tensor sum_dz_xhat)",
    "backward_input": f"(Tensor dy, Tensor x, {_STATISTICS}, {_AFFINE}, Tensor? mean_dz, Tensor? mean_dz_xhat, "
    "Tensor? mask=None) -> (Tensor dx, Tensor dresidual)",
    "backward": f"(Tensor dy, Tensor x, Tensor count, Tensor mean, Tensor m2, {_AFFINE}, Tensor? mask=None)"
    " -> (Tensor dx, Tensor dweight, Tensor dbias, Tensor dresidual)",
    "commit": f"({_RUNNING}, Tensor count, Tensor mean, Tensor m2, float? momentum) -> ()",
    "forward_commit": f"(Tensor x, {_AFFINE}, Tensor? mask, {_RUNNING}, float? momentum)"
    " -> (Tensor y, Tensor count, Tensor mean, Tensor m2)",
}


def _statistic(x: Tensor, channel_dim: int) -> Tensor:
    return x.new_empty(x.shape[layout.channel_axis(x.dim(), channel_dim)], dtype=statistics_dtype(x.device))


def _fake_batch_moments(x: Tensor, channel_dim: int, mask: Tensor | None = None) -> tuple[Tensor, Tensor, Tensor]:
    count = torch.int64 if mask is None or mask.dtype == torch.bool else statistics_dtype(x.device)
    return x.new_empty((), dtype=count), _statistic(x, channel_dim), _statistic(x, channel_dim)


def _fake_normalize(x: Tensor, *_: Any) -> Tensor:  # noqa: ANN401 - the rest of the schema does not matter here
    return torch.empty_like(x)


def _fake_forward(
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    residual: Tensor | None,
    eps: float,
    channel_dim: int,
    activation: str | None,
    mask: Tensor | None = None,
    *_: Any,  # noqa: ANN401 - the running statistics of `forward_commit`
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    return torch.empty_like(x), *_fake_batch_moments(x, channel_dim, mask)


def _fake_backward_sums(
    dy: Tensor,
    x: Tensor,
    mean: Tensor,
    var: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    residual: Tensor | None,
    eps: float,
    channel_dim: int,
    activation: str | None,
    mask: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    return _statistic(x, channel_dim), _statistic(x, channel_dim)


def _fake_backward_input(
    dy: Tensor,
    x: Tensor,
    mean: Tensor,
    var: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    residual: Tensor | None,
    eps: float,
    channel_dim: int,
    activation: str | None,
    mean_dz: Tensor | None = None,
    mean_dz_xhat: Tensor | None = None,
    mask: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    dx = torch.empty_like(x)
    return dx, (dx.new_empty(0) if residual is None or activation is None else torch.empty_like(x))


def _fake_backward(
    dy: Tensor,
    x: Tensor,
    count: Tensor,
    mean: Tensor,
    m2: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    *rest: Any,  # noqa: ANN401 - handed on
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    dx, dresidual = _fake_backward_input(dy, x, mean, m2, weight, bias, *rest)
    dweight, dbias = (torch.empty_like(mean if t is None else t) for t in (weight, bias))
    return dx, dweight, dbias, dresidual


def _fake_nothing(*_: Any) -> None:  # noqa: ANN401 - what changes in place has its shape already
    return None


_FAKES: dict[str, Callable[..., Any]] = {
    "batch_moments": _fake_batch_moments,
    "normalize": _fake_normalize,
    "normalize_": _fake_nothing,
    "forward": _fake_forward,
    "backward_sums": _fake_backward_sums,
    "backward_input": _fake_backward_input,
    "backward": _fake_backward,
    "commit": _fake_nothing,
    "forward_commit": _fake_forward,
}

_library = torch.library.Library("batchnorm", "DEF")
for _name, _schema in SCHEMAS.items():
    _library.define(_name + _schema, tags=(torch.Tag.pt2_compliant_tag,))
    _library.impl(_name, getattr(reference, _name), "CompositeExplicitAutograd")
    # Gradients are `functional`'s concern; the dispatcher need not stop here to find that out.
    _library.impl(_name, torch.library.fallthrough_kernel, "Autograd")
    torch.library.register_fake(f"batchnorm::{_name}", _FAKES[_name], lib=_library)


_DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)
_NATIVE_DTYPES = frozenset(_DTYPES if cpu.AVAILABLE else ())


_operators = torch.ops.batchnorm


def implementation(x: Tensor) -> Any:  # noqa: ANN401 - a namespace of operators, or a module with the same names
    """Where the operations for `x` are: an object with a function for each name in `SCHEMAS`."""
    native = x.is_cpu and x.dtype in _NATIVE_DTYPES
    # A compiled graph holds operators: torch's compiler cannot look into what the reference does to get derivatives.
    return _operators if native or torch.compiler.is_compiling() else reference


cpu_levels = cpu.levels
use_cpu_level = cpu.use_level
resizable_outputs = cpu.resizable_outputs


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
    level = cpu.level()
    dtypes = (torch.float32, torch.float64, torch.bfloat16, torch.float16)
    rows = [
        Kernel(
            "cpu", str(dtype).removeprefix("torch."), f"native ({level})" if dtype in _NATIVE_DTYPES else "reference"
        )
        for dtype in dtypes
    ]
    return KernelTable([*rows, Kernel("others", "all", "reference")])
