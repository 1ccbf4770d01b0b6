"""A layer's state as other people's tools see it: torch's tensors and no others, wherever they come from."""

from __future__ import annotations

import copy
import gc
import subprocess
import sys
from typing import Any

import pytest
import torch
from torch import Tensor, fx, nn
from torch.func import functional_call
from torch.optim.swa_utils import AveragedModel, update_bn

import batchnorm as bn
from batchnorm.errors import DTypeError, OptionError, ShapeError, TransformError
from support.comparison import close

KINDS = [bn.BatchNorm2d, lambda n: bn.convert(nn.BatchNorm2d(n))]


def batches(count: int = 3) -> list[Tensor]:
    torch.manual_seed(0)
    return [torch.randn(6, 4, 3, 2) * (i + 1) + i for i in range(count)]


def step_alike(ours: nn.Module, torchs: nn.Module, xs: list[Tensor]) -> None:
    for x in xs:
        close(ours(x).detach(), torchs(x).detach())
    for (name, actual), expected in zip(ours.state_dict().items(), torchs.state_dict().values(), strict=True):
        close(actual, expected, name=name)


@pytest.mark.parametrize("make", KINDS)
def test_its_tensors_are_torchs(make: Any) -> None:
    layer, torchs = make(4), nn.BatchNorm2d(4)
    layer(batches()[0])
    for kind in ("named_buffers", "named_parameters"):
        assert [name for name, _ in getattr(layer, kind)()] == [name for name, _ in getattr(torchs, kind)()]
    for actual, expected in zip(layer.buffers(), torchs.buffers(), strict=True):
        assert actual.shape == expected.shape
    y = functional_call(layer, torchs.state_dict(), (batches()[1],), strict=True)
    close(y.detach(), torchs(batches()[1]).detach())


@pytest.mark.parametrize("make", KINDS)
@pytest.mark.parametrize("parts", ["all", "parameters", "buffers"])
def test_a_layer_made_on_meta_is_filled_by_assignment(make: Any, parts: str) -> None:
    source = nn.BatchNorm2d(4)
    source(batches()[0])
    with torch.device("meta"):
        layer = nn.Sequential(make(4))
    state = nn.Sequential(source).state_dict()
    if parts != "all":  # the others are made by hand, as loaders do
        kept = dict(nn.Module.named_parameters(nn.Sequential(source))).keys()
        for name, tensor in list(state.items()):
            if (name in kept) is (parts == "buffers"):
                layer[0].register_parameter(name[2:], nn.Parameter(tensor.clone())) if name in kept else setattr(
                    layer[0], name[2:], tensor.clone()
                )
                del state[name]
    layer.load_state_dict(state, assign=True, strict=False)
    step_alike(layer, nn.Sequential(copy.deepcopy(source)), batches())
    assert layer[0].num_batches_skipped.tolist() == [0] * 4
    moved = copy.deepcopy(layer).to("cpu")
    assert all(torch.equal(a, b) for a, b in zip(moved.state_dict().values(), layer.state_dict().values(), strict=True))


def test_what_is_still_on_meta_is_named() -> None:
    for name in ("weight", "bias", "running_mean", "running_var", "num_batches_tracked"):
        layer = bn.BatchNorm2d(4)
        tensor = getattr(layer, name).to("meta")
        setattr(layer, name, nn.Parameter(tensor) if isinstance(getattr(layer, name), nn.Parameter) else tensor)
        before = {key: value.clone() for key, value in layer.state_dict().items() if not value.is_meta}
        with pytest.raises(OptionError, match=rf"BatchNorm2d\(4\): got {name} on device meta"):
            layer(batches()[0])
        assert all(torch.equal(value, layer.state_dict()[key]) for key, value in before.items())


