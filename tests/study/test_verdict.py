"""One rule for all claims."""

from __future__ import annotations

import math
import re

import pytest

from batchnorm.study.measured import Measured
from batchnorm.study.statistics import Interval, mean_interval
from batchnorm.study.verdict import FEWEST, Claim, Margin, Postponed, Quantity, Value, Verdict

CLAIM = Claim(
    "quicker",
    "M11",
    "It is quicker",
    Quantity("steps to the target", form=".0f"),
    Margin("the ratio of steps", 1, "times"),
)
STEPS = {"with": [10.0], "without": [40.0]}


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
    found = CLAIM.judge(Measured(Interval((low + high) / 2, low, high), 10, 0.8), STEPS)
    assert found.verdict is verdict
    assert (found.claim, found.measured.effect, found.measured.count) == (CLAIM, 0.8, 10)


@pytest.mark.parametrize("interval", [Interval(3.0, 2.0, 4.0), Interval(0.2, 0.1, 0.3)])
def test_few_values_decide_nothing(interval: Interval) -> None:
    assert CLAIM.judge(Measured(interval, FEWEST - 1), STEPS).verdict is Verdict.INCONCLUSIVE
    assert CLAIM.judge(Measured(interval, FEWEST), STEPS).verdict is not Verdict.INCONCLUSIVE
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
    """What was measured first; the margin that decides is behind it."""
    row = CLAIM.judge(Measured(interval, 10, 0.8), STEPS).judged()
    assert (row.claim, row.outcome, row.verdict) == ("It is quicker", outcome, verdict)
    assert row.evidence == "steps to the target: 10 with, 40 without"
    assert row.margin == f"{interval.estimate} times ({interval.low} to {interval.high}, 10 seeds)"
    assert row.criterion == (
        "The ratio of steps: supported where its whole 95 % interval is above 1 times, not supported where it is "
        "below, inconclusive otherwise."
    )


def test_what_has_no_interval_shows_none() -> None:
    claim = Claim("exact", "M2", "It is so", Quantity("error", form=".1e"), Margin("digits", 1.0), "mini-batches")
    found = claim.judge(Measured.exact(4.0, 1234), {"": [1e-4]})
    assert (found.quantity, found.margin) == ("error: 1.0e-04", "4 (1,234 mini-batches)")


def test_a_single_number_has_its_name_and_its_interval() -> None:
    slopes = [-0.51, -0.5, -0.49]
    quantity = Quantity("exponent", form=".3f")
    (value,) = quantity.values({"": slopes})
    assert value == Value("", mean_interval(slopes))
    assert quantity.text([value]) == f"exponent: -0.500 ({value.interval.low:.3f} to {value.interval.high:.3f})"


def test_numbers_are_in_the_unit() -> None:
    quantity = Quantity("test accuracy", "%", ".1f", 100)
    values = quantity.values({"with": [0.97, 0.98], "without": [0.96, 0.96]})
    assert values[0].interval == mean_interval([0.97, 0.98]).map(lambda x: 100 * x)
    assert quantity.text(values) == "test accuracy: 97.5 % with, 96.0 % without"
    points = Quantity("gap", "points", ".1f", 100)
    assert points.text(points.values({"with": [0.02], "without": [0.03]})) == "gap: 2.0 points with, 3.0 without"


def test_a_geometric_mean_is_one() -> None:
    (value,) = Quantity("steps", geometric=True).values({"": [1.0, 10.0, 100.0]})
    assert value.interval.estimate == pytest.approx(10)
    assert value.interval == mean_interval([0.0, math.log(10), math.log(100)]).map(math.exp)


def test_no_claim_is_judged_without_its_numbers() -> None:
    with pytest.raises(ValueError, match="'steps to the target' has no numbers"):
        CLAIM.judge(Measured(Interval(1.25, 1.1, 1.4), 10), {})
    with pytest.raises(TypeError):
        CLAIM.judge(Measured(Interval(1.25, 1.1, 1.4), 10))  # type: ignore[call-arg]  # on purpose


def test_the_record_holds_quantity_criterion_and_numbers() -> None:
    record = CLAIM.judge(Measured(Interval(1.25, 1.1, 1.4), 10), STEPS).record()
    assert record == {
        "claim": "quicker",
        "mission": "M11",
        "statement": "It is quicker",
        "quantity": {
            "name": "steps to the target",
            "unit": "",
            "values": [
                {"of": "with", "estimate": 10.0, "low": 10.0, "high": 10.0},
                {"of": "without", "estimate": 40.0, "low": 40.0, "high": 40.0},
            ],
        },
        "margin": {
            "measure": "the ratio of steps",
            "threshold": 1.0,
            "unit": "times",
            "estimate": 1.25,
            "low": 1.1,
            "high": 1.4,
            "effect": None,
        },
        "counted": "seeds",
        "count": 10,
        "verdict": "supported",
    }


def test_what_is_postponed_has_no_number() -> None:
    found, judged = Postponed(CLAIM), CLAIM.judge(Measured(Interval(1.25, 1.1, 1.4), 10), STEPS)
    assert found.verdict is Verdict.POSTPONED
    row, record = found.judged(), found.record()
    assert (row.outcome, row.verdict) == ("note", "needs the full study")
    assert not re.search(r"\d", row.evidence + row.margin)
    assert record.keys() == judged.record().keys()
    assert record["quantity"] == {"name": "steps to the target", "unit": "", "values": []}
    margin = record["margin"]
    assert isinstance(margin, dict)
    assert [margin[name] for name in ("estimate", "low", "high", "effect")] == [None] * 4
