"""Converted layers: the same objects in the same places, with the same results, and nothing lost."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize, prune

import batchnorm as bn
from batchnorm.surgery.convert import ORIGIN, OUR_CLASSES, convert
from support.comparison import close
from support.torch_options import BIAS_FALSE

PAIRS = [(bn.BatchNorm1d, nn.BatchNorm1d), (bn.BatchNorm2d, nn.BatchNorm2d), (bn.BatchNorm3d, nn.BatchNorm3d)]
SHAPES = {nn.BatchNorm1d: (6, 4), nn.BatchNorm2d: (6, 4, 5, 3), nn.BatchNorm3d: (6, 4, 2, 3, 2)}
OPTIONS: list[dict[str, Any]] = [
    {},
    {"momentum": None},
    {"eps": 1e-3, "momentum": 0.7},
    {"affine": False},
    *BIAS_FALSE,
    {"track_running_stats": False},
    {"affine": False, "track_running_stats": False},
    {"dtype": torch.float64},
]


class Mine(nn.BatchNorm2d):
    """A user's subclass, which may do anything."""


class Ours(bn.BatchNorm2d):
    """A user's subclass of ours."""


def net() -> nn.Sequential:
    """Every kind of layer, nested, with statistics that are not the initial ones."""
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Conv3d(3, 4, 3),
        nn.BatchNorm3d(4),
        nn.Flatten(2, 3),
        nn.Sequential(nn.Conv2d(4, 6, 3, bias=False), nn.BatchNorm2d(6, momentum=None), nn.ReLU()),
        nn.Flatten(2),
        nn.BatchNorm1d(6, affine=False),
        nn.AdaptiveAvgPool1d(1),
        nn.Flatten(),
        nn.Linear(6, 5),
    )
    model(images())
    return model


def images() -> Tensor:
    return torch.randn(5, 3, 6, 7, 8, generator=torch.Generator().manual_seed(1)) + 1


def steps(model: nn.Module, x: Tensor) -> list[Tensor]:
    """Outputs and gradients of two training passes and one of inference, and the state that comes of them."""
    results = []
    for training in (True, True, False):
        inputs = x.clone().requires_grad_()
        y = model.train(training)(inputs)
        dy = (torch.arange(y.numel()) % 17 / 8 - 1).to(y.dtype).view(y.shape)
        results += [y.detach(), *torch.autograd.grad(y, [inputs, *model.parameters()], dy)]
    return [*results, *(value.clone() for value in model.state_dict().values())]


# --- what changes ----------------------------------------------------------------------------------------------------


def test_every_layer_becomes_ours() -> None:
    model = convert(net())
    assert [type(m) for m in model.modules() if isinstance(m, nn.modules.batchnorm._BatchNorm)] == [
        bn.BatchNorm3d,
        bn.BatchNorm2d,
        bn.BatchNorm1d,
    ]


@pytest.mark.parametrize("options", OPTIONS, ids=str)
@pytest.mark.parametrize(("ours", "torch_class"), PAIRS)
def test_it_is_as_one_made_by_our_constructor(ours: Any, torch_class: Any, options: dict[str, Any]) -> None:
    converted, made = convert(torch_class(4, **options)), ours(4, **options)
    assert vars(converted).keys() - {ORIGIN} == vars(made).keys()
    assert converted._non_persistent_buffers_set == made._non_persistent_buffers_set
    assert list(converted._buffers) == list(made._buffers)
    for actual, expected in zip(converted._buffers.values(), made._buffers.values(), strict=True):
        assert (actual is None) == (expected is None)
        assert actual is None or (torch.equal(actual, expected) and actual.dtype == expected.dtype)
    assert repr(converted) == repr(made)
    assert converted.activation == made.activation
    assert converted.channel_dim == made.channel_dim


