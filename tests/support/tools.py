"""Other people's tools, which are in a folder of their own: tests/compatibility/requirements.txt."""

from __future__ import annotations

import sys
from pathlib import Path

import torch

FOLDER = Path(sys.prefix) / "tools"


def make_importable() -> None:
    """Let this process import timm, torchvision, torchao and the others.

    PyPI's torchvision for Linux is a CUDA build. Beside a CPU build of torch its C++ part does not load, and its Python
    part asks for these two operators when it is imported.
    """
    if not FOLDER.is_dir():
        raise FileNotFoundError(f"{FOLDER} is not there: the Makefile installs it. Run `make test`")
    if str(FOLDER) not in sys.path:
        sys.path.append(str(FOLDER))
    for name in ("nms", "qnms"):
        if not hasattr(torch.ops.torchvision, name):
            torch.library.define(f"torchvision::{name}", "(Tensor boxes, Tensor scores, float threshold) -> Tensor")
