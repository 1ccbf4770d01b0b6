"""Claims, declared before any number is known, and what the numbers make of them."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from enum import Enum

from batchnorm.report.document import Judged, Outcome
from batchnorm.study.measured import Measured
from batchnorm.study.statistics import Interval

# n independent differences all have the same sign by chance alone in 2^(1 - n) of cases, above 5 % up to n = 5: nothing
# can be said of fewer with 95 % confidence, unless one assumes how they are distributed.
FEWEST = 6


class Verdict(Enum):
    """What becomes of a claim."""

    SUPPORTED = "supported"
    NOT_SUPPORTED = "not supported"
    INCONCLUSIVE = "inconclusive"


_OUTCOMES: dict[Verdict, Outcome] = {
    Verdict.SUPPORTED: "yes",
    Verdict.NOT_SUPPORTED: "no",
    Verdict.INCONCLUSIVE: "open",
}


@dataclass(frozen=True)
class Claim:
    """A statement with the criterion that decides it: one rule for all.

    Supported where the whole 95 % interval of the measure lies above the threshold, not supported where the whole
    interval lies below, inconclusive otherwise, and with fewer than `FEWEST` independent values. "Not supported" is
    thus said of this data, these networks and this threshold; it is not a proof of the contrary.

    Attributes:
        key: its name in results.json, unlike any other claim's.
        mission: which statement of the article it examines, "M1" to "M14".
        statement: the claim, in words short enough for one line (some 70 characters).
        measure: what is measured, as a noun; oriented so that larger is more as claimed.
        threshold: what the measure must exceed.
        unit: of measure and threshold; empty for a plain number.
        counted: what the independent values are, in the plural.
    """

    key: str
    mission: str
    statement: str
    measure: str
    threshold: float
    unit: str = ""
    counted: str = "seeds"

    def judge(self, measured: Measured) -> Finding:
        """The verdict on what was measured."""
        verdict = Verdict.INCONCLUSIVE
        if measured.count >= FEWEST and measured.interval.low > self.threshold:
            verdict = Verdict.SUPPORTED
        elif measured.count >= FEWEST and measured.interval.high < self.threshold:
            verdict = Verdict.NOT_SUPPORTED
        return Finding(self, verdict, measured)

    @property
    def criterion(self) -> str:
        """The rule in words."""
        return (
            f"{self.measure[0].upper()}{self.measure[1:]}: supported where its whole 95 % interval is above "
            f"{self._number(self.threshold)}, not supported where it is below, inconclusive otherwise."
        )

    def _number(self, value: float) -> str:
        return f"{value:.3g}{' ' if self.unit else ''}{self.unit}"


@dataclass(frozen=True)
class Finding:
    """A claim and what was found.

    Attributes:
        claim: the claim.
        verdict: what became of it.
        measured: its measure.
    """

    claim: Claim
    verdict: Verdict
    measured: Measured

    @property
    def interval(self) -> Interval:
        """Of the measure."""
        return self.measured.interval

    @property
    def evidence(self) -> str:
        """The numbers that decided, on one line."""
        low, high = f"{self.interval.low:.3g}", f"{self.interval.high:.3g}"
        around = "" if low == high else f"{low} to {high}, "
        return f"{self.claim._number(self.interval.estimate)} ({around}{self.measured.count:,} {self.claim.counted})"

    def judged(self) -> Judged:
        """The row that a report shows."""
        claim = self.claim
        return Judged(claim.statement, _OUTCOMES[self.verdict], self.verdict.value, claim.criterion, self.evidence)

    def record(self) -> dict[str, object]:
        """What results.json holds: the criterion beside the numbers."""
        claim = asdict(self.claim)
        measured = {"count": self.measured.count, **asdict(self.interval), "effect": self.measured.effect}
        return {"claim": claim.pop("key"), **claim, **measured, "verdict": self.verdict.value}