@pytest.mark.parametrize("options", OPTIONS, ids=str)
@pytest.mark.parametrize("torch_class", SHAPES)
def test_a_layer_computes_as_torchs(torch_class: Any, options: dict[str, Any]) -> None:
    torch.manual_seed(0)
    layer, x = torch_class(4, **options), torch.randn(SHAPES[torch_class], dtype=options.get("dtype")) * 2 + 1
    for actual, expected in zip(steps(convert(copy.deepcopy(layer)), x), steps(layer, x), strict=True):
        close(actual, expected)


@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last_3d])
def test_a_network_computes_as_torchs(memory_format: torch.memory_format) -> None:
    torch_net, x = net(), images().to(memory_format=memory_format)
    for actual, expected in zip(steps(convert(copy.deepcopy(torch_net)), x), steps(torch_net, x), strict=True):
        close(actual, expected)


def test_the_kernels_are_ours() -> None:
    """An empty batch tells: torch counts it."""
    layer = convert(nn.BatchNorm2d(4))
    layer(torch.zeros(0, 4, 2, 2))
    assert layer.num_batches_tracked == 0


def test_a_compiled_call_is_ours_too() -> None:
    layer = nn.BatchNorm2d(4)
    layer.compile(backend="eager")
    layer(torch.randn(3, 4, 2, 2))
    convert(layer)(torch.zeros(0, 4, 2, 2))
    assert layer.num_batches_tracked == 1


# --- what stays ------------------------------------------------------------------------------------------------------


def test_the_model_the_layers_and_their_places_stay() -> None:
    model = net()
    before = list(model.named_modules(remove_duplicate=False))
    assert convert(model) is model
    after = list(model.named_modules(remove_duplicate=False))
    assert [path for path, _ in after] == [path for path, _ in before]
    assert all(a is b for (_, a), (_, b) in zip(after, before, strict=True))


@pytest.mark.parametrize("torch_class", SHAPES)
def test_the_root_may_be_a_layer(torch_class: Any) -> None:
    root = torch_class(4)
    weight = root.weight
    converted = convert(root)
    assert converted is root
    assert type(converted) is OUR_CLASSES[torch_class]
    assert converted.weight is weight


def test_parameters_and_buffers_are_the_same_objects() -> None:
    model = net()
    model[1].weight.requires_grad_(False)
    before = {**dict(model.named_parameters()), **dict(model.named_buffers())}
    pointers = {name: tensor.data_ptr() for name, tensor in before.items()}
    learning = {name: tensor.requires_grad for name, tensor in before.items()}
    convert(model)
    after = {**dict(model.named_parameters()), **dict(model.named_buffers())}
    assert list(after) == list(before)
    assert all(after[name] is before[name] for name in before)
    assert {name: after[name].data_ptr() for name in before} == pointers
    assert {name: after[name].requires_grad for name in before} == learning
    assert not learning["1.weight"]


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_running_statistics_of_half_precision_become_float32(dtype: torch.dtype) -> None:
    model = net().to(dtype)
    before = {**dict(model.named_parameters()), **dict(model.named_buffers())}
    after = convert(model).state_dict()
    assert list(after) == [name for name, _ in net().state_dict().items()]
    for name, value in after.items():
        running = name.endswith(("running_mean", "running_var"))
        assert value.dtype == (torch.float32 if running else before[name].dtype)
        assert torch.equal(value, before[name].to(value.dtype))
        assert (value.data_ptr() == before[name].data_ptr()) is not running
    model(images().to(dtype))
    assert model[1].running_mean.dtype == torch.float32


def test_the_state_dict_is_the_same_to_the_bit() -> None:
    model = net()
    before = copy.deepcopy(model.state_dict())
    after = convert(model).state_dict()
    assert list(after) == list(before)
    assert after._metadata == before._metadata
    for key, value in before.items():
        assert torch.equal(after[key].view(-1).view(torch.uint8), value.view(-1).view(torch.uint8))
    net().load_state_dict(after)
    model.load_state_dict(net().state_dict())


def test_an_optimizer_made_before_goes_on() -> None:
    model = net()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    convert(model)
    before = model[1].weight.detach().clone()
    model(images()).square().sum().backward()
    optimizer.step()
    assert not torch.equal(model[1].weight, before)


