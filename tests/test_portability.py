"""The package where fcntl, resource and SC_AVPHYS_PAGES are absent, as on macOS and Windows."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

TESTS = Path(__file__).parent
PROGRAM = """
import sys
sys.path.insert(0, sys.argv[1])
import without_posix  # which hides them

import importlib, logging, pkgutil
from pathlib import Path
import saffe_cache
from saffe_cache.core.atomic_io import hold_folder, write_whole
from saffe_cache.core.devices import available_memory, peak_memory_mb

for module in pkgutil.walk_packages(saffe_cache.__path__, "saffe_cache."):
    importlib.import_module(module.name)
assert available_memory() == 2 * 2**30
assert peak_memory_mb() == 0
folder = Path(sys.argv[2]) / "cache"
with hold_folder(folder):
    write_whole(folder / "file", b"bytes")
assert [path.name for path in folder.iterdir()] == ["file"]
"""


@pytest.mark.slow
def test_package_works_without_posix_modules(tmp_path: Path) -> None:
    command = [sys.executable, "-c", PROGRAM, TESTS, tmp_path]
    done = subprocess.run(command, capture_output=True, text=True, cwd=TESTS.parent)
    assert done.returncode == 0, done.stderr
    assert "this system has no file locks. Do not write to it from two processes." in done.stderr
