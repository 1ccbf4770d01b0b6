"""Fixtures for the tests of this folder."""

from __future__ import annotations

from support.threads import one_thread

__all__ = ["one_thread"]
