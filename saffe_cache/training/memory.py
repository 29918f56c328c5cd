"""Memory that a training on a CPU frees and soon needs again."""

from __future__ import annotations

import ctypes
import os
from collections.abc import Iterator
from contextlib import contextmanager

_TRIM_THRESHOLD, _MMAP_THRESHOLD = -1, -3
"""glibc's numbers for them (malloc.h)."""
_USUAL = {_TRIM_THRESHOLD: 2**26, _MMAP_THRESHOLD: 2**25}
"""Where glibc's own adaptation ends."""
_KEPT = {_TRIM_THRESHOLD: 2**31 - 1, _MMAP_THRESHOLD: 2**30}


@contextmanager
def kept_memory() -> Iterator[None]:
    """Let glibc keep what is freed, for the whole process; afterwards it goes back to the system.

    Every step needs arrays of the same sizes. Those above 32 MB glibc gives back at once and asks for anew: the system
    then clears and maps each page, which took a quarter of a step of `paper`. Elsewhere nothing is changed.
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None) if os.name == "posix" else None
    if mallopt is None:
        yield
        return
    for option, number in _KEPT.items():
        mallopt(option, number)
    try:
        yield
    finally:
        for option, number in _USUAL.items():
            mallopt(option, number)
        ctypes.CDLL(None).malloc_trim(0)
