"""Biases before batch norm: removed where they do nothing, without a change of outputs, gradients or statistics."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import batchnorm as bn
from batchnorm.surgery import biases, linear
from batchnorm.surgery.biases import remove_dead_biases
from support import tolerances
from support.comparison import close
from support.networks import Block, Calls, Untraceable, draw, used

Norm = nn.modules.batchnorm._BatchNorm


def compare(model: nn.Module, original: nn.Module, x: Tensor) -> None:
    """Inference, two training steps and inference again: outputs, gradients of what both have, statistics."""
    for training in (False, True, True, False):
        results = []
        for one in (model, original):
            inputs = x.clone().requires_grad_()
            one.zero_grad()
            y = one.train(training)(inputs)
            y.square().sum().backward()
            results.append((y.detach(), inputs.grad, {n: p.grad for n, p in one.named_parameters()}))
        (y, dx, grads), (expected_y, expected_dx, expected_grads) = results
        close(y, expected_y), close(dx, expected_dx)
        assert grads.keys() < expected_grads.keys()
        for name, grad in grads.items():
            close(grad, expected_grads[name])
    for name, value in model.named_buffers():
        if not name.endswith("running_mean"):
            close(value, original.get_buffer(name))


def check(model: nn.Module, *shape: int) -> Any:
    """Remove the biases of a copy, which has some."""
    used(model).double()
    original, x = copy.deepcopy(model), draw(*shape)
    removed = remove_dead_biases(model, x)
    assert removed is model
    compare(copy.deepcopy(model), original, x)
    return model


PAIRS: dict[str, tuple[list[nn.Module], tuple[int, ...]]] = {
    "conv": ([nn.Conv2d(3, 4, 3, padding=1), nn.BatchNorm2d(4)], (2, 3, 5, 5)),
    "transposed": ([nn.ConvTranspose2d(4, 4, 3, stride=2, groups=2), nn.BatchNorm2d(4)], (2, 4, 3, 3)),
    "linear": ([nn.Linear(3, 4), nn.BatchNorm1d(4)], (6, 3)),
    "features last": ([nn.Linear(3, 4), bn.BatchNorm1d(4, channel_dim=-1, activation="silu")], (6, 4, 3)),
    "without running statistics": ([nn.Conv1d(3, 4, 1), nn.BatchNorm1d(4, track_running_stats=False)], (2, 3, 5)),
    "without affine": ([nn.Conv1d(3, 4, 1), nn.Identity(), nn.BatchNorm1d(4, affine=False)], (2, 3, 5)),
    "renormalized": ([nn.Linear(3, 4), bn.BatchNorm1d(4, renorm=bn.Renorm(2.0, 1.0))], (6, 3)),
    "ghost batches": ([nn.Linear(3, 4), bn.BatchNorm1d(4, virtual_batch_size=3)], (6, 3)),
}


@pytest.mark.parametrize("name", PAIRS)
def test_a_dead_bias_goes(name: str) -> None:
    layers, shape = copy.deepcopy(PAIRS[name])
    model = check(nn.Sequential(*layers, nn.Sigmoid()), *shape)
    assert model[0].bias is None
    assert "0.bias" not in model.state_dict()
    last = f"{len(layers) - 1}"
    assert model.report.done == {last: "the bias of 0 is part of the running mean"}
    assert model.report.error < tolerances.AGAINST_TORCH[torch.float64][1]


def test_the_running_mean_is_without_the_bias() -> None:
    model = used(nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4)))
    mean, bias, buffer = model[1].running_mean.clone(), model[0].bias.detach().clone(), model[1].running_mean
    remove_dead_biases(model, draw(6, 3, dtype=torch.float32))
    assert model[1].running_mean is buffer
    assert torch.equal(buffer, (mean.double() - bias.double()).float())


def test_a_network() -> None:
    model = check(nn.Sequential(Block(3, projected=True), nn.Conv2d(3, 3, 1), nn.BatchNorm2d(3)), 2, 3, 6, 6)
    assert set(model.report.done) == {"0.downsample.1", "2"}
    assert model.report.left == {"0.bn1": "0.conv1 has no bias", "0.bn2": "0.conv2 has no bias"}


def test_parts_of_a_model_that_cannot_be_traced() -> None:
    model = check(Untraceable(nn.Sequential(nn.Conv2d(3, 3, 1), nn.BatchNorm2d(3)), nn.BatchNorm2d(3)), 2, 3, 5, 5)
    assert set(model.report.done) == {"parts.0.1"}
    assert model.report.left["parts.1"].startswith("the model is not traceable: ")


class Mine(nn.BatchNorm1d):
    """May do anything."""


def hooked(module: nn.Module) -> nn.Module:
    module.register_forward_hook(lambda *_: None)
    return module


LEFT: dict[str, tuple[nn.Module, tuple[int, ...], str]] = {
    "(N, L, C) with L == C": (
        nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4)),
        (5, 4, 4),
        "its channels are dimension 1 of (5, 4, 4), those of 0 dimension 2",
    ),
    "dropout between": (
        nn.Sequential(nn.Linear(4, 4), nn.Dropout(0.5), nn.BatchNorm1d(4)),
        (5, 4),
        "no linear layer stands directly before it",
    ),
    "an activation between": (
        nn.Sequential(nn.Linear(4, 4), nn.ReLU(), nn.BatchNorm1d(4)),
        (5, 4),
        "no linear layer stands directly before it",
    ),
    "another reader": (
        Calls(lambda m, x: m.norm(y := m.linear(x)) + y, linear=nn.Linear(4, 4), norm=nn.BatchNorm1d(4)),
        (5, 4),
        "the output of linear has 2 readers",
    ),
    "frozen": (
        nn.Sequential(nn.Linear(4, 4), bn.freeze(bn.BatchNorm1d(4))),
        (5, 4),
        "it is frozen and normalises by its running statistics, so that a bias matters",
    ),
    "another class": (nn.Sequential(nn.Linear(4, 4), Mine(4)), (5, 4), "Mine may do anything"),
    "hooks": (
        nn.Sequential(hooked(nn.Linear(4, 4)), nn.BatchNorm1d(4)),
        (5, 4),
        "0 has hooks, which would see other values",
    ),
    "another mode, another thing": (
        Calls(
            lambda m, x: m.norm(m.linear(x)) if m.training else m.linear(x),
            linear=nn.Linear(4, 4),
            norm=nn.BatchNorm1d(4),
        ),
        (5, 4),
        "the model is not traceable: it computes something else in training than in inference",
    ),
}


@pytest.mark.parametrize("name", LEFT)
def test_a_bias_stays_with_the_reason(name: str) -> None:
    model, shape, reason = LEFT[name]
    model = used(copy.deepcopy(model)).double()
    state = copy.deepcopy(model.state_dict())
    remove_dead_biases(model, draw(*shape))
    assert list(model.report.left.values()) == [reason]
    assert list(model.state_dict()) == list(state)
    assert all(torch.equal(value, state[key]) for key, value in model.state_dict().items())


def test_what_changes_the_output_is_undone(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(linear, "channel_axis", lambda layer, rank: 1)  # as if (N, L, C) were (N, C, L)
    model = used(nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4))).double()
    bias, state = model[0].bias, copy.deepcopy(model.state_dict())
    remove_dead_biases(model, draw(5, 4, 4))
    assert "without their biases, the model is off by" in model.report.left["1"]
    assert model[0].bias is bias
    assert all(torch.equal(value, state[key]) for key, value in model.state_dict().items())


def test_flags_and_mode_stay() -> None:
    model = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4)).train()
    remove_dead_biases(model, (draw(6, 3, dtype=torch.float32),))
    assert model[1].training
    assert model[1].num_batches_tracked == 0
    assert biases.remove_dead_biases(model, draw(6, 3, dtype=torch.float32)).report.left == {"1": "0 has no bias"}


def test_a_compiled_model() -> None:
    net = used(nn.Sequential(nn.Conv2d(3, 3, 1), nn.BatchNorm2d(3))).double()
    compiled, x = torch.compile(copy.deepcopy(net), backend="eager"), draw(2, 3, 4, 4)
    assert remove_dead_biases(compiled, x) is compiled
    assert compiled.report.done == {"1": "the bias of 0 is part of the running mean"}
    close(compiled.eval()(x), net.eval()(x))
