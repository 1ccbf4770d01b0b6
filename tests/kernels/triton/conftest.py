"""Tests in this folder run under Triton's interpreter, on the CPU, in processes of their own.

The interpreter has to be chosen before Triton is imported, so a process that has other tests, too, cannot. It starts
some that run the tests of this folder that it was asked for, and reports what these found as its own.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from batchnorm.kernels import triton as kernels
from batchnorm.kernels.triton import plan

FOLDER = Path(__file__).parent
INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
REPORT = "BATCHNORM_INTERPRETED_REPORT"  # where the process of its own writes
TIMEOUT = 1200  # two minutes each on cores that have nothing else to do
PROCESSES = min(2, os.cpu_count() or 1)  # what waits for them has nothing to compute

if not kernels.AVAILABLE:
    collect_ignore_glob = ["*"]
if INTERPRETED:
    from support import interpreter

    interpreter.round_to_bfloat16_as_devices_do()
    interpreter.take_numbers_for_float64()


def is_long(item: pytest.Item) -> bool:
    """Whether it is a long test: these compile, and interpret nothing."""
    return item.get_closest_marker("long") is not None


def pytest_report_header() -> str:
    return "" if kernels.AVAILABLE else f"not run: tests of the kernels in Triton, as {kernels.UNAVAILABLE_REASON}"


@pytest.fixture(scope="session")
def interpreted(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """What the processes of their own found of each test: "", or how it failed."""
    asked = [item.nodeid for item in request.session.items if item.path.is_relative_to(FOLDER) and not is_long(item)]
    folder = tmp_path_factory.mktemp("interpreted")
    with ThreadPoolExecutor(PROCESSES) as pool:
        parts = pool.map(
            lambda i: _found(request.config.rootpath, folder / str(i), asked[i::PROCESSES]), range(PROCESSES)
        )
        return {name: how for part in parts for name, how in part.items()}


def _found(root: Path, folder: Path, asked: list[str]) -> dict[str, str]:
    """What one process found of some tests."""
    if not asked:
        return {}
    folder.mkdir()
    (folder / "asked").write_text("\n".join(asked))
    # The interpreter's arithmetic is NumPy's, which warns of what a device computes silently.
    options = ["-q", "-p", "no:cacheprovider", "-W", "ignore::RuntimeWarning"]
    run = subprocess.run(
        [sys.executable, "-m", "pytest", *options, f"@{folder / 'asked'}"],
        env=os.environ | {"TRITON_INTERPRET": "1", REPORT: str(folder / "found"), "OMP_NUM_THREADS": "1"},
        cwd=root,
        capture_output=True,
        text=True,
        timeout=TIMEOUT,
        check=False,
    )
    if not (folder / "found").exists():
        pytest.fail(f"the interpreter's process found nothing:\n{run.stdout[-5000:]}\n{run.stderr[-5000:]}")
    return dict(json.loads(line) for line in (folder / "found").read_text().splitlines())


def pytest_runtest_logreport(report: pytest.TestReport) -> None:
    if (path := os.environ.get(REPORT)) and INTERPRETED and (report.when == "call" or report.outcome != "passed"):
        with Path(path).open("a") as file:
            file.write(
                json.dumps([report.nodeid, "" if report.passed else f"{report.outcome}: {report.longrepr}"]) + "\n"
            )


@pytest.hookimpl(tryfirst=True)
def pytest_pyfunc_call(pyfuncitem: pytest.Function) -> bool | None:
    if INTERPRETED or is_long(pyfuncitem):
        return None
    found = pyfuncitem._request.getfixturevalue("interpreted").get(pyfuncitem.nodeid, "was not run")
    if found:
        pytest.fail(f"under Triton's interpreter: {found}", pytrace=False)
    return True


@pytest.fixture
def small(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Small tiles, so that small inputs have many, of many splits that are joined in many chunks."""
    for name, value in {"TILE": 64, "WHOLE": 16, "PROGRAMS": 8, "LEAST_TILES": 1, "WIDTH": 4, "CHUNK": 2}.items():
        monkeypatch.setattr(plan, name, value)
    plan.plan_for.cache_clear()
    yield
    plan.plan_for.cache_clear()
