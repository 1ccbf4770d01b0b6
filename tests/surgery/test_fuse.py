"""Fused models train as the originals do, keep what they are made of, and go back."""

from __future__ import annotations

import copy
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
from support.networks import Block, Calls, Untraceable, draw, used

Norm = nn.modules.batchnorm._BatchNorm


def steps(model: nn.Module, x: Tensor) -> list[Tensor]:
    """Outputs and gradients of two training passes and one of inference, and the state that comes of them."""
    results = []
    for training in (True, True, False):
        inputs = x.clone().requires_grad_()
        y = model.train(training)(inputs * 1)  # a copy: some of the models write over their input
        dy = (torch.arange(y.numel()) % 17 / 8 - 1).to(y.dtype).view(y.shape)
        results += [y.detach(), *torch.autograd.grad(y, [inputs, *model.parameters()], dy)]
    return [*results, *(value.clone() for value in model.state_dict().values())]


def check(model: nn.Module, *shape: int) -> nn.Module:
    """Fuse a copy; compare with the model, which keeps torch's layers."""
    used(model).double().train()
    fused = copy.deepcopy(model)
    parts, tensors = list(fused.modules()), {**fused.state_dict(keep_vars=True)}
    assert fuse(fused) is fused
    assert all(a is b for a, b in zip(fused.modules(), parts, strict=True))
    state = fused.state_dict(keep_vars=True)
    assert list(state) == list(tensors)
    assert all(state[key] is tensors[key] for key in state)
    x = draw(*shape)
    for actual, expected in zip(steps(copy.deepcopy(fused), x), steps(model, x), strict=True):
        close(actual, expected)
    return fused


def activations(model: nn.Module) -> dict[str, str | None]:
    return {path: module.activation for path, module in model.named_modules() if isinstance(module, bn.BatchNorm)}


# --- what is fused ---------------------------------------------------------------------------------------------------


def test_a_residual_block() -> None:
    fused = check(nn.Sequential(Block(3), Block(3, projected=True)), 2, 3, 6, 6)
    assert fused.report.done == {
        "0.bn1": "with relu, in 0",
        "0.bn2": "with the addition and relu, in 0",
        "1.bn1": "with relu, in 1",
        "1.bn2": "with the addition and relu, in 1",
    }
    assert fused.report.left == {"1.downsample.1": "the addition after it writes over its other operand"}
    assert isinstance(fused[0], Block)
    assert type(fused) is nn.Sequential


def test_an_addition_alone() -> None:
    """An inverted residual: nothing comes behind the addition."""
    model = nn.Sequential(
        Calls(lambda m, x: x + m.branch(x), branch=nn.Sequential(nn.Conv2d(3, 3, 1), nn.BatchNorm2d(3)))
    )
    fused = check(model, 2, 3, 4, 4)
    assert fused.report.done == {"0.branch.1": "with the addition, in 0"}
    assert activations(fused) == {"0.branch.1": None}


@pytest.mark.parametrize(
    ("shape", "layers"),
    [
        ((6, 3), [nn.Linear(3, 4), nn.BatchNorm1d(4), nn.SiLU()]),
        ((2, 3, 5), [nn.Conv1d(3, 4, 1), nn.BatchNorm1d(4), nn.GELU()]),
        (
            (2, 3, 4, 4),
            [nn.BatchNorm2d(3), nn.ReLU(inplace=True), nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.Hardswish()],
        ),
        ((2, 3, 4, 4, 2), [nn.BatchNorm3d(3, affine=False), nn.LeakyReLU(), nn.BatchNorm3d(3), nn.ELU()]),
        ((2, 3, 4, 4), [nn.BatchNorm2d(3, track_running_stats=False), nn.ReLU()]),
    ],
    ids=str,
)
def test_sequences(shape: tuple[int, ...], layers: list[nn.Module]) -> None:
    fused = check(nn.Sequential(*copy.deepcopy(layers)), *shape)
    assert fused.report.left == {}
    assert len(fused) == len(layers)


def test_a_residual_that_broadcasts() -> None:
    model = Calls(lambda m, x: F.relu(m.norm(x) + x.mean((2, 3), keepdim=True)), norm=nn.BatchNorm2d(3))
    assert check(model, 2, 3, 4, 4).report.done == {"norm": "with the addition and relu, in the model itself"}


def test_both_sides_of_an_addition_are_layers() -> None:
    model = Calls(lambda m, x: F.relu(m.a(x) + m.b(x * 2)), a=nn.BatchNorm2d(3), b=nn.BatchNorm2d(3))
    fused = check(model, 2, 3, 4, 4)
    assert fused.report.done == {"b": "with the addition and relu, in the model itself"}
    assert fused.report.left == {"a": "what its output is added to takes in the addition"}


def test_a_chain_of_additions() -> None:
    model = Calls(lambda m, x: F.relu(m.b(x) + F.relu(m.a(x) + x)), a=nn.BatchNorm2d(3), b=nn.BatchNorm2d(3))
    assert check(model, 2, 3, 4, 4).report.left == {}


