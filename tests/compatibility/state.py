"""Tools that keep, copy, replace or share a model's parameters and buffers."""

from __future__ import annotations

import copy
import io
import pickle
import tempfile
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import batchnorm as bn
from compatibility.rows import row
from compatibility.subjects import CHANNELS, OURS, batch, plain, same, step
from support import processes
from support.comparison import close


def alike(net: nn.Module, expected: nn.Module, call: Callable[[Tensor], Tensor] | None = None) -> None:
    """Assert that two networks take the same training step, and infer the same after it."""
    same(step(net, batch(), call), step(expected, batch()))
    close(net.eval()(batch()).detach(), expected.eval()(batch()).detach())


@row(
    "`AveragedModel`, `update_bn`",
    "torch",
    "made before or after `convert` and `fuse`, with `use_buffers` or not, as torch.nn's; `recalibrate` takes them too",
)
def averaged() -> None:
    from torch.optim.swa_utils import AveragedModel, update_bn

    def run(make: Callable[[], nn.Module], then: Callable[[nn.Module], object], use_buffers: bool) -> dict[str, Tensor]:
        net = make().train()
        average = AveragedModel(net, use_buffers=use_buffers)
        then(net)
        optimizer = torch.optim.SGD(net.parameters(), lr=0.01)
        for seed in range(3):
            net(batch(seed)).square().mean().backward()
            optimizer.step()
            optimizer.zero_grad()
            average.update_parameters(net)
        results = {f"averaged {name}": tensor.clone() for name, tensor in average.state_dict().items()}
        update_bn([batch(seed) for seed in range(3)], average)
        results |= {name: tensor.clone() for name, tensor in average.state_dict().items()}
        results["output"] = average.eval()(batch()).detach()
        bn.recalibrate(average, [batch(seed) for seed in range(3)])
        return results | {f"recalibrated {name}": tensor for name, tensor in average.named_buffers()}

    for use_buffers in (False, True):
        expected = run(plain, nn.Module.train, use_buffers)
        for make in OURS:
            same(run(make, nn.Module.train, use_buffers), expected)
        for then in (bn.convert, bn.fuse):
            same(run(plain, then, use_buffers), expected)


@row("`DataParallel`", "torch", "as torch.nn's: replicas share statistics with the model; without devices, the model")
def data_parallel() -> None:
    for make in OURS:
        net = nn.DataParallel(make())
        alike(net.module, plain(), net)
        net = make()
        alike(net, plain(), replicated(net))


def replicated(net: nn.Module) -> nn.Module:
    """What `torch.nn.parallel.replicate` makes for one device of several, where there are none."""
    net.train()
    copies = {module: module._replicate_for_data_parallel() for module in net.modules()}
    for module, replica in copies.items():
        for name, child in module._modules.items():
            setattr(replica, name, child if child is None else copies[child])
        for name, parameter in module._parameters.items():
            setattr(replica, name, parameter if parameter is None else parameter.clone())
        for name, buffer in module._buffers.items():
            setattr(replica, name, buffer)
    return copies[net]


@row(
    "torch.func, `functional_call`, also `strict=True`",
    "torch",
    "training moves the buffers that are given, and no others",
)
def functional() -> None:
    from torch.func import functional_call

    for make in OURS:
        net, expected = make().train(), plain().train()
        given = {name: tensor.clone() for name, tensor in net.state_dict().items()}
        y = functional_call(net, given, (batch(),), strict=True)
        close(y.detach(), expected(batch()).detach())
        for name, value in expected.state_dict().items():
            close(given[name], value, name=name)
        for name, value in plain().state_dict().items():
            assert torch.equal(net.state_dict()[name], value), name


