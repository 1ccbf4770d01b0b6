"""How exact the statistics and the output of a float32 batch are, far from zero: ours and torch's, as a Markdown table.

The measure is float64 NumPy on the same float32 values. Errors are the worst over channels (or values): of the mean in
standard deviations, of the variance relative, of the output over (1 + |output|).
"""

from __future__ import annotations

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

import batchnorm
from batchnorm.call import Call
from batchnorm.functional import normalize
from batchnorm.statistics import BatchStatistics

EPS = 1e-5
RATIOS = (0.0, 1.0, 1e1, 1e2, 1e3, 1e4)
# Many values a channel: where a sum kept in float32 loses what it adds.
LAYOUTS = {"(N, C, H, W)": (64, 3, 64, 64), "channels_last": (64, 3, 64, 64), "(N, C)": (262_144, 3)}


def ours(x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Output, mean and biased variance of our batch normalization."""
    y, moments = normalize(Call(x, eps=EPS), BatchStatistics())
    assert moments is not None
    return y, moments.mean, moments.var()


def torchs(x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """The same of torch's, whose saved statistics are the mean and 1 / sqrt(var + eps)."""
    y, mean, invstd = torch.native_batch_norm(x, None, None, None, None, True, 0.0, EPS)
    return y, mean, invstd.double().pow(-2) - EPS


def errors(result: tuple[Tensor, Tensor, Tensor], x: Tensor) -> tuple[float, float, float]:
    """The three worst errors of a result for `x`."""
    exact = x.double().numpy()
    dims = tuple(d for d in range(x.dim()) if d != 1)
    mean, var = exact.mean(dims, keepdims=True), exact.var(dims, keepdims=True)
    expected = (exact - mean) / np.sqrt(var + EPS)
    y, actual_mean, actual_var = (t.double().numpy() for t in result)
    mean_error = np.abs(actual_mean - mean.ravel()) / np.sqrt(var.ravel())
    var_error = np.abs(actual_var / var.ravel() - 1)
    return mean_error.max(), var_error.max(), (np.abs(y - expected) / (1 + np.abs(expected))).max()


def main() -> None:
    """Print the table."""
    print(f"torch {torch.__version__}, {batchnorm.kernels()[0].implementation}, float32, errors of ours / of torch\n")
    print("| layout | abs(mean) / std | mean, in std | variance, relative | output |")
    print("|---|---|---|---|---|")
    generator = torch.Generator().manual_seed(0)
    for name, shape in LAYOUTS.items():
        for ratio in RATIOS:
            x = (torch.randn(shape, generator=generator, dtype=torch.float64) + ratio).float()
            if name == "channels_last":
                x = x.contiguous(memory_format=torch.channels_last)
            reference = F.batch_norm(x, None, None, training=True, eps=EPS)
            assert torch.equal(reference, torchs(x)[0]), "torch.native_batch_norm is not what F.batch_norm uses"
            cells = [f"{a:.1e} / {b:.1e}" for a, b in zip(errors(ours(x), x), errors(torchs(x), x), strict=True)]
            print(f"| {name} | {ratio:g} | {' | '.join(cells)} |")


if __name__ == "__main__":
    main()
