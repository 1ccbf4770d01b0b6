"""The equations, against NumPy; and that a layer which computes something else is found out."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from batchnorm.study import equations
from batchnorm.study.equations import BIAS, STANDARD, TUNED, WRITTEN, Plan, agreeing_digits, compare, conclude, run
from batchnorm.study.experiment import Setting
from batchnorm.study.networks import OURS, TORCH, Layers
from batchnorm.study.verdict import Verdict
from study.plans import TINY, carried_out
from support import tolerances

PLAN = TINY["equations"]


def drawn(seed: int = 0) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    z = torch.randn(32, 5, generator=generator) * 3 + 2
    bias, beta = torch.randn(2, 5, generator=generator)
    return z, bias, 0.5 + torch.rand(5, generator=generator), beta


def test_preactivations_are_the_linear_map_of_the_training_samples(setting: Setting) -> None:
    z = equations.preactivations(setting, 7, torch.Generator().manual_seed(3))
    # He's weights, drawn in the order in which torch draws them.
    weights = torch.randn(7, 64, generator=torch.Generator().manual_seed(3)).numpy() * np.sqrt(2 / 64)
    expected = setting.data.train.inputs.reshape(-1, 64).numpy() @ weights.T
    np.testing.assert_allclose(z.numpy(), expected, rtol=tolerances.STUDY, atol=tolerances.STUDY)


@pytest.mark.parametrize("layers", [OURS, TORCH], ids=lambda layers: layers.name)
def test_layers_do_what_the_equations_say(layers: Layers) -> None:
    errors = compare(layers, *drawn())
    assert errors["equation"] < 1e-5
    assert errors["mean"] < 1e-6
    assert errors["tuned"] < 1e-5
    assert errors["bias"] < 1
    assert errors["gradient"] < 1e-5


def test_the_standard_deviation_is_short_of_1_by_eps() -> None:
    z, *others = drawn()
    variance = z.double().numpy().var(0)
    expected = (1 - np.sqrt(variance / (variance + 1e-5))).max()
    # float32's rounding of the outputs is 1e-7 of them; eps makes 1e-6.
    assert compare(OURS, z, *others)["std"] == pytest.approx(expected, abs=2e-7)
    assert compare(OURS, z / 100, *others)["std"] == pytest.approx(
        (1 - np.sqrt(variance / (variance + 1e-1))).max(), abs=1e-5
    )


class Wrong(nn.BatchNorm1d):
    """Batch normalization with a mistake."""

    mistake = ""

    def forward(self, x: Tensor) -> Tensor:
        correction = 1 if self.mistake == "m - 1" else 0
        mean = 0.9 * x.mean(0) if self.mistake == "mean" else x.mean(0)
        root = torch.sqrt(x.var(0, correction=correction) + self.eps)
        if self.mistake == "eps outside":
            root = x.std(0, correction=0) + self.eps
        y = (x - mean) / root
        if self.affine and self.mistake == "beta":
            return y * self.weight + 1.001 * self.bias
        return y * self.weight + self.bias if self.affine else y


@pytest.mark.parametrize(
    ("mistake", "fails"),
    [
        ("", set()),
        ("m - 1", {WRITTEN, STANDARD}),
        ("mean", {WRITTEN, STANDARD, BIAS, TUNED}),
        ("beta", {WRITTEN, TUNED}),
    ],
)
def test_a_mistake_is_found(setting: Setting, monkeypatch: pytest.MonkeyPatch, mistake: str, fails: set[Any]) -> None:
    monkeypatch.setattr(Wrong, "mistake", mistake)
    found = carried_out(equations.EXPERIMENT, replace(setting, layers=Layers("wrong", Wrong, Wrong)), PLAN)
    verdicts = {finding.claim: finding.verdict for finding in found.findings}
    for claim in (WRITTEN, STANDARD, BIAS, TUNED):
        assert (verdicts[claim] is Verdict.NOT_SUPPORTED) == (claim in fails), claim.key
    assert {claim for claim, verdict in verdicts.items() if verdict is Verdict.SUPPORTED} == set(verdicts) - fails


def test_the_example_is_the_first_mini_batch_step_by_step(setting: Setting) -> None:
    example = run(setting, PLAN, 0)["example"]
    generator = torch.Generator().manual_seed(0)
    z = equations.preactivations(setting, PLAN.features, generator)
    torch.randn(PLAN.features, generator=generator)
    gamma = 0.5 + 1.5 * torch.rand(PLAN.features, generator=generator)
    beta = torch.randn(PLAN.features, generator=generator)
    order = torch.randperm(len(z), generator=generator)
    batch = z[order[: PLAN.batch_size]].double().numpy()
    mean, std = batch.mean(0), np.sqrt(batch.var(0) + 1e-5)
    scaled = (batch - mean) / std
    output = gamma.double().numpy() * scaled + beta.double().numpy()
    expected = {"z": batch, "centred": batch - mean, "scaled": scaled, "output": output, "layer": output}
    for name, values in expected.items():
        np.testing.assert_allclose(
            example["values"][name], values[: PLAN.shown, 0], rtol=tolerances.STUDY, atol=tolerances.STUDY
        )
    np.testing.assert_allclose(example["mean"], mean[: PLAN.shown], rtol=tolerances.STUDY)
    np.testing.assert_allclose(example["std"], std[: PLAN.shown], rtol=tolerances.STUDY)
    np.testing.assert_allclose(
        example["channels"]["layer"]["mean"], beta[: PLAN.shown], rtol=tolerances.STUDY, atol=tolerances.STUDY
    )
    np.testing.assert_allclose(example["channels"]["z"]["std"], batch.std(0)[: PLAN.shown], rtol=tolerances.STUDY)


def test_every_mini_batch_of_an_epoch_counts(setting: Setting) -> None:
    found = carried_out(equations.EXPERIMENT, setting, PLAN)
    each = len(setting.data.train.labels) // PLAN.batch_size
    assert len(equations.EXPERIMENT.grid(PLAN).tasks()) == PLAN.seeds
    assert {finding.measured.count for finding in found.findings} == {each * PLAN.seeds}


def test_the_worst_mini_batch_decides(setting: Setting) -> None:
    results: dict[Any, Any] = {
        args: dict(run(setting, PLAN, *args)) for args in equations.EXPERIMENT.grid(PLAN).tasks()
    }
    results[(1,)]["tuned"] = 0.01
    found = conclude(setting, PLAN, results)
    by_claim = {finding.claim: finding for finding in found.findings}
    assert by_claim[TUNED].interval.estimate == pytest.approx(2)
    assert by_claim[TUNED].verdict is Verdict.NOT_SUPPORTED
    assert by_claim[WRITTEN].verdict is Verdict.SUPPORTED
    assert "3 of the 4 statements held" in " ".join(found.summary)


@pytest.mark.parametrize(("error", "expected"), [(1e-3, 3), (0.5, 0.30103), (10, -1), (0, 16)])
def test_agreeing_digits(error: float, expected: float) -> None:
    assert agreeing_digits(error) == pytest.approx(expected)


def test_the_allowance_is_needed() -> None:
    """A hundredth of it is less than a bias does change: the bound is not loose by orders of magnitude."""
    generator = torch.Generator().manual_seed(0)
    z = torch.randn(64, 8, generator=generator)
    worst = compare(OURS, z, torch.full((8,), 1e3), torch.ones(8), torch.zeros(8))["bias"]
    assert 0.01 < worst < 1


def test_plans() -> None:
    assert equations.EXPERIMENT.full == Plan(seeds=10)