def test_pruned_channels() -> None:
    layer, torchs = bn.BatchNorm2d(4), nn.BatchNorm2d(4)
    step_alike(layer, torchs, batches())
    for one in (layer, torchs):
        one.num_features = 3
        for name in ("weight", "bias"):
            setattr(one, name, nn.Parameter(getattr(one, name)[:3].detach().clone()))
        for name in ("running_mean", "running_var"):
            setattr(one, name, getattr(one, name)[:3].clone())
    step_alike(layer, torchs, [x[:, :3] for x in batches()])
    assert layer.num_batches_skipped.shape == (3,)


def test_averages_of_models_made_before_convert() -> None:
    def train(converted: bool) -> AveragedModel:
        torch.manual_seed(0)
        net = nn.Sequential(nn.Conv2d(4, 4, 1), nn.BatchNorm2d(4))
        averaged = AveragedModel(net, use_buffers=True)
        if converted:
            bn.convert(net)
        for x in batches():
            net(x)
            averaged.update_parameters(net)
        update_bn(batches(), averaged)
        return averaged

    for actual, expected in zip(train(True).state_dict().values(), train(False).state_dict().values(), strict=True):
        close(actual, expected)


@pytest.mark.parametrize("momentum", [0.1, None])
@pytest.mark.parametrize("counter", [torch.tensor(2.5), torch.tensor(3, dtype=torch.int32), torch.tensor([4])], ids=str)
def test_counters_of_other_dtypes_count(momentum: float | None, counter: Tensor) -> None:
    layer, torchs = bn.BatchNorm2d(4, momentum=momentum), nn.BatchNorm2d(4, momentum=momentum)
    for one in (layer, torchs):
        one.num_batches_tracked = counter.clone()
    step_alike(layer, torchs, batches())
    with bn.deferred(layer):
        layer(batches()[0])
    assert layer.num_batches_tracked == counter + 4


@pytest.mark.parametrize(
    ("name", "wrong", "error"),
    [
        ("running_var", torch.ones(3), ShapeError),
        ("running_mean", torch.ones(4, 1), ShapeError),
        ("running_mean", torch.ones(4, dtype=torch.int64), DTypeError),
        ("num_batches_tracked", torch.tensor(1j), DTypeError),
        ("num_batches_tracked", torch.tensor([1, 2]), ShapeError),
        ("running_var", torch.ones(4).bfloat16(), DTypeError),
    ],
)
@pytest.mark.parametrize("options", [{}, {"virtual_batch_size": 2}, {"momentum": None}], ids=str)
def test_what_cannot_be_committed_is_refused_before_anything_moves(
    name: str, wrong: Tensor, error: type[Exception], options: dict[str, Any]
) -> None:
    layer = bn.BatchNorm2d(4, **options)
    layer._buffers[name] = wrong
    before = copy.deepcopy(layer.state_dict())
    with pytest.raises(
        error, match=rf"BatchNorm2d\(4\): got .*{'statistics' if wrong.dtype == torch.bfloat16 else name}"
    ):
        layer(batches()[0])
    assert all(torch.equal(value, before[key]) for key, value in layer.state_dict().items())


def test_statistics_that_are_parameters() -> None:
    layer = bn.BatchNorm2d(4).eval()
    layer.running_mean = nn.Parameter(torch.randn(4))
    x = batches()[0]
    layer(x).sum().backward()
    close(layer.running_mean.grad, torch.full((4,), -36.0) / (1 + 1e-5) ** 0.5)
    with pytest.raises(OptionError, match="requires_grad"):
        layer.train()(x)
    layer.running_mean.requires_grad_(False)
    layer(x)
    close(layer.running_var, 0.9 + 0.1 * x.var((0, 2, 3)))


class Block(nn.Module):
    def __init__(self, norm: nn.Module) -> None:
        super().__init__()
        self.conv, self.norm = nn.Conv2d(4, 4, 1), norm

    def forward(self, x: Tensor) -> Tensor:
        return self.norm(self.conv(x)) + x


