"""Two libraries' layers under the same names, for checks that run on both: torch.nn's and ours.

Where torch has no such thing, its kit does the nearest that its users do.
"""

from __future__ import annotations

import importlib
import textwrap
import warnings
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils.fusion import fuse_conv_bn_eval, fuse_linear_bn_eval
from torch.optim.swa_utils import update_bn

import batchnorm as bn
from batchnorm.surgery.interop import from_convention
from support import oracle, tolerances

RIGHT = tolerances.AGAINST_TORCH[torch.float32][1]  # over 1 + |value|: a trap is a wrong value, not a rounding


@dataclass(frozen=True)
class Kit:
    """A library's layers.

    Attributes:
        name: what its users call it.
        BatchNorm1d: its layer for (N, C) and (N, C, L).
        BatchNorm2d: its layer for (N, C, H, W).
        batch_norm: its functional form.
        features_last: from C to a layer that (N, L, C) is given to.
        masked: (layer, x, mask) to the layer's output where only the mask's positions are to count.
        accumulate: (layer, micro-batches): forward passes that stand for one batch.
        freeze: a layer that is to stand still from now on.
        convert: a model's torch.nn layers become others.
        fold: (model in inference, example input) to a model with batch norm folded into linear layers.
        recompute: (model, batches): running statistics from data.
        from_keras: a layer from Keras' values, by Keras' names.
    """

    name: str
    BatchNorm1d: Callable[..., Any]
    BatchNorm2d: Callable[..., Any]
    batch_norm: Callable[..., Tensor]
    features_last: Callable[[int], nn.Module]
    masked: Callable[[nn.Module, Tensor, Tensor], Tensor]
    accumulate: Callable[[nn.Module, Iterable[Tensor]], None]
    freeze: Callable[[nn.Module], object]
    convert: Callable[[nn.Module], nn.Module]
    fold: Callable[[nn.Module, Tensor], nn.Module]
    recompute: Callable[[nn.Module, Iterable[Tensor]], object]
    from_keras: Callable[[dict[str, Any]], nn.Module]


def _zeros_for_padding(layer: nn.Module, x: Tensor, mask: Tensor) -> Tensor:
    padded: Tensor = layer(x.masked_fill(~mask.unsqueeze(1), 0))
    return padded


def _one_after_another(layer: nn.Module, micro_batches: Iterable[Tensor]) -> None:
    for x in micro_batches:
        layer(x)


def _deferred(layer: nn.Module, micro_batches: Iterable[Tensor]) -> None:
    with bn.deferred(layer):
        _one_after_another(layer, micro_batches)


def _torchs_fold(model: nn.Module, _: Tensor) -> nn.Module:
    """Pairs by the functions for pairs, networks by the one for networks."""
    if not isinstance(model, nn.Sequential):
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", DeprecationWarning)  # what it imports uses what torch deprecates
            return importlib.import_module("torch.fx.experimental.optimization").fuse(model)
    layer, norm = model
    if isinstance(layer, nn.Linear):
        return fuse_linear_bn_eval(layer, norm)
    return fuse_conv_bn_eval(layer, norm, transpose=isinstance(layer, nn.ConvTranspose2d))


def _names_alike(values: dict[str, Any]) -> nn.Module:
    """momentum as momentum, a running variance as a running variance."""
    layer = nn.BatchNorm1d(len(values["moving_mean"]), eps=values["epsilon"], momentum=values["momentum"])
    state = {"weight": "gamma", "bias": "beta", "running_mean": "moving_mean", "running_var": "moving_variance"}
    layer.load_state_dict({ours: values[name] for ours, name in state.items()}, strict=False)
    return layer


