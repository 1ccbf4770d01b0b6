"""Which layers take part, what their hooks see, what they write, and which are skipped and why."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import batchnorm as bn
from batchnorm.errors import DTypeError, NonFiniteError, OptionError, OrderError, ShapeError
from batchnorm.population.layers import CallHooks, Layer, select_layers
from batchnorm.population.recalibrate import METHODS
from support import oracle, tolerances
from support.comparison import close
from support.populations import everything, images, layers, made


def layer_of(module: Any) -> Layer:
    (layer,), _ = select_layers(module)
    return layer


def test_every_kind_of_layer_and_no_other() -> None:
    model = nn.Sequential(
        nn.BatchNorm1d(2), nn.Sequential(nn.SyncBatchNorm(2), bn.BatchNorm(2)), nn.InstanceNorm1d(2), nn.GroupNorm(1, 2)
    )
    assert [layer.name for layer in select_layers(model)[0]] == ["0", "1.0", "1.1"]
    assert layer_of(nn.BatchNorm2d(3)).name == "the model itself"


def test_an_object_is_one_layer_under_its_first_name() -> None:
    layer = nn.BatchNorm1d(2)
    assert [found.name for found in select_layers(nn.ModuleDict({"a": layer, "b": layer}))[0]] == ["a"]


@pytest.mark.parametrize(
    ("module", "shape", "axis"),
    [
        (nn.BatchNorm1d(3), (5, 3), 1),
        (nn.BatchNorm2d(3), (5, 3, 2, 4), 1),
        (bn.BatchNorm2d(3, channel_dim=-1), (5, 2, 4, 3), 3),
        (bn.BatchNorm(3, channel_dim=0), (3, 5, 2), 0),
    ],
)
@pytest.mark.parametrize("keyword", [True, False])
def test_moments_of_the_input(module: Any, shape: tuple[int, ...], axis: int, keyword: bool) -> None:
    x = torch.randn(shape) * 3 + 100
    moments = layer_of(module).moments(() if keyword else (x,), {"input": x} if keyword else {})
    n, mean, m2 = oracle.moments(x.double().numpy(), axis)
    assert moments.count == n
    close(moments.mean, torch.from_numpy(mean), relative=tolerances.STATISTIC)
    close(moments.m2, torch.from_numpy(m2), relative=tolerances.STATISTIC)


def test_only_our_layers_know_masks() -> None:
    x, mask = torch.randn(4, 3), torch.tensor([True, False, True, True])
    assert layer_of(bn.BatchNorm1d(3)).moments((x,), {"mask": mask}).count == 3
    assert layer_of(nn.BatchNorm1d(3)).moments((x,), {"mask": mask}).count == 4


def test_nothing_has_empty_moments() -> None:
    moments = layer_of(nn.BatchNorm1d(3)).moments((torch.zeros(0, 3),), {})
    assert moments.count == 0
    assert moments.mean.shape == (3,)


def test_other_channels_are_refused() -> None:
    with pytest.raises(ShapeError, match=r"got running_mean of shape \(3,\) for an input with 4 channels"):
        layer_of(nn.BatchNorm1d(3)).moments((torch.zeros(2, 4),), {})


def test_other_buffers_than_the_models_are_refused() -> None:
    module = nn.BatchNorm1d(3)
    layer = layer_of(module)
    module.running_mean = module.running_mean.clone()
    with pytest.raises(OptionError, match="got a call with other buffers than the model's own"):
        layer.moments((torch.zeros(2, 3),), {})


def test_write_and_settle() -> None:
    module = nn.BatchNorm1d(2).half()
    layer, buffers = layer_of(module), (module.running_mean, module.running_var)
    layer.settle(torch.tensor([1.0, 2.0]), torch.tensor([3.0, 1e-9]))
    assert (module.running_mean, module.running_var) == buffers or module.running_mean is buffers[0]
    assert module.running_mean.tolist() == [1, 2]
    assert module.running_var.tolist() == [3, 0]
    layer.write(torch.tensor([1.0, 2.0]), torch.tensor([3.0, 1e9]))
    assert module.running_var.isinf().tolist() == [False, True]
    with pytest.raises(NonFiniteError, match=r'layer "the model itself": got statistics up to 2 and 1e\+09 that torch'):
        layer.settle(torch.tensor([1.0, 2.0]), torch.tensor([3.0, 1e9]))


def test_call_hooks_come_after_other_hooks_and_leave_none() -> None:
    model = made("residual")
    model.bn1.register_forward_pre_hook(lambda m, args: (args[0] + 1,))
    before, seen = everything(model), []
    taking_part, _ = select_layers(model)
    hooks = CallHooks(lambda layer, args, kwargs: seen.append((layer.name, args[0])), lambda: True)
    with hooks.on(model, taking_part):
        x = images(3)[0]
        model(x)
    assert [name for name, _ in seen] == list(layers(model))
    assert torch.equal(seen[0][1], model.conv1(x) + 1)
    after = everything(model)
    for name in layers(model):  # a training pass moved the statistics
        assert after[name][1] == before[name][1]


def test_a_refusal_is_raised_again_and_calls_that_are_not_ours_are_refused() -> None:
    model, ours = nn.Sequential(nn.BatchNorm1d(2), nn.BatchNorm1d(2)), [True]

    def refuse(*_: object) -> None:
        raise OptionError("no")

    hooks = CallHooks(refuse, lambda: ours[0])
    with hooks.on(model, select_layers(model)[0]):
        with pytest.raises(OptionError, match=r'layer "0": no'):
            model(torch.randn(3, 2))
        with pytest.raises(OptionError, match=r'layer "0": no'):  # whichever layer comes next
            model[1](torch.randn(3, 2))
        with pytest.raises(OptionError, match=r'layer "0": no'):
            hooks.check()
    ours[0] = False
    with (
        CallHooks(refuse, lambda: ours[0]).on(model, select_layers(model)[0]),
        pytest.raises(OrderError, match=r"while no batch's forward pass was running"),
    ):
        model(torch.randn(3, 2))


# --- layers -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("method", METHODS)
def test_layers_that_are_skipped(method: str) -> None:
    model = nn.ModuleDict(
        {
            "frozen": bn.freeze(bn.BatchNorm1d(3)),
            "frozen affine": bn.freeze(bn.BatchNorm1d(3), statistics=False),
            "untracked": nn.BatchNorm1d(3, track_running_stats=False),
            "unused": nn.BatchNorm1d(3),
            "lazy": nn.LazyBatchNorm1d(),
            "used": nn.BatchNorm1d(3),
        }
    )
    skipped = ("frozen", "untracked", "unused")
    before = {name: copy.deepcopy(model[name].state_dict()) for name in skipped}

    def forward(model: Any, x: Tensor) -> None:
        model["used"](model["untracked"](model["frozen affine"](model["frozen"](x))))

    result = bn.recalibrate(model, [torch.randn(5, 3) + 1], forward=forward, method=method)
    assert [layer.name for layer in result.layers] == ["frozen affine", "used"]
    assert dict(result.skipped) == {
        "frozen": "frozen",
        "untracked": "no running statistics",
        "unused": "never called with a value",
        "lazy": "not initialised yet",
    }
    for name in skipped:
        assert all(torch.equal(before[name][key], value) for key, value in model[name].state_dict().items())
    assert nn.parameter.is_lazy(model["lazy"].running_mean)


@pytest.mark.parametrize("method", METHODS)
def test_what_is_not_initialised_yet_is_not_initialised_by_this(method: str) -> None:
    model = nn.Sequential(nn.LazyLinear(3), nn.BatchNorm1d(3))
    with pytest.raises(OptionError, match=r"got a model with a LazyLinear that has not been initialised yet"):
        bn.recalibrate(model, [torch.randn(5, 2)], method=method)
    assert model[0].has_uninitialized_params()


def test_a_model_without_layers_has_nothing_to_do() -> None:
    result = bn.recalibrate(nn.Linear(2, 2), iter(()))
    assert (result.layers, result.skipped, result.batches) == ((), (), 0)


def test_statistics_without_data_are_refused() -> None:
    with pytest.raises(OptionError, match='on the device "meta"'):
        bn.recalibrate(nn.BatchNorm1d(3, device="meta"), [torch.randn(2, 3)])


def test_integers_are_refused() -> None:
    with pytest.raises(DTypeError, match=r'layer "the model itself": got an input of dtype torch.int64'):
        bn.recalibrate(nn.BatchNorm1d(3), [torch.ones(2, 3, dtype=torch.int64)])


# --- domains ---------------------------------------------------------------------------------------------------------


def test_of_several_domains_the_chosen_one_takes_part() -> None:
    model = nn.Sequential(bn.BatchNorm1d(2, domains=("a", "b")), bn.BatchNorm1d(2, domains=("a",)), nn.BatchNorm1d(2))
    with pytest.raises(OptionError, match="have the domains 'a', 'b' without saying which"):
        select_layers(model)
    with bn.domain(model[0], ["a", "b"]), pytest.raises(OptionError, match="without saying which"):
        select_layers(model)
    with bn.domain(model[0], "b"):
        first, second, third = select_layers(model)[0]
    assert first.mean is model[0].running_mean_b
    assert first.var is model[0].running_var_b
    assert [second.mean, third.mean] == [model[1].running_mean, model[2].running_mean]


@pytest.mark.parametrize("method", METHODS)
def test_a_domain_is_recalibrated_by_itself(method: str) -> None:
    model, plain = nn.Sequential(bn.BatchNorm1d(3, domains=("a", "b"))), nn.Sequential(bn.BatchNorm1d(3))
    data = [torch.randn(8, 3) + 4, torch.randn(5, 3)]
    with bn.domain(model, "b"):
        result = bn.recalibrate(model, data, method=method)
    expected = bn.recalibrate(plain, data, method=method)
    assert torch.equal(result.layers[0].new_mean, expected.layers[0].new_mean)
    assert torch.equal(model[0].running_mean_b, plain[0].running_mean)
    assert torch.equal(model[0].running_var_b, plain[0].running_var)
    assert model[0].running_mean.tolist() == [0, 0, 0]


def test_frozen_layers_take_part_where_they_are_only_read() -> None:
    model = bn.freeze(nn.Sequential(bn.BatchNorm1d(2)))
    assert [len(found) for found in select_layers(model)] == [0, 1]
    assert [len(found) for found in select_layers(model, frozen=True)] == [1, 0]


def test_a_model_that_chooses_another_domain_itself() -> None:
    model = nn.Sequential(bn.BatchNorm1d(3, domains=("a", "b")))

    def forward(model: nn.Module, x: Tensor) -> None:
        with bn.domain(model, "a"):
            model(x)

    with bn.domain(model, "b"), pytest.raises(OptionError, match=r"other domains than that of 0 \(b\)"):
        bn.recalibrate(model, [torch.randn(8, 3)], method="pooled", forward=forward)
