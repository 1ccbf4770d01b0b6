"""The packages that only some features need: the extras of `pip install "batchnorm[NAME]"`."""

from __future__ import annotations

import importlib

from batchnorm.errors import UsageError

# Of each extra, what is imported, and what it is called where packages are installed from.
EXTRAS = {
    "study": {
        "sklearn": "scikit-learn",
        "matplotlib": "matplotlib",
        "jinja2": "jinja2",
        "numpy": "numpy",
        "scipy": "scipy",
    },
    "onnx": {"onnx": "onnx", "onnxscript": "onnxscript"},
    "files": {"numpy": "numpy", "safetensors": "safetensors"},
}


def require(extra: str, feature: str, *modules: str) -> None:
    """Import packages of an extra, so that a missing one is noticed before any work is done.

    Args:
        extra: its name.
        feature: what needs it, as the message's subject.
        modules: which of its modules; all of them by default.

    Raises:
        UsageError: one does not import.
    """
    packages = EXTRAS[extra]
    for module in modules or packages:
        try:
            importlib.import_module(module)
        except ImportError as error:
            raise UsageError(
                f"{feature} needs {packages[module]}, which does not import ({error}). "
                f'Run: pip install "batchnorm[{extra}]"'
            ) from error
