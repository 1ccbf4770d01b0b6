"""One command in this process, and whether it did what commands may do."""

from __future__ import annotations

import argparse
import contextlib
import io
import os
import random
import sys
import tempfile
import warnings
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

from batchnorm.cli import main as cli


class Outcome(NamedTuple):
    """What a command left: its exit code, stdout, stderr, or the error that came out of it."""

    code: int | None
    out: str
    err: str
    escaped: BaseException | None


class Stream(io.TextIOWrapper):
    """A stream of the process, kept."""

    def __init__(self) -> None:
        super().__init__(io.BytesIO(), encoding="utf-8", write_through=True)

    def text(self) -> str:
        return self.buffer.getvalue().decode("utf-8")  # type: ignore[attr-defined]  # a BytesIO


def run(arguments: Sequence[str]) -> Outcome:
    """Run the command line in this process, as in a new one: what was imported from this folder is forgotten."""
    out, err = Stream(), Stream()
    code, escaped = None, None
    path, modules = list(sys.path), set(sys.modules)
    # Damaged code may give warnings when it is compiled; and two versions may be of one size and second.
    with (
        warnings.catch_warnings(),
        without_bytecode(),
        contextlib.redirect_stdout(out),
        contextlib.redirect_stderr(err),
    ):
        warnings.simplefilter("ignore")
        try:
            code = cli.main(list(arguments))
        except BaseException as error:
            if isinstance(error, KeyboardInterrupt):
                raise
            escaped = error
    sys.path[:] = path
    for name in set(sys.modules) - modules:
        if str(getattr(sys.modules[name], "__file__", None) or "").startswith(str(Path.cwd())):
            del sys.modules[name]
    return Outcome(code, out.text(), err.text(), escaped)


@contextlib.contextmanager
def without_bytecode() -> Iterator[None]:
    before, sys.dont_write_bytecode = sys.dont_write_bytecode, True
    try:
        yield
    finally:
        sys.dont_write_bytecode = before


def faults(outcome: Outcome) -> list[str]:
    """What is wrong with an outcome: one that failed is exit code 2, one line on stderr, and nothing else."""
    if outcome.escaped is not None:
        return [f"{type(outcome.escaped).__name__} came out: {outcome.escaped}"]
    found = []
    if outcome.code not in (0, 2):
        found.append(f"exit code {outcome.code}")
    if outcome.code == 2:
        lines = outcome.err.splitlines()
        if len(lines) != 1 or not lines[0].startswith("batchnorm: "):
            found.append(f"stderr is not one line: {outcome.err[:300]!r}")
        if outcome.out:
            found.append(f"stdout is not empty: {outcome.out[:300]!r}")
        if "did not expect this" in outcome.err:
            found.append(f"nobody expected this: {outcome.err[:300]!r}")
    for word in ("Traceback", ".cpp", ".hpp"):
        if word in outcome.err:
            found.append(f"{word} in {outcome.err[:300]!r}")
    if any(ord(c) < 32 and c not in "\n\t" for c in outcome.out + outcome.err):
        found.append("a control character reached the terminal")
    return found


@contextlib.contextmanager
def inside(folder: Path) -> Iterator[None]:
    """Work in a folder."""
    before = Path.cwd()
    os.chdir(folder)
    try:
        yield
    finally:
        os.chdir(before)


def repeated(case: Callable[[random.Random], tuple[str, list[str]]], cases: int, seed: int) -> list[str]:
    """Do cases; each has a seed of its own, so that it can be done alone.

    Args:
        case: from a source of randomness to what was done and what is wrong.
        cases: how many.
        seed: of the first.

    Returns:
        A line for each fault.
    """
    found = []
    for number in range(seed, seed + cases):
        what, wrong = case(random.Random(number))
        found += [f"--seed {number} --cases 1: {what}: {fault}" for fault in wrong]
    return found


def main(description: str | None, fuzz: Callable[[int, int], list[str]]) -> None:
    """The command line of a fuzzer: exit code 1, and a line for each fault, where there are any."""
    parser = argparse.ArgumentParser(description=(description or "").splitlines()[0])
    parser.add_argument("--cases", type=int, default=200, help="how many")
    parser.add_argument("--seed", type=int, default=0, help="of the first; each later one has the next number")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder, inside(Path(folder)):
        found = fuzz(arguments.cases, arguments.seed)
    print(*found, f"{arguments.cases} cases, {len(found)} faults", sep="\n")
    raise SystemExit(1 if found else 0)
