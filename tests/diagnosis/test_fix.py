"""Remedies: all of them or none, and the same check again."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

import batchnorm as bn
from batchnorm.diagnosis import fix
from batchnorm.diagnosis.catalogue import CHECKS
from diagnosis.networks import healthy, labelled


def test_a_remedy_for_every_check_that_promises_one() -> None:
    assert set(fix.REMEDIES) >= {code for code, check in CHECKS.items() if check.fixed}


def test_wrong_statistics_become_the_populations() -> None:
    model, batches = healthy(), labelled()
    right = copy.deepcopy(model)
    model[4].running_mean += 2
    report = bn.check(model, batches)
    done, after = report.fix()
    assert [(entry.code, entry.layer) for entry in done] == [("BN301", "4")]
    assert done[0].before.startswith("off by ")
    assert float(done[0].after.split()[-1]) < 1e-5
    assert after.before is report
    assert after.ok
    for actual, expected in zip(model.buffers(), right.buffers(), strict=True):
        torch.testing.assert_close(actual, expected)


def test_batches_that_can_be_read_once_only() -> None:
    model, batches = healthy(), labelled()
    model[4].running_mean += 2
    done, after = bn.check(model, iter(batches)).fix()
    assert len(done) == 1
    assert after.batches == 0  # what can be seen without data
    assert bn.check(model, batches).ok


def test_nothing_to_do() -> None:
    report = bn.check(healthy(), labelled())
    done, after = report.fix()
    assert done == ()
    assert after is report


def test_all_or_none(monkeypatch: pytest.MonkeyPatch) -> None:
    model, batches = healthy(), labelled()
    model[1].running_mean += 2
    model[4].running_mean += 2
    before = {name: value.clone() for name, value in model.state_dict().items()}
    modules = list(model)
    report = bn.check(model, batches)
    settle, calls = fix.REMEDIES["BN301"], []

    def second_fails(work: fix._Work, finding: object) -> str | None:
        calls.append(finding)
        if len(calls) == 2:
            bn.convert(work.model)
            raise RuntimeError("broken")
        return settle(work, finding)  # type: ignore[arg-type]

    monkeypatch.setitem(fix.REMEDIES, "BN301", second_fails)
    with pytest.raises(RuntimeError, match="broken"):
        report.fix()
    assert len(calls) == 2
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert all(a is b for a, b in zip(model, modules, strict=True))
    assert [type(m) for m in model if isinstance(m, nn.BatchNorm2d)] == [nn.BatchNorm2d, bn.BatchNorm2d, nn.BatchNorm2d]
    monkeypatch.setitem(fix.REMEDIES, "BN301", settle)
    assert report.fix().report.ok


def test_a_fresh_model_is_left_alone() -> None:
    model = nn.Sequential(nn.Linear(4, 8), nn.BatchNorm1d(8), nn.Linear(8, 8), nn.BatchNorm1d(8))
    report = bn.check(model, [torch.randn(16, 4) for _ in range(4)], ignore="BN201")
    assert [(f.code, f.severity) for f in report.findings] == [("BN001", "info")]
    assert report.fix().done == ()
    assert not model[1].running_mean.any()


def test_all_statistics_go_together() -> None:
    """A layer's are right where those upstream are: one that was not worth a word is set, too."""
    model, batches = healthy(), labelled()
    right = copy.deepcopy(model)
    model[1].running_mean += 0.02 * model[1].running_var.sqrt()
    model[4].running_mean += 2
    report = bn.check(model, batches, select="BN301")
    assert [f.layer for f in report.findings] == ["4"]
    report.fix()
    for actual, expected in zip(model.buffers(), right.buffers(), strict=True):
        torch.testing.assert_close(actual, expected)


def test_every_remedy() -> None:
    model, batches = healthy(), [x for x, _ in labelled()]
    model[0] = nn.Conv2d(3, 8, 3)
    model[7].requires_grad_(False)
    model[4].running_mean, model[4].running_var = model[4].running_mean.bfloat16(), model[4].running_var.bfloat16()
    model.eval()
    model[1].train()
    report = bn.check(model, batches, ignore=["BN205", "BN3"])
    assert {(f.code, f.layer) for f in report.findings} >= {
        ("BN005", "4"),
        ("BN105", "1"),
        ("BN106", "7"),
        ("BN201", "1"),
    }
    done, after = report.fix()
    assert {entry.code for entry in done} == {"BN005", "BN105", "BN106", "BN201"}
    assert not {f.code for f in after.findings} & {"BN005", "BN105", "BN106", "BN201"}
    assert model[0].bias is None
    assert model[4].running_var.dtype == torch.float32
    assert not model[1].training
    assert "report" not in vars(model)
