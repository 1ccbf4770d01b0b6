"""The packages that only some features need."""

from __future__ import annotations

import re
import sys
from pathlib import Path

import pytest

from batchnorm.errors import UsageError
from batchnorm.extras import EXTRAS, require

PACKAGES = [(extra, module, package) for extra, packages in EXTRAS.items() for module, package in packages.items()]


@pytest.mark.parametrize("extra", EXTRAS)
def test_nothing_is_missing_here(extra: str) -> None:
    require(extra, "it")


@pytest.mark.parametrize(("extra", "module", "package"), PACKAGES)
def test_a_missing_package_is_named_with_the_remedy(
    extra: str, module: str, package: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, module, None)
    with pytest.raises(UsageError) as caught:
        require(extra, "this")
    message = str(caught.value)
    assert message.startswith(f"this needs {package}, ")
    assert message.endswith(f'Run: pip install "batchnorm[{extra}]"')


def test_only_what_was_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "safetensors", None)
    require("files", "this", "numpy")


@pytest.mark.parametrize("extra", EXTRAS)
def test_the_packages_are_those_that_the_project_declares(extra: str) -> None:
    project = (Path(__file__).parents[1] / "pyproject.toml").read_text(encoding="utf-8")
    declared = re.search(rf"^{extra} = \[(.*?)\]", project, re.MULTILINE | re.DOTALL)
    assert declared is not None
    assert set(EXTRAS[extra].values()) == set(re.findall(r'"([\w-]+)', declared[1]))