@row(
    "torch.func, `stack_module_state` and `vmap`", "torch", "an ensemble trains at once, each member's statistics move"
)
def ensemble() -> None:
    from torch.func import functional_call, stack_module_state, vmap

    for make in OURS:
        members = [make().train() for _ in range(3)]
        for number, member in enumerate(members):
            member.get_parameter("norm.weight").data.mul_(number + 1)
        alone = copy.deepcopy(members)
        parameters, buffers = stack_module_state(members)
        base = members[0]
        x = torch.stack([batch(seed) for seed in range(3)])
        y = vmap(lambda p, b, v, base=base: functional_call(base, (p, b), (v,)))(parameters, buffers, x)
        for number, member in enumerate(alone):
            close(y[number].detach(), member(x[number]).detach())
            for name, value in member.named_buffers():
                close(buffers[name][number], value, name=name)


@row(
    "lazy modules, ours and `torch.nn.LazyBatchNorm2d`",
    "torch",
    "ours become ordinary layers at the first input, options and all; `convert` names torch.nn's that had none yet",
    "one input, then `convert`",
)
def lazy() -> None:
    x = torch.randn((4, 5, 6, 6), generator=torch.Generator().manual_seed(0))
    net = nn.Sequential(nn.LazyConv2d(5, 1), bn.LazyBatchNorm2d(activation="relu"), nn.LazyLinear(2))
    assert net(x).shape == (4, 5, 6, 2)
    assert repr(net[1]) == repr(bn.BatchNorm2d(5, activation="relu"))
    close(net[1](x).detach(), nn.BatchNorm2d(5)(x).relu().detach())
    theirs = nn.Sequential(nn.LazyBatchNorm2d())
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        bn.convert(theirs)
    assert any("LazyBatchNorm2d" in str(warning.message) for warning in said)
    assert type(theirs[0]) is nn.LazyBatchNorm2d
    theirs(x)
    assert type(bn.convert(theirs)[0]) is bn.BatchNorm2d
    alike_layer(theirs[0].train(), x)


def alike_layer(layer: nn.Module, x: Tensor) -> None:
    """A layer whose state is that after one batch takes another step as torch.nn's does."""
    expected = nn.BatchNorm2d(x.shape[1])
    expected(x)
    close(layer(x).detach(), expected(x).detach())
    for name, value in expected.state_dict().items():
        close(layer.state_dict()[name], value, name=name)


@row(
    "`DTensor`, `distribute_module`, `distribute_tensor`",
    "torch",
    "plain torch operations; statistics are those of the whole batch, also where each process has a part of it; "
    "`num_batches_skipped` does not count",
)
def distributed_tensors() -> None:
    with tempfile.TemporaryDirectory() as folder:
        found = processes.run(["step"], 2, Path(folder), 120, script=str(Path(__file__).with_name("dtensors.py")))
    expected = step(plain(), batch())
    for ours in found:
        assert ours is not None
        for name, results in ours["step"].items():
            assert name.startswith(tuple(make.__name__ for make in OURS))
            same(results, expected)
        assert len(ours["step"]) == 2 * len(OURS)


@row(
    "`copy.deepcopy`, pickle, `torch.save` of whole models",
    "torch",
    "copies compute the same, fused ones too, and are independent",
)
def copies() -> None:
    def saved(net: nn.Module) -> Any:
        torch.save(net, file := io.BytesIO())
        file.seek(0)
        return torch.load(file, weights_only=False)

    for copied in (copy.deepcopy, lambda net: pickle.loads(pickle.dumps(net)), saved):
        for make in OURS:
            net = make()
            other = copied(net)
            assert [type(m).__name__ for m in other.modules()] == [type(m).__name__ for m in net.modules()]
            alike(other, plain())
            close(net(batch()), plain()(batch()))


@row(
    "`load_state_dict(assign=True)` on `meta`",
    "torch",
    "a model made on meta, converted or fused there, trains as it would",
)
def assigned() -> None:
    def on_meta(make: Callable[[], nn.Module]) -> nn.Module:
        with torch.device("meta"):
            return make()

    from compatibility.subjects import Network, OurNetwork

    makes: tuple[Callable[[], nn.Module], ...] = (
        lambda: bn.convert(Network()),
        lambda: bn.fuse(Network()),
        OurNetwork,
    )
    for make in makes:
        net = on_meta(make)
        assert next(net.parameters()).is_meta
        net.load_state_dict(plain().state_dict(), assign=True)
        alike(net, plain())


