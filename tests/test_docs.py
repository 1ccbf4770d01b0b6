"""Every snippet of README, CONTRIBUTING and docs runs, and every command in them exists."""

from __future__ import annotations

import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
DOCS = ROOT / "docs"
CHECKS = sorted((DOCS / "checks").glob("*.md"))  # made from a table; their snippets are tests/diagnosis/test_pages.py's
TOP = [ROOT / name for name in ("README.md", "CONTRIBUTING.md", "SECURITY.md", "examples/README.md")]
PAGES = [*TOP, *sorted(set(DOCS.rglob("*.md")) - set(CHECKS))]
MAKE_TARGETS = set(re.findall(r"^([\w-]+):", (ROOT / "Makefile").read_text(), flags=re.M))


def blocks(page: Path, language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```", page.read_text(), flags=re.M | re.S)


def commands() -> set[str]:
    lines = {
        line.split("#")[0].strip() for page in PAGES for block in blocks(page, "sh") for line in block.splitlines()
    }
    return lines - {""}


def files() -> dict[str, str]:
    """Python snippets that begin with the name of a file: what commands work on."""
    snippets = [block for page in PAGES for block in blocks(page, "python")]
    return {match[1]: block for block in snippets if (match := re.match(r"# (\w+\.py)\n", block))}


def named(page: Path) -> str:
    return str(page.relative_to(ROOT))


@pytest.mark.usefixtures("threads")
@pytest.mark.parametrize("page", PAGES, ids=named)
def test_python_snippets(page: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A page's snippets share their names, in order, as a reader would type them; files go where they are run."""
    monkeypatch.chdir(tmp_path)
    names: dict[str, object] = {}
    for block in blocks(page, "python"):
        exec(compile(block, str(page), "exec"), names)


def test_there_is_something_to_test() -> None:
    assert sum(len(blocks(page, "python")) for page in PAGES) >= 8
    assert {"make demo", "make test", "batchnorm kernels"} <= commands()


@pytest.mark.parametrize("command", sorted(c for c in commands() if c.startswith("make ")))
def test_make_targets_exist(command: str) -> None:
    target = command.split()[1]  # variables may follow
    assert target in MAKE_TARGETS


@pytest.mark.long
@pytest.mark.parametrize("command", sorted(c for c in commands() if not c.startswith("make ")))
def test_commands(command: str, tmp_path: Path) -> None:
    program, *arguments = shlex.split(command)
    assert program in ("batchnorm", "python", "torchrun"), f"{command}: the tests do not know how to run this"
    for folder in ("benchmarks", "tests"):
        (tmp_path / folder).symlink_to(ROOT / folder)
    for name, code in files().items():
        (tmp_path / name).write_text(code)
    environment = os.environ | {"PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}"}
    run = subprocess.run(
        [program, *arguments], cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=900, check=False
    )
    assert run.returncode == 0, run.stderr
    assert run.stdout.strip()


@pytest.mark.parametrize("page", [*PAGES, *CHECKS], ids=named)
def test_links_between_pages(page: Path) -> None:
    for target in re.findall(r"\]\(([^)#]+)\)", page.read_text()):
        if not target.startswith("http"):
            assert (page.parent / target).exists(), f"{page.name} links to {target}"