def test_a_block_in_two_places_is_fused_once() -> None:
    block = Block(3)
    fused = check(nn.Sequential(block, nn.Sigmoid(), block), 2, 3, 6, 6)
    assert fused[0] is fused[2]
    assert list(fused.report.done) == ["0.bn1", "0.bn2"]


def test_a_layer_called_twice_in_the_same_pattern() -> None:
    model = Calls(
        lambda m, x: F.relu(m.norm(m.conv(F.relu(m.norm(x))))), norm=nn.BatchNorm2d(3), conv=nn.Conv2d(3, 3, 1)
    )
    assert check(model, 2, 3, 4, 4).report.done == {"norm": "with relu, in the model itself"}


def test_a_pattern_across_modules_is_fused_where_all_of_it_is() -> None:
    """As transformers writes ResNets: the addition is not in the module that has the layer."""
    layer = nn.Sequential(nn.Conv2d(3, 3, 1), nn.BatchNorm2d(3), nn.Identity())
    model = nn.Sequential(Calls(lambda m, x: m.act(m.layer(x) + x), layer=layer, act=nn.ReLU()))
    fused = check(model, 2, 3, 4, 4)
    assert fused.report.done == {"0.layer.1": "with the addition and relu, in 0"}
    assert type(fused[0].layer) is nn.Sequential


def test_parts_of_a_model_that_cannot_be_traced() -> None:
    model = Untraceable(Block(3), nn.BatchNorm2d(3), Untraceable(nn.Sequential(nn.BatchNorm2d(3), nn.ReLU())))
    fused = check(model, 2, 3, 6, 6)
    assert set(fused.report.done) == {"parts.0.bn1", "parts.0.bn2", "parts.2.parts.0.0"}
    assert fused.report.left == {
        "parts.1": "the model is not traceable: symbolically traced variables cannot be used as inputs to control flow"
    }
    assert type(fused) is Untraceable


