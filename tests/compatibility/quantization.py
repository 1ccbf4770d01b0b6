"""Tools that quantize a model: torch's two older ways, eager and by torch.fx, and torchao's, by torch.export."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.ao import quantization

import batchnorm as bn
from batchnorm.errors import DTypeError
from compatibility.rows import row
from compatibility.subjects import OURS, batch, plain
from support import tolerances
from support.comparison import close

LEVELS = 256  # of 8 bits
STEPS = 3  # of training, while quantization is simulated
FUSABLE = [["conv1", "norm1", "relu"], ["conv2", "norm2"]]


class Stubs(nn.Module):
    """Two convolutions with batch norm, between the stubs that eager quantization needs."""

    def __init__(self) -> None:
        super().__init__()
        self.quant, self.dequant = quantization.QuantStub(), quantization.DeQuantStub()
        self.conv1, self.norm1, self.relu = nn.Conv2d(3, 8, 3, bias=False), nn.BatchNorm2d(8), nn.ReLU()
        self.conv2, self.norm2 = nn.Conv2d(8, 8, 3), nn.BatchNorm2d(8)

    def forward(self, x: Tensor) -> Tensor:
        y = self.relu(self.norm1(self.conv1(self.quant(x))))
        z: Tensor = self.dequant(self.norm2(self.conv2(y)))
        return z


def stubs() -> Stubs:
    """With the statistics of many batches: quantization-aware training begins with a trained network."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        net = Stubs()
    with torch.no_grad():
        for seed in range(60):
            net(batch(seed))
    return net


def stubs_inside() -> Stubs:
    """The same, written with an activation inside a layer of ours."""
    net = Stubs()
    net.norm1, net.relu, net.norm2 = bn.BatchNorm2d(8, activation="relu"), nn.Identity(), bn.BatchNorm2d(8)
    net.load_state_dict(stubs().state_dict())
    return net


def trained(prepared: nn.Module) -> nn.Module:
    """After some training steps, in inference."""
    for seed in range(STEPS):
        prepared(batch(seed))
    return copy.deepcopy(prepared).eval()


def as_torchs(actual: Tensor, expected: Tensor) -> None:
    """Two quantized models' outputs are the same but for values that were rounded to other levels."""
    bound = tolerances.QUANTIZED_TWICE * float(expected.max() - expected.min())
    close(actual.detach(), expected.detach(), absolute=bound)


def as_unquantized(quantized: Tensor, floating: nn.Module) -> None:
    """A quantized model's output is the floating one's, as well as 8 bits can tell."""
    expected = floating.eval()(batch())
    error = (quantized - expected).abs().mean() / expected.abs().max()
    assert error < tolerances.QUANTIZED, f"off by {error:.3g}"


def eager(net: nn.Module, then: Callable[[nn.Module], nn.Module] = lambda net: net) -> Tensor:
    """The output after eager quantization-aware training; `then` is called with what was prepared."""
    net.train()
    net.qconfig = quantization.get_default_qat_qconfig("x86")
    prepared = then(quantization.prepare_qat(quantization.fuse_modules_qat(net, FUSABLE)))
    y: Tensor = quantization.convert(trained(prepared))(batch())
    return y


@row(
    "eager quantization, `fuse_modules_qat`, `prepare_qat`",
    "torch",
    "knows torch.nn's layers by their type: `fuse_modules_qat` raises an `AssertionError`, and a layer that is left "
    "a `DTypeError` at the first quantized input",
    "`revert`; `convert` after `prepare_qat`",
)
def eager_training() -> None:
    expected = eager(stubs())
    for make in (bn.convert, bn.fuse):
        with pytest.raises(AssertionError, match="did not find fuser method"):
            eager(make(stubs()))
        unfused = make(stubs()).train()
        unfused.qconfig = quantization.get_default_qat_qconfig("x86")
        quantized = quantization.convert(trained(quantization.prepare_qat(unfused)))
        with pytest.raises(DTypeError, match=r"dtype torch.quint8.*needs a floating dtype"):
            quantized(batch())
        close(eager(bn.revert(make(stubs()))), expected)
        prepared = []

        def ours(net: nn.Module, prepared: list[nn.Module] = prepared) -> nn.Module:
            prepared.append(bn.convert(net))
            return prepared[0]

        as_torchs(eager(bn.revert(make(stubs())), ours), expected)
        assert type(prepared[0].get_submodule("conv1.bn")) is bn.BatchNorm2d
        assert prepared[0].get_submodule("conv1.bn").num_batches_tracked == 60 + STEPS


