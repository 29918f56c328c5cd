"""Checksums of arrays."""

from __future__ import annotations

from collections.abc import Iterable

import google_crc32c
import numpy as np

_BLOCK_BYTES = 2**18


def bytes_of(rows: np.ndarray) -> memoryview:
    """The bytes of a contiguous array, without a copy."""
    return rows.reshape(-1).view(np.uint8).data.toreadonly()


def crc32c(portions: Iterable[np.ndarray]) -> int:
    """CRC-32C of consecutive contiguous arrays. The library accepts bytes only, so a little is copied at a time."""
    crc = 0
    for data in map(bytes_of, portions):
        for start in range(0, len(data), _BLOCK_BYTES):
            crc = google_crc32c.extend(crc, bytes(data[start : start + _BLOCK_BYTES]))
    return crc
