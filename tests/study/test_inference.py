"""Single observations at inference, against NumPy and hand-made numbers."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from batchnorm.study import inference, training
from batchnorm.study.experiment import Conclusion, Setting
from batchnorm.study.grid import Results
from batchnorm.study.inference import (
    ALONE,
    AVERAGE,
    COMPANY,
    EITHER,
    EXACT,
    MEANINGLESS,
    OWN,
    PERCEPTRON,
    POOLED,
    POPULATION,
    RESIDUAL,
    RUNNING,
    Plan,
    by_own_statistics,
    conclude,
    run,
)
from batchnorm.study.networks import OURS, TORCH, Layers, perceptron, residual
from batchnorm.study.verdict import Verdict
from study.plans import TINY, carried_out
from support import tolerances

PLAN = TINY["inference"]


@pytest.mark.parametrize("layers", [OURS, TORCH], ids=lambda layers: layers.name)
def test_own_statistics_leave_a_perceptron_its_betas(layers: Layers) -> None:
    """Variance 0, so each channel comes out as beta: by NumPy from the second linear map on."""
    generator = torch.Generator().manual_seed(0)
    network = perceptron(5, (7,), 3, placement="before", layers=layers, generator=generator)
    beta = torch.randn(7, generator=generator)
    network[2].norm.bias.data.copy_(beta)  # type: ignore[union-attr]  # modules of a Sequential
    before = copy.deepcopy(network.state_dict())
    outputs = by_own_statistics(network, torch.randn(4, 5))
    last = network[3]
    assert isinstance(last, nn.Linear)
    expected = np.maximum(beta.numpy(), 0) @ last.weight.detach().numpy().T
    np.testing.assert_allclose(outputs.numpy(), np.tile(expected, (4, 1)), atol=tolerances.STUDY_TRAINED)
    assert all(torch.equal(value, network.state_dict()[name]) for name, value in before.items())


def test_own_statistics_of_an_image_are_those_of_its_pixels() -> None:
    """Against instance normalisation, which is that for any number of images."""
    generator = torch.Generator().manual_seed(0)
    network = residual((1, 6, 6), 3, 1, 2, placement="before", layers=OURS, generator=generator)
    images = torch.randn(3, 1, 6, 6)
    normal = nn.functional.instance_norm
    with torch.no_grad():
        x = torch.relu(normal(network[0](images)))
        block = network[2]
        y = torch.relu(normal(block.map1(x)))  # type: ignore[operator]  # a module's attributes are unknown to mypy
        y = torch.relu(normal(block.map2(y)) + x)  # type: ignore[operator]
        expected = nn.Sequential(*network[3:])(y)
    torch.testing.assert_close(
        by_own_statistics(network, images), expected, rtol=tolerances.STUDY, atol=tolerances.STUDY
    )


class Neighbours(nn.Module):
    """In training answers with the batch's commonest sign, otherwise with the sample's own."""

    def forward(self, x: Tensor) -> Tensor:
        signs = torch.sign(x[:, 0])
        if self.training:
            signs = signs.sum().sign().expand(len(x))
        return torch.stack([-signs, signs], 1)


def test_company() -> None:
    x = torch.cat([torch.ones(30, 1), -torch.ones(15, 1)])

    def changed(size: int, seed: int = 0) -> float:
        return inference._company(Neighbours(), x, size, torch.Generator().manual_seed(seed))

    assert 0 < changed(3) < 1
    assert changed(45) == 0
    generator = torch.Generator().manual_seed(0)
    answers = []
    for _ in range(2):
        order = torch.randperm(45, generator=generator)
        majority = x[order, 0].reshape(15, 3).sum(1).sign()
        answers.append(torch.empty(45).index_copy(0, order, majority.repeat_interleave(3)))
    assert changed(3) == pytest.approx((answers[0] != answers[1]).float().mean().item())


def test_no_batch_of_one_is_made_up() -> None:
    network = nn.Sequential(nn.Linear(3, 2), nn.BatchNorm1d(2))
    assert 0 <= inference._company(network, torch.randn(9, 3), 4, torch.Generator().manual_seed(0)) <= 1


@pytest.mark.parametrize("kind", [PERCEPTRON, RESIDUAL])
def test_numbers_are_of_the_network_they_name(setting: Setting, kind: str) -> None:
    """A training by hand; the exact statistics by hand from the layer upwards, the running ones as trained."""
    found = run(setting, PLAN, kind, 0)
    generator = torch.Generator().manual_seed(0)
    network = inference._network(setting, PLAN, kind, generator)
    descent = training.descend(network, setting.data.train, learning_rate=0.1, batch_size=32, generator=generator)
    for _ in range(PLAN.steps):
        next(descent)
    inputs, labels = setting.data.test.inputs[: PLAN.shown], setting.data.test.labels[: PLAN.shown]
    outputs = training.infer(network, inputs)
    assert found["shown"] == PLAN.shown
    assert found["accuracy"][RUNNING] == training.accuracy(outputs.argmax(1), labels)
    assert found["loss"][RUNNING] == pytest.approx(
        nn.functional.cross_entropy(outputs, labels).item(), rel=tolerances.STUDY
    )
    # With the whole training set as one batch, its own statistics are the exact ones (but for m / (m - 1)).
    whole = copy.deepcopy(network).train()
    for module in whole.modules():
        if isinstance(module, nn.BatchNorm1d | nn.BatchNorm2d):
            module.momentum = 1.0
    with torch.no_grad():
        whole(setting.data.train.inputs)
    exact = nn.functional.cross_entropy(training.infer(whole, inputs), labels).item()
    assert found["loss"][EXACT] == pytest.approx(exact, rel=tolerances.STUDY_TRAINED)
    assert set(found["accuracy"]) == {OWN, RUNNING, AVERAGE, POOLED, EXACT}
    # 20 steps in, the running average still holds much of where it started.
    assert abs(found["loss"][RUNNING] - found["loss"][EXACT]) > 0.01


def made(
    own: float = 0.1, running: float = 0.9, exact: float = 0.9, alike: float = 1.0, company: float = 0.2
) -> dict[str, Any]:
    accuracy = {OWN: own, **dict.fromkeys(POPULATION, running), EXACT: exact}
    return {
        "shown": 20,
        "accuracy": accuracy,
        "loss": dict.fromkeys(POPULATION, 0.1),
        "alike": {**dict.fromkeys(POPULATION, 1.0), POOLED: alike},
        "company": company,
    }


def concluded(setting: Setting, made_for: Callable[[str], dict[str, Any]]) -> Conclusion:
    """From the same numbers for six seeds, by the network."""
    results = Results({(network, seed): made_for(network) for seed in range(6) for network in MEANINGLESS})
    return conclude(setting, Plan(seeds=6), results)


@pytest.mark.parametrize(
    ("change", "fails"),
    [
        ({}, set()),
        ({"own": 0.8}, set(MEANINGLESS.values())),
        ({"company": 0.001}, {COMPANY}),
        ({"alike": 0.9}, {ALONE}),
        ({"exact": 0.95}, {EITHER}),
        ({"exact": 0.85}, {EITHER}),
    ],
)
def test_each_claim_has_its_own_number(setting: Setting, change: dict[str, float], fails: set[Any]) -> None:
    found = concluded(setting, lambda _: made(**change))
    assert {f.claim for f in found.findings if f.verdict is Verdict.NOT_SUPPORTED} == fails
    assert {f.claim for f in found.findings if f.verdict is Verdict.SUPPORTED} == {
        *MEANINGLESS.values(),
        COMPANY,
        ALONE,
        EITHER,
    } - fails


def test_networks_are_judged_apart(setting: Setting) -> None:
    found = concluded(setting, lambda network: made(own=0.1 if network == PERCEPTRON else 0.85))
    verdicts = {finding.claim: finding.verdict for finding in found.findings}
    assert verdicts[MEANINGLESS[PERCEPTRON]] is Verdict.SUPPORTED
    assert verdicts[MEANINGLESS[RESIDUAL]] is Verdict.NOT_SUPPORTED
    chance = setting.data.chance
    lost = next(f.interval.estimate for f in found.findings if f.claim is MEANINGLESS[RESIDUAL])
    assert lost == pytest.approx(0.05 / (0.9 - chance))
    assert "The residual network answered 85.0 % rightly by the sample's own" in " ".join(found.summary)


def test_where_nothing_was_learnt_nothing_is_lost(setting: Setting) -> None:
    found = concluded(setting, lambda _: made(own=0.1, running=0.05, exact=0.05))
    assert found.findings[0].interval.estimate == 0


@pytest.mark.parametrize("layers", [OURS, TORCH], ids=lambda layers: layers.name)
def test_it_runs_with_either_layer(setting: Setting, layers: Layers) -> None:
    found = carried_out(inference.EXPERIMENT, Setting(setting.data, layers), PLAN)
    assert len(found.tables[0].rows) == 2 * 5
    assert len(found.numbers["runs"]) == 2 * PLAN.seeds
