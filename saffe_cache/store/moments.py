"""Mean, spread and largest magnitude of stored numbers, shard by shard. Pure: no file is touched here.

They are for people, who look at the range of an array. So a large shard is judged by a sample: every n-th row, with n
such that it gives about two million numbers. All of them would cost more than writing the bytes does.
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
"""Numbers whose moments are taken at once: they stay in a processor's cache, and torch takes no threads for them."""


@dataclass(frozen=True, kw_only=True)
class Moments:
    """Of finite numbers; all 0 where there are none."""

    mean: float = 0.0
    m2: float = 0.0
    """Sum of squared differences from the mean."""
    count: int = 0
    max_magnitude: float = 0.0


@dataclass(frozen=True)
class Statistics:
    """Over the finite numbers of an array that were looked at."""

    mean: float
    std: float
    max_magnitude: float


def sampled_moments(portions: Sequence[np.ndarray], dtype: str) -> Moments:
    """Of every n-th row of a shard, whose stored rows come in portions; the same however they are cut."""
    n = max(1, sum(rows.size for rows in portions) // _SAMPLE_NUMBERS)
    return _merge(_moments(from_storage(block, dtype)) for block in _blocks(_every_nth(portions, n)))


def combine_statistics(parts: Sequence[Moments]) -> Statistics:
    """Over all shards of an array."""
    whole = _merge(parts)
    return Statistics(whole.mean, math.sqrt(whole.m2 / whole.count) if whole.count else 0.0, whole.max_magnitude)


def _every_nth(portions: Iterable[np.ndarray], n: int) -> Iterator[np.ndarray]:
    """Rows 0, n, 2n, … of all portions together."""
    position = 0
    for rows in portions:
        yield rows[-position % n :: n]
        position += len(rows)


def _blocks(portions: Iterable[np.ndarray]) -> Iterator[np.ndarray]:
    """Stored tokens, [tokens, last axis], equally many at a time, wherever one portion ends and the next begins."""
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
    """Of the finite ones among floating-point numbers [tokens, d]. In float64: a float32's square may overflow."""
    if numbers.dtype == np.float16:  # numpy takes eight times as long as torch, which warns of what is read-only
        numbers = torch.from_numpy(numbers if numbers.flags.writeable else numbers.copy()).float().numpy()
    values = numbers.astype(np.float64)
    total = float(np.einsum("ij->", values))  # half the time of a sum, and silent on infinities
    if not math.isfinite(total):
        is_finite = np.isfinite(numbers)
        numbers, values = numbers[is_finite][None], values[is_finite][None]
        total = float(np.einsum("ij->", values))
    if not values.size:
        return Moments()
    mean = total / values.size
    squares = _sum_of_squares(values)
    m2 = squares - mean * total
    if m2 < squares / 1000:  # too many of its digits cancelled
        values -= mean
        m2 = _sum_of_squares(values)
    return Moments(mean=mean, m2=m2, count=values.size, max_magnitude=float(max(numbers.max(), -numbers.min())))


def _sum_of_squares(values: np.ndarray) -> float:
    """Token by token: for longer ones the linear algebra behind numpy would take every core, and gain nothing."""
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
