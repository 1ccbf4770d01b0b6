"""Passes that activation checkpointing repeats in the backward pass: committed once, and the same operators."""

from __future__ import annotations

import copy
import functools
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import CheckpointPolicy, checkpoint, create_selective_checkpoint_contexts

import batchnorm as bn
from batchnorm import functional
from support.comparison import close


@pytest.mark.parametrize("compiled", [False, True])
@pytest.mark.parametrize("reentrant", [False, True])
def test_a_pass_that_checkpointing_repeats_is_committed_once(compiled: bool, reentrant: bool) -> None:
    torch.manual_seed(0)
    x, mean, var = torch.randn(6, 3, 4), torch.randn(3), torch.rand(3) + 0.5
    moves = functional.batch_norm(x, expected := mean.clone(), var.clone(), training=True)

    def step(x: Tensor) -> Tensor:
        return functional.batch_norm(x, mean, var, training=True)

    run = torch.compile(step, backend="aot_eager") if compiled else step
    leaf = x.requires_grad_()
    y = checkpoint(run, leaf, use_reentrant=reentrant)
    y.square().sum().backward()
    close(y.detach(), moves.detach())
    close(mean, expected)


SAVED = {
    "all": lambda op: True,
    "nothing": lambda op: False,
    "convolutions": lambda op: "conv" in str(op),
    "batch norm": lambda op: "batchnorm" in str(op),
}


@pytest.mark.parametrize("saved", SAVED)
@pytest.mark.parametrize("options", [{}, {"virtual_batch_size": 2}, {"activation": "silu"}], ids=str)
def test_selective_checkpointing(saved: str, options: dict[str, Any]) -> None:
    torch.manual_seed(0)
    net = nn.Sequential(nn.Conv2d(3, 4, 1), bn.BatchNorm2d(4, **options), nn.Conv2d(4, 4, 1), bn.BatchNorm2d(4))
    plain = copy.deepcopy(net)
    x = torch.randn(6, 3, 5, 5)

    def policy(ctx: object, op: object, *args: object, **kwargs: object) -> CheckpointPolicy:
        return CheckpointPolicy.MUST_SAVE if SAVED[saved](op) else CheckpointPolicy.PREFER_RECOMPUTE

    contexts = functools.partial(create_selective_checkpoint_contexts, policy)
    a, b = x.clone().requires_grad_(), x.clone().requires_grad_()
    checkpoint(net, a, use_reentrant=False, context_fn=contexts).square().sum().backward()
    plain(b).square().sum().backward()
    assert torch.equal(a.grad, b.grad)
    for (name, actual), expected in zip(net.state_dict().items(), plain.state_dict().values(), strict=True):
        assert torch.equal(actual, expected), name


@pytest.mark.parametrize("reentrant", [False, True])
def test_a_compiled_network_counts_once(reentrant: bool) -> None:
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(3, 4), bn.BatchNorm1d(4, activation="relu"), bn.BatchNorm1d(4, momentum=None))
    plain = copy.deepcopy(net)
    compiled = torch.compile(net, backend="aot_eager", fullgraph=True)
    x = torch.randn(6, 3)
    for _ in range(3):
        checkpoint(compiled, x.clone().requires_grad_(), use_reentrant=reentrant).square().sum().backward()
        plain(x).square().sum().backward()
    for (name, actual), expected in zip(net.state_dict().items(), plain.state_dict().values(), strict=True):
        close(actual, expected, name=name)


@pytest.mark.parametrize("mark", ["disable_patch_batchnorm", "_bn_momentum_patched"])
def test_workarounds_for_repeated_passes_leave_our_layers_alone(mark: str) -> None:
    # One kind keeps statistics still in the first pass, another lets both passes weigh half: both skip what has a mark.
    assert getattr(bn.BatchNorm2d(3), mark)
    assert getattr(bn.convert(nn.BatchNorm2d(3)), mark)
    assert not hasattr(bn.revert(bn.convert(nn.BatchNorm2d(3))), mark)
