"""Traps in changing a model: each check runs a kit's conversion or folding and says what was observed."""

from __future__ import annotations

import warnings

import torch
from torch import Tensor, nn

from support import tolerances
from support.networks import Calls, draw, used
from traps.kits import RIGHT, Kit, apart, expect, show, springing


class Doubled(nn.BatchNorm2d):
    """A user's layer, which does something else."""

    def forward(self, input: Tensor) -> Tensor:
        return 2 * super().forward(input)


def hooks(kit: Kit) -> str:
    model, calls = nn.Sequential(nn.BatchNorm2d(3)), []
    model[0].register_forward_hook(lambda *_: calls.append(1))
    kit.convert(model).eval()(draw(2, 3, 4, 4, dtype=torch.float32))
    return expect(len(calls) == 1, f"after converting, a hook is called {len(calls)} times in one pass")


def shared(kit: Kit) -> str:
    layer = nn.BatchNorm2d(3)
    model = kit.convert(nn.ModuleDict({"a": nn.Sequential(layer), "b": nn.Sequential(layer)}))
    still_one = model["a"][0] is model["b"][0]
    return expect(still_one, f"a layer in two places is {'one layer' if still_one else 'two layers'} after converting")


def subclass(kit: Kit) -> str:
    model, x = used(nn.Sequential(Doubled(3))), draw(2, 3, 4, 4, dtype=torch.float32)
    y = model(x)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # ours says that it leaves the layer
        converted = kit.convert(model).eval()
    return expect((error := apart(converted(x), y)) < RIGHT, f"the output is off by {show(error)} after converting")


def _folded(kit: Kit, model: nn.Module, x: Tensor, bound: float = RIGHT) -> str:
    used(model).to(x.dtype)
    y = model(x)
    with springing():
        error = apart(kit.fold(model, x)(x), y)
    return expect(error < bound, f"off by {show(error)}")


def features_last(kit: Kit) -> str:
    return _folded(kit, nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4)), draw(5, 4, 4, dtype=torch.float32))


def reused(kit: Kit) -> str:
    model = Calls(
        lambda m, x: m.b(m.conv(m.a(m.conv(x)))),
        conv=nn.Conv2d(3, 3, 3, padding=1),
        a=nn.BatchNorm2d(3),
        b=nn.BatchNorm2d(3),
    )
    return _folded(kit, model, draw(2, 3, 5, 5, dtype=torch.float32))


def two_readers(kit: Kit) -> str:
    model = Calls(
        lambda m, x: m.a(y := m.conv(x)) + m.b(y),
        conv=nn.Conv2d(3, 3, 3, padding=1),
        a=nn.BatchNorm2d(3),
        b=nn.BatchNorm2d(3),
    )
    return _folded(kit, model, draw(2, 3, 5, 5, dtype=torch.float32))


def grouped(kit: Kit) -> str:
    model = nn.Sequential(nn.ConvTranspose2d(4, 6, 3, groups=2), nn.BatchNorm2d(6))
    return _folded(kit, model, draw(2, 4, 5, 5, dtype=torch.float32))


def half_precision(kit: Kit) -> str:
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4))
    return _folded(
        kit, model, draw(2, 3, 5, 5, dtype=torch.bfloat16), bound=tolerances.SEVERAL_ROUNDINGS[torch.bfloat16]
    )


def large_scale(kit: Kit) -> str:
    model = used(nn.Sequential(nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4, eps=1e-12)))
    model[1].running_var[1] = 1e-10
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        kit.fold(model.double(), draw(2, 3, 4, 4))
    said = any("multiply a channel by more than" in str(warning.message) for warning in caught)
    return expect(said, "a warning names the layer" if said else "nothing is said")


def other_words(kit: Kit) -> str:
    """One training step of a layer whose values come from Keras."""
    ones = torch.ones(3)
    values = {"gamma": ones, "beta": 0 * ones, "moving_mean": 5 * ones, "moving_variance": ones}
    layer, x = kit.from_keras({**values, "momentum": 0.99, "epsilon": 1e-3}), draw(8, 3, dtype=torch.float32)
    layer(x)
    mean = layer.running_mean[0].item()
    right = abs(mean - (0.99 * 5 + 0.01 * x[:, 0].mean().item())) < RIGHT
    return expect(right, f"a running mean of 5 with Keras' momentum 0.99 is {show(mean)} after a batch around 0")
