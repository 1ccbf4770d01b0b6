"""The table of checks, and what is chosen from it."""

from __future__ import annotations

import pytest

from batchnorm.diagnosis.catalogue import CHECKS, NEEDS, explanation, selected
from batchnorm.errors import OptionError


def codes(select: object, ignore: object = None) -> list[str]:
    return [check.code for check in selected(select, ignore)]  # type: ignore[arg-type]


def test_codes_and_prefixes_choose() -> None:
    everything = list(CHECKS)
    assert everything == sorted(everything)
    assert codes(None) == everything
    assert codes("BN301") == ["BN301"]
    assert codes(["BN1", "BN301"]) == [code for code in everything if code.startswith(("BN1", "BN301"))]
    assert codes(None, "BN1") == [code for code in everything if not code.startswith("BN1")]
    assert codes("BN1", ["BN101"]) == [code for code in everything if code.startswith("BN1") and code != "BN101"]
    assert codes([]) == []


@pytest.mark.parametrize("wrong", ["BN999", "bn301", "", ["BN301", "x"], [3]])
@pytest.mark.parametrize("name", ["select", "ignore"])
def test_codes_that_no_check_has(name: str, wrong: object) -> None:
    with pytest.raises(OptionError, match=rf"got {name}=.*; it must be a code or the beginning of codes"):
        selected(**({"select": None, "ignore": None} | {name: wrong}))  # type: ignore[arg-type]


@pytest.mark.parametrize("check", CHECKS.values(), ids=lambda check: check.code)
def test_every_check_is_explained(check: object) -> None:
    text = explanation(check)  # type: ignore[arg-type]
    assert text.startswith(f"# {check.code} {check.name}\n")  # type: ignore[attr-defined]
    headings = [line for line in text.splitlines() if line.startswith("## ")]
    assert headings == ["## Why it hurts", "## How it is measured", "## Example", "## Remedy"]
    assert check.needs in NEEDS  # type: ignore[attr-defined]
