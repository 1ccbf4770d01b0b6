"""The site: docstrings become what Sphinx reads, public names must be in the reference, and broken links fail."""

from __future__ import annotations

import importlib.util
import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType

import pytest

import batchnorm

ROOT = Path(__file__).parents[1]
DOCS = ROOT / "docs"


def extension(name: str) -> ModuleType:
    spec = importlib.util.spec_from_file_location(name, DOCS / "extensions" / f"{name}.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


docstrings = extension("docstrings")
public_names = extension("public_names")


# --- docstrings ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("function", "before", "after"),
    [
        ("with_code", "text\n\n    y = x\n\ntext", "text\n\n::\n\n    y = x\n\ntext"),
        ("with_code", "text\n\n    y = x\n\n    z = y", "text\n\n::\n\n    y = x\n\n    z = y"),
        ("with_code", "text\n\n::\n\n    tree", "text\n\n::\n\n    tree"),
        ("with_code", "Args:\n    x: one\n\n    y: two", "Args:\n    x: one\n\n    y: two"),
        ("with_fields", "Returns:\n    a pair: y and z", ":returns:\n    a pair: y and z"),
        (
            "with_fields",
            "Raises:\n    ShapeError, DTypeError: wrong,\n        so\n    whatever it raises\n\nSource: a book",
            ":Raises:\n    * `ShapeError`, `DTypeError`: wrong,\n      so\n    * whatever it raises\n\nSource: a book",
        ),
        ("with_escapes", "(N, C, *S) and |x|", r"(N, C, \*S) and \|x\|"),
        ("with_escapes", "*so*, `fold`, `(N, *S)`, `.half()`", "*so*, `fold`, ``(N, *S)``, ``.half()``"),
    ],
)
def test_docstrings(function: str, before: str, after: str) -> None:
    mend: Callable[[list[str]], list[str]] = getattr(docstrings, function)
    assert mend(before.split("\n")) == after.split("\n")


# --- public names ----------------------------------------------------------------------------------------------------


def documented() -> set[str]:
    """What would be in the reference if everything were."""
    return {
        fault.split(" is public")[0] for fault in public_names.faults(set()) if fault.endswith("not in the reference")
    }


def test_every_public_name_is_asked_for() -> None:
    modules = {"errors", "functional"}  # they have names of their own
    wanted = documented()
    assert {f"batchnorm.{name}" for name in set(batchnorm.__all__) - modules} <= wanted
    assert {"batchnorm.Moments.of", "batchnorm.BatchNorm.forward", "batchnorm.BatchNorm.num_batches_skipped"} <= wanted
    assert {"batchnorm.errors.ShapeError", "batchnorm.functional.batch_norm"} <= wanted
    assert {"batchnorm.integrations.lightning.Monitor", "batchnorm.surgery.interop.to_convention"} <= wanted
    assert not any(part.startswith("_") for path in wanted for part in path.split("."))
    assert public_names.faults(wanted) == []


def test_what_is_missing_is_named() -> None:
    assert public_names.faults(documented() - {"batchnorm.fold"}) == [
        "batchnorm.fold is public, but not in the reference"
    ]


def test_a_missing_docstring_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    wanted = documented()
    monkeypatch.setattr(batchnorm.fold, "__doc__", None)
    assert public_names.faults(wanted) == ["batchnorm.fold is public, but has no docstring"]


# --- the build -------------------------------------------------------------------------------------------------------

COMMAND = re.search(
    r"^docs:.*\n\t\$\(BIN\)/python (-m sphinx .*) docs build/docs$", (ROOT / "Makefile").read_text(), re.M
)


def build(folder: Path) -> tuple[int, str]:
    """The Makefile's own command, on a copy."""
    assert COMMAND is not None
    run = subprocess.run(
        [sys.executable, *COMMAND[1].split(), "docs", "build/docs"],
        cwd=folder,
        capture_output=True,
        text=True,
        timeout=900,
        check=False,
    )
    return run.returncode, run.stdout + run.stderr


@pytest.mark.long
def test_the_build_is_strict(tmp_path: Path) -> None:
    """As it is, it passes, and asks nothing of the network; with a fault it fails and names it."""
    shutil.copytree(DOCS, tmp_path / "docs")
    shutil.copy(ROOT / "CHANGELOG.md", tmp_path)
    version = tmp_path / "src" / "batchnorm" / "__init__.py"
    version.parent.mkdir(parents=True)
    shutil.copy(ROOT / "src" / "batchnorm" / "__init__.py", version)

    assert build(tmp_path) == (0, "")
    site = tmp_path / "build" / "docs"
    assert (site / "index.html").exists()
    for page in site.rglob("*.html"):
        text = page.read_text(encoding="utf-8")
        assert not re.findall(r'<(?:script|img|iframe)[^>]+src="(?:https?:)?//', text), page
        assert not re.findall(r'<link[^>]+href="(?:https?:)?//', text), page
        assert "system-message" not in text, page

    faults = {
        "docs/moments.md": ("# Moments\n", "# Moments\n\n[broken](no-such-page.md)\n", "no-such-page"),
        "docs/precision.md": ("# Precision\n", "# Precision\n\n[broken](moments.md#no-such-part)\n", "no-such-part"),
        "docs/kernels.md": ("# Kernels\n", "# Kernels\n\n![broken](pictures/none.svg)\n", "none.svg"),
        "docs/reference/surgery.md": (
            ".. autofunction:: fold\n",
            "",
            "batchnorm.fold is public, but not in the reference",
        ),
    }
    for name, (right, wrong, _) in faults.items():
        page = tmp_path / name
        text = page.read_text()
        assert right in text
        page.write_text(text.replace(right, wrong, 1))
    returncode, output = build(tmp_path)
    assert returncode == 1
    for name, (_, _, said) in faults.items():
        assert said in output, name
