"""Mean, spread and largest magnitude of stored numbers, shard by shard. No file I/O.

They only show people the range of an array, so large shards are sampled: every n-th row, with n chosen to give about
two million numbers. Using all numbers would take longer than writing the shard.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch

from saffe_cache.store.dtypes import from_storage

_SAMPLE_NUMBERS = 2**21
_BLOCK_NUMBERS = 2**15
"""Numbers that are processed at once: they fit into a processor's cache, and torch uses no threads for so few."""


@dataclass(frozen=True, kw_only=True)
class Moments:
    """Moments of finite numbers; all 0 if there are none."""

    mean: float = 0.0
    m2: float = 0.0
    """Sum of squared differences from the mean."""
    count: int = 0
    max_magnitude: float = 0.0


@dataclass(frozen=True)
class Statistics:
    """Statistics of the sampled finite numbers of an array."""

    mean: float
    std: float
    max_magnitude: float


def sampled_moments(portions: Sequence[np.ndarray], dtype: str) -> Moments:
    """Moments of every n-th row of a shard; they do not depend on how the stored rows are cut into portions."""
    n = max(1, sum(rows.size for rows in portions) // _SAMPLE_NUMBERS)
    return _merge(_moments(from_storage(block, dtype)) for block in _blocks(_every_nth(portions, n)))


def combine_statistics(parts: Sequence[Moments]) -> Statistics:
    """Statistics over all shards of an array."""
    whole = _merge(parts)
    return Statistics(whole.mean, math.sqrt(whole.m2 / whole.count) if whole.count else 0.0, whole.max_magnitude)


def _every_nth(portions: Iterable[np.ndarray], n: int) -> Iterator[np.ndarray]:
    """Rows 0, n, 2n, … of all portions together."""
    position = 0
    for rows in portions:
        yield rows[-position % n :: n]
        position += len(rows)


def _blocks(portions: Iterable[np.ndarray]) -> Iterator[np.ndarray]:
    """Stored tokens, [tokens, last axis], in blocks of equal size, across the boundaries of portions."""
    waiting: list[np.ndarray] = []
    room = 0
    for rows in portions:
        tokens = rows.reshape(-1, math.prod(rows.shape[1:][-1:]))
        size = max(1, _BLOCK_NUMBERS // tokens.shape[1])
        room = room or size
        while len(tokens):
            waiting.append(tokens[:room])
            tokens, room = tokens[room:], room - len(waiting[-1])
            if not room:
                yield np.concatenate(waiting) if len(waiting) > 1 else waiting[0]
                waiting, room = [], size
    if waiting:
        yield np.concatenate(waiting)


def _moments(numbers: np.ndarray) -> Moments:
    """Moments of the finite values among [tokens, d], in float64 because a float32's square may overflow."""
    if numbers.dtype == np.float16:  # torch is eight times as fast, but warns about read-only arrays
        numbers = torch.from_numpy(numbers if numbers.flags.writeable else numbers.copy()).float().numpy()
    values = numbers.astype(np.float64)
    total = float(np.einsum("ij->", values))  # twice as fast as sum(), and without warnings for infinities
    if not math.isfinite(total):
        is_finite = np.isfinite(numbers)
        numbers, values = numbers[is_finite][None], values[is_finite][None]
        total = float(np.einsum("ij->", values))
    if not values.size:
        return Moments()
    mean = total / values.size
    squares = _sum_of_squares(values)
    m2 = squares - mean * total
    if m2 < squares / 1000:  # too many digits cancelled
        values -= mean
        m2 = _sum_of_squares(values)
    return Moments(mean=mean, m2=m2, count=values.size, max_magnitude=float(max(numbers.max(), -numbers.min())))


def _sum_of_squares(values: np.ndarray) -> float:
    """Token by token: for longer products numpy's linear algebra would use every core without being faster."""
    return float((values[:, None, :] @ values[:, :, None]).sum())


def _merge(parts: Iterable[Moments]) -> Moments:
    """The moments of all parts together. Source: Chan, Golub, LeVeque 1979, eq. 2.1."""
    count, mean, m2, largest = 0, 0.0, 0.0, 0.0
    for part in parts:
        if part.count:
            total, delta = count + part.count, part.mean - mean
            mean += delta * part.count / total
            m2 += part.m2 + delta * delta * count * part.count / total
            count, largest = total, max(largest, part.max_magnitude)
    return Moments(mean=mean, m2=m2, count=count, max_magnitude=largest)
