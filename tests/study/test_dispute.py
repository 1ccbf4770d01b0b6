"""The dispute: what is measured at a step, and what is said of it."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from batchnorm.study import dispute, training
from batchnorm.study.dispute import (
    CLAIMS,
    EXPLAINS,
    GRADIENTS,
    LOSS,
    NETWORKS,
    NOISIER,
    NOISY,
    PLAIN,
    PREDICTIVE,
    SMOOTH,
    STILL,
    WITH,
    Plan,
    conclude,
    run,
)
from batchnorm.study.experiment import Setting
from batchnorm.study.grid import Results
from batchnorm.study.networks import OURS, TORCH, Layers
from batchnorm.study.noise_injection import Noise
from batchnorm.study.verdict import Verdict
from study.plans import TINY, carried_out
from support import tolerances

PLAN = TINY["dispute"]


def weights(model: nn.Module) -> list[torch.Tensor]:
    return [module.weight for module in model.modules() if isinstance(module, nn.Linear)]


def test_the_three_start_from_equal_weights(setting: Setting) -> None:
    models = {kind: dispute.network(setting, PLAN, kind, 3)[0] for kind in NETWORKS}
    for kind in (WITH, NOISY):
        assert all(torch.equal(a, b) for a, b in zip(weights(models[kind]), weights(models[PLAIN]), strict=True))
    assert [sum(isinstance(m, Noise) for m in models[kind].modules()) for kind in NETWORKS] == [0, 0, 1]
    assert [sum(isinstance(m, nn.BatchNorm1d) for m in models[kind].modules()) for kind in NETWORKS] == [0, 3, 3]


@pytest.mark.parametrize("kind", [PLAIN, WITH])
def test_numbers_of_a_step(setting: Setting, kind: str) -> None:
    """Against a training by `training.descend`, and the definitions at the measured step."""
    found = run(setting, PLAN, kind, 1)
    model, generator = dispute.network(setting, PLAN, kind, 1)
    train = setting.data.train
    order = training.batches(len(train.labels), PLAN.batch_size, generator)
    parameters = list(model.parameters())
    right = []
    for step in range(1, PLAN.every + 1):
        chosen = next(order)
        x, y = train.inputs[chosen], train.labels[chosen]
        outputs = model(x)
        right.append((outputs.argmax(1) == y).double().mean().item())
        loss = nn.functional.cross_entropy(outputs, y)
        gradients = torch.autograd.grad(loss, parameters)
        if step < PLAN.every:
            with torch.no_grad():
                for parameter, gradient in zip(parameters, gradients, strict=True):
                    parameter -= PLAN.learning_rate * gradient
    flat = torch.cat([g.flatten() for g in gradients]).double().numpy()
    start = [parameter.detach().clone() for parameter in parameters]
    losses, changes = [loss.item()], []
    for factor in PLAN.factors:
        with torch.no_grad():
            for parameter, kept, gradient in zip(parameters, start, gradients, strict=True):
                parameter.copy_(kept - factor * PLAN.learning_rate * gradient)
        loss = nn.functional.cross_entropy(model(x), y)
        losses.append(loss.item())
        moved = torch.cat([g.flatten() for g in torch.autograd.grad(loss, parameters)]).double().numpy()
        changes.append(np.linalg.norm(moved - flat))
    ways = np.array(PLAN.factors) * PLAN.learning_rate * np.linalg.norm(flat)
    assert found["curve"][0] == pytest.approx(np.mean(right))
    assert found["loss_range"][0] == pytest.approx(max(losses) - min(losses), rel=tolerances.STUDY_TRAINED)
    assert found["gradient_change"][0] == pytest.approx(max(changes), rel=tolerances.STUDY_TRAINED)
    assert found["smoothness"][0] == pytest.approx((np.array(changes) / ways).max(), rel=tolerances.STUDY_TRAINED)
    assert found["at"] == [6, 12]


def test_a_loss_is_repeatable_and_the_next_pass_has_the_same_noise(setting: Setting) -> None:
    model, _ = dispute.network(setting, PLAN, NOISY, 0)
    x, y = setting.data.train.inputs[:32], setting.data.train.labels[:32]
    again = dispute._repeatable(model, x, y)
    first = nn.functional.cross_entropy(model(x), y).item()
    assert [again().item(), again().item()] == [first, first]
    assert nn.functional.cross_entropy(model(x), y).item() != first


def test_the_noise_shifts_what_the_layers_receive(setting: Setting) -> None:
    """By about the spread of the difference of two centres, each uniform over a length of 1, once through ReLU."""
    quiet, loud = (run(setting, PLAN, kind, 0) for kind in (WITH, NOISY))
    assert max(quiet["shift"]) < 0.1
    assert 0.1 < min(loud["shift"]) < max(loud["shift"]) < math.sqrt(1 / 6)


def made(**values: float) -> dict[str, Any]:
    base = {"shift": 0.1, "loss_range": 1.0, "gradient_change": 1.0, "smoothness": 1.0, "disturbance": 0.5}
    series = {name: [value] for name, value in {**base, **values}.items() if name != "learning"}
    return {"learning": values["learning"], "test": 0.9, "at": [6], "curve": [0.5], **series}


THE_SCEPTICS = {
    PLAIN: {"learning": 0.6, "shift": 0.2, "loss_range": 2.0, "gradient_change": 4.0, "smoothness": 3.0},
    WITH: {"learning": 0.8, "shift": 0.01},
    NOISY: {"learning": 0.75, "shift": 0.4},
}


def changed(kind: str, **values: float) -> dict[str, dict[str, float]]:
    return {**THE_SCEPTICS, kind: {**THE_SCEPTICS[kind], **values}}


@pytest.mark.parametrize(
    ("networks", "fails", "words"),
    [
        (THE_SCEPTICS, {EXPLAINS}, "here less shift is not what it comes from"),
        (changed(NOISY, shift=0.1), {EXPLAINS, NOISIER}, "it tests nothing here"),
        (changed(NOISY, learning=0.62), set(), "here the shift may well be the cause"),
        (changed(NOISY, learning=0.5), {STILL}, "here the shift may well be the cause"),
        (changed(WITH, disturbance=0.1), {EXPLAINS, GRADIENTS}, "3 of these 3 measures support"),
        (changed(WITH, loss_range=3.0), {EXPLAINS, LOSS}, "2 of these 3 measures support the sceptics' account, 1"),
        (changed(WITH, gradient_change=8.0), {EXPLAINS, PREDICTIVE}, "by 2.00"),
        (changed(WITH, smoothness=6.0), {EXPLAINS, SMOOTH}, "beta-smoothness by 2.00"),
    ],
)
def test_each_account_has_its_numbers(
    setting: Setting, networks: dict[str, dict[str, float]], fails: set[Any], words: str
) -> None:
    results: dict[Any, Any] = {(kind, seed): made(**networks[kind]) for kind in NETWORKS for seed in range(6)}
    found = conclude(setting, Plan(seeds=6), Results(results))
    assert [finding.claim for finding in found.findings] == list(CLAIMS)
    assert {f.claim for f in found.findings if f.verdict is Verdict.NOT_SUPPORTED} == fails
    assert {f.claim for f in found.findings if f.verdict is Verdict.SUPPORTED} == set(CLAIMS) - fails
    assert words in " ".join(found.summary)


def test_measures(setting: Setting) -> None:
    results: dict[Any, Any] = {(kind, seed): made(**THE_SCEPTICS[kind]) for kind in NETWORKS for seed in range(6)}
    found = {f.claim: f.interval.estimate for f in conclude(setting, Plan(seeds=6), Results(results)).findings}
    expected = {NOISIER: 2, EXPLAINS: -0.05, STILL: 0.15, GRADIENTS: 0, LOSS: 2, PREDICTIVE: 4, SMOOTH: 3}
    assert found == pytest.approx(expected)


def test_where_it_cannot_be_told_that_is_said(setting: Setting) -> None:
    results: dict[Any, Any] = {
        (kind, seed): made(**THE_SCEPTICS[kind] | ({"learning": 0.6 + 0.04 * seed} if kind == NOISY else {}))
        for kind in NETWORKS
        for seed in range(6)
    }
    found = conclude(setting, Plan(seeds=6), Results(results))
    assert "cannot be told" in " ".join(found.summary)


@pytest.mark.parametrize("layers", [OURS, TORCH], ids=lambda layers: layers.name)
def test_it_runs_with_either_layer(setting: Setting, layers: Layers) -> None:
    found = carried_out(dispute.EXPERIMENT, Setting(setting.data, layers), PLAN)
    assert len(found.charts) == 4
    assert all(0 <= run["test"] <= 1 for run in found.numbers["runs"])
