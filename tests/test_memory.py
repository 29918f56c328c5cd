"""What is freed in a training is used again, and afterwards goes back to the system."""

from __future__ import annotations

import ctypes
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from saffe_cache.core.devices import kept_memory

resource = pytest.importorskip("resource")

LARGE = 2**26
"""Bytes, of which glibc keeps none by itself."""


def faults_of_a_repeated_array() -> int:
    """Pages that the system maps for a large array once others of its size were freed, again and again.

    The least of some: a freed piece may be too short by what the alignment of the next one takes, until it has grown
    together with its neighbours.
    """
    found = []
    for _ in range(10):
        before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
        torch.zeros(LARGE // 4).fill_(1.0)
        found.append(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
    return min(found)


def resident() -> int:
    """Bytes of memory that the process holds."""
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * resource.getpagesize()


@pytest.mark.slow
@pytest.mark.skipif(
    not sys.platform.startswith("linux") or not hasattr(ctypes.CDLL(None), "mallopt"), reason="glibc alone is told"
)
def test_freed_memory_is_used_again_and_given_back() -> None:
    """In a process of its own: where much was allocated before, the heap may have no room to grow."""
    done = subprocess.run([sys.executable, __file__], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    usual, kept, given_back = map(int, done.stdout.split())
    if usual < 1000:
        pytest.skip("another allocator, or pages of megabytes")
    assert kept < usual / 10
    assert given_back > LARGE / 2


def main() -> None:
    kept, held = [], []

    @kept_memory()
    def be_killed() -> None:
        kept.append(faults_of_a_repeated_array())
        held.append(resident())
        raise KeyboardInterrupt

    usual = faults_of_a_repeated_array()
    with pytest.raises(KeyboardInterrupt):
        be_killed()
    print(usual, *kept, held[0] - resident())


if __name__ == "__main__":
    main()
