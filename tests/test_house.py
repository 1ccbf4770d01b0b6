"""The house's rules, read from the code itself."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import pytest

import batchnorm

ROOT = Path(__file__).parents[1]
PACKAGE = ROOT / "src" / "batchnorm"
SOURCES = sorted(PACKAGE.rglob("*.py"))

# Imports go down: a file may import from lower floors, and inside its own room.
FLOORS = {
    "errors": 0,
    "layout": 0,
    "ghost": 0,
    "extras": 1,
    "moments": 1,
    "renorm": 2,
    "kernels": 2,
    "ops": 3,
    "distributed": 4,
    "recipe": 4,
    "autograd": 5,
    "functional": 5,
    "sharing": 5,
    "modules": 6,
    "models": 7,
    "deferral": 8,
    "population": 8,
    "surgery": 8,
    "bench": 9,
    "integrations": 9,
    "report": 9,
    "loading": 9,
    "study": 9,
    "cli": 10,
    "__main__": 11,
}
# The law of shapes raises errors; study's and bench's numbers become report's pages, and report knows nothing of them;
# the study takes data as commands do.
SAME_FLOOR = {
    ("layout", "errors"),
    ("functional", "autograd"),
    ("functional", "sharing"),
    ("sharing", "autograd"),
    ("study", "report"),
    ("study", "loading"),
    ("bench", "report"),
}


def room(path: Path) -> str:
    return path.relative_to(PACKAGE).parts[0].removesuffix(".py")


def imported_rooms(path: Path) -> set[str]:
    """The rooms that a file imports from, wherever in the file the import stands."""
    names: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import"
            module = node.module or ""
            names |= {f"{module}.{alias.name}" for alias in node.names} if module == "batchnorm" else {module}
    return {name.split(".")[1] for name in names if name.startswith("batchnorm.")}


@pytest.mark.parametrize("path", [p for p in SOURCES if p != PACKAGE / "__init__.py"], ids=lambda p: p.name)
def test_imports_go_down(path: Path) -> None:
    here = room(path)
    assert here in FLOORS, f"{path} has no floor yet"
    for other in imported_rooms(path) & set(FLOORS):
        allowed = other == here or FLOORS[other] < FLOORS[here] or (here, other) in SAME_FLOOR
        assert allowed, f"{path.name} (floor {FLOORS[here]}) imports {other} (floor {FLOORS[other]})"


def test_the_floors_are_read() -> None:
    assert imported_rooms(PACKAGE / "recipe.py") == {"layout", "errors", "kernels"}


def test_only_ops_speaks_to_torch_ops() -> None:
    users = [path.name for path in SOURCES if "torch.ops.batchnorm" in path.read_text()]
    assert users == ["ops.py"]


def test_there_is_one_autograd_function() -> None:
    users = [path.name for path in SOURCES if "autograd.Function)" in path.read_text()]
    assert users == ["autograd.py"]


def test_no_file_is_long() -> None:
    files = [
        *SOURCES,
        *PACKAGE.rglob("*.[ch]pp"),
        *(ROOT / "tests").rglob("*.py"),
        *(ROOT / "benchmarks").rglob("*.py"),
    ]
    long = {str(path.relative_to(ROOT)): n for path in files if (n := len(path.read_text().splitlines())) > 400}
    assert not long


def test_the_oracle_shares_no_code() -> None:
    assert "batchnorm" not in {
        name.split(".")[0]
        for node in ast.walk(ast.parse((ROOT / "tests" / "support" / "oracle.py").read_text()))
        if isinstance(node, ast.Import | ast.ImportFrom)
        for name in ([node.module or ""] if isinstance(node, ast.ImportFrom) else [a.name for a in node.names])
    }


def test_tests_mirror_the_sources() -> None:
    tests = {path.relative_to(ROOT / "tests") for path in (ROOT / "tests").rglob("test_*.py")}
    for source in SOURCES:
        relative = source.relative_to(PACKAGE)
        if source.name != "__init__.py":
            assert relative.with_name(f"test_{relative.name}") in tests, f"{relative} has no test file"


def test_the_public_names() -> None:
    assert set(batchnorm.__all__) == {
        "BatchNorm",
        "BatchNorm1d",
        "BatchNorm2d",
        "BatchNorm3d",
        "BatchNormError",
        "Moments",
        "Pending",
        "Recalibration",
        "Renorm",
        "convert",
        "deferred",
        "errors",
        "fold",
        "freeze",
        "functional",
        "fuse",
        "kernels",
        "recalibrate",
        "remove_dead_biases",
        "revert",
        "unfreeze",
    }
    assert all(hasattr(batchnorm, name) for name in batchnorm.__all__)


IMPORT = """
import sys, torch
before = set(sys.modules)
import batchnorm
print(*sorted({name.split(".")[0] for name in set(sys.modules) - before}))
print(torch.cuda.is_initialized())
"""


def test_the_import_brings_nothing_but_itself() -> None:
    run = subprocess.run([sys.executable, "-c", IMPORT], capture_output=True, text=True, timeout=120, check=True)
    modules, cuda = run.stdout.splitlines()
    installed_by_hook = {name for name in modules.split() if name.startswith(("_batchnorm_editable", "batchnorm"))}
    assert set(modules.split()) - installed_by_hook <= {"ctypes", "_ctypes", "_struct", "struct"}
    assert cuda == "False"