def by_fx(net: nn.Module, then: Callable[[nn.Module], nn.Module] = lambda net: net) -> nn.Module:
    """The quantized model after quantization-aware training by torch.fx; `then` as above."""
    from torch.ao.quantization.quantize_fx import convert_fx, prepare_qat_fx

    qconfig = quantization.get_default_qat_qconfig_mapping("x86")
    quantized: nn.Module = convert_fx(trained(then(prepare_qat_fx(net.train(), qconfig, (batch(),)))))
    return quantized


@row(
    "FX quantization, `prepare_qat_fx`",
    "torch",
    "likewise by type: our layers stay in floating point between quantized convolutions, which is right but slower",
    "`revert`; `convert` after `prepare_qat_fx`",
)
def fx_training() -> None:
    expected = by_fx(stubs())
    floating = stubs()
    trained(floating)
    as_unquantized(expected(batch()), floating)
    for make in (bn.convert, bn.fuse):
        as_is = by_fx(make(stubs()))
        assert type(as_is.get_submodule("norm1")) is bn.BatchNorm2d
        as_unquantized(as_is(batch()), floating)
        reverted = by_fx(bn.revert(make(stubs())))
        assert not any(isinstance(module, nn.BatchNorm2d) for module in reverted.modules())
        close(reverted(batch()), expected(batch()))
        as_torchs(by_fx(bn.revert(make(stubs())), bn.convert)(batch()), expected(batch()))


@row(
    "quantization after training, eager and FX, `fuse_modules`, `prepare_fx`",
    "torch",
    "likewise by type",
    "`fold`: with batch norm folded away, nothing is left that they would have to know",
)
def after_training() -> None:
    from torch.ao.quantization.quantize_fx import convert_fx, prepare_fx

    def fx(net: nn.Module) -> nn.Module:
        prepared = prepare_fx(net, quantization.get_default_qconfig_mapping("x86"), (batch(),))
        return convert_fx(trained(prepared))

    def steps(net: nn.Module, groups: list[list[str]]) -> nn.Module:
        net = quantization.fuse_modules(net, groups)
        net.qconfig = quantization.get_default_qconfig("x86")
        return quantization.convert(trained(quantization.prepare(net)))

    torchs = stubs().eval()
    expected_fx, expected_eager = fx(copy.deepcopy(torchs))(batch()), steps(copy.deepcopy(torchs), FUSABLE)(batch())
    for net in (bn.convert(stubs()), bn.fuse(stubs()), stubs_inside()):
        net.eval()
        with pytest.raises(AssertionError, match="did not find fuser method"):
            steps(copy.deepcopy(net), [["conv1", "norm1"], ["conv2", "norm2"]])
        as_unquantized(fx(copy.deepcopy(net))(batch()), torchs)
        folded = bn.fold(net, batch())
        as_torchs(fx(folded)(batch()), expected_fx)
        last = (
            "norm1" if net.norm1.activation else "relu"
        )  # what is left of a layer with an activation is the activation
        as_torchs(steps(bn.fold(net, batch()), [["conv1", last]])(batch()), expected_eager)


def exported(net: nn.Module, *, strict: bool = False) -> Any:
    """What torchao quantizes: a program's module."""
    return torch.export.export(net, (batch(),), strict=strict).module()


class Beside(nn.Module):
    """Networks beside each other in one: torchao takes as long for one as for many."""

    def __init__(self, *nets: nn.Module) -> None:
        super().__init__()
        self.nets = nn.ModuleList(nets)

    def forward(self, x: Tensor) -> list[Tensor]:
        return [net(x) for net in self.nets]


def by_export(quantizer: Any, *nets: nn.Module, strict: bool = False) -> list[Tensor]:
    """torchao's quantization-aware training of networks: their outputs, quantized."""
    from torchao.quantization.pt2e import move_exported_model_to_eval
    from torchao.quantization.pt2e.quantize_pt2e import convert_pt2e, prepare_qat_pt2e

    prepared = prepare_qat_pt2e(exported(Beside(*nets).train(), strict=strict), quantizer)
    for seed in range(STEPS):
        prepared(batch(seed))
    move_exported_model_to_eval(prepared)
    statistics = {name: b.clone() for name, b in prepared.named_buffers() if "running" in name}
    assert statistics
    prepared(batch())
    for name, value in statistics.items():
        assert torch.equal(prepared.get_buffer(name), value), name
    quantized = convert_pt2e(prepared)
    assert not any("batch_norm" in str(node.target) for node in quantized.graph.nodes)
    outputs: list[Tensor] = quantized(batch())
    return outputs


