"""The linear example against all of its terms, and the shift of layer inputs against NumPy."""

from __future__ import annotations

import copy
import itertools
import math
from itertools import islice
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from batchnorm.study import shift, training
from batchnorm.study.experiment import Setting
from batchnorm.study.grid import Results
from batchnorm.study.networks import OURS, TORCH, Layers, perceptron
from batchnorm.study.shift import (
    DEEPER,
    EXPANDED,
    LESS,
    LINEAR,
    NETWORKS,
    PLAIN,
    UNFORESEEN,
    WITH,
    conclude,
    expand,
    layer_inputs,
    run,
    width_change,
)
from batchnorm.study.verdict import Verdict
from study.plans import TINY, carried_out
from support import tolerances

PLAN = TINY["shift"]


@pytest.mark.parametrize("weights", [[2.0], [1.0, 3.0], [0.5, -1.0, 2.0], [1.1, 0.9, 1.2, 0.8, 1.0, 1.3, -0.7]])
def test_every_term_is_written_out(weights: list[float]) -> None:
    """The 2^k products one by one, sorted by how many of their factors are updates."""
    rate = 0.3
    updates = [-rate * math.prod(weights[:i] + weights[i + 1 :]) for i in range(len(weights))]
    orders = [0.0] * (len(weights) + 1)
    for which in itertools.product((False, True), repeat=len(weights)):
        factors = [u if chosen else w for chosen, w, u in zip(which, weights, updates, strict=True)]
        orders[sum(which)] += math.prod(factors)
    assert expand(weights, rate) == pytest.approx(orders, rel=tolerances.STUDY_DOUBLE, abs=tolerances.STUDY_DOUBLE)


def test_the_article_s_three_layers() -> None:
    """(w1 - e g1)(w2 - e g2)(w3 - e g3) by hand, at weights of 1: gradients of 1, binomials of e."""
    assert expand([1.0] * 3, 0.1) == pytest.approx([1, -0.3, 0.03, -0.001])


def test_the_linear_example_is_a_gradient_step(setting: Setting) -> None:
    """Against torch's gradient of the product."""
    found = run(setting, PLAN, LINEAR, 5)["depths"]
    drawn = torch.randn(10, generator=torch.Generator().manual_seed(5), dtype=torch.float64)
    for depth, example in zip(PLAN.depths, found, strict=True):
        weights = (1 + 0.1 * drawn[:depth]).requires_grad_()
        old = weights.prod()
        (gradient,) = torch.autograd.grad(old, weights)
        step = (weights - 0.1 * gradient).prod() - old
        first = -0.1 * gradient.square().sum()
        assert example["step"] == pytest.approx(step.item(), rel=tolerances.STUDY_DOUBLE)
        assert example["orders"][0] == pytest.approx(first.item(), rel=tolerances.STUDY_DOUBLE)
        assert example["unforeseen"] == pytest.approx(
            ((step - first) / first).abs().item(), rel=tolerances.STUDY_DOUBLE, abs=tolerances.STUDY_DOUBLE
        )
        assert math.fsum(example["orders"]) == pytest.approx(step.item(), rel=tolerances.STUDY_DOUBLE)
        assert example["error"] < 1e-14


def test_shift_and_width_change() -> None:
    generator = np.random.default_rng(0)
    before, after = generator.normal(size=(50, 4)), 1.5 * generator.normal(size=(50, 4)) + 3
    moved = np.sqrt(np.mean((after.mean(0) - before.mean(0)) ** 2))
    widths = [np.sqrt(np.mean(x.var(0))) for x in (before, after)]
    a, b = torch.tensor(before), torch.tensor(after)
    assert shift.shift(a, b) == pytest.approx(moved / widths[0])
    assert width_change(a, b) == pytest.approx(np.log(widths[1] / widths[0]))
    assert width_change(b, a) == pytest.approx(np.log(widths[1] / widths[0]))


def test_a_dead_layer_and_a_diverged_one_have_bounds() -> None:
    dead, gone = torch.zeros(5, 2, dtype=torch.float64), torch.full((5, 2), math.nan, dtype=torch.float64)
    assert shift.shift(dead, dead) == 1e-6
    assert shift.shift(dead, gone) == 1e3
    assert shift.shift(dead, dead + 1) == 1e3
    assert width_change(dead, dead) == 1e-6


