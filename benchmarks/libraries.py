"""Libraries that the scripts measure and the package does not need."""

from __future__ import annotations

import importlib
import importlib.util
import sys
from types import ModuleType

import torch

INSTALL = {"torchvision": "--no-deps torchvision", "timm": "--no-deps timm", "transformers": "transformers"}


def installed(name: str) -> bool:
    """Whether a library is there."""
    return importlib.util.find_spec(name) is not None


def library(name: str) -> ModuleType:
    """A library, or a module of one.

    Raises:
        SystemExit: it does not import.
    """
    package = name.split(".")[0]
    try:
        if package == "torchvision" or installed("torchvision"):  # the others import it where it is
            import_torchvision()
        return importlib.import_module(name)
    except ImportError as error:
        missing = "torchvision" if "torchvision" in str(error) else package
        raise SystemExit(
            f"networks of {package} are measured here ({error}). Run: pip install {INSTALL[missing]}"
        ) from error


def import_torchvision() -> None:
    """Import torchvision, also one whose compiled operators do not fit torch's build: no network here needs them.

    Without them its Python code fails at import for want of two schemas, those of object detection.
    """
    try:
        importlib.import_module("torchvision")
    except RuntimeError as error:
        if "torchvision::nms" not in str(error):
            raise
        for module in [module for module in sys.modules if module.split(".")[0] == "torchvision"]:
            del sys.modules[module]
        for operator in ("nms", "qnms"):
            torch.library.define(f"torchvision::{operator}", "(Tensor dets, Tensor scores, float iou) -> Tensor")
        importlib.import_module("torchvision")
