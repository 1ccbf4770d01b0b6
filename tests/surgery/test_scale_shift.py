"""A batch-norm layer as a scale and a shift."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn

import batchnorm as bn
from batchnorm.surgery import scale_shift
from support import oracle, tolerances
from support.comparison import close
from support.networks import draw, used
from support.torch_options import BIAS_FALSE

SHAPES: list[tuple[Any, tuple[int, ...], dict[str, Any]]] = [
    (nn.BatchNorm1d, (6, 4), {}),
    (nn.BatchNorm1d, (6, 4, 5), {"affine": False}),
    (nn.BatchNorm2d, (6, 4, 5, 3), {"eps": 1e-2}),
    *((nn.BatchNorm3d, (6, 4, 2, 3, 2), options) for options in BIAS_FALSE),
    (nn.SyncBatchNorm, (6, 4, 5, 3), {}),
    (bn.BatchNorm2d, (6, 4, 5, 3), {"activation": "silu"}),
    (bn.BatchNorm1d, (6, 5, 4), {"channel_dim": -1}),
    (bn.BatchNorm, (4, 5), {"channel_dim": 0}),
    (bn.BatchNorm, (6, 2, 4, 5), {"channel_dim": 2, "activation": "relu"}),
]


class Mine(nn.BatchNorm2d):
    """May do anything."""


class Ours(bn.BatchNorm2d):
    def forward(self, input: Any, **_: Any) -> Any:
        return input


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize(("cls", "shape", "options"), SHAPES, ids=str)
def test_it_computes_what_the_oracle_says(
    cls: Any, shape: tuple[int, ...], options: dict[str, Any], dtype: torch.dtype
) -> None:
    layer, x = used(cls(4, **options)).to(dtype), draw(*shape, dtype=dtype)
    assert scale_shift.why_not(layer) is None
    stand_in = scale_shift.standing_in(layer)
    mean, var = (t.double().numpy() for t in (layer.running_mean, layer.running_var))
    weight = np.ones(4) if layer.weight is None else layer.weight.detach().double().numpy()
    bias = np.zeros(4) if layer.bias is None else layer.bias.detach().double().numpy()
    axis = options.get("channel_dim", 1)
    z = oracle.preactivation(x.double().numpy(), mean, var, weight, bias, None, vars(layer)["eps"], axis)
    expected = torch.from_numpy(oracle.activate(z, options.get("activation")))
    y = stand_in(x)
    assert (y.dtype, y.shape) == (dtype, x.shape)
    assert not stand_in.training
    relative, absolute = tolerances.AGAINST_TORCH[dtype]
    torch.testing.assert_close(y.double(), expected, rtol=relative, atol=absolute)


def test_residual_activation_and_mask() -> None:
    layer, x, r = used(bn.BatchNorm2d(4, activation="relu")), draw(2, 4, 3, 3), draw(2, 4, 3, 3).flip(0)
    layer.double()
    y = scale_shift.standing_in(layer)(x, residual=r, mask=torch.ones(2, dtype=torch.bool))
    relative, absolute = tolerances.AGAINST_TORCH[torch.float64]
    torch.testing.assert_close(y, layer(x, residual=r), rtol=relative, atol=absolute)
    torch.testing.assert_close(scale_shift.ScaleShift(None, None, activation=nn.ReLU())(x, residual=r), F.relu(x + r))


@pytest.mark.filterwarnings("ignore:.torch.jit:DeprecationWarning")
def test_it_can_be_scripted() -> None:
    x = draw(6, 4, 5, 3)
    whole = scale_shift.standing_in(used(bn.BatchNorm2d(4, activation="silu")).double())
    for module in (whole, scale_shift.ScaleShift(None, None, activation=nn.ReLU())):
        scripted = torch.jit.script(module)
        for arguments in ({}, {"residual": x.flip(0)}):
            close(scripted(x, **arguments), module(x, **arguments))
        with pytest.raises(torch.jit.Error, match="give the layer one before scripting"):
            scripted(x, activation="relu")


def test_the_state_is_the_scale_and_the_shift() -> None:
    layer = used(nn.BatchNorm2d(4))
    state = scale_shift.standing_in(layer).state_dict()
    scale, shift = scale_shift.affine(layer)
    assert list(state) == ["scale", "shift"]
    assert torch.equal(state["scale"], scale.float())
    assert torch.equal(state["shift"], shift.float())


def test_what_is_no_scale_and_shift() -> None:
    replaced = nn.BatchNorm2d(4)
    replaced.forward = torch.relu
    assert scale_shift.why_not(nn.BatchNorm2d(4, track_running_stats=False)) == (
        "it has no running statistics, so inference depends on the batch"
    )
    assert scale_shift.why_not(Mine(4)) == "Mine may do anything"
    assert scale_shift.why_not(Ours(4)) == "Ours may do anything"
    assert scale_shift.why_not(replaced) == "BatchNorm2d may do anything"
