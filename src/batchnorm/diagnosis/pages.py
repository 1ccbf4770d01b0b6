"""The documentation of the checks, made from their table: `python -m batchnorm.diagnosis.pages docs/checks`."""

from __future__ import annotations

import sys
from pathlib import Path

from batchnorm.diagnosis.catalogue import CHECKS, NEEDS, explanation
from batchnorm.files import write_text

INDEX = "README.md"
FIXED, BAR = r" \*", r"\|"  # as Markdown shows them


def pages() -> dict[str, str]:
    """Every page, in Markdown, by the name of its file: one for each check, and the table of all."""
    checks = {f"{check.code}.md": f"{explanation(check)}\n[All checks]({INDEX})\n" for check in CHECKS.values()}
    return {INDEX: _index(), **checks}


def write(folder: Path) -> None:
    """Write the pages into a folder, which is made if it is not there."""
    folder.mkdir(parents=True, exist_ok=True)
    for name, content in pages().items():
        write_text(folder / name, content)


def _index() -> str:
    table = [("code", "name", "at most", "needs", "found when", "remedy"), ("---",) * 6]
    for check in CHECKS.values():
        code, remedy = f"[{check.code}]({check.code}.md)", check.remedy + (FIXED if check.fixed else "")
        table.append((code, check.name, check.severity, NEEDS[check.needs], check.found, remedy))
    lines = ["| " + " | ".join(cell.replace("|", BAR) for cell in row) + " |" for row in table]
    return (
        "# The checks\n\n"
        "What `batchnorm.check` and `batchnorm check` look for. `select` and `ignore` take these codes or prefixes of\n"
        "them: `BN3` means all codes that begin with it. `batchnorm explain CODE` prints one of these pages.\n\n"
        + "\n".join(lines)
        + "\n\n\\* `report.fix()` and `batchnorm check --fix --output FILE` do it.\n\n"
        "```{toctree}\n:hidden:\n:glob:\n\nBN*\n```\n"  # where the site's menu has the pages
    )


if __name__ == "__main__":
    write(Path(sys.argv[1]))
