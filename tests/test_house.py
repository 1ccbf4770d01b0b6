"""The house's rules, read from the code itself."""

from __future__ import annotations

import ast
import re
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import yaml

import batchnorm

ROOT = Path(__file__).parents[1]
PACKAGE = ROOT / "src" / "batchnorm"
SOURCES = sorted(PACKAGE.rglob("*.py"))

PUBLIC = "__init__"  # what `import batchnorm` brings


def room(path: Path) -> str:
    return path.relative_to(PACKAGE).parts[0].removesuffix(".py")


ROOMS = {room(path) for path in SOURCES}


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
    parts = [(*name.split("."), PUBLIC)[1] for name in names if name.split(".")[0] == "batchnorm"]
    return {part if part in ROOMS else PUBLIC for part in parts}


def floors() -> dict[str, int]:
    """Every room's floor: one above the highest that it imports from."""
    below: dict[str, set[str]] = {}
    for path in SOURCES:
        below.setdefault(room(path), set()).update(imported_rooms(path) - {room(path)})
    found: dict[str, int] = {}
    while ready := [name for name in below if name not in found and below[name] <= found.keys()]:
        found |= {name: 1 + max((found[other] for other in below[name]), default=-1) for name in ready}
    circle = below.keys() - found.keys()
    assert not circle, f"these import each other in a circle, or from one: {sorted(circle)}"
    return found


def test_imports_go_down_and_the_table_of_floors_says_how_far() -> None:
    rows = re.findall(r"^\| (\d+) \| (.+?) \|", (ROOT / "CONTRIBUTING.md").read_text(), flags=re.M)
    told = {
        name.removesuffix("/").removesuffix(".py"): int(floor)
        for floor, names in rows
        for name in re.findall(r"`([^`]+)`", names)
    }
    inside = {name for name in told if "/" in name}  # a file of a room that has a row of its own
    assert {name: told[name] for name in told.keys() - inside} == floors()
    assert all(told[name] == floors()[name.split("/")[0]] for name in inside)


def test_the_imports_are_read() -> None:
    assert imported_rooms(PACKAGE / "renorm.py") == {"errors", "moments"}
    assert imported_rooms(PACKAGE / "ops.py") == {"_torch", "kernels"}
    assert PUBLIC in imported_rooms(PACKAGE / "bench" / "contenders.py")


def test_only_ops_speaks_to_torch_ops() -> None:
    users = {str(path.relative_to(PACKAGE)) for path in SOURCES if "torch.ops.batchnorm" in path.read_text()}
    assert users == {"ops.py", "kernels/cpu/__init__.py"}


PRIVATE = re.compile(r"torch\._[A-Za-z]|\b_pytree\b|_getframe|\._(forward|backward)_(pre_)?hooks|_current_level")


def test_only_one_file_uses_private_names_of_torch() -> None:
    users = {path.name for path in SOURCES if PRIVATE.search(path.read_text())}
    assert users == {"_torch.py"}


def test_there_is_one_autograd_function() -> None:
    users = [path.name for path in SOURCES if "autograd.Function)" in path.read_text()]
    assert users == ["autograd.py"]


def test_the_citation_is_of_this_version() -> None:
    """The fields are those that the format's version 1.2.0 requires, and the ones that say what is cited."""
    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text())
    assert {"cff-version", "message", "title", "authors"} <= citation.keys()
    assert citation["cff-version"] == "1.2.0"
    assert citation["version"] == batchnorm.__version__
    assert f'license = "{citation["license"]}"' in (ROOT / "pyproject.toml").read_text()
    assert citation["authors"] == [{"name": "The batchnorm developers"}]
    (article,) = citation["references"]
    assert [author["family-names"] for author in article["authors"]] == ["Ioffe", "Szegedy"]
    assert article["year"] == 2015


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
        "Adaptation",
        "BatchNorm",
        "BatchNorm1d",
        "BatchNorm2d",
        "BatchNorm3d",
        "BatchNormError",
        "DomainDistance",
        "LazyBatchNorm1d",
        "LazyBatchNorm2d",
        "LazyBatchNorm3d",
        "Moments",
        "Monitor",
        "Pending",
        "PooledStatistics",
        "Recalibration",
        "Renorm",
        "adapt",
        "check",
        "convert",
        "deferred",
        "domain",
        "domain_distance",
        "errors",
        "fold",
        "freeze",
        "functional",
        "fuse",
        "kernels",
        "pool_statistics",
        "recalibrate",
        "recompute",
        "remove_dead_biases",
        "revert",
        "unfreeze",
    }
    modules = {name for name, value in vars(batchnorm).items() if isinstance(value, ModuleType)}
    visible = {name for name in vars(batchnorm) if not name.startswith("_")} - (modules - set(batchnorm.__all__))
    assert visible == set(batchnorm.__all__)
    assert all(hasattr(batchnorm, name) for name in batchnorm.__all__)
    # Nothing of others' is to be had from here by accident: all modules are the package's own.
    assert all(vars(batchnorm)[name].__name__ == f"batchnorm.{name}" for name in modules)


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
