"""The inputs that values, gradients, operator checks and threads are all tested on."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from batchnorm.activations import ACTIVATIONS


@dataclass(frozen=True)
class Layout:
    """A shape, the dimension of its channels, and how it lies in memory."""

    name: str
    shape: tuple[int, ...]
    channel_dim: int = 1
    memory: str = "contiguous"

    @property
    def channels(self) -> int:
        return self.shape[self.channel_dim]

    def arrange(self, x: Tensor) -> Tensor:
        """`x`'s values in this layout's memory order."""
        match self.memory:
            case "contiguous":
                return x.contiguous()
            case "channels_last":
                return x.contiguous(memory_format=torch.channels_last if x.dim() == 4 else torch.channels_last_3d)
            case "permuted":  # dense, channels neither first nor last in memory
                return x.permute(0, 2, 1, 3).contiguous().permute(0, 2, 1, 3)
            case "gaps":  # not dense: every second value of a wider tensor
                wide = torch.zeros(*x.shape[:-1], 2 * x.shape[-1], dtype=x.dtype)
                wide[..., ::2] = x
                return wide[..., ::2]
            case "expanded":  # one sample, repeated without memory of its own
                return x[:1].expand_as(x)
        raise AssertionError(self.memory)


LAYOUTS = [
    Layout("(N, C)", (33, 20)),
    Layout("(N, C) wide", (9, 131)),
    Layout("(N, C) one channel", (7, 1)),
    Layout("(N, C, L)", (4, 5, 67)),
    Layout("(N, C, L) short", (6, 19, 3)),
    Layout("(N, L, C)", (4, 13, 21), -1),
    Layout("(N, C, H, W)", (3, 20, 7, 9)),
    Layout("(N, C, H, W) channels_last", (3, 20, 7, 9), 1, "channels_last"),
    Layout("(N, C, H, W) permuted", (3, 5, 7, 9), 1, "permuted"),
    Layout("(N, C, H, W) with gaps", (3, 5, 7, 9), 1, "gaps"),
    Layout("(N, C, H, W) expanded", (3, 5, 7, 9), 1, "expanded"),
    Layout("(N, C, 1, 1)", (5, 33, 1, 1)),
    Layout("(1, C, H, W)", (1, 3, 31, 33)),
    Layout("(1, 1, H, W)", (1, 1, 300, 301)),
    Layout("(N, C, D, H, W)", (2, 3, 4, 5, 6)),
    Layout("(N, C, D, H, W) channels_last_3d", (2, 3, 4, 5, 6), 1, "channels_last"),
    Layout("(C, N)", (20, 33), 0),
    Layout("more rows than 65,535", (70_001, 3)),
]


@dataclass(frozen=True)
class Sample:
    """Everything that the operations take, drawn from a seed, and the same in float64 for the oracle."""

    layout: Layout
    activation: str | None
    with_residual: bool
    dtype: torch.dtype = torch.float32
    affine: bool = True

    @property
    def name(self) -> str:
        parts = [self.layout.name, self.activation or "identity", str(self.dtype).removeprefix("torch.")]
        return ", ".join(parts + ["residual"] * self.with_residual + ["plain"] * (not self.affine))

    def tensors(self, offset: float = 3.0) -> dict[str, Any]:
        generator = torch.Generator().manual_seed(hash(self.layout.shape) % 1000)

        def draw(*shape: int) -> Tensor:
            return torch.randn(*shape, generator=generator, dtype=torch.float64)

        shape, c = self.layout.shape, self.layout.channels
        x = self.layout.arrange((draw(*shape) * 2 + offset).to(self.dtype))
        dy = self.layout.arrange(draw(*shape).to(self.dtype))
        residual = self.layout.arrange(draw(*shape).to(self.dtype)) if self.with_residual else None
        weight = (draw(c).abs() + 0.5).to(torch.float32) if self.affine else None
        bias = draw(c).to(torch.float32) if self.affine else None
        return {"x": x, "dy": dy, "residual": residual, "weight": weight, "bias": bias}

    def oracle_inputs(self, tensors: dict[str, Any]) -> dict[str, Any]:
        """The same values in float64; a missing weight is 1, a missing bias 0."""
        arrays = {key: None if t is None else t.double().numpy() for key, t in tensors.items()}
        c = self.layout.channels
        arrays["weight"] = np.ones(c) if arrays["weight"] is None else arrays["weight"]
        arrays["bias"] = np.zeros(c) if arrays["bias"] is None else arrays["bias"]
        return arrays


KINKS = {name: row.kinks for name, row in ACTIVATIONS.items()}
DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)
# Whole vectors and tails of them, in each of the three orders that the kernels have loops for.
THREE = (LAYOUTS[1], LAYOUTS[6], LAYOUTS[7])


def every_activation() -> list[Sample]:
    """Every activation in every dtype, with a residual and without, and so that each is in all of the three layouts."""
    combinations = itertools.product((None, *ACTIVATIONS), DTYPES, (False, True))
    # An activation has 8 combinations, among which 3 layouts in turn are two or three times each.
    return [
        Sample(layout, activation, residual, dtype)
        for (activation, dtype, residual), layout in zip(combinations, itertools.cycle(THREE), strict=False)
    ]


# Every memory order in float32, then every activation, then samples without weight and bias.
NATIVE = [
    Sample(layout, activation, residual)
    for layout, activation, residual in itertools.product(LAYOUTS, (None, "relu"), (False, True))
]
NATIVE += [sample for sample in every_activation() if sample not in NATIVE]
NATIVE += [Sample(LAYOUTS[0], None, False, affine=False), Sample(LAYOUTS[7], "relu", True, affine=False)]


@dataclass(frozen=True)
class OperatorCase:
    """What the operators' schemas, fakes and derivatives are checked with."""

    sample: Sample
    mask: torch.dtype | None
    optional: bool  # whether counters, a momentum and means of gradients are given, or None

    @property
    def name(self) -> str:
        mask = "" if self.mask is None else f", {str(self.mask).removeprefix('torch.')} mask"
        return self.sample.name + mask + ", all given" * self.optional


