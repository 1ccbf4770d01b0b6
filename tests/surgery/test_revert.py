"""Reverted layers: torch.nn's again, the very classes and values."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import batchnorm as bn
from batchnorm.surgery.convert import convert
from batchnorm.surgery.revert import TORCH_CLASSES, revert
from support import tolerances

SHAPES = {nn.BatchNorm1d: (6, 4), nn.BatchNorm2d: (6, 4, 5, 3), nn.BatchNorm3d: (6, 4, 2, 3, 2)}


class Ours(bn.BatchNorm2d):
    """A user's subclass of ours."""


def bits(state: dict[str, Tensor]) -> dict[str, tuple[torch.dtype, bytes]]:
    return {key: (value.dtype, bytes(value.reshape(-1).view(torch.uint8).numpy().data)) for key, value in state.items()}


def used(layer: Any) -> Any:
    """With statistics that are not the initial ones."""
    with torch.no_grad():
        for name in ("running_mean", "running_var", "weight", "bias"):
            if (tensor := getattr(layer, name)) is not None:
                tensor.uniform_(0.5, 2)
    return layer


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16])
@pytest.mark.parametrize(
    "options", [{}, {"affine": False}, {"track_running_stats": False}, {"momentum": None}], ids=str
)
@pytest.mark.parametrize("torch_class", SHAPES)
def test_there_and_back_is_nothing(torch_class: Any, options: dict[str, Any], dtype: torch.dtype) -> None:
    layer = used(torch_class(4, dtype=dtype, **options))
    state, attributes, parameters = bits(layer.state_dict()), {**vars(layer)}, list(layer.parameters())
    buffers = list(layer._buffers)
    assert revert(convert(layer)) is layer
    assert type(layer) is torch_class
    assert bits(layer.state_dict()) == state
    assert vars(layer) == attributes
    assert list(layer._buffers) == buffers
    assert all(a is b for a, b in zip(layer.parameters(), parameters, strict=True))
    assert layer._non_persistent_buffers_set == set()
    layer(torch.randn(SHAPES[torch_class], dtype=dtype))


@pytest.mark.parametrize("ours", TORCH_CLASSES)
def test_a_layer_made_as_ours_computes_as_before(ours: Any) -> None:
    layer, x = used(ours(4)), torch.randn(SHAPES[TORCH_CLASSES[ours]]) * 2 + 1
    expected = copy.deepcopy(layer)
    reverted = revert(layer)
    assert type(reverted) is TORCH_CLASSES[ours]
    assert not hasattr(reverted, "frozen")
    relative, absolute = tolerances.AGAINST_TORCH[torch.float32]
    for training in (True, False):
        torch.testing.assert_close(
            reverted.train(training)(x), expected.train(training)(x), rtol=relative, atol=absolute
        )
    torch.testing.assert_close(reverted.running_var, expected.running_var, rtol=relative, atol=absolute)
    assert reverted.num_batches_tracked == 1


def test_trained_statistics_of_half_precision_are_rounded_once() -> None:
    layer = convert(nn.BatchNorm2d(4).bfloat16())
    layer(torch.randn(6, 4, 5, 3).bfloat16())
    expected = layer.running_mean.bfloat16()
    assert torch.equal(revert(layer).running_mean, expected)
    assert layer.running_mean.dtype == torch.bfloat16


@pytest.mark.parametrize("when", ["before", "after"])
def test_a_layer_made_or_moved_to_half_precision_runs_in_torch(when: str) -> None:
    layer = bn.BatchNorm2d(4).half() if when == "before" else convert(nn.BatchNorm2d(4)).half()
    assert layer.running_var.dtype == torch.float32
    assert revert(layer).running_var.dtype == torch.float16
    layer(torch.randn(6, 4, 5, 3).half())


def test_statistics_kept_in_float32_beside_half_parameters_stay() -> None:
    layer = nn.BatchNorm2d(4).half()
    layer.running_mean, layer.running_var = layer.running_mean.float(), layer.running_var.float()
    mean = layer.running_mean
    assert revert(convert(layer)).running_mean is mean


