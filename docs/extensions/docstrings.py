"""The package's docstrings, which are Google's sections around Markdown, as Sphinx reads them.

Napoleon makes fields of most sections. What it takes for something else is written out here before it looks: Markdown's
indented blocks are code, and reStructuredText's are quotations; a line of `Raises:` may name several errors, or none;
the text of `Returns:` has no type before its first colon, because annotations have the types.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

from sphinx.application import Sphinx
from sphinx.domains.python import PyObject

SECTION = re.compile(r"(Args|Attributes|Raises|Returns|Shapes|Yields):$")
FIELDS = {"Raises:": ":Raises:", "Returns:": ":returns:"}
NAME = re.compile(r"`\w[\w.]*(\(\))?`")
ERRORS = re.compile(r"    (\w+(?:, \w+)*): ")
MARKS = re.compile(r"(`[^`]*`)|(?<!\*)\*(?=S\b)|\|")  # code, which stays; the star of (N, C, *S); bars of |x|


def with_code(lines: list[str]) -> list[str]:
    """The same lines, with `::` before each indented block outside of sections."""
    out: list[str] = []
    section = code = False
    for line in lines:
        indented = line.startswith("    ")
        if line and not indented:
            section, code = bool(SECTION.match(line)), False
        elif indented and not section and not code and (not out or not out[-1]) and out[-2:] != ["::", ""]:
            out += ["::", ""]
            code = True
        out.append(line)
    return out


def _return(line: str) -> str:
    return line


def _raise(line: str) -> str:
    if line.startswith("     ") or not line:
        return f"      {line.strip()}".rstrip()
    named = ERRORS.match(line)
    if not named:
        return f"    * {line[4:]}"
    errors = ", ".join(f"`{name}`" for name in named[1].split(", "))
    return f"    * {errors}: {line[named.end() :]}"


def with_fields(lines: list[str]) -> list[str]:
    """The same lines, with `Returns:` as a field of running text and `Raises:` as one of bullets."""
    written: dict[str, Callable[[str], str]] = {"Raises:": _raise, "Returns:": _return}
    out: list[str] = []
    section = ""
    for line in lines:
        if line in FIELDS:
            section = line
            out.append(FIELDS[line])
            continue
        if line and not line.startswith(" "):
            section = ""
        out.append(written[section](line) if section else line)
    return out


def with_escapes(lines: list[str]) -> list[str]:
    """The same lines, with what Markdown prints as it is, and reStructuredText does not, escaped.

    Code that is no name, and so cannot be a link, becomes a literal.
    """

    def escaped(mark: re.Match[str]) -> str:
        if mark[1]:
            return mark[1] if NAME.fullmatch(mark[1]) else f"`{mark[1]}`"
        return f"\\{mark[0]}"

    return [MARKS.sub(escaped, line) for line in lines]


def _process(app: Sphinx, what: str, name: str, obj: object, options: object, lines: list[str]) -> None:
    mended = with_fields(with_code(with_escapes(lines)))
    # Napoleon takes what is before the first colon of an attribute for its type, but only in the first line: a comment.
    lines[:] = ["..", "", *mended] if what in ("property", "attribute") else mended


def setup(app: Sphinx) -> dict[str, Any]:
    """Before napoleon, which has the priority 500."""
    app.connect("autodoc-process-docstring", _process, priority=400)
    for field in PyObject.doc_field_types:
        if field.name == "variable":
            field.label = "Attributes"  # Sphinx says Variables
    return {"parallel_read_safe": True}