@pytest.mark.parametrize("layers", [OURS, TORCH], ids=lambda layers: layers.name)
@pytest.mark.parametrize("kind", NETWORKS)
def test_layer_inputs(layers: Layers, kind: str) -> None:
    """What the linear layers but the first receive, with the batch's own statistics; nothing is left changed."""
    network = perceptron(
        5,
        (7, 6),
        3,
        placement=NETWORKS[kind],
        layers=layers,
        generator=torch.Generator().manual_seed(0),
    ).eval()
    x = torch.randn(20, 5)
    before = copy.deepcopy(network.state_dict())
    found = layer_inputs(network, x)
    assert all(torch.equal(value, network.state_dict()[name]) for name, value in before.items())
    assert not network.training
    assert not any(module._forward_pre_hooks for module in network.modules())
    expected, y = [], x.double().numpy()
    for linear in [module for module in network if isinstance(module, nn.Linear)][:-1]:
        y = y @ linear.weight.detach().double().numpy().T
        if kind == WITH:
            y = (y - y.mean(0)) / np.sqrt(y.var(0) + 1e-5)
        y = np.maximum(y, 0)
        expected.append(y)
    assert len(found) == 2
    for a, b in zip(found, expected, strict=True):
        np.testing.assert_allclose(a.numpy(), b, atol=tolerances.STUDY)


@pytest.mark.parametrize("kind", NETWORKS)
def test_one_step_is_measured_by_itself(setting: Setting, kind: str) -> None:
    """Against a training by hand: the network just before and just after the steps 6 and 12."""
    found = run(setting, PLAN, kind, 0)
    assert found["steps"] == [6, 12]
    generator = torch.Generator().manual_seed(0)
    network = perceptron(64, PLAN.hidden, 10, placement=NETWORKS[kind], layers=OURS, generator=generator)
    descent = training.descend(network, setting.data.train, learning_rate=0.1, batch_size=32, generator=generator)
    states = [copy.deepcopy(network)]
    for _ in islice(descent, 12):
        states.append(copy.deepcopy(network))
    x = setting.data.train.inputs[: PLAN.watched]
    by_step = []
    for step in (6, 12):
        pairs = zip(layer_inputs(states[step - 1], x), layer_inputs(states[step], x), strict=True)
        by_step.append([shift.shift(*pair) for pair in pairs])
    np.testing.assert_allclose(found["shift_by_layer"], np.exp(np.log(by_step).mean(0)), rtol=tolerances.STUDY_DOUBLE)
    np.testing.assert_allclose(found["shift_by_step"], np.exp(np.log(by_step).mean(1)), rtol=tolerances.STUDY_DOUBLE)


def made(shifts: list[float]) -> dict[str, Any]:
    return {"steps": [6], "shift_by_layer": shifts, "spread_by_layer": [0.01] * 3, "shift_by_step": [0.1]}


@pytest.mark.parametrize(
    ("plain", "ours", "fails", "words"),
    [
        ([0.1, 0.2, 0.4], [0.01, 0.02, 0.01], set(), "did reduce the shift."),
        ([0.1, 0.2, 0.4], [0.3, 0.3, 0.3], {LESS}, "did not reduce the shift; it was larger with it."),
        ([0.4, 0.2, 0.1], [0.01, 0.02, 0.01], {DEEPER}, "did reduce the shift."),
    ],
)
def test_verdicts(setting: Setting, plain: list[float], ours: list[float], fails: set[Any], words: str) -> None:
    results: dict[Any, Any] = {}
    plan = shift.Plan(seeds=6, hidden=(16,) * 3)
    for seed in range(6):
        results[LINEAR, seed] = run(setting, plan, LINEAR, seed)
        results[PLAIN, seed], results[WITH, seed] = made(plain), made(ours)
    found = conclude(setting, plan, Results(results))
    assert {f.claim for f in found.findings if f.verdict is Verdict.NOT_SUPPORTED} == fails
    assert {f.claim for f in found.findings if f.verdict is Verdict.SUPPORTED} == {
        EXPANDED,
        UNFORESEEN,
        DEEPER,
        LESS,
    } - fails
    assert words in " ".join(found.summary)
    ratio = next(f.interval for f in found.findings if f.claim is LESS)
    assert ratio.estimate == pytest.approx(np.prod(np.divide(plain, ours)) ** (1 / 3))


def test_with_few_seeds_nothing_is_said(setting: Setting) -> None:
    found = carried_out(shift.EXPERIMENT, setting, PLAN)
    by_claim = {finding.claim: finding.verdict for finding in found.findings}
    assert by_claim[LESS] is Verdict.INCONCLUSIVE
    assert "cannot be told" in " ".join(found.summary)
    assert by_claim[EXPANDED] is Verdict.SUPPORTED
    assert [row[0] for row in found.tables[0].rows] == [str(depth) for depth in range(1, 11)]
    assert [row[1] for row in found.tables[0].rows][:3] == ["1", "3", "7"]
