"""One rule for all claims."""

from __future__ import annotations

import pytest

from batchnorm.study.measured import Measured
from batchnorm.study.statistics import Interval
from batchnorm.study.verdict import FEWEST, Claim, Verdict

CLAIM = Claim("quicker", "M11", "It is quicker", "the ratio of steps", 1.0, "times")


@pytest.mark.parametrize(
    ("low", "high", "verdict"),
    [
        (1.1, 1.4, Verdict.SUPPORTED),
        (1.0, 1.4, Verdict.INCONCLUSIVE),
        (0.9, 1.4, Verdict.INCONCLUSIVE),
        (0.9, 1.0, Verdict.INCONCLUSIVE),
        (0.5, 0.9, Verdict.NOT_SUPPORTED),
    ],
)
def test_the_whole_interval_decides(low: float, high: float, verdict: Verdict) -> None:
    found = CLAIM.judge(Measured(Interval((low + high) / 2, low, high), 10, 0.8))
    assert found.verdict is verdict
    assert (found.claim, found.measured.effect, found.measured.count) == (CLAIM, 0.8, 10)


@pytest.mark.parametrize("interval", [Interval(3.0, 2.0, 4.0), Interval(0.2, 0.1, 0.3)])
def test_few_values_decide_nothing(interval: Interval) -> None:
    assert CLAIM.judge(Measured(interval, FEWEST - 1)).verdict is Verdict.INCONCLUSIVE
    assert CLAIM.judge(Measured(interval, FEWEST)).verdict is not Verdict.INCONCLUSIVE
    assert 2.0 ** (1 - FEWEST) < 0.05 < 2.0 ** (2 - FEWEST), "all of one sign by chance"


@pytest.mark.parametrize(
    ("interval", "outcome", "verdict"),
    [
        (Interval(1.25, 1.1, 1.4), "yes", "supported"),
        (Interval(0.75, 0.5, 0.9), "no", "not supported"),
        (Interval(1.25, 0.9, 1.4), "open", "inconclusive"),
    ],
)
def test_the_row_of_a_report(interval: Interval, outcome: str, verdict: str) -> None:
    row = CLAIM.judge(Measured(interval, 10, 0.8)).judged()
    assert (row.claim, row.outcome, row.verdict) == ("It is quicker", outcome, verdict)
    assert row.evidence == f"{interval.estimate} times ({interval.low} to {interval.high}, 10 seeds)"
    assert row.criterion == (
        "The ratio of steps: supported where its whole 95 % interval is above 1 times, not supported where it is "
        "below, inconclusive otherwise."
    )


def test_what_has_no_interval_shows_none() -> None:
    claim = Claim("exact", "M2", "It is so", "the bound over the error", 1.0, counted="mini-batches")
    assert claim.judge(Measured.exact(4.0, 1234)).evidence == "4 (1,234 mini-batches)"


def test_the_record_holds_criterion_and_numbers() -> None:
    assert CLAIM.judge(Measured(Interval(1.25, 1.1, 1.4), 10)).record() == {
        "claim": "quicker",
        "mission": "M11",
        "statement": "It is quicker",
        "measure": "the ratio of steps",
        "threshold": 1.0,
        "unit": "times",
        "counted": "seeds",
        "count": 10,
        "estimate": 1.25,
        "low": 1.1,
        "high": 1.4,
        "effect": None,
        "verdict": "supported",
    }
