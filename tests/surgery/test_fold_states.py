"""Models that `fold` gets in other states: compiled, with computed weights, with nothing to be verified on."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from datetime import timedelta
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.nn.utils import parametrizations, prune

import batchnorm as bn
from batchnorm.surgery.fold import fold
from support.networks import Calls, draw, used


@pytest.fixture
def one_process(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[DeviceMesh]:
    """A group of this process alone."""
    monkeypatch.setenv("GLOO_SOCKET_IFNAME", "lo")
    store = dist.FileStore(str(tmp_path / "store"), 1)
    dist.init_process_group("gloo", store=store, rank=0, world_size=1, timeout=timedelta(seconds=20))
    try:
        yield init_device_mesh("cpu", (1,))
    finally:
        dist.destroy_process_group()


@pytest.mark.parametrize("inner", [False, True], ids=["whole", "part"])
def test_a_compiled_model_folds(inner: bool) -> None:
    net = used(nn.Sequential(nn.Conv2d(3, 3, 1), nn.BatchNorm2d(3), nn.ReLU())).double().eval()
    x = draw(2, 3, 4, 4)
    compiled = torch.compile(copy.deepcopy(net), backend="eager")
    folded = fold(nn.Sequential(compiled) if inner else compiled, x)
    assert list(folded.report.done.values()) == [f"part of {'0.' if inner else ''}0"]
    torch.testing.assert_close(folded(x), net(x))


def test_inputs_that_verify_nothing_are_refused() -> None:
    net = used(nn.Sequential(nn.Conv2d(3, 3, 1), nn.BatchNorm2d(3))).eval()
    with pytest.raises(bn.BatchNormError, match="of which nothing comes out"):
        fold(net, torch.randn(0, 3, 4, 4))
    with pytest.raises(bn.BatchNormError, match="not finite"):
        fold(net, torch.full((2, 3, 4, 4), float("nan")))


def test_a_scale_and_shift_is_counted_apart() -> None:
    net = used(nn.Sequential(nn.BatchNorm2d(3), nn.ReLU(), nn.Conv2d(3, 3, 1), nn.BatchNorm2d(3)))
    head = str(fold(net, torch.randn(2, 3, 4, 4)).report).splitlines()[0]
    assert head.startswith("1 of 2 folded, 1 as a scale and shift, outputs differ by at most")


def test_the_activation_of_a_call_folds() -> None:
    net = Calls(lambda m, x: m.norm(m.conv(x), activation="silu"), conv=nn.Conv2d(3, 3, 1), norm=bn.BatchNorm2d(3))
    net, x = used(net).double().eval(), draw(2, 3, 4, 4)
    folded = fold(net, x)
    assert folded.report.done == {"norm": "part of conv"}
    torch.testing.assert_close(folded(x), net(x))


@pytest.mark.filterwarnings("ignore:.*weight_norm:FutureWarning")
@pytest.mark.parametrize("how", ["pruned", "normed"])
def test_weights_that_a_hook_computed_with_gradients(how: str) -> None:
    net, x = used(nn.Sequential(nn.Conv2d(3, 3, 1), nn.BatchNorm2d(3))).double(), draw(2, 3, 4, 4)
    if how == "pruned":
        prune.random_unstructured(net[0], "weight", 0.5)
    else:
        nn.utils.weight_norm(net[0])
    net(x).sum().backward()
    folded = fold(net, x)
    torch.testing.assert_close(folded(x), net.eval()(x))


def test_what_a_model_has_computed_with_gradients_and_kept() -> None:
    """As LeViT keeps its attention's biases: in a dict."""

    class Keeps(nn.Conv2d):
        def forward(self, x: Tensor) -> Tensor:
            self.kept = {"at": [2 * self.weight]}
            return super().forward(x)

    net, x = used(nn.Sequential(Keeps(3, 3, 1), nn.BatchNorm2d(3))).double(), draw(2, 3, 4, 4)
    net(x)
    folded = fold(net, x)
    assert folded.report.done == {"1": "part of 0"}
    torch.testing.assert_close(folded(x), net(x))


def test_parametrized_weights_after_a_gradient_pass() -> None:
    net = used(nn.Sequential(parametrizations.weight_norm(nn.Conv2d(3, 3, 1)), nn.BatchNorm2d(3))).double()
    x = draw(2, 3, 4, 4)
    net(x).sum().backward()
    folded = fold(net, x)
    assert "0 computes the weight or bias that it uses" in folded.report.done["1"]
    torch.testing.assert_close(folded(x), net(x))


@pytest.mark.parametrize("inner", [False, True], ids=["whole", "part"])
def test_a_sharded_model_is_refused(inner: bool, one_process: DeviceMesh) -> None:
    """FSDP2's cannot be copied, and no weight is whole."""
    net = nn.Sequential(nn.Sequential(nn.Conv2d(3, 3, 1), nn.BatchNorm2d(3)), nn.ReLU())
    fully_shard(net[0] if inner else net, mesh=one_process)
    x = torch.randn(2, 3, 4, 4)
    net(x).sum().backward()
    message = "cannot be copied: FSDP does not support deepcopy.* where parameters are sharded .*, fold the plain model"
    with pytest.raises(bn.BatchNormError, match=message):
        fold(net, x)
    assert net(x).shape == x.shape
