"""`python tests/traps`: the table of traps, as Markdown."""

from __future__ import annotations

import sys
from pathlib import Path

sys.path[0] = str(Path(__file__).parents[1])  # where `traps` and `support` are found, as pytest finds them

from traps.table import main  # noqa: E402 - after the path it is found on

main()
