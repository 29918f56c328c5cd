"""Checksums of arrays."""

from __future__ import annotations

from collections.abc import Iterable

import google_crc32c
import numpy as np

_BLOCK_BYTES = 2**18


def bytes_of(rows: np.ndarray) -> memoryview:
    """The bytes of a contiguous array, without a copy."""
    return rows.reshape(-1).view(np.uint8).data.toreadonly()


def crc32c(portions: Iterable[np.ndarray | bytes]) -> int:
    """CRC-32C of consecutive portions. The library accepts bytes only: of arrays, a little is copied at a time."""
    crc = 0
    for portion in portions:
        if isinstance(portion, bytes):
            crc = google_crc32c.extend(crc, portion)
            continue
        data = bytes_of(portion)
        for start in range(0, len(data), _BLOCK_BYTES):
            crc = google_crc32c.extend(crc, bytes(data[start : start + _BLOCK_BYTES]))
    return crc
