"""Claims, declared before any number is known, and what the numbers make of them."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from enum import Enum

from batchnorm.report.document import Judged, Outcome
from batchnorm.study.formatting import formatted
from batchnorm.study.measured import Measured
from batchnorm.study.statistics import Interval, mean_interval

# n independent differences all have the same sign by chance alone in 2^(1 - n) of cases, above 5 % up to n = 5: nothing
# can be said of fewer with 95 % confidence, unless one assumes how they are distributed.
FEWEST = 6


class Verdict(Enum):
    """What becomes of a claim."""

    SUPPORTED = "supported"
    NOT_SUPPORTED = "not supported"
    INCONCLUSIVE = "inconclusive"
    POSTPONED = "needs the full study"


_OUTCOMES: dict[Verdict, Outcome] = {
    Verdict.SUPPORTED: "yes",
    Verdict.NOT_SUPPORTED: "no",
    Verdict.INCONCLUSIVE: "open",
    Verdict.POSTPONED: "note",
}


@dataclass(frozen=True)
class Value:
    """One of the numbers that a claim is about: the mean over the seeds.

    Attributes:
        of: what it is of, "with" or "without" for instance; empty where the quantity is a single number.
        interval: the mean with its 95 % interval.
    """

    of: str
    interval: Interval


@dataclass(frozen=True)
class Quantity:
    """What a claim is about, in numbers that a reader knows: an accuracy, steps, an exponent.

    Attributes:
        name: of the quantity, as a noun.
        unit: empty for a plain number.
        form: how its numbers are written, as `format` takes it.
        times: by how much a measured number is multiplied, for the unit: 100 for a fraction in per cent.
        geometric: whether means are geometric, as is right where the margin is a ratio.
    """

    name: str
    unit: str = ""
    form: str = ".3g"
    times: float = 1.0
    geometric: bool = False

    def values(self, measured: Mapping[str, Sequence[float]]) -> tuple[Value, ...]:
        """The mean of each of the measured series, in the unit."""
        if not measured:
            raise ValueError(f"the quantity {self.name!r} has no numbers; give those of one network at least")
        return tuple(Value(of, self._mean(series).map(lambda x: self.times * x)) for of, series in measured.items())

    def _mean(self, series: Sequence[float]) -> Interval:
        return mean_interval([*map(math.log, series)]).map(math.exp) if self.geometric else mean_interval(series)

    def text(self, values: Sequence[Value]) -> str:
        """The name, then a single number with its interval; of several, each with what it is of."""
        if len(values) > 1:
            # A unit in words is said once.
            units = [self.unit, *("" if self.unit[:1].isalpha() else self.unit for _ in values[1:])]
            numbers = [
                f"{formatted(value.interval.estimate, self.form)}{' ' if unit else ''}{unit} {value.of}"
                for value, unit in zip(values, units, strict=True)
            ]
            return f"{self.name}: {', '.join(numbers)}"
        interval = values[0].interval
        low, high = formatted(interval.low, self.form), formatted(interval.high, self.form)
        number = f"{formatted(interval.estimate, self.form)}{' ' if self.unit else ''}{self.unit}"
        return f"{self.name}: {number}{'' if low == high else f' ({low} to {high})'}"


@dataclass(frozen=True)
class Margin:
    """What the rule judges.

    Attributes:
        measure: what is measured, as a noun; oriented so that larger is more as claimed.
        threshold: what the measure must exceed.
        unit: of both; empty for a plain number.
    """

    measure: str
    threshold: float
    unit: str = ""

    @property
    def criterion(self) -> str:
        """The rule in words."""
        return (
            f"{self.measure[0].upper()}{self.measure[1:]}: supported where its whole 95 % interval is above "
            f"{self.number(self.threshold)}, not supported where it is below, inconclusive otherwise."
        )

    def number(self, value: float) -> str:
        """A value with the unit."""
        return f"{value:.3g}{' ' if self.unit else ''}{self.unit}"


@dataclass(frozen=True)
class Claim:
    """A statement with the criterion that decides it: one rule for all.

    Supported where the whole 95 % interval of the margin's measure lies above the threshold, not supported where the
    whole interval lies below, inconclusive otherwise, and with fewer than `FEWEST` independent values. "Not supported"
    is thus said of this data, these networks and this threshold; it is not a proof of the contrary.

    Attributes:
        key: its name in results.json, unlike any other claim's.
        mission: which statement of the article it examines, "M1" to "M14".
        statement: the claim, in words short enough for one line (some 70 characters).
        quantity: what it is about, which a reader is told first.
        margin: what decides it.
        counted: what the independent values are, in the plural.
    """

    key: str
    mission: str
    statement: str
    quantity: Quantity
    margin: Margin
    counted: str = "seeds"

    def judge(self, measured: Measured, quantity: Mapping[str, Sequence[float]]) -> Finding:
        """The verdict on what was measured.

        Args:
            measured: the margin.
            quantity: the numbers of the quantity, of each seed: one series for each network, or whatever they are of.
        """
        verdict = Verdict.INCONCLUSIVE
        if measured.count >= FEWEST and measured.interval.low > self.margin.threshold:
            verdict = Verdict.SUPPORTED
        elif measured.count >= FEWEST and measured.interval.high < self.margin.threshold:
            verdict = Verdict.NOT_SUPPORTED
        return Finding(self, verdict, measured, self.quantity.values(quantity))


@dataclass(frozen=True)
class Finding:
    """A claim and what was found.

    Attributes:
        claim: the claim.
        verdict: what became of it.
        measured: the measure of its margin.
        values: the numbers of its quantity.
    """

    claim: Claim
    verdict: Verdict
    measured: Measured
    values: tuple[Value, ...]

    @property
    def interval(self) -> Interval:
        """Of the margin."""
        return self.measured.interval

    @property
    def quantity(self) -> str:
        """What was measured, on one line."""
        return self.claim.quantity.text(self.values)

    @property
    def margin(self) -> str:
        """The numbers that decided, on one line."""
        low, high = f"{self.interval.low:.3g}", f"{self.interval.high:.3g}"
        around = "" if low == high else f"{low} to {high}, "
        number = self.claim.margin.number(self.interval.estimate)
        return f"{number} ({around}{self.measured.count:,} {self.claim.counted})"

    def judged(self) -> Judged:
        """The row that a report shows."""
        return _row(self)

    def record(self) -> dict[str, object]:
        """What results.json holds: the criterion beside the numbers."""
        values = [{"of": value.of, **asdict(value.interval)} for value in self.values]
        return _record(self, values, {**asdict(self.interval), "effect": self.measured.effect}, self.measured.count)


@dataclass(frozen=True)
class Postponed:
    """A claim that was not examined: only trainings of the full study's length could decide it.

    Attributes:
        claim: the claim.
    """

    claim: Claim
    verdict = Verdict.POSTPONED
    quantity, margin = "not measured by --quick", ""

    def judged(self) -> Judged:
        """The row that a report shows."""
        return _row(self)

    def record(self) -> dict[str, object]:
        """What results.json holds: no numbers."""
        return _record(self, [], dict.fromkeys(("estimate", "low", "high", "effect")), 0)


def _row(found: Finding | Postponed) -> Judged:
    claim, verdict = found.claim, found.verdict
    return Judged(
        claim.statement, _OUTCOMES[verdict], verdict.value, claim.margin.criterion, found.quantity, found.margin
    )


def _record(
    found: Finding | Postponed, values: Sequence[object], measured: Mapping[str, object], count: int
) -> dict[str, object]:
    claim = found.claim
    return {
        "claim": claim.key,
        "mission": claim.mission,
        "statement": claim.statement,
        "quantity": {"name": claim.quantity.name, "unit": claim.quantity.unit, "values": values},
        "margin": {**asdict(claim.margin), **measured},
        "counted": claim.counted,
        "count": count,
        "verdict": found.verdict.value,
    }