@row(
    "torchao, `prepare_qat_pt2e`, quantizers that look for operators",
    "torchao",
    "the numbers of torch.nn's model, activation and residual inside too; tried with the XNNPACK quantizer",
)
def pt2e_training() -> None:
    from torchao.testing.pt2e._xnnpack_quantizer import XNNPACKQuantizer, get_symmetric_quantization_config

    quantizer = XNNPACKQuantizer().set_global(get_symmetric_quantization_config(is_per_channel=True, is_qat=True))
    expected, *ours = by_export(quantizer, plain(), *(make() for make in OURS))
    assert len(ours) == len(OURS)
    for actual in ours:
        as_torchs(actual, expected)


@row(
    "torchao, `prepare_qat_pt2e`, quantizers that look for modules",
    "torchao",
    "exported with `strict=True`, the numbers of torch.nn's model; otherwise the quantizer does not see batch norm "
    "behind a convolution, and quantizes what it sees; tried with `X86InductorQuantizer`",
    "`revert`, or `strict=True`",
)
def pt2e_training_by_modules() -> None:
    from torchao.quantization.pt2e.quantizer import x86_inductor_quantizer as x86

    def quantized(*nets: nn.Module, strict: bool = False) -> list[Tensor]:
        config = x86.get_default_x86_inductor_quantization_config(is_qat=True)
        return by_export(x86.X86InductorQuantizer().set_global(config), *nets, strict=strict)

    floating = stubs()
    trained(floating)
    expected, *others = quantized(stubs(), bn.revert(bn.fuse(stubs())), bn.fuse(stubs()), stubs_inside())
    as_torchs(others[0], expected)
    assert [len(output.unique()) <= LEVELS for output in (expected, *others)] == [True, True, False, False]
    for output in (expected, *others):
        as_unquantized(output, floating)
    for output in quantized(bn.convert(stubs()), bn.fuse(stubs()), stubs_inside(), strict=True):
        as_torchs(output, expected)


@row(
    "torchao, `move_exported_model_to_eval`, `allow_exported_model_train_eval`",
    "torchao",
    "a program that was exported in training normalises by running statistics then, which stand, and goes back; like "
    "torch.nn's with eps=1e-5, which torchao writes whatever the layers have",
)
def exported_to_inference() -> None:
    from torchao.quantization.pt2e import allow_exported_model_train_eval, move_exported_model_to_eval

    x = batch()
    for make in (plain, *OURS):
        once, there_and_back = exported(make().train()), allow_exported_model_train_eval(exported(make().train()))
        move_exported_model_to_eval(once)
        there_and_back.eval()
        for program in (once, there_and_back):
            close(program(x), make()(x))
            assert torch.equal(program.norm.running_mean, plain().norm.running_mean)
            assert torch.equal(program.block.bn2.running_var, plain().block.bn2.running_var)
        there_and_back.train()
        net = make().train()
        close(there_and_back(x).detach(), net(x).detach())
        close(there_and_back.block.bn2.running_var, net.get_submodule("block.bn2").running_var)


@row("torchao, `prepare_pt2e`", "torchao", "the numbers of torch.nn's model, an activation inside too")
def pt2e_after_training() -> None:
    from torchao.quantization.pt2e.quantize_pt2e import convert_pt2e, prepare_pt2e
    from torchao.quantization.pt2e.quantizer import x86_inductor_quantizer as x86

    quantizer = x86.X86InductorQuantizer().set_global(x86.get_default_x86_inductor_quantization_config())
    nets = stubs(), bn.convert(stubs()), bn.fuse(stubs()), stubs_inside()
    prepared = prepare_pt2e(exported(Beside(*nets).eval()), quantizer)
    prepared(batch())
    quantized = convert_pt2e(prepared)
    assert not any("batch_norm" in str(node.target) for node in quantized.graph.nodes)
    expected, *ours = quantized(batch())
    as_unquantized(expected, stubs())
    for actual in ours:
        as_torchs(actual, expected)


@row("torchao, `quantize_`", "torchao", "quantizes linear layers, and leaves ours as it leaves torch.nn's")
def weights_only() -> None:
    from torchao.quantization import Int8WeightOnlyConfig, quantize_

    expected = plain()
    quantize_(expected, Int8WeightOnlyConfig(version=2))
    for make in OURS:
        net = make()
        quantize_(net, Int8WeightOnlyConfig(version=2))
        assert type(net.get_submodule("norm")) is bn.BatchNorm2d
        as_torchs(net(batch()), expected(batch()))
    assert not torch.equal(expected(batch()), plain()(batch()))
