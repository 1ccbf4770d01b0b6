"""Fixtures for the study's tests."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from batchnorm.study.training import one_thread


@pytest.fixture(autouse=True)
def on_one_core() -> Iterator[None]:
    """As the study's tasks are computed: networks this small are slower on two, by far where others compute as well."""
    with one_thread():
        yield
