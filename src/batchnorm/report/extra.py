"""The packages of the extra `batchnorm[study]`, which only reports and experiments need."""

from __future__ import annotations

import importlib

from batchnorm.errors import UsageError

# What is imported, and what it is called where packages are installed from.
PACKAGES = {"sklearn": "scikit-learn", "matplotlib": "matplotlib", "jinja2": "jinja2"}


def require() -> None:
    """Import every package of the extra, so that a missing one is noticed before any work is done.

    Raises:
        UsageError: one does not import.
    """
    for module, package in PACKAGES.items():
        try:
            importlib.import_module(module)
        except ImportError as error:
            raise UsageError(
                f'the study needs {package}, which does not import ({error}). Run: pip install "batchnorm[study]"'
            ) from error
