"""Fused models after something of them changed, or while others look at them: they give what they did before."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import batchnorm as bn
from batchnorm.surgery.fuse import fuse
from support import tolerances
from support.comparison import close
from support.networks import Block, Calls, draw, used


class Flagged(nn.Module):
    """Branches by a flag, over a list of layers."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList([nn.Conv2d(3, 3, 1), nn.BatchNorm2d(3), nn.ReLU(inplace=True)])
        self.double = False

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            x = layer(x)
        return 2 * x if self.double else x


def small() -> nn.Sequential:
    return nn.Sequential(nn.Conv2d(3, 3, 1), nn.BatchNorm2d(3), nn.Identity(), nn.ReLU(), nn.Conv2d(3, 3, 1))


def set_at(path: str, value: object) -> Callable[[nn.Module], None]:
    parent, _, name = path.rpartition(".")
    return lambda model: setattr(model.get_submodule(parent), name, copy.deepcopy(value))


def remove(path: str) -> Callable[[nn.Module], None]:
    parent, _, name = path.rpartition(".")
    return lambda model: delattr(model.get_submodule(parent), name)


def slope(model: nn.Module) -> None:
    model[1].negative_slope = 0.5


CHANGES: dict[str, tuple[Callable[[], nn.Module], Callable[[Any], object]]] = {
    "another activation": (small, set_at("3", nn.GELU())),
    "another layer": (small, set_at("1", nn.GroupNorm(3, 3).double())),
    "torch's layer": (small, set_at("1", used(nn.BatchNorm2d(3)).double())),
    "something in between": (small, set_at("2", nn.Sigmoid())),
    "no activation": (small, remove("3")),
    "popped": (small, lambda model: model.pop(3)),
    "appended": (small, lambda model: model.append(nn.Sigmoid())),
    "inserted": (small, lambda model: model.insert(2, nn.Sigmoid())),
    "inplace": (small, set_at("3.inplace", value=True)),
    "a flag": (lambda: nn.Sequential(Flagged()), set_at("0.double", value=True)),
    "a list of layers": (lambda: nn.Sequential(Flagged()), lambda model: model[0].layers.append(nn.Sigmoid())),
    "the activation's parameter": (lambda: nn.Sequential(nn.BatchNorm2d(3), nn.LeakyReLU()), slope),
    "a forward of the activation": (small, lambda model: setattr(model[3], "forward", torch.sigmoid)),
    "a forward of the layer": (small, lambda model: setattr(model[1], "forward", torch.sigmoid)),
    "a part of an inner module": (
        lambda: nn.Sequential(
            Calls(lambda m, x: F.relu(m.inner(x) + x), inner=nn.Sequential(nn.Conv2d(3, 3, 1), nn.BatchNorm2d(3)))
        ),
        lambda model: model[0].inner.append(nn.Sigmoid()),
    ),
}


@pytest.mark.parametrize("name", CHANGES)
@pytest.mark.parametrize("copied", [False, True], ids=["itself", "a copy"])
def test_what_changes_counts(name: str, copied: bool) -> None:
    make, change = CHANGES[name]
    expected = used(make()).double()
    fused = fuse(copy.deepcopy(expected))
    assert len(fused.report.done) == 1
    if copied:
        fused = pickle.loads(pickle.dumps(fused)) if "Calls" not in str(fused) else copy.deepcopy(fused)
    for model in (expected, fused):
        change(model)
    x = draw(2, 3, 4, 4)
    for training in (True, False):
        close(fused.train(training)(x.clone()), expected.train(training)(x.clone()))
    for a, b in zip(fused.state_dict().values(), expected.state_dict().values(), strict=True):
        close(a, b)


Hooked = Callable[[nn.Module, Callable[..., None]], Any]
HOOKS: dict[str, Hooked] = {
    "forward": lambda module, hook: module.register_forward_hook(lambda m, a, y: hook(y)),
    "pre": lambda module, hook: module.register_forward_pre_hook(lambda m, a: hook(*a)),
    "backward": lambda module, hook: module.register_full_backward_hook(lambda m, i, o: hook(*o)),
    "backward pre": lambda module, hook: module.register_full_backward_pre_hook(lambda m, o: hook(*o)),
}