def test_each_layers_training_flag_stays() -> None:
    model = net()
    model[1].eval()
    convert(model)
    assert [model[1].training, model[3][1].training, model.training] == [False, True, True]
    state = copy.deepcopy(model[1].state_dict())
    model(images())
    assert all(torch.equal(state[key], value) for key, value in model[1].state_dict().items())


def test_hooks_fire_and_can_be_removed() -> None:
    model, calls = net(), []
    layer = model[3][1]
    handles = [
        layer.register_forward_pre_hook(lambda module, args: calls.append(("pre", module))),
        layer.register_forward_hook(lambda module, args, output: calls.append(("forward", module))),
        layer.register_full_backward_pre_hook(lambda module, dy: calls.append(("backward pre", module))),
        layer.register_full_backward_hook(lambda module, dx, dy: calls.append(("backward", module))),
        layer.register_state_dict_post_hook(lambda module, state, prefix, metadata: calls.append(("state", module))),
    ]
    convert(model)
    model(images()).sum().backward()
    model.state_dict()
    assert calls == [(kind, model[3][1]) for kind in ("pre", "forward", "backward pre", "backward", "state")]
    for handle in handles:
        handle.remove()
    model(images()).sum().backward()
    model.state_dict()
    assert len(calls) == len(handles)


def test_attributes_of_the_users_stay() -> None:
    model, tag = net(), object()
    layer = model[1]
    layer.tag = tag
    layer.register_buffer("seen", torch.ones(2), persistent=False)
    layer.extra = nn.Linear(2, 2)
    before, seen = {**vars(layer)}, layer.seen
    convert(model)
    assert model[1].tag is tag
    assert model[1].seen is seen
    assert "1.extra.weight" in model.state_dict()
    assert "1.seen" not in model.state_dict()
    assert all(vars(model[1])[name] is value for name, value in before.items())


def test_a_pruned_layer_stays_pruned() -> None:
    """Pruning is a hook that sets a plain attribute `weight` before each forward pass."""
    torch_layer, ours, x = nn.BatchNorm1d(4), nn.BatchNorm1d(4), torch.randn(6, 4)
    for layer in (torch_layer, ours):
        prune.custom_from_mask(layer, "weight", torch.tensor([0, 1, 0, 1]))
    for actual, expected in zip(steps(convert(ours), x), steps(torch_layer, x), strict=True):
        close(actual, expected)
    assert (ours.weight == 0).sum() == 2


# --- shared layers ---------------------------------------------------------------------------------------------------


def test_a_layer_in_several_places_stays_one() -> None:
    layer = nn.BatchNorm2d(4)
    inner = nn.Sequential(layer)
    model = nn.ModuleDict({"a": layer, "b": layer, "c": inner, "d": inner})
    keys = list(model.state_dict())
    convert(model)
    assert type(model["a"]) is bn.BatchNorm2d
    assert model["a"] is model["b"] is model["c"][0] is model["d"][0]
    assert model["c"] is model["d"]
    assert list(model.state_dict()) == keys
    assert len(list(model.parameters())) == 2


def test_references_from_outside_stay() -> None:
    layer = nn.BatchNorm2d(4)
    model, other = nn.Sequential(layer), nn.Sequential(layer)
    model.norms = [layer]  # a list is no child: only the object itself can be found there
    convert(model)
    assert model[0] is model.norms[0] is other[0]
    model.eval()
    assert not model.norms[0].training


def test_a_deepcopy_afterwards_is_ours_and_its_own() -> None:
    layer = nn.BatchNorm2d(4)
    model = convert(nn.Sequential(layer, layer))
    other = copy.deepcopy(model)
    assert type(other[0]) is bn.BatchNorm2d
    assert other[0] is other[1]
    x = torch.randn(3, 4, 2, 2)
    other(x)
    assert other[0].num_batches_tracked == 2
    assert model[0].num_batches_tracked == 0
    assert torch.equal(copy.deepcopy(model)(x), model(x))


# --- what is left ----------------------------------------------------------------------------------------------------


