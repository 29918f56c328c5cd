"""What is freed in a training is used again, and afterwards goes back to the system."""

from __future__ import annotations

import ctypes
import resource
import subprocess
import sys

import pytest
import torch

from saffe_cache.training.memory import kept_memory

LARGE = 2**26
"""Bytes, of which glibc keeps none by itself."""


def faults_of_a_second_array() -> int:
    """Pages that the system maps for a large array, another of its size having been freed just before."""
    for _ in range(2):
        before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
        torch.zeros(LARGE // 4).fill_(1.0)
        faults = resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before
    return faults


@pytest.mark.skipif(
    not sys.platform.startswith("linux") or not hasattr(ctypes.CDLL(None), "mallopt"), reason="glibc alone is told"
)
def test_freed_memory_is_used_again_and_given_back() -> None:
    """In a process of its own: where much was allocated before, the heap may have no room to grow."""
    done = subprocess.run([sys.executable, __file__], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    usual, kept, afterwards = map(int, done.stdout.split())
    if usual < 1000:
        pytest.skip("another allocator, or pages of megabytes")
    assert kept < usual / 10
    assert afterwards > usual / 2


def main() -> None:
    kept = []

    @kept_memory()
    def be_killed() -> None:
        kept.append(faults_of_a_second_array())
        raise KeyboardInterrupt

    usual = faults_of_a_second_array()
    with pytest.raises(KeyboardInterrupt):
        be_killed()
    print(usual, *kept, faults_of_a_second_array())


if __name__ == "__main__":
    main()