TORCH = Kit(
    "torch.nn",
    nn.BatchNorm1d,
    nn.BatchNorm2d,
    F.batch_norm,
    features_last=nn.BatchNorm1d,
    masked=_zeros_for_padding,
    accumulate=_one_after_another,
    freeze=lambda layer: layer.eval().requires_grad_(False),
    convert=nn.SyncBatchNorm.convert_sync_batchnorm,
    fold=_torchs_fold,
    recompute=lambda model, batches: update_bn(batches, model),
    from_keras=_names_alike,
)
OURS = Kit(
    "batchnorm",
    bn.BatchNorm1d,
    bn.BatchNorm2d,
    bn.functional.batch_norm,
    features_last=lambda c: bn.BatchNorm1d(c, channel_dim=-1),
    masked=lambda layer, x, mask: layer(x, mask=mask),
    accumulate=_deferred,
    freeze=bn.freeze,
    convert=bn.convert,
    fold=bn.fold,
    recompute=bn.recalibrate,
    from_keras=lambda values: from_convention("keras", values),
)


def expect(right: bool, observed: str) -> str:
    """What was observed; as an AssertionError where it is not right."""
    if not right:
        raise AssertionError(observed)
    return observed


@contextmanager
def springing() -> Iterator[None]:
    """An error of torch's inside is what was observed, and it is not right."""
    try:
        yield
    except (RuntimeError, ValueError) as error:
        raise AssertionError(
            f"{type(error).__name__}: {textwrap.shorten(str(error), 80, placeholder=' ...')}"
        ) from error


def show(values: Tensor | float) -> str:
    """A few numbers, short."""
    if isinstance(values, Tensor) and values.dim():
        return "[" + ", ".join(show(v) for v in values) + "]"
    return f"{float(values):.3g}"


def draw(*shape: int, seed: int = 0) -> Tensor:
    """Values of order 1 with means of order 1."""
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)) * 1.5 + 1


def after(momentum: float, *batches: Tensor) -> tuple[Tensor, Tensor]:
    """Running statistics that began at 0 and 1, after some batches (N, C, *S), by the oracle."""
    c = batches[0].shape[1]
    running = np.zeros(c), np.ones(c)
    for x in batches:
        running = oracle.commit(running, *oracle.moments(x.double().numpy()), momentum)
    mean, var = (torch.from_numpy(v) for v in running)
    return mean, var


def apart(actual: Tensor, expected: Tensor) -> float:
    """The largest difference over 1 + |expected|; infinite where one is not finite."""
    difference = (actual.detach().double() - expected.detach().double()).abs() / (1 + expected.detach().abs().double())
    return float(difference.nan_to_num(nan=float("inf")).max()) if difference.numel() else 0.0


def training_error(kit: Kit, x: Tensor, dy: Tensor, parameters: torch.dtype = torch.float32) -> tuple[Tensor, float]:
    """One training pass and its backward pass through the functional form, beside the oracle.

    Returns:
        The output, and the largest difference of it, the gradients and the running statistics, as `apart`; gradients of
        weight and bias over the root of the number of values that they add up.
    """
    c = x.shape[1]
    leaves = [
        x.detach().requires_grad_(),
        torch.linspace(0.5, 1.5, c).to(parameters).requires_grad_(),
        torch.linspace(-1, 1, c).to(parameters).requires_grad_(),
    ]
    running = torch.zeros(c, dtype=parameters), torch.ones(c, dtype=parameters)
    y = kit.batch_norm(leaves[0], *running, leaves[1], leaves[2], True)
    dx, dweight, dbias = torch.autograd.grad(y, leaves, dy)
    arrays = [leaf.detach().double().numpy() for leaf in leaves]
    n, mean, m2 = oracle.moments(arrays[0])
    expected_y, *_ = oracle.forward(*arrays)
    expected_dx, _, expected_dweight, expected_dbias = oracle.backward(
        dy.double().numpy(), arrays[0], mean, m2 / n, *arrays[1:]
    )
    pairs = [
        (y, expected_y),
        (dx, expected_dx),
        (dweight.double() / n**0.5, expected_dweight / n**0.5),
        (dbias.double() / n**0.5, expected_dbias / n**0.5),
        *zip(running, oracle.commit((np.zeros(c), np.ones(c)), n, mean, m2, 0.1), strict=True),
    ]
    return y.detach(), max(apart(actual, torch.from_numpy(expected)) for actual, expected in pairs)