def pairwise(*axes: Sequence[Any]) -> list[tuple[Any, ...]]:
    """Few combinations of values, one of each axis, in which any two values of two axes come together at least once."""
    open_pairs = {
        ((i, a), (j, b)): None
        for (i, axis), (j, other) in itertools.combinations(enumerate(axes), 2)
        for a, b in itertools.product(axis, other)
    }
    combinations = []
    while open_pairs:
        chosen = dict(next(iter(open_pairs)))  # by axis
        for i, axis in enumerate(axes):
            if i not in chosen:
                gains = [
                    sum(tuple(sorted([(i, value), pair], key=lambda p: p[0])) in open_pairs for pair in chosen.items())
                    for value in axis
                ]
                chosen[i] = axis[gains.index(max(gains))]
        combination = sorted(chosen.items())
        for pair in itertools.combinations(combination, 2):
            open_pairs.pop(pair, None)
        combinations.append(tuple(value for _, value in combination))
    return combinations


# One for every way in which strides come about.
OPERATOR_LAYOUTS = [
    layout
    for layout in LAYOUTS
    if layout.name
    in (
        "(N, C)",
        "(N, L, C)",
        "(C, N)",
        "(N, C, H, W)",
        "(N, C, H, W) channels_last",
        "(N, C, H, W) permuted",
        "(N, C, H, W) with gaps",
        "(N, C, H, W) expanded",
        "(N, C, D, H, W) channels_last_3d",
    )
]


def operator_cases() -> list[OperatorCase]:
    """Pairwise what decides which results an operator returns and of which dtypes; layouts in turn.

    An activation with a residual has one gradient more, the dtypes of weight and bias are those of their gradients,
    and a mask's dtype decides the count's: no operator looks at more than two of these at once.
    """
    choices = pairwise(
        DTYPES, (None, torch.bool, torch.float64), (None, "silu"), (False, True), (True, False), (False, True)
    )
    return [
        OperatorCase(Sample(layout, activation, residual, dtype, affine), mask, optional)
        for (dtype, mask, activation, residual, affine, optional), layout in zip(
            choices, itertools.cycle(OPERATOR_LAYOUTS), strict=False
        )
    ]