def test_hooks_flags_and_shared_layers_stay() -> None:
    layer, calls = nn.BatchNorm2d(4), []
    model = nn.ModuleDict({"a": layer, "b": nn.Sequential(layer)})
    layer.register_forward_hook(lambda module, args, y: calls.append(module))
    layer.eval().weight.requires_grad_(False)
    layer.tag = "mine"
    revert(convert(model))
    model["b"](torch.randn(2, 4, 3, 3))
    assert model["a"] is model["b"][0] is layer is calls[0]
    assert (layer.training, layer.weight.requires_grad, layer.tag) == (False, False, "mine")


def test_ghost_batches_that_convert_added_go() -> None:
    layer = convert(nn.BatchNorm1d(3), virtual_batch_size=4)
    assert layer.virtual_batch_size == 4
    assert type(revert(layer)) is nn.BatchNorm1d
    assert "virtual_batch_size" not in vars(layer)


@pytest.mark.parametrize("size", [0, -1, 2.5])
def test_a_wrong_size_of_ghost_batches_changes_nothing(size: Any) -> None:
    model = nn.Sequential(nn.BatchNorm1d(3))
    with pytest.raises(bn.BatchNormError, match="virtual_batch_size"):
        convert(model, virtual_batch_size=size)
    assert type(model[0]) is nn.BatchNorm1d


def test_what_torch_cannot_express_is_named_in_one_warning() -> None:
    later = convert(nn.BatchNorm2d(4))
    later.activation = "silu"
    model = nn.ModuleDict(
        {
            "activation": bn.BatchNorm2d(4, activation="relu"),
            "ghosts": bn.BatchNorm2d(4, virtual_batch_size=2),
            "last": bn.BatchNorm1d(4, channel_dim=-1),
            "renorm": bn.BatchNorm1d(4, renorm=bn.Renorm()),
            "frozen": bn.freeze(bn.BatchNorm2d(4)),
            "any": bn.BatchNorm(4),
            "mine": Ours(4),
            "later": later,
            "plain": bn.BatchNorm3d(4),
        }
    )
    classes = {path: type(module) for path, module in model.items()}
    with pytest.warns(UserWarning, match="left as they are") as caught:
        revert(model)
    assert len(caught) == 1
    assert caught[0].filename == __file__
    message = str(caught[0].message)
    for part in (
        "activation (BatchNorm2d with activation=relu)",
        "ghosts (BatchNorm2d with virtual_batch_size=2)",
        "last (BatchNorm1d with channel_dim=-1)",
        "renorm (BatchNorm1d with renorm=",
        "frozen (BatchNorm2d with frozen=",
        "any (BatchNorm)",
        "mine (Ours)",
        "later (BatchNorm2d with activation=silu)",
    ):
        assert part in message
    assert {path for path, module in model.items() if type(module) is not classes[path]} == {"plain"}
    bn.unfreeze(model["frozen"])
    assert type(revert(model["frozen"])) is nn.BatchNorm2d


@pytest.mark.parametrize("made", [nn.SyncBatchNorm, nn.BatchNorm2d])
@pytest.mark.parametrize("sync", [True, False])
def test_sharing_that_convert_added_goes_and_torchs_stays(made: Any, sync: bool) -> None:
    layer = made(4)
    attributes = {**vars(layer)}
    assert type(revert(convert(layer, sync=sync))) is made
    assert vars(layer) == attributes


@pytest.mark.parametrize("ours", [bn.BatchNorm, bn.BatchNorm2d])
def test_a_layer_made_as_ours_that_shares_becomes_torchs_that_does(ours: Any) -> None:
    group = object()
    reverted = revert(ours(4, sync=True, process_group=group))
    assert type(reverted) is nn.SyncBatchNorm
    assert vars(reverted).keys() == vars(nn.SyncBatchNorm(4)).keys()
    assert reverted.process_group is group


def test_a_layer_of_any_rank_that_does_not_share_is_left() -> None:
    with pytest.warns(UserWarning, match=r"left as they are: the model itself \(BatchNorm\)"):
        assert type(revert(bn.BatchNorm(4))) is bn.BatchNorm
