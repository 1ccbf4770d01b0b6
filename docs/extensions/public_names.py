"""Every public name is in the reference and has a docstring; where one is not, the build warns, and so fails.

A name is public where a user imports it from, which need not be the module that defines it. References by either, and
by the last part alone where that is unique, lead to the same place.
"""

from __future__ import annotations

import functools
import importlib
import inspect
from collections import Counter
from collections.abc import Iterator
from types import ModuleType
from typing import Any

from docutils.nodes import Element
from sphinx.addnodes import pending_xref
from sphinx.application import Sphinx
from sphinx.domains.python import PythonDomain
from sphinx.environment import BuildEnvironment
from sphinx.util import logging
from sphinx.util.nodes import make_refnode

MODULES = (
    "batchnorm",
    "batchnorm.errors",
    "batchnorm.functional",
    "batchnorm.integrations.lightning",
    "batchnorm.integrations.transformers",
    "batchnorm.surgery.interop",
)
log = logging.getLogger(__name__)


def public(module: ModuleType) -> dict[str, Any]:
    """The names that a module offers: `__all__`, or the classes and functions that it defines."""
    if hasattr(module, "__all__"):
        return {name: getattr(module, name) for name in module.__all__ if not inspect.ismodule(getattr(module, name))}
    return {
        name: value
        for name, value in vars(module).items()
        if not name.startswith("_")
        and (inspect.isclass(value) or inspect.isfunction(value))
        and value.__module__ == module.__name__
    }


def members(cls: type) -> Iterator[str]:
    """The public methods and properties that a class of ours defines itself."""
    for name, value in vars(cls).items():
        if not name.startswith("_") and isinstance(value, property | classmethod | staticmethod) | inspect.isfunction(
            value
        ):
            yield name


def faults(documented: set[str], modules: tuple[str, ...] = MODULES) -> list[str]:
    """What is public and not in the reference, or without a docstring of its own."""
    found = []
    for module_name in modules:
        for name, value in public(importlib.import_module(module_name)).items():
            path = f"{module_name}.{name}"
            if path not in documented and f"{value.__module__}.{name}" in documented:
                path = f"{value.__module__}.{name}"
            wanted = {path: value}
            if inspect.isclass(value):
                wanted |= {f"{path}.{member}": vars(value)[member] for member in members(value)}
            found += [f"{path} is public, but not in the reference" for path in wanted.keys() - documented]
            found += [f"{path} is public, but has no docstring" for path, value in wanted.items() if not value.__doc__]
    return sorted(found)


def _python(env: BuildEnvironment) -> PythonDomain:
    domain = env.get_domain("py")
    assert isinstance(domain, PythonDomain)
    return domain


def _check(app: Sphinx, env: BuildEnvironment) -> None:
    for fault in faults(set(_python(env).objects)):
        log.warning(fault, type="public_names")


@functools.cache
def _aliases(domain: PythonDomain) -> dict[str, str]:
    """The documented name by the one that its module defines, and by the last part where it is unique."""
    aliases = {}
    for path in domain.objects:
        module, _, name = path.rpartition(".")
        try:
            value = getattr(importlib.import_module(module), name)
        except (ImportError, AttributeError):
            continue  # a member of a class
        aliases[f"{getattr(value, '__module__', module)}.{getattr(value, '__qualname__', name)}"] = path
    ends = Counter(path.rpartition(".")[2] for path in set(aliases.values()))
    return aliases | {path.rpartition(".")[2]: path for path in aliases.values() if ends[path.rpartition(".")[2]] == 1}


def _resolve(app: Sphinx, env: BuildEnvironment, node: pending_xref, content: Element) -> Element | None:
    if node.get("refdomain") != "py":
        return None
    domain = _python(env)
    target = _aliases(domain).get(node["reftarget"].removeprefix("bn."))
    if target is None:
        return None
    entry = domain.objects[target]
    return make_refnode(app.builder, node["refdoc"], entry.docname, entry.node_id, content, target)


def setup(app: Sphinx) -> dict[str, Any]:
    """After all pages are read; and for each reference that Sphinx does not know."""
    app.connect("env-check-consistency", _check)
    app.connect("missing-reference", _resolve)
    return {"parallel_read_safe": True, "parallel_write_safe": True}
