"""The table: every experiment is what the runner and the reader expect, and results.json is as documented."""

from __future__ import annotations

import io
import json
import re
from collections.abc import Iterator
from dataclasses import asdict, is_dataclass, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console

from batchnorm.study.experiment import Experiment, Setting
from batchnorm.study.experiments import EXPERIMENTS
from batchnorm.study.networks import OURS, TORCH, Layers
from batchnorm.study.runner import study
from batchnorm.study.verdict import Verdict
from study import example
from study.plans import TINY, runs_as_printed

DOCS = Path(__file__).parents[2] / "docs"
CLAIMS, SCHEMA = ((DOCS / name).read_text(encoding="utf-8") for name in ("study.md", "study-results.md"))
KINDS = {bool: "boolean", int: "integer", float: "number", str: "string", type(None): "null"}
SMALL = [replace(row, full=TINY[row.name], quick=TINY[row.name]) for row in EXPERIMENTS]
# What each section's snippet prints: the whole of it, or its beginning.
PRINTED = {
    "placement": "".join(rf"batch norm: {placement} .+\n" for placement in ("before", "after", "none")) + "$",
    "equations": r"tensor\(.+\n",
    "noise": "(.+\n){5}",
    "inference": r"tensor\((.|\n)+tensor\(",
    "shift": "1 -0.1 0.*\n(.+\n){2}$",
    "scales": r"tensor\(.+\) tensor\(.+\n$",
    "speed": "batch norm: before .+\nbatch norm: none .+\n$",
    "rates": "".join(
        rf"batch norm: {placement} rate: {rate} .+\n" for placement in ("before", "none") for rate in (0.01, 0.1, 1.0)
    )
    + "$",
    "dropout": "".join(
        rf"batch norm: {placement} dropout: {share} .+\n" for placement in ("before", "none") for share in (0.0, 0.2)
    )
    + "$",
    "dispute": "plain .+\nbatch norm .+\nnoisy batch norm .+\n$",
}


