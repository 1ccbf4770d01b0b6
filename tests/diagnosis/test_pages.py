"""The documentation of the checks is what their table says, and its examples do what it says."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from batchnorm.diagnosis.catalogue import CHECKS
from batchnorm.diagnosis.pages import pages

FOLDER = Path(__file__).parents[2] / "docs" / "checks"
SECTIONS = ["Why it hurts", "How it is measured", "Example", "Remedy"]


def test_what_is_in_docs_is_what_is_made() -> None:
    there = {path.name: path.read_text(encoding="utf-8") for path in FOLDER.iterdir()}
    assert there == pages(), "python -m batchnorm.diagnosis.pages docs/checks"


def test_the_command_writes_them(tmp_path: Path) -> None:
    out = tmp_path / "new" / "checks"
    subprocess.run([sys.executable, "-m", "batchnorm.diagnosis.pages", str(out)], check=True, timeout=120)
    assert {path.name: path.read_text(encoding="utf-8") for path in out.iterdir()} == pages()


def test_the_table_has_a_row_for_each_check() -> None:
    rows = re.findall(r"^\| \[(\w+)\]\((\w+)\.md\) \| ([\w/ -]+) \| (\w+) \|(.*)\|$", pages()["README.md"], flags=re.M)
    assert [row[:4] for row in rows] == [(c.code, c.code, c.name, c.severity) for c in CHECKS.values()]
    assert [rest.strip().endswith("\\*") for *_, rest in rows] == [c.fixed for c in CHECKS.values()]
    assert all(rest.replace("\\|", "").count("|") == 2 for *_, rest in rows)


@pytest.mark.parametrize("code", CHECKS)
def test_a_page_has_its_sections(code: str) -> None:
    page = pages()[f"{code}.md"]
    assert page.startswith(f"# {code} {CHECKS[code].name}\n")
    assert re.findall(r"^## (.*)$", page, flags=re.M) == SECTIONS
    for target in re.findall(r"\]\(([^)#]+)\)", page):
        assert target in pages() or (FOLDER / target).exists()


def blocks(code: str, section: str) -> list[str]:
    part = pages()[f"{code}.md"].split(f"## {section}\n")[1].split("\n## ")[0]
    return re.findall(r"^```python\n(.*?)^```", part, flags=re.M | re.S)


@pytest.mark.usefixtures("threads")
@pytest.mark.parametrize("code", CHECKS)
def test_the_example_fails_by_this_check_and_the_remedy_puts_it_right(code: str) -> None:
    names: dict[str, Any] = {}
    for block in blocks(code, "Example"):
        exec(compile(block, f"{code}, example", "exec"), names)
    assert code in {finding.code for finding in names["report"].findings}
    before = names["report"]
    for block in blocks(code, "Remedy"):
        exec(compile(block, f"{code}, remedy", "exec"), names)
    assert names["report"] is not before, "the remedy ends with the same check"
    assert code not in {finding.code for finding in names["report"].findings}