@pytest.mark.parametrize("where", [1, 2, 3])
@pytest.mark.parametrize("kind", HOOKS)
def test_hooks_added_later_see_what_they_saw(kind: str, where: int) -> None:
    model = used(small()).double()
    fused, seen = fuse(copy.deepcopy(model)), {}
    for one in (model, fused):
        handle = HOOKS[kind](one[where], lambda *t, one=one: seen.setdefault(one, []).append(t[0].detach()))
        y = one(draw(2, 3, 4, 4).requires_grad_())
        y.backward(torch.arange(y.numel(), dtype=y.dtype).view(y.shape))
        handle.remove()
        one(draw(2, 3, 4, 4))
    assert [len(values) for values in seen.values()] == [1, 1]
    close(seen[fused][0], seen[model][0])


def test_hooks_of_all_modules_see_what_they_saw() -> None:
    model = used(small()).double()
    fused, seen = fuse(copy.deepcopy(model)), []
    handle = nn.modules.module.register_module_forward_hook(lambda module, *_: seen.append(type(module).__name__))
    fused(draw(2, 3, 4, 4))
    handle.remove()
    assert seen == ["Conv2d", "BatchNorm2d", "Identity", "ReLU", "Conv2d", "FusedSequential"]


def test_parts_taken_out_compute_what_they_did() -> None:
    model = used(small()).double()
    fused, x = fuse(copy.deepcopy(model)), draw(2, 3, 4, 4)
    for end in range(1, 6):
        wanted = copy.deepcopy(model)[:end](x)
        close(copy.deepcopy(fused)[:end](x), wanted)
        close(nn.Sequential(*list(copy.deepcopy(fused).children())[:end])(x), wanted)
        y = x
        for child in list(copy.deepcopy(fused).children())[:end]:
            y = child(y)
        close(y, wanted)
    assert fused[1].activation is None


def test_it_is_fused_while_nothing_changed(monkeypatch: pytest.MonkeyPatch) -> None:
    """Activations are not called as modules, then."""
    fused = fuse(nn.Sequential(Block(3), small()))
    for model in (fused, copy.deepcopy(fused), pickle.loads(pickle.dumps(fused)), fuse(copy.deepcopy(fused))):
        with monkeypatch.context() as patch:
            patch.setattr(nn.ReLU, "forward", lambda *_: pytest.fail("called"))
            model(torch.randn(2, 3, 4, 4))
            torch.func.functional_call(model, dict(model.named_parameters()), torch.randn(2, 3, 4, 4))
            with pytest.raises(pytest.fail.Exception):
                bn.revert(model)(torch.randn(2, 3, 4, 4))


@pytest.mark.filterwarnings("ignore:.*torch.jit.*:DeprecationWarning")
def test_torchs_own_tools_on_a_fused_model() -> None:
    from torch.utils.mkldnn import to_mkldnn

    model, x = used(small()).eval(), draw(2, 3, 4, 4, dtype=torch.float32)
    fused, wanted = fuse(copy.deepcopy(model)), model(x)
    relative, absolute = tolerances.AGAINST_TORCH[torch.float32]
    close(to_mkldnn(copy.deepcopy(fused))(x.to_mkldnn()).to_dense(), wanted, relative=relative, absolute=absolute)
    converted = nn.SyncBatchNorm.convert_sync_batchnorm(copy.deepcopy(fused))
    assert type(converted[1]) is nn.SyncBatchNorm
    close(converted(x), wanted, relative=relative, absolute=absolute)
    fused[0], fused[1] = nn.utils.fuse_conv_bn_eval(fused[0], fused[1]), nn.Identity()
    close(fused(x), wanted, relative=relative, absolute=absolute)
