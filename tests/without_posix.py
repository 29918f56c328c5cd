"""A pytest plugin that hides what Windows and macOS lack: fcntl, resource, SC_AVPHYS_PAGES.

    PYTHONPATH=tests python -m pytest -p without_posix -m "not slow"

Python on Windows locks with msvcrt instead; here there are no locks at all, so tests of locks are skipped.
"""

from __future__ import annotations

import importlib.util
import os
import sys

import pytest

if importlib.util.find_spec("psutil"):  # accelerate needs it, and its part for Linux needs resource
    importlib.import_module("psutil")


def hide() -> None:
    """In this process, before anything else is imported."""
    real = os.sysconf

    def sysconf(name: str | int) -> int:
        if name == "SC_AVPHYS_PAGES":
            raise ValueError("unrecognized configuration name")
        return real(name)

    os.sysconf = sysconf
    sys.modules["fcntl"] = sys.modules["resource"] = None  # type: ignore[assignment]


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        if item.get_closest_marker("locks"):
            item.add_marker(pytest.mark.skip(reason="this system has no locks"))


hide()
