"""BN301: inference by wrong running statistics."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import batchnorm as bn
from batchnorm.diagnosis.checks.inference import gap_severity, is_far
from batchnorm.diagnosis.gap import Far, Gap
from batchnorm.diagnosis.result import Mode
from diagnosis.networks import healthy, labelled


def found(model: nn.Module, batches: object, **options: object) -> list[tuple[str, str]]:
    report = bn.check(model, batches, select="BN301", **options)  # type: ignore[arg-type]
    return [(finding.layer, finding.severity) for finding in report.findings]


@pytest.mark.parametrize("ours", [False, True])
def test_a_planted_layer_is_named_and_no_other(ours: bool) -> None:
    model, batches = healthy(ours=ours), labelled()
    assert found(model, batches) == []
    model[4].running_mean += 1.0 * model[4].running_var.sqrt()
    assert found(model, batches) == [("4", "error")]
    bn.recalibrate(model, batches)
    model[7].running_var *= 4
    ((layer, _),) = found(model, batches)
    assert layer == "7"
    bn.recalibrate(model, batches)
    assert found(model, batches) == []


def test_one_channel_that_decides() -> None:
    model, batches = healthy(), labelled()
    model[1].running_mean[5] += 6 * model[1].running_var[5].sqrt()
    ((layer, _),) = found(model, batches)
    assert layer == "1"
    (finding,) = bn.check(model, batches, select="BN301").findings
    assert finding.evidence is not None
    assert finding.evidence.rows[0][0] == "5"


def test_far_statistics_that_do_nothing_are_no_finding() -> None:
    model, batches = healthy(), labelled()
    with torch.no_grad():
        model[4].weight.zero_()  # whatever it normalises by, its output is beta
    model[4].running_mean += 5
    bn.recalibrate(model, batches)
    model[4].running_mean += 5
    assert found(model, batches) == []


def test_few_samples_prove_nothing() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.BatchNorm1d(4), nn.Linear(4, 2)).eval()
    few = [torch.randn(6, 4, generator=torch.Generator().manual_seed(1))]
    assert found(model, few) == []
    model[0].running_mean += 3
    assert [layer for layer, _ in found(model, few)] == ["0"]


def test_a_fresh_network_has_nothing_to_be_wrong() -> None:
    model = nn.Sequential(nn.Linear(4, 8), nn.BatchNorm1d(8), nn.Linear(8, 2))
    assert found(model, [torch.randn(32, 4) * 5 + 3]) == []


def test_a_frozen_layer_is_meant_to_be_as_it_is() -> None:
    model, batches = healthy(ours=True), labelled()
    model[4].running_mean += 2
    bn.freeze(model[4])
    bn.recalibrate(model, batches)
    assert found(model, batches) == []
    bn.unfreeze(model[4])
    assert "4" in [layer for layer, _ in found(model, batches)]


def test_statistics_that_are_not_finite() -> None:
    model, batches = healthy(), labelled()
    model[4].running_var[3] = -1.0
    assert found(model, batches) == [("4", "error")]


def test_how_far_is_far() -> None:
    none = torch.zeros(100, dtype=torch.float64)
    one = none.clone()
    one[3] = 0.9
    assert not is_far(Far(none, none + 0.05, 0.0))
    assert is_far(Far(none, none + 0.2, 0.0))
    assert not is_far(Far(none + 0.2, none, 0.1))
    assert is_far(Far(none + 0.2, none, 0.01))
    assert not is_far(Far(one, none, 0.0))
    assert is_far(Far(2 * one, none, 0.0))
    assert is_far(Far(none, none * math.nan, 0.1))


def test_what_it_does_decides_the_severity() -> None:
    def severity(
        distance: float | None, changed: float | None, losses: tuple[float | None, float | None]
    ) -> str | None:
        return gap_severity(Gap((Mode("running", distance, changed, losses[0]), Mode("exact", 0.0, 0.0, losses[1]))))

    none = (None, None)
    assert severity(0.05, None, none) is None
    assert severity(0.2, None, none) == "warning"
    assert severity(0.6, None, none) == "error"
    assert severity(None, None, none) == "error"
    assert severity(0.05, 0.05, none) == "warning"
    assert severity(0.05, 0.2, none) == "error"
    assert severity(0.05, 0.0, (1.05, 1.0)) == "warning"
    assert severity(0.05, 0.0, (1.5, 1.0)) == "error"
    assert severity(0.05, 0.0, (0.5, 1.0)) is None


def test_the_remedy_is_exact() -> None:
    model, batches = healthy(), labelled()
    model[4].running_mean += 2
    report = bn.check(model, batches, loss=F.cross_entropy)
    (finding,) = [f for f in report.findings if f.code == "BN301"]
    exec(finding.remedy, {"bn": bn, "model": model, "batches": [x for x, _ in batches]})
    assert found(model, batches) == []
