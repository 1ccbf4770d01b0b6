"""What is measured: shapes, layouts and dtypes, and the arrays of one case."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

SHAPES: dict[str, tuple[tuple[int, ...], ...]] = {
    "resnet": ((32, 64, 112, 112), (32, 256, 56, 56), (32, 512, 28, 28), (32, 1024, 14, 14), (32, 2048, 7, 7)),
    "small": ((128, 64, 32, 32), (8, 64, 32, 32), (32, 64), (4096, 256), (8192, 1024)),
    "odd": ((16, 256, 1000), (4, 32, 16, 64, 64), (2, 3, 720, 1280), (5, 17, 13, 11), (1, 1, 2000, 2000)),
}
# Where the channels are: the dimension, and next to each other in memory or not.
FIRST, LAST, AXIS = "channels first", "channels last", "(N, L, C)"
LAYOUTS = {2: (FIRST,), 3: (FIRST, AXIS), 4: (FIRST, LAST), 5: (FIRST, LAST)}
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
# What is measured on each device if nothing else is asked for.
USUAL = {"cpu": ("float32", "bfloat16"), "cuda": tuple(DTYPES)}


@dataclass(frozen=True)
class Case:
    """One thing to measure.

    Attributes:
        suite: a key of `SHAPES`.
        shape: (N, C, *S), channels second whatever the layout.
        layout: one of `LAYOUTS[rank]`.
        dtype: a key of `DTYPES`.
        residual: whether one is added before the ReLU.
    """

    suite: str
    shape: tuple[int, ...]
    layout: str
    dtype: str
    residual: bool = False

    @property
    def channels(self) -> int:
        """The number of channels."""
        return self.shape[1]

    @property
    def channel_dim(self) -> int:
        """Where the layer finds the channels."""
        return -1 if self.layout == AXIS else 1

    def arrange(self, x: Tensor) -> Tensor:
        """A (N, C, *S) tensor as this case has it."""
        if self.layout == AXIS:
            return x.movedim(1, -1).contiguous()
        if self.layout == LAST:
            return x.contiguous(memory_format=torch.channels_last if x.dim() == 4 else torch.channels_last_3d)
        return x.contiguous()

    def tensors(self) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """The input x, the gradient dy of the output, weight and bias."""
        generator = torch.Generator().manual_seed(0)
        x, dy = (self.arrange(torch.randn(self.shape, generator=generator).to(DTYPES[self.dtype])) for _ in range(2))
        weight, bias = (torch.rand(self.channels, generator=generator) + 0.5 for _ in range(2))
        return x, dy, weight, bias

    def added(self) -> Tensor | None:
        """The residual, if there is one."""
        if not self.residual:
            return None
        generator = torch.Generator().manual_seed(1)
        return self.arrange(torch.randn(self.shape, generator=generator).to(DTYPES[self.dtype]))


def cases(suite: str, dtypes: tuple[str, ...] = USUAL["cpu"], residuals: tuple[bool, ...] = (False,)) -> list[Case]:
    """Every case of a suite, or of all of them ("all")."""
    return [
        Case(name, shape, layout, dtype, residual)
        for name, shapes in SHAPES.items()
        if suite in (name, "all")
        for shape in shapes
        for layout in LAYOUTS[len(shape)]
        for dtype in dtypes
        for residual in residuals
    ]
