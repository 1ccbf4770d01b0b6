"""Fixtures for the whole suite."""

from __future__ import annotations

import gc
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import hypothesis
import pytest
import torch

from batchnorm import ops
from batchnorm.kernels import cpu

# Machines are slow at times: an example that takes long is no failure.
hypothesis.settings.register_profile("no deadline", deadline=None)
hypothesis.settings.load_profile("no deadline")


TOGETHER = "tests/kernels/triton/"  # its tests share a run of the interpreter


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config: pytest.Config, log: Any) -> Any:
    """Of several processes, one has all tests of a file, or of that folder: what they share is made once."""
    from xdist.scheduler import LoadFileScheduling

    class Scheduling(LoadFileScheduling):
        def _split_scope(self, nodeid: str) -> str:
            return TOGETHER if nodeid.startswith(TOGETHER) else str(super()._split_scope(nodeid))

    return Scheduling(config, log)


def pytest_collection_finish() -> None:
    """Thousands of tests are millions of objects: what looks through all there are takes seconds, and need not."""
    gc.collect()
    gc.freeze()


@pytest.fixture(params=cpu.levels() or ["none"])
def level(request: pytest.FixtureRequest) -> Iterator[str]:
    """Each instruction set that this machine has, in use."""
    if request.param == "none":
        pytest.fail("the native extension is not built: " + str(ops.kernels()))
    best = cpu.levels()[-1]
    cpu.use_level(request.param)
    yield request.param
    cpu.use_level(best)


@pytest.fixture
def project(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """An empty folder to work in; what was imported from there is forgotten afterwards."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))
    before = set(sys.modules)
    yield tmp_path
    for name in set(sys.modules) - before:
        if (getattr(sys.modules[name], "__file__", None) or "").startswith(str(tmp_path)):
            del sys.modules[name]


@pytest.fixture
def threads() -> Iterator[None]:
    """Leaves torch's number of threads as it was."""
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)
