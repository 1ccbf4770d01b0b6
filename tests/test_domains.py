"""Layers with domains: whole batches, mixed ones and mixtures, with each option of a layer."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import batchnorm as bn
from batchnorm import errors, functional
from batchnorm.domains import mixture
from batchnorm.statistics import RunningStatistics
from support import oracle, tolerances
from support.comparison import close

NAMES = ("clean", "adversarial")
DOMAIN = torch.tensor([0, 1, 1, 0, 1, 0])
Results = dict[str, Tensor]


def batch(*shape: int, seed: int = 0) -> Tensor:
    """Samples of `DOMAIN`, each domain with moments of its own."""
    x = torch.randn(len(DOMAIN), *shape, generator=torch.Generator().manual_seed(seed))
    return x + 4 * DOMAIN.view(-1, *[1] * len(shape))


def layer(**options: Any) -> bn.BatchNorm:
    made = bn.BatchNorm(3, **{"domains": NAMES, **options})
    generator = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for parameter in made.parameters():
            parameter.copy_(torch.rand(parameter.shape, generator=generator) + 0.5)
    return made


def state(module: nn.Module) -> Results:
    return {name: value.clone() for name, value in module.state_dict().items()}


def mixed(module: nn.Module, x: Tensor, choice: Any = DOMAIN, **given: Any) -> Results:
    """One step by a mixed batch: output, gradients, and what the layer keeps."""
    leaf = x.clone().requires_grad_()
    module.zero_grad()
    with bn.domain(module, choice):
        y = module(leaf, **given)
    y.square().sum().backward()
    gradients = {f"d {name}": p.grad for name, p in module.named_parameters() if p.grad is not None}
    return {"y": y.detach(), "dx": leaf.grad, **gradients, **state(module)}


def separate(module: nn.Module, x: Tensor, **given: Tensor) -> Results:
    """The same, by a pass for each domain."""
    module.zero_grad()
    y, dx = torch.zeros_like(x), torch.zeros_like(x)
    for number, name in enumerate(NAMES):
        ours = number == DOMAIN
        leaf = x[ours].clone().requires_grad_()
        with bn.domain(module, name):
            own = module(leaf, **{key: value[ours] for key, value in given.items()})
        own.square().sum().backward()
        y[ours], dx[ours] = own.detach(), leaf.grad
    gradients = {f"d {name}": p.grad for name, p in module.named_parameters() if p.grad is not None}
    return {"y": y, "dx": dx, **gradients, **state(module)}


def agree(actual: Results, expected: Results) -> None:
    assert actual.keys() == expected.keys()
    for name, value in expected.items():
        bound = tolerances.GRADIENT * 20 if name.startswith("d ") else tolerances.GRADIENT
        close(actual[name], value, bound, name=name)


# --- mixed batches are separate passes -------------------------------------------------------------------------------

OPTIONS: dict[str, dict[str, Any]] = {
    "plain": {},
    "own affine": {"own_affine": True},
    "without affine": {"affine": False},
    "without bias": {"bias": False, "own_affine": True},
    "activation": {"activation": "gelu"},
    "average of all batches": {"momentum": None},
    "ghost batches": {"virtual_batch_size": 2, "own_affine": True},
    "renorm": {"renorm": bn.Renorm(rmax=1.5, dmax=0.5), "own_affine": True},
    "channels last": {"channel_dim": -1},
    "float64": {"dtype": torch.float64},
}


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("name", OPTIONS)
def test_a_mixed_batch_is_a_pass_for_each_domain(name: str, training: bool) -> None:
    one = layer(**OPTIONS[name])
    other = copy.deepcopy(one)
    for step in range(3):
        x = batch(3, 5, seed=step) if name != "channels last" else batch(5, 3, seed=step)
        x = x.to(OPTIONS[name].get("dtype", torch.float32))
        # Running statistics first, so that inference has some to tell apart.
        agree(mixed(one.train(training or step == 0), x), separate(other.train(training or step == 0), x))
    assert not torch.equal(one.running_mean, one.statistics_of("adversarial").mean)


@pytest.mark.parametrize("kind", [torch.bool, torch.float32])
def test_masks(kind: torch.dtype) -> None:
    one = layer(own_affine=True)
    drawn = torch.rand(6, 5, generator=torch.Generator().manual_seed(0))
    mask = (drawn > 0.3).to(kind)
    x = batch(3, 5)
    x[~mask.bool().unsqueeze(1).expand_as(x)] = 1e9  # padding
    agree(mixed(one, x, mask=mask), separate(copy.deepcopy(layer(own_affine=True)), x, mask=mask))


def test_residuals_and_an_activation_of_the_call() -> None:
    x, residual = batch(3, 5), batch(3, 5, seed=1)
    one, other = layer(), layer()
    with bn.domain(one, DOMAIN), bn.domain(other, DOMAIN):
        y = one(x, residual=residual, activation="relu")
        close(y, (other(x) + residual).relu(), tolerances.OUTPUT * 4)


@pytest.mark.parametrize(
    "switches",
    [{}, {"normalization": False}, {"statistics": False, "normalization": True}, {"statistics": False, "affine": True}],
    ids=str,
)
def test_frozen_layers(switches: dict[str, bool]) -> None:
    one = layer(own_affine=True)
    other = copy.deepcopy(one)
    x = batch(3, 5)
    agree(mixed(one, x), separate(other, x))
    bn.freeze(one, **switches)
    bn.freeze(other, **switches)
    before = state(one)
    found = mixed(one, x)
    agree(found, separate(other, x))
    moved = any(not torch.equal(value, before[name]) for name, value in state(one).items())
    assert moved is not switches.get("statistics", True)
    assert all(p.requires_grad is not switches.get("affine", True) for p in one.parameters())
    assert not any(name.startswith("d ") for name in found) or not switches.get("affine", True)
    bn.unfreeze(one)
    assert all(p.requires_grad for p in one.parameters())


def test_deferred_commits_each_domain_once() -> None:
    one, other = layer(), layer()
    parts = [(batch(3, 5, seed=seed), choice) for seed, choice in ((0, DOMAIN), (1, 1 - DOMAIN), (2, "clean"))]
    with bn.deferred(one):
        for x, choice in parts:
            with bn.domain(one, choice):
                one(x)
        assert one.statistics_of(0).num_batches_tracked == 0
    numbers = torch.cat([DOMAIN, 1 - DOMAIN, torch.zeros_like(DOMAIN)])
    with bn.domain(other, numbers):
        other(torch.cat([x for x, _ in parts]))
    for name, value in state(other).items():
        close(one.state_dict()[name], value, tolerances.STATISTIC, name=name)


@pytest.mark.parametrize("fused", [True, False])
def test_of_a_domain_without_samples_nothing_moves(fused: bool) -> None:
    one = layer() if fused else layer(renorm=bn.Renorm())
    before = state(one)
    with bn.domain(one, torch.zeros(6, dtype=torch.int64)):
        one(batch(3, 5))
    for name, value in state(one).items():
        assert torch.equal(value, before[name]) is (name.endswith("adversarial") or name in ("weight", "bias")), name


def test_one_value_for_each_channel_names_the_domain_and_changes_nothing() -> None:
    one = layer()
    before = state(one)
    with bn.domain(one, [0, 0, 0, 1, 0, 0]), pytest.raises(errors.CountError, match="'adversarial'"):
        one(batch(3))
    assert all(torch.equal(value, before[name]) for name, value in state(one).items())
    with bn.domain(one.eval(), [0, 0, 0, 1, 0, 0]):
        one(batch(3))


def test_what_is_not_finite_is_skipped_in_its_domain_alone() -> None:
    one = layer()
    x = batch(3, 5)
    x[1, 2] = float("nan")  # of the second domain
    with bn.domain(one, DOMAIN):
        one(x)
    assert one.statistics_of("clean").num_batches_skipped.tolist() == [0, 0, 0]
    assert one.statistics_of("adversarial").num_batches_skipped.tolist() == [0, 0, 1]
    assert one.statistics_of("adversarial").mean[2] == 0
    assert one.running_mean[2] != 0


def test_an_input_of_its_own_memory_is_written_over() -> None:
    one = layer(inplace=True).eval()
    for choice in (DOMAIN, "clean", {"clean": 1, "adversarial": 1}):
        x = batch(3, 5)
        with torch.no_grad(), bn.domain(one, choice):
            expected = layer(own_affine=False).eval()
            expected.load_state_dict(one.state_dict())
            with bn.domain(expected, choice):
                wanted = expected(x)
            assert one(x).data_ptr() == x.data_ptr()
        close(x, wanted, tolerances.OUTPUT)


# --- inference -------------------------------------------------------------------------------------------------------


def test_inference_by_the_oracle() -> None:
    one = layer(own_affine=True, activation="silu")
    for seed in range(3):
        mixed(one, batch(3, 5, seed=seed))
    x = batch(3, 5, seed=9)
    with bn.domain(one.eval(), DOMAIN):
        y = one(x)
    for number, row in enumerate(one._rows):
        tensors = (getattr(one, name).detach().double().numpy() for name in (row.mean, row.var, row.weight, row.bias))
        z = oracle.preactivation(x[number == DOMAIN].double().numpy(), *tensors, None, 1e-5)
        close(y[number == DOMAIN].detach(), oracle.activate(z, "silu"), tolerances.OUTPUT * 2)


@pytest.mark.parametrize("weights", [(0.7, 0.3), (1.0, 0.0), (3, 5)])
def test_a_mixture_is_the_population_that_has_both_parts(weights: tuple[float, float]) -> None:
    """The oracle: samples of both domains, as many as they weigh, in one batch."""
    rng = np.random.default_rng(0)
    parts = [rng.normal(shift, spread, (400, 3, 1)) for shift, spread in ((0, 1), (5, 3))]
    statistics = [
        RunningStatistics(torch.from_numpy(part.mean((0, 2))), torch.from_numpy(part.var((0, 2)))) for part in parts
    ]
    sample_weights = np.concatenate([np.full((400, 1), weight) for weight in weights])
    n, expected_mean, m2 = oracle.moments(np.concatenate(parts), weights=sample_weights)
    mean, var = mixture(tuple(weight / sum(weights) for weight in weights), statistics)
    close(mean, expected_mean, tolerances.STATISTIC)
    close(var, m2 / n, relative=tolerances.STATISTIC)

    one = layer().eval()
    for name, (part_mean, part_var, *_) in zip(NAMES, statistics, strict=True):
        one.statistics_of(name).mean.copy_(part_mean)
        one.statistics_of(name).var.copy_(part_var)
    x = batch(3, 5)
    with bn.domain(one, dict(zip(NAMES, weights, strict=True))):
        y = one(x)
    close(y, functional.batch_norm(x, mean, var, one.weight, one.bias), tolerances.OUTPUT * 2)


def test_without_a_choice_training_and_inference_say_what_to_write() -> None:
    one = layer()
    for training in (True, False):
        with pytest.raises(errors.OptionError, match=r'domains "clean", "adversarial".*with batchnorm\.domain'):
            one.train(training)(batch(3, 5))
    assert "BatchNorm(3), number" in str(_error(lambda: one(batch(3, 5))))


def test_a_mixture_is_for_inference_and_for_statistics() -> None:
    both = {"clean": 1, "adversarial": 1}
    one = layer()
    with bn.domain(one, both), pytest.raises(errors.OptionError, match="in training"):
        one(batch(3, 5))
    own = layer(own_affine=True).eval()
    with bn.domain(own, both), pytest.raises(errors.OptionError, match="own_affine=True"):
        own(batch(3, 5))
    bn.freeze(one)
    with bn.domain(one, both):
        one(batch(3, 5))  # by running statistics


def test_one_domain_needs_no_choice() -> None:
    one, plain = layer(domains=("only",)), layer(domains=None)
    x = batch(3, 5)
    assert torch.equal(one(x), plain(x))
    with bn.domain(one, "only"):
        assert torch.equal(one(x), plain(x))
    assert torch.equal(one.eval()(x), plain.eval()(x))
    assert state(one).keys() == state(plain).keys()


def _error(work: Callable[[], object]) -> BaseException:
    with pytest.raises(errors.BatchNormError) as caught:
        work()
    return caught.value
