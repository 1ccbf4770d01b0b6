"""The packages that only reports and experiments need."""

from __future__ import annotations

import re
import sys
from pathlib import Path

import pytest

from batchnorm.errors import UsageError
from batchnorm.report.extra import PACKAGES, require


def test_nothing_is_missing_here() -> None:
    require()


@pytest.mark.parametrize(("module", "package"), PACKAGES.items())
def test_a_missing_package_is_named_with_the_remedy(module: str, package: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, module, None)
    with pytest.raises(UsageError) as caught:
        require()
    message = str(caught.value)
    assert message.startswith(f"the study needs {package}, ")
    assert message.endswith('Run: pip install "batchnorm[study]"')


def test_the_packages_are_those_of_the_extra() -> None:
    project = (Path(__file__).parents[2] / "pyproject.toml").read_text(encoding="utf-8")
    declared = re.search(r"^study = \[(.*?)\]$", project, re.MULTILINE | re.DOTALL)
    assert declared is not None
    assert set(PACKAGES.values()) == set(re.findall(r'"([\w-]+)', declared[1]))
