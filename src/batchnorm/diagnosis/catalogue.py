"""All checks, in one table: what runs, the documentation and the command line are made from it."""

from __future__ import annotations

import importlib.resources
from collections.abc import Iterable

from batchnorm.diagnosis.checks import batches, configuration, data, inference, learning, state, structure
from batchnorm.diagnosis.definition import Check
from batchnorm.errors import OptionError

GROUPS = (state, configuration, structure, batches, data, inference, learning)
CHECKS: dict[str, Check] = {
    check.code: check for check in sorted((c for group in GROUPS for c in group.CHECKS), key=lambda check: check.code)
}

NEEDS = {
    "state": "nothing but the layers",
    "model": "a model whose graph can be traced",
    "data": "batches",
    "second": "a second set of batches",
    "optimizer": "the optimizer",
    "loss": "batches with targets, and a loss",
}


def selected(select: Iterable[str] | str | None, ignore: Iterable[str] | str | None) -> list[Check]:
    """The checks that codes or prefixes of codes choose.

    Args:
        select: those to take; None for all.
        ignore: those to leave out of them.

    Raises:
        OptionError: a code, or prefix, that no check has.
    """
    chosen, left_out = (_codes(name, codes) for name, codes in (("select", select), ("ignore", ignore)))
    return [
        check
        for check in CHECKS.values()
        if (select is None or check.code.startswith(chosen)) and not (left_out and check.code.startswith(left_out))
    ]


def _codes(name: str, given: Iterable[str] | str | None) -> tuple[str, ...]:
    codes = () if given is None else (given,) if isinstance(given, str) else tuple(given)
    for code in codes:
        if not isinstance(code, str) or not code or not any(known.startswith(code) for known in CHECKS):
            raise OptionError(
                f"got {name}={code!r}; it must be a code or the beginning of codes, such as BN301 or BN3. "
                f"`batchnorm explain` lists them"
            )
    return codes


def explanation(check: Check) -> str:
    """The page of a check, in Markdown."""
    file = importlib.resources.files("batchnorm.diagnosis") / "explanations" / f"{check.code}.md"
    severity = {"error": "an error", "warning": "a warning", "info": "an info"}[check.severity]
    fixed = "; `report.fix()` and `batchnorm check --fix` do it" if check.fixed else ""
    return (
        f"# {check.code} {check.name}\n\n"
        f"Found when: {check.found}.\n\n"
        f"At most {severity}. Needs {NEEDS[check.needs]}.\n\n"
        f"Remedy: {check.remedy}{fixed}.\n\n"
        f"{file.read_text(encoding='utf-8')}"
    )