@pytest.mark.parametrize("training", [True, False])
def test_layers_are_leaves_to_fx(training: bool) -> None:
    model = nn.Sequential(Block(bn.BatchNorm2d(4, activation="relu")), bn.convert(nn.BatchNorm2d(4))).train(training)
    traced = fx.symbolic_trace(model)
    assert [str(n.target) for n in traced.graph.nodes if n.op == "call_module"] == ["0.conv", "0.norm", "1"]
    copied = copy.deepcopy(model)
    step_alike(traced, copied, batches())

    class Masked(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.norm = bn.BatchNorm2d(4)

        def forward(self, x: Tensor, mask: Tensor) -> Tensor:
            return self.norm(x, residual=x, mask=mask)

    masked = Masked().train(training)
    arguments = batches()[0], torch.tensor([True, False] * 3)
    close(fx.symbolic_trace(copy.deepcopy(masked))(*arguments).detach(), masked(*arguments).detach())


@pytest.mark.parametrize("activation", [None, "relu", "silu"])
@pytest.mark.parametrize("training", [True, False])
def test_exported_graphs_need_nothing_of_ours(activation: str | None, training: bool) -> None:
    model = Block(bn.BatchNorm2d(4, activation=activation)).train(training)
    program = torch.export.export(model, (batches()[0],))
    for graph in (program, program.run_decompositions()):
        assert "batchnorm." not in str([node.target for node in graph.graph.nodes])
    reference = copy.deepcopy(model)
    step_alike(program.module(), reference, batches())


@pytest.mark.parametrize("options", [{"virtual_batch_size": 2}, {"renorm": bn.Renorm()}], ids=str)
def test_what_torchs_operator_cannot_say_is_not_exported_in_training(options: dict[str, Any]) -> None:
    layer = bn.BatchNorm2d(4, **options)
    with pytest.raises(TransformError, match="Export in inference"):
        torch.export.export(layer, (batches()[0],))
    program = torch.export.export(layer.eval(), (batches()[0],))
    close(program.module()(batches()[1]), layer(batches()[1]))


@pytest.mark.filterwarnings("ignore::torch.jit.TracerWarning")  # the package's filter is not pytest's
def test_traced_layers() -> None:
    model = Block(bn.BatchNorm2d(4, activation="silu")).eval()
    xs = batches()
    model.norm.running_mean.normal_()
    with pytest.warns((DeprecationWarning, FutureWarning), match="jit"):  # the latter from torch 2.14 on
        traced = torch.jit.trace(model, xs[0])
    for x in (*xs, xs[0][:2]):
        close(traced(x).detach(), model(x).detach())


AGAIN = """
import sys, torch, gc
import batchnorm
x = torch.randn(6, 4)
expected = torch.nn.BatchNorm1d(4)(x)
for _ in range(2):
    for name in [name for name in sys.modules if name.split(".")[0] == "batchnorm"]:
        del sys.modules[name]
    gc.collect()
    import batchnorm
    layer = batchnorm.BatchNorm1d(4)
    torch.testing.assert_close(layer(x), expected)
assert layer.num_batches_tracked == 1
"""


def test_the_package_can_be_imported_again() -> None:
    run = subprocess.run([sys.executable, "-c", AGAIN], capture_output=True, text=True, timeout=300, check=False)
    assert run.returncode == 0, run.stderr


def test_a_copy_made_while_something_is_traced_leaves_no_counter_behind() -> None:
    from torch._subclasses import FakeTensorMode

    layer = bn.BatchNorm2d(4)
    with FakeTensorMode(allow_non_fake_inputs=True):
        functional_call(
            layer, {name: torch.empty_like(t) for name, t in layer.state_dict().items()}, (torch.ones(3, 4, 2, 2),)
        )
    gc.collect()
    step_alike(layer, nn.BatchNorm2d(4), batches())
    assert type(layer.num_batches_skipped) is Tensor