@pytest.fixture(scope="module", params=["digits ours", pytest.param("vectors torch", marks=pytest.mark.long)])
def results(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """What all experiments find: on images with our layers, on vectors with torch's."""
    out = tmp_path_factory.mktemp("out")
    data = layers = None
    if request.param == "vectors torch":
        import numpy as np

        generator = np.random.default_rng(0)
        x, y = generator.normal(size=(600, 9)), np.arange(600) % 3
        np.savez(out / "mine.npz", x=x + y[:, None], y=y)
        data, layers = str(out / "mine.npz"), "torch"
    study(
        out,
        console=Console(file=io.StringIO()),
        quick=True,
        data=data,
        layers=layers or "ours",
        experiments=SMALL,
        processes=1,
    )
    content: dict[str, Any] = json.loads((out / "results.json").read_text(encoding="utf-8"))
    return content


def leaves(value: object, path: str = "") -> Iterator[tuple[str, str]]:
    """Every path in a JSON value, with the kind of what is there."""
    if isinstance(value, dict):
        for key, part in value.items():
            yield from leaves(part, f"{path}.{key}".removeprefix("."))
    elif isinstance(value, list):
        for part in value:
            yield from leaves(part, f"{path}[]")
    else:
        yield path, KINDS[type(value)]


def documented() -> dict[str, tuple[re.Pattern[str], set[str]]]:
    """Of each path in the docs, what paths it stands for, and the kinds of what is there."""
    found = {}
    for path, kinds in re.findall(r"^\| `([^`]+)` \| ([^|]+) \|", SCHEMA, re.MULTILINE):
        parts = [f"{path}.{part}" for part in ("estimate", "low", "high")] if kinds == "interval" else [path]
        for name in [row.name for row in EXPERIMENTS] if "NAME" in path else [""]:
            for part in parts:
                pattern = re.escape(part.replace("NAME", name)).replace(r"\*", r"[^.\[\]]+")
                known = {"number"} if kinds == "interval" else set(kinds.split(" or "))
                found[part.replace("NAME", name)] = re.compile(pattern), known
    return found


def test_results_are_as_documented(results: dict[str, Any]) -> None:
    schema, met, wrong = documented(), set(), set()
    for path, kind in set(leaves(results)):
        rows = {row: kinds for row, (pattern, kinds) in schema.items() if pattern.fullmatch(path)}
        met |= set(rows)
        # A whole number may stand where any number may.
        allowed = {kind, "number"} if kind == "integer" else {kind}
        if len(rows) != 1 or not allowed & next(iter(rows.values())):
            wrong.add((path, kind))
    assert not wrong
    assert set(schema) == met


def test_every_claim_has_a_finding_in_order(results: dict[str, Any]) -> None:
    for row in EXPERIMENTS:
        findings = results["experiments"][row.name]["findings"]
        assert [finding["claim"] for finding in findings] == [claim.key for claim in row.claims]


def test_a_new_experiment_is_one_file_and_one_row(tmp_path: Path) -> None:
    """The example is run, judged, stored and reported beside another experiment."""
    rows = (example.EXPERIMENT, SMALL[0])
    outcome = study(tmp_path, console=Console(file=io.StringIO()), quick=True, experiments=rows, processes=1)
    content = json.loads((tmp_path / "results.json").read_text(encoding="utf-8"))["experiments"]
    assert list(content) == ["longer", SMALL[0].name]
    assert outcome.findings[0].verdict is Verdict.SUPPORTED
    assert [run["seed"] for run in content["longer"]["numbers"]["runs"]] == [seed for seed in range(6) for _ in "ab"]
    html = outcome.page.read_text(encoding="utf-8")
    for part in ("Does longer training help?", example.LONGER.statement, "Plain gradient descent.", "print("):
        assert part in html
    assert (tmp_path / "figures" / "longer-1.svg").exists()
    assert len(Path(example.__file__).read_text(encoding="utf-8").splitlines()) < 150


def test_names_and_claims_are_unlike_each_other() -> None:
    claims = [claim for row in EXPERIMENTS for claim in row.claims]
    for names in ([row.name for row in EXPERIMENTS], [c.key for c in claims], [c.statement for c in claims]):
        assert len(set(names)) == len(names)
    assert set(TINY) == {row.name for row in EXPERIMENTS}


@pytest.mark.parametrize("row", EXPERIMENTS, ids=lambda row: row.name)
def test_a_row(row: Experiment[Any]) -> None:
    assert row.claims
    for claim in row.claims:
        assert re.fullmatch(r"[a-z0-9-]+", claim.key)
        assert re.fullmatch(r"M([1-9]|1[0-4])", claim.mission)
        assert len(claim.statement) <= 75, "one line of the summary"
    for plan in (row.full, row.quick) if row.quick is not None else (row.full,):
        assert is_dataclass(plan)
        assert row.seconds(plan) > 0
        tasks = row.grid(plan).tasks()
        assert len(set(tasks)) == len(tasks)
        assert [tuple(task) for task in json.loads(json.dumps(tasks))] == list(tasks)
        json.dumps(asdict(plan), allow_nan=False)
    assert getattr(row.full, "seeds", 10) >= 10


@pytest.mark.parametrize("row", EXPERIMENTS, ids=lambda row: row.name)
def test_the_docs_have_every_claim_with_its_criterion(row: Experiment[Any]) -> None:
    for claim in row.claims:
        margin = claim.margin
        shown = claim.quantity.name + (f", {claim.quantity.unit}" if claim.quantity.unit else "")
        row_of_docs = f"| {claim.mission} | {claim.statement} | {shown} | {margin.measure} | {margin.threshold:g}"
        assert f"{row_of_docs}{' ' if margin.unit else ''}{margin.unit} |" in CLAIMS


@pytest.mark.parametrize("layers", [OURS, TORCH], ids=lambda layers: layers.name)
@pytest.mark.parametrize("row", EXPERIMENTS, ids=lambda row: row.name)
def test_a_seed_gives_the_same_numbers_again(setting: Setting, row: Experiment[Any], layers: Layers) -> None:
    """Whatever torch's global generator is at, which is left there; another seed gives others."""
    chosen, plan = Setting(setting.data, layers), TINY[row.name]
    for args in row.grid(plan).tasks():
        if args[-1] == 0:
            first = row.run(chosen, plan, *args)
            before = torch.manual_seed(77).get_state()
            assert row.run(chosen, plan, *args) == first
            assert torch.equal(torch.get_rng_state(), before)
            assert row.run(chosen, plan, *args[:-1], 1) != first


@pytest.mark.parametrize("row", EXPERIMENTS, ids=lambda row: row.name)
def test_the_code_runs(row: Experiment[Any]) -> None:
    assert re.match(PRINTED[row.name], runs_as_printed(row.code))