def test_nothing_is_said_when_nothing_is_left() -> None:
    convert(nn.Sequential(nn.InstanceNorm2d(4), nn.LayerNorm(4), net()))  # warnings are errors here


def test_twice_is_as_once() -> None:
    model = convert(net())
    before = [(id(module), type(module), {**vars(module)}) for module in model.modules()]
    convert(model)
    assert [(id(module), type(module), {**vars(module)}) for module in model.modules()] == before


@pytest.mark.parametrize("cls", [bn.BatchNorm, bn.BatchNorm2d, Ours])
def test_ours_are_left(cls: Any) -> None:
    layer = cls(4, activation="relu", channel_dim=-1)
    before = {**vars(layer)}
    assert convert(nn.Sequential(layer))[0] is layer
    assert type(layer) is cls
    assert vars(layer) == before


def test_unknown_subclasses_are_left_and_named_in_one_warning() -> None:
    mine = Mine(4)
    parametrized = nn.BatchNorm2d(4)
    parametrize.register_parametrization(parametrized, "weight", nn.Identity())
    model = nn.ModuleDict(
        {
            "first": nn.Sequential(mine, nn.BatchNorm2d(4)),
            "again": mine,
            "lazy": nn.LazyBatchNorm2d(),
            "parametrized": parametrized,
        }
    )
    classes = {path: type(module) for path, module in model.named_modules()}
    with pytest.warns(UserWarning, match="left as they are") as caught:
        convert(model)
    assert len(caught) == 1
    assert caught[0].category is UserWarning
    assert caught[0].filename == __file__
    message = str(caught[0].message)
    expected = "first.0 (Mine), lazy (LazyBatchNorm2d), parametrized (ParametrizedBatchNorm2d). Only"
    assert f"left as they are: {expected}" in message
    changed = {path for path, module in model.named_modules() if type(module) is not classes[path]}
    assert changed == {"first.1"}
    assert model["again"] is mine


def test_an_unknown_root_is_named() -> None:
    with pytest.warns(UserWarning, match=r"left as they are: the model itself \(Mine\)\."):
        assert type(convert(Mine(4))) is Mine


def test_a_layer_inside_an_unknown_one_is_converted() -> None:
    outer = Mine(4)
    outer.inner = nn.BatchNorm1d(4)
    with pytest.warns(UserWarning, match="the model itself"):
        convert(outer)
    assert type(outer.inner) is bn.BatchNorm1d


def test_a_lazy_layer_is_converted_once_it_has_its_shape() -> None:
    layer = nn.LazyBatchNorm2d()
    layer(torch.randn(3, 4, 2, 2))
    assert type(convert(layer)) is bn.BatchNorm2d
    layer(torch.randn(3, 4, 2, 2))
    assert layer.num_batches_tracked == 2


@pytest.mark.parametrize(
    ("name", "value"),
    [
        pytest.param("forward", torch.relu, id="forward-relu"),  # whose own name has its address
        ("activation", "relu"),
        ("activation", nn.ReLU()),
        ("channel_dim", nn.Parameter(torch.ones(1))),
        ("_commit", 1),
        ("frozen", True),
        ("num_batches_skipped", 1),
    ],
    ids=str,
)
def test_a_layer_whose_attributes_would_mean_something_else_is_left(name: str, value: Any) -> None:
    model = nn.Sequential(nn.BatchNorm2d(4))
    setattr(model[0], name, value)
    with pytest.warns(UserWarning, match=rf"0 \(BatchNorm2d with its own {name}\)"):
        convert(model)
    assert type(model[0]) is nn.BatchNorm2d
    assert getattr(model[0], name) is value


@pytest.mark.filterwarnings("ignore:.*torch.jit.*:DeprecationWarning")
def test_scripted_layers_are_named() -> None:
    scripted = torch.jit.script(nn.Sequential(nn.BatchNorm2d(3)))
    with pytest.warns(UserWarning, match=r"0\.0 \(a scripted BatchNorm2d: convert before torch\.jit\)"):
        bn.convert(nn.Sequential(scripted))
