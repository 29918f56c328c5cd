"""A part of `make torture`: kills, limits, disks and writers at once, on tiny encoders."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

TORTURE = Path(__file__).parent / "torture" / "torture.py"


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="mount namespaces, /proc")
def test_faults_end_as_promised(tmp_path: Path) -> None:
    command = [sys.executable, str(TORTURE), "--quick", "--work", str(tmp_path)]
    ended = subprocess.run(command, capture_output=True, text=True)
    assert ended.returncode == 0, ended.stdout + ended.stderr
    counts = json.loads((tmp_path / "torture.json").read_text())["counts"]
    assert sum(sum(outcomes.values()) for outcomes in counts.values()) >= 10
