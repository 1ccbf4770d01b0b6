"""What a process has mapped."""

from __future__ import annotations

import tempfile


def mapped_files() -> int:
    """Mappings of temporary files without a name, on Linux."""
    with open("/proc/self/maps") as maps:
        return sum(tempfile.gettempdir() in line and "(deleted)" in line for line in maps)
