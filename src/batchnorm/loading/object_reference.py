"""The user's own code, as `package.module:callable` or `path/file.py:callable`, and what it raises."""

from __future__ import annotations

import importlib
import importlib.util
import operator
import sys
import sysconfig
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import ModuleType
from typing import Any

import torch

from batchnorm.errors import BatchNormError, UsageError
from batchnorm.messages import described

_PACKAGE = str(Path(__file__).parents[1])
# Python, what is installed, torch wherever it is, and this package: their lines say less about an error than the user's
# line before them.
_INSTALLED = {sysconfig.get_path(name) for name in ("stdlib", "purelib", "platlib")}
_NOT_THE_USERS = (*_INSTALLED, str(Path(torch.__file__).parent), _PACKAGE, "<")


def resolve(reference: str, what: str) -> Callable[..., Any]:
    """The callable that a reference names.

    Modules are searched for in the current folder first, and a file's own folder is on `sys.path`, as with
    `python FILE`.

    Args:
        reference: `package.module:callable` or `path/file.py:callable`.
        what: what it is for, as messages name it.

    Raises:
        UsageError: the reference has another form, there is no such module, file or name, it is not callable, or the
            module raises.
    """
    source, _, name = reference.rpartition(":")
    if not source or not all(part.isidentifier() for part in name.split(".")):
        raise UsageError(f"got {what} {reference}; it must be package.module:callable or path/file.py:callable")
    with blaming(f"importing {source}"):
        module = _file(Path(source)) if source.endswith(".py") else _module(source)
    with blaming(f"looking for {name} in {source}"):
        try:
            found: Any = operator.attrgetter(name)(module)
        except AttributeError as error:
            raise UsageError(f"got {what} {reference}; {source} has no {name}. Check the name") from error
    if not callable(found):
        raise UsageError(f"got {what} {reference}; it must be callable, and is of type {type(found).__name__}")
    return found  # type: ignore[no-any-return]  # it can be called, which is all that is known


@contextmanager
def blaming(what: str) -> Iterator[None]:
    """An exception inside is the user's own code's: it becomes one line that says what raised it, and where.

    `sys.exit` is an exception too: the work is not done, whatever the code it gives.

    Raises:
        UsageError: for any exception but this package's own, Ctrl-C, and what ends a suspended pass.
    """
    try:
        yield
    except (BatchNormError, KeyboardInterrupt):
        raise
    except BaseException as error:
        if _ends_a_pass(error):
            raise
        frames = [f for f in traceback.extract_tb(error.__traceback__) if not f.filename.startswith(_NOT_THE_USERS)]
        where = f" ({frames[-1].filename}, line {frames[-1].lineno})" if frames else ""
        raise UsageError(f"{what} raised {type(error).__name__}: {described(error)}{where}") from error


def _ends_a_pass(error: BaseException) -> bool:
    """Whether it is how greenlet ends a forward pass that method "exact" has suspended."""
    greenlet = sys.modules.get("greenlet")  # without it, there is none
    return greenlet is not None and isinstance(error, greenlet.GreenletExit)


def _module(name: str) -> ModuleType:
    _search(Path.cwd())
    return importlib.import_module(name)


def _file(path: Path) -> ModuleType:
    """The module of a file, under the file's name, so that what it defines can be pickled; executed once."""
    path = path.resolve()
    known = sys.modules.get(path.stem)
    if known is not None:
        if getattr(known, "__file__", None) == str(path):
            return known
        raise UsageError(f"got the file {path.name}, and there is a module {path.stem} already. Rename the file")
    spec = importlib.util.spec_from_file_location(path.stem, path)
    assert spec is not None  # there is a loader for .py
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    _search(path.parent)
    sys.modules[path.stem] = module
    try:
        spec.loader.exec_module(module)
    except BaseException:
        del sys.modules[path.stem]
        raise
    return module


def _search(folder: Path) -> None:
    if str(folder) not in sys.path:
        sys.path.insert(0, str(folder))
