"""The traps do not spring here; in torch they do where the table says so."""

from __future__ import annotations

from pathlib import Path

import pytest

from traps.kits import OURS, TORCH, expect
from traps.table import TRAPS, Trap, observed

PAGE = Path(__file__).parents[2] / "docs" / "traps.md"
EVERY_TRAP = pytest.mark.parametrize("trap", TRAPS, ids=lambda trap: trap.title)
# Under vmap, torch runs some operations in a loop, and says so.
pytestmark = pytest.mark.filterwarnings("ignore:There is a performance drop:UserWarning")


@EVERY_TRAP
def test_ours(trap: Trap) -> None:
    trap.check(OURS)


@EVERY_TRAP
def test_torchs(trap: Trap) -> None:
    """So that the table stays honest: a torch that mends a trap turns this red."""
    if not trap.torch_fails:
        trap.check(TORCH)
        return
    try:
        seen = trap.check(TORCH)
    except AssertionError:
        return
    pytest.fail(f"torch has mended this ({seen}): say torch_fails=False, and make the tables of docs/traps.md again")


@EVERY_TRAP
def test_the_page_has_it(trap: Trap) -> None:
    """What was observed may differ by rounding from machine to machine; who springs may not."""
    (row,) = [line for line in PAGE.read_text().splitlines() if line.startswith(f"| {trap.title} |")]
    torchs, ours = row.strip("| ").split(" | ")[1:]
    assert torchs.startswith("**") == trap.torch_fails
    assert not ours.startswith("**")


def test_rows_are_written_once() -> None:
    assert len({trap.title for trap in TRAPS}) == len(TRAPS)


def test_what_springs_is_bold() -> None:
    def check(kit: object) -> str:
        return expect(kit is OURS, "seen")

    trap = Trap("made up", check, torch_fails=True)
    assert (observed(trap, TORCH), observed(trap, OURS)) == ("**seen**", "seen")
