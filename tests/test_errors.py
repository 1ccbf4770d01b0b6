from __future__ import annotations

import pytest

from batchnorm import errors


def _all() -> list[type[errors.BatchNormError]]:
    return [c for c in vars(errors).values() if isinstance(c, type) and issubclass(c, errors.BatchNormError)]


@pytest.mark.parametrize("error", _all())
def test_every_error_is_in_the_tree_of_the_docstring(error: type[errors.BatchNormError]) -> None:
    assert errors.__doc__ is not None
    (line,) = [line for line in errors.__doc__.splitlines() if line.lstrip("│├└─ ").startswith(error.__name__)]
    for base in error.__bases__:
        if base not in (errors.BatchNormError, Exception):
            assert base.__name__ in line


@pytest.mark.parametrize("error", _all())
def test_within_keeps_the_type_and_the_message(error: type[errors.BatchNormError]) -> None:
    placed = error("got 1").within("BatchNorm2d(3)")
    assert type(placed) is error
    assert str(placed) == "BatchNorm2d(3): got 1"
