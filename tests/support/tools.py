"""Other people's tools, which are in a folder of their own: tests/compatibility/requirements.txt."""

from __future__ import annotations

import sys
from importlib import metadata
from pathlib import Path

from libraries import import_torchvision

FOLDER = Path(sys.prefix) / "tools"


def version(package: str) -> str:
    """Of a tool, or of what is installed beside them; nothing becomes importable."""
    _check()
    found = next(iter(metadata.distributions(name=package, path=[str(FOLDER), *sys.path])), None)
    if found is None:
        raise FileNotFoundError(f"{package} is not installed: name it in tests/compatibility/requirements.txt")
    return found.version


def make_importable() -> None:
    """Let this process import timm, torchvision, torchao and the others; torchvision as the benchmarks do."""
    _check()
    if str(FOLDER) not in sys.path:
        sys.path.append(str(FOLDER))
    import_torchvision()


def _check() -> None:
    if not FOLDER.is_dir():
        raise FileNotFoundError(f"{FOLDER} is not there: the Makefile installs it. Run `make test-long`")
