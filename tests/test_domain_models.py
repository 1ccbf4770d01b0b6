"""Models whose layers have domains: compiled, exported, checkpointed, copied, fused and folded."""

from __future__ import annotations

import copy
import io
import pickle
from typing import Any

import pytest
import torch
from test_domains import DOMAIN, NAMES, agree, batch, layer, mixed, state
from torch import Tensor, nn
from torch.utils.checkpoint import CheckpointError, checkpoint

import batchnorm as bn
from batchnorm import errors
from support import tolerances
from support.comparison import close


def network(**options: Any) -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv1d(3, 3, 2), layer(**options))


@pytest.mark.parametrize("choice", ["adversarial", DOMAIN])
@pytest.mark.parametrize("training", [True, False])
def test_compiled_models(choice: Any, training: bool) -> None:
    torch._dynamo.reset()
    one = network(own_affine=True).train(training)
    other = copy.deepcopy(one)
    compiled = torch.compile(one, backend="aot_eager", fullgraph=True)
    for number, now in enumerate((choice, choice, "clean", 1 - DOMAIN)):
        x = batch(3, 5, seed=number)
        with bn.domain(one, now), bn.domain(other, now):
            y, expected = compiled(x), other(x)
        close(y.detach(), expected.detach(), tolerances.OUTPUT)
    for name, value in state(other).items():
        close(one.state_dict()[name], value, tolerances.STATISTIC, name=name)


def test_the_context_inside_a_compiled_function() -> None:
    torch._dynamo.reset()
    one = network()
    other = copy.deepcopy(one)
    x = batch(3, 5)

    @torch.compile(backend="aot_eager")
    def step(x: Tensor) -> Tensor:
        with bn.domain(one, "adversarial"):
            return one(x)  # type: ignore[no-any-return]  # a module's

    with bn.domain(other, "adversarial"):
        close(step(x).detach(), other(x).detach(), tolerances.OUTPUT)


@pytest.mark.parametrize("choice", ["adversarial", DOMAIN, {"clean": 1, "adversarial": 3}], ids=["one", "each", "both"])
def test_exported_models(choice: Any) -> None:
    one = network()
    mixed(one, batch(3, 5))
    x = batch(3, 5, seed=2)
    with bn.domain(one.eval(), choice):
        program = torch.export.export(one, (x,))
        expected = one(x)
    close(program.module()(x).detach(), expected.detach(), tolerances.OUTPUT * 2)
    targets = {str(node.target) for node in program.graph.nodes if node.op == "call_function"}
    assert ("aten.batch_norm.default" in targets) is not isinstance(choice, Tensor)


def test_what_cannot_be_exported_says_so() -> None:
    one = network()
    with bn.domain(one, DOMAIN), pytest.raises(errors.TransformError, match="samples of several domains"):
        torch.export.export(one, (batch(3, 5),))
    with pytest.raises(errors.OptionError, match=r"batchnorm\.domain"):
        torch.export.export(one.eval(), (batch(3, 5),))


@pytest.mark.parametrize("how", ["reentrant", "inside", "contexts"])
def test_activation_checkpointing(how: str) -> None:
    one = network(own_affine=True)
    other = copy.deepcopy(one)
    x = batch(3, 5).requires_grad_()
    if how == "contexts":
        contexts = lambda: (bn.domain(one, DOMAIN), bn.domain(one, DOMAIN))  # noqa: E731 - one expression
        y = checkpoint(one, x, use_reentrant=False, context_fn=contexts)
        y.square().sum().backward()
    else:
        with bn.domain(one, DOMAIN):
            y = checkpoint(one, x, use_reentrant=how == "reentrant")
            y.square().sum().backward()
    expected = mixed(other, x.detach())
    close(x.grad, expected["dx"], tolerances.GRADIENT)
    for name, value in state(one).items():  # each batch was committed once
        assert torch.equal(value, expected[name]), name


def test_checkpointing_whose_choice_is_over_says_so() -> None:
    one = network()
    with bn.domain(one, DOMAIN):
        y = checkpoint(one, batch(3, 5).requires_grad_(), use_reentrant=False)
    with pytest.raises(errors.OptionError, match="activation checkpointing repeats"):
        y.sum().backward()


@pytest.mark.parametrize("determinism_check", ["default", "none"])
@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize(
    ("first", "again"),
    [("clean", "adversarial"), (DOMAIN, DOMAIN.flip(0)), (DOMAIN, "clean"), ("clean", DOMAIN)],
    ids=str,
)
def test_checkpointing_inside_another_choice_raises_instead_of_wrong_gradients(
    first: str | torch.Tensor, again: str | torch.Tensor, training: bool, determinism_check: str
) -> None:
    one = network().train(training)
    with bn.domain(one, first):
        y = checkpoint(one, batch(3, 5).requires_grad_(), use_reentrant=False, determinism_check=determinism_check)
    # Torch's own, where it compares, or where another number of tensors is saved for other domains; else ours.
    message = "repeated for other domains|different metadata|different number of tensors"
    with bn.domain(one, again), pytest.raises((errors.OptionError, CheckpointError), match=message):
        y.sum().backward()
    assert all(p.grad is None for p in one.parameters())


def test_a_copy_of_a_layer_with_one_domain_needs_no_choice() -> None:
    layer = bn.BatchNorm1d(4, domains=("only",))
    with bn.domain(layer, "only"):
        copied = copy.deepcopy(layer)
    x = torch.randn(8, 4)
    assert torch.equal(copied(x), layer(x))


@pytest.mark.parametrize("how", ["deepcopy", "pickle", "save"])
def test_copies_have_the_domains_and_no_choice(how: str) -> None:
    one = network(own_affine=True)
    mixed(one, batch(3, 5))
    with bn.domain(one, "adversarial"):
        if how == "deepcopy":
            copied = copy.deepcopy(one)
        elif how == "pickle":
            copied = pickle.loads(pickle.dumps(one))
        else:
            torch.save(one, file := io.BytesIO())
            copied = torch.load(io.BytesIO(file.getvalue()), weights_only=False)
        one(batch(3, 5))
    with pytest.raises(errors.OptionError):
        copied(batch(3, 5))
    assert copied[1].domains == NAMES
    with bn.domain(copied, DOMAIN):
        copied(batch(3, 5))


def test_half_precision_keeps_wide_statistics() -> None:
    one = network().to(torch.bfloat16)
    with bn.domain(one, DOMAIN):
        assert one(batch(3, 5).bfloat16()).dtype == torch.bfloat16
    assert {b.dtype for b in one.buffers()} == {torch.float32, torch.int64}
    plain = network()
    with torch.autocast("cpu", dtype=torch.bfloat16), bn.domain(plain, DOMAIN):
        assert plain(batch(3, 5)).dtype == torch.bfloat16


def test_fused_and_folded() -> None:
    one = nn.Sequential(*network(), nn.ReLU())
    mixed(one, batch(3, 5))
    unfused = copy.deepcopy(one)
    bn.fuse(one)
    assert one.report.entries[0].done
    x = batch(3, 5)
    agree(mixed(one, x), mixed(unfused, x))
    unfused.eval()
    for choice in ("adversarial", {"clean": 1, "adversarial": 3}):
        folded = bn.fold(unfused, x, domain=choice)
        assert not any(isinstance(m, bn.BatchNorm) for m in folded.modules())
        with bn.domain(unfused, choice):
            close(folded(x).detach(), unfused(x).detach(), tolerances.GRADIENT * 5)
    with pytest.raises(errors.OptionError, match="Pass domain="):
        bn.fold(unfused, x)