class WithOption(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.BatchNorm2d(3)

    def forward(self, x: Tensor, factor: float = 1.0) -> Tensor:
        return F.relu(self.norm(x)) * factor


def test_optional_arguments() -> None:
    fused = check(nn.Sequential(nn.Sequential(WithOption())), 2, 3, 4, 4)
    assert fused.report.done == {"0.0.norm": "with relu, in 0.0"}
    x, plain = draw(2, 3, 4, 4), bn.revert(copy.deepcopy(fused))
    for factor in (2.0, 1.0):
        close(fused[0][0](x, factor), plain[0][0](x, factor))
        close(fused[0][0](x, factor=factor), plain[0][0](x, factor=factor))
        close(fused[0][0](x=x), plain[0][0](x=x))


def test_a_part_called_with_optional_arguments_becomes_part_of_the_one_around_it() -> None:
    model = nn.Sequential(Calls(lambda m, x: m.part(x, 2.0), part=WithOption()))
    assert check(model, 2, 3, 4, 4).report.done == {"0.part.norm": "with relu, in 0"}
    model = nn.Sequential(Calls(lambda m, x: m.part(x, factor=1.0), part=WithOption()))  # what it is without
    assert check(model, 2, 3, 4, 4).report.done == {"0.part.norm": "with relu, in 0.part"}


def test_dropout_and_its_mode_stay() -> None:
    model = nn.Sequential(nn.BatchNorm1d(3), nn.ReLU(), nn.Dropout(0.5))
    fused, x = fuse(copy.deepcopy(model)), draw(64, 3, dtype=torch.float32)
    torch.manual_seed(0)
    y = model(x)
    torch.manual_seed(0)
    torch.testing.assert_close(fused(x), y)
    close(fused.eval()(x), model.eval()(x), relative=tolerances.AGAINST_TORCH[torch.float64][0], absolute=1e-6)


# --- what is left ----------------------------------------------------------------------------------------------------


class Mine(nn.BatchNorm2d):
    """May do anything."""


class Modal(nn.Module):
    """Computes one thing in training and another in inference, which one graph cannot say."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.BatchNorm2d(3)

    def forward(self, x: Tensor) -> Tensor:
        y = self.norm(x)
        return F.relu(y) if self.training else y


LEFT: dict[str, tuple[nn.Module, dict[str, str]]] = {
    "different activations": (
        Calls(lambda m, x: F.silu(m.norm(m.conv(F.relu(m.norm(x))))), norm=nn.BatchNorm2d(3), conv=nn.Conv2d(3, 3, 1)),
        {"norm": "its 2 calls have different activations"},
    ),
    "one call does not fit": (
        Calls(lambda m, x: F.softplus(m.norm(F.relu(m.norm(x)))), norm=nn.BatchNorm2d(3)),
        {"norm": "of its 2 calls, one does not fit: after it, softplus is not one of our activations"},
    ),
    "another class": (nn.Sequential(Mine(3), nn.ReLU()), {"0": "Mine is none of ours"}),
    "depends on the mode": (
        Modal(),
        {"norm": "the model is not traceable: it computes something else in training than in inference"},
    ),
    "the module around it is another's": (
        Calls(lambda m, x: F.relu(m.part(x)), part=nn.Sequential(nn.BatchNorm2d(3), nn.ReLU(), nn.BatchNorm2d(3))),
        {"part.2": "a module around it is changed for others, and would compute something else alone"},
    ),
}


@pytest.mark.parametrize("name", LEFT)
def test_what_is_left(name: str) -> None:
    model, reasons = LEFT[name]
    fused = check(copy.deepcopy(model), 2, 3, 4, 4)
    assert fused.report.left == reasons
    assert all(activations(fused).get(path) is None for path in reasons)


def test_hooks_of_modules_around_keep_being_called() -> None:
    layer, calls = nn.Sequential(nn.Conv2d(3, 3, 1), nn.BatchNorm2d(3)), []
    model = Calls(lambda m, x: F.relu(m.layer(x) + x), layer=layer)
    layer.register_forward_hook(lambda *_: calls.append("layer"))
    model.register_forward_hook(lambda *_: calls.append("model"))
    fuse(model)
    model(torch.randn(2, 3, 4, 4))
    assert model.report.left == {"layer.1": "a module around it has hooks, which would not be called"}
    assert calls == ["layer", "model"]


def test_hooks_of_the_rewritten_module_are_called() -> None:
    model, calls = nn.Sequential(Block(3)), []
    model[0].register_forward_hook(lambda module, args, y: calls.append(module))
    fuse(model)
    model(torch.randn(2, 3, 4, 4))
    assert calls == [model[0]]
    assert len(model.report.done) == 2


def test_a_graph_module_is_left() -> None:
    model = torch.fx.symbolic_trace(nn.Sequential(nn.BatchNorm2d(3), nn.ReLU()))
    fuse(model)
    assert model.report.left == {"0": "its module is of torch.fx and copies itself by its graph"}


def test_twice_is_as_once() -> None:
    model = fuse(nn.Sequential(Block(3)))
    classes = [type(module) for module in model.modules()]
    fuse(model)
    assert [type(module) for module in model.modules()] == classes
    assert list(model.report.done) == ["0.bn1", "0.bn2"]


# --- what one does with it -------------------------------------------------------------------------------------------


def test_an_optimizer_made_before_goes_on() -> None:
    model = nn.Sequential(Block(3), nn.Flatten(), nn.Linear(48, 2))
    expected = copy.deepcopy(model)
    for one in (model, expected):
        optimizer = torch.optim.SGD(one.parameters(), lr=0.1, momentum=0.9)
        if one is model:
            fuse(one)
        for seed in range(3):
            optimizer.zero_grad()
            one(torch.randn(4, 3, 4, 4, generator=torch.Generator().manual_seed(seed))).square().mean().backward()
            optimizer.step()
    relative, absolute = tolerances.AGAINST_TORCH[torch.float32]
    for (name, a), b in zip(model.named_parameters(), expected.parameters(), strict=True):
        close(a, b, relative=1e2 * relative, absolute=absolute, name=name)


def test_revert_undoes_it() -> None:
    model = nn.Sequential(Block(3, projected=True), nn.BatchNorm2d(3), nn.SiLU()).double()
    expected, classes = copy.deepcopy(model), [type(module) for module in model.modules()]
    bn.revert(fuse(model))
    assert [type(module) for module in model.modules()] == classes
    for actual, wanted in zip(steps(model, draw(2, 3, 6, 6)), steps(expected, draw(2, 3, 6, 6)), strict=True):
        assert torch.equal(actual, wanted)


def test_a_fused_model_folds() -> None:
    model = used(nn.Sequential(Block(3, projected=True), nn.Conv2d(3, 3, 1), nn.BatchNorm2d(3), nn.SiLU())).double()
    x = draw(2, 3, 6, 6)
    y = model(x)
    folded = bn.fold(fuse(model), x)
    assert folded.report.left == {}
    assert all(what.startswith("part of ") for what in folded.report.done.values())
    close(folded(x), y)


def test_a_fused_model_compiles_and_checkpoints() -> None:
    model, x = fuse(nn.Sequential(Block(3))), torch.randn(2, 3, 4, 4)
    expected = copy.deepcopy(model)(x)
    graphs: list[torch.fx.GraphModule] = []

    def backend(graph: torch.fx.GraphModule, _: object) -> Callable[..., Any]:
        graphs.append(graph)
        return graph.forward

    torch.testing.assert_close(torch.compile(copy.deepcopy(model), backend=backend, fullgraph=True)(x), expected)
    (graph,) = graphs
    assert "torch.relu" not in graph.code
    assert "functional.relu" not in graph.code
    again = torch.utils.checkpoint.checkpoint(model, x.requires_grad_(), use_reentrant=False)
    torch.testing.assert_close(again, expected)
    again.sum().backward()
    assert model[0].bn1.num_batches_tracked == 1


def test_a_report_of_the_models_own_is_not_hidden() -> None:
    class Reporting(nn.Sequential):
        report = "mine"

    model: Any = Reporting(nn.BatchNorm1d(3))
    with pytest.raises(bn.BatchNormError, match="a `report` of its own"):
        fuse(model)
    assert type(model[0]) is nn.BatchNorm1d