@row(
    "channels removed by hand",
    "torch",
    "`num_features` set and tensors cut, as of torch.nn's; also with an activation inside",
)
def pruned_by_hand() -> None:
    def cut(net: nn.Module) -> nn.Module:
        keep = torch.tensor([0, 2, 5])
        conv, norm = net.get_submodule("block.conv1"), net.get_submodule("block.bn1")
        conv.weight, conv.out_channels = nn.Parameter(conv.weight[keep].detach()), 3
        for name in ("weight", "bias"):
            setattr(norm, name, nn.Parameter(getattr(norm, name)[keep].detach()))
        for name in ("running_mean", "running_var"):
            setattr(norm, name, getattr(norm, name)[keep])
        norm.num_features = 3
        conv2 = net.get_submodule("block.conv2")
        conv2.weight, conv2.in_channels = nn.Parameter(conv2.weight[:, keep].detach()), 3
        return net

    for make in OURS:
        alike(cut(make()), cut(plain()))


@row("`torch.nn.utils.prune`", "torch", "gamma and convolutions, and `remove`")
def pruned() -> None:
    from torch.nn.utils import prune

    def cut(net: nn.Module) -> nn.Module:
        prune.l1_unstructured(net.get_submodule("norm"), "weight", amount=0.5)
        prune.ln_structured(net.get_submodule("block.conv1"), "weight", amount=2, n=2, dim=0)
        return net

    for make in OURS:
        alike(cut(make()), cut(plain()))
        net = cut(make())
        removed = prune.remove(net.get_submodule("norm"), "weight")
        assert (removed.weight == 0).sum() == CHANNELS // 2
        close(net(batch()).detach(), cut(plain())(batch()).detach())


@row(
    "`torch.nn.utils.parametrize`",
    "torch",
    "gamma computed from another parameter, and undone again; `convert` names layers that are parametrized already",
    "`convert`, then `register_parametrization`",
)
def parametrized() -> None:
    from torch.nn.utils import parametrizations, parametrize

    class Positive(nn.Module):
        def forward(self, raw: Tensor) -> Tensor:
            return nn.functional.softplus(raw)

    def register(net: nn.Module) -> nn.Module:
        parametrize.register_parametrization(net.get_submodule("norm"), "weight", Positive())
        parametrizations.weight_norm(net.get_submodule("block.conv1"))
        return net

    for make in OURS:
        alike(register(make()), register(plain()))
        net = register(make())
        parametrize.remove_parametrizations(net.get_submodule("norm"), "weight")
        assert type(net.get_submodule("norm")) is bn.BatchNorm2d
        close(net(batch()).detach(), register(plain())(batch()).detach())
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        late = bn.convert(register(plain()))
    assert any("ParametrizedBatchNorm2d" in str(warning.message) for warning in said)
    alike(late, register(plain()))


@row(
    "`torch.__future__.set_swap_module_params_on_conversion`",
    "torch",
    "`.to()` and `load_state_dict` swap tensors in place; running statistics stay float32 in half precision",
)
def swapped() -> None:
    torch.__future__.set_swap_module_params_on_conversion(True)
    for make in OURS:
        net = make()
        before = [id(p) for p in net.parameters()]
        net.double()
        net.load_state_dict(plain().state_dict())
        assert [id(p) for p in net.parameters()] == before
        same(
            {name: value.float() for name, value in step_in_double(net).items()},
            {name: value.float() for name, value in step_in_double(plain().double()).items()},
        )
        half = make().bfloat16()
        assert half.get_parameter("norm.weight").dtype == torch.bfloat16
        assert half.get_buffer("norm.running_mean").dtype == torch.float32


def step_in_double(net: nn.Module) -> dict[str, Tensor]:
    """`step` in float64."""
    return step(net, batch().double())
