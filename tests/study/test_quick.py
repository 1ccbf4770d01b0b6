"""The quick form beside the full study: it may say less, and nothing else."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest

from batchnorm.study.experiments import EXPERIMENTS
from batchnorm.study.verdict import Verdict
from cli.commands import start

CLAIMS = [claim for row in EXPERIMENTS for claim in row.claims]
DOCS = (Path(__file__).parents[2] / "docs" / "study.md").read_text(encoding="utf-8")
DECIDED = {Verdict.SUPPORTED, Verdict.NOT_SUPPORTED}


def recorded() -> dict[str, tuple[Verdict, Verdict]]:
    """Of each statement, the verdicts of the full study and of the quick one, as the docs have them."""
    names = "|".join(verdict.value for verdict in Verdict)
    rows = re.findall(rf"^\| M\d+ \| ([^|]+) \| ({names}) \| ({names}) \|", DOCS, re.MULTILINE)
    return {statement: (Verdict(full), Verdict(quick)) for statement, full, quick in rows}


def contradict(full: Verdict, quick: Verdict) -> bool:
    """Whether one form affirms what the other denies."""
    return {full, quick} == DECIDED


def test_the_docs_have_both_verdicts_on_every_claim() -> None:
    both = recorded()
    assert list(both) == [claim.statement for claim in CLAIMS]
    assert not [statement for statement, verdicts in both.items() if contradict(*verdicts)]
    assert Verdict.POSTPONED not in [full for full, _ in both.values()]
    postponed = {claim.statement for row in EXPERIMENTS if row.quick is None for claim in row.claims}
    assert {statement for statement, (_, quick) in both.items() if quick is Verdict.POSTPONED} == postponed


def test_what_a_contradiction_is() -> None:
    assert contradict(Verdict.SUPPORTED, Verdict.NOT_SUPPORTED)
    assert contradict(Verdict.NOT_SUPPORTED, Verdict.SUPPORTED)
    assert not contradict(Verdict.SUPPORTED, Verdict.SUPPORTED)
    assert not contradict(Verdict.INCONCLUSIVE, Verdict.NOT_SUPPORTED)
    assert not contradict(Verdict.SUPPORTED, Verdict.POSTPONED)


@pytest.mark.long
def test_a_quick_run_contradicts_the_full_study_in_nothing(tmp_path: Path) -> None:
    """The full study takes too long to be repeated here: its verdicts are those of the docs."""
    process = start("study", "--quick", "--out", str(tmp_path))
    output, errors = process.communicate(timeout=600)
    assert process.returncode == 0, errors
    *table, page = output.splitlines()
    assert page == str(tmp_path / "report.html")
    assert [row.split(" | ")[1] for row in table[2:]] == [claim.statement for claim in CLAIMS]
    experiments = json.loads((tmp_path / "results.json").read_text(encoding="utf-8"))["experiments"]
    findings = [finding for row in experiments.values() for finding in row["findings"]]
    quick = {finding["statement"]: Verdict(finding["verdict"]) for finding in findings}
    full = {statement: verdict for statement, (verdict, _) in recorded().items()}
    assert not [statement for statement, verdict in quick.items() if contradict(full[statement], verdict)]
    # Equations hold whatever is trained, and these two claims by far.
    by_key = {finding["claim"]: finding["verdict"] for finding in findings}
    equations = [claim.key for claim in CLAIMS if claim.mission in ("M2", "M3", "M4", "M5")]
    for key in (*equations, "larger-rates", "fewer-steps-best-rates"):
        assert by_key[key] == "supported", key
