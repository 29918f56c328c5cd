"""In which order an epoch sees the training pairs.

Where rows cost the same wherever they lie, all are shuffled. Where a row costs its whole shard, shards are drawn at
random, so many at a time: a window; and what lies in these is shuffled. Both follow from seed and epoch alone.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np


class EpochOrder(NamedTuple):
    """Of one epoch."""

    epoch: int
    pairs: np.ndarray
    """int64 [pairs]: a permutation."""
    windows: np.ndarray | None
    """int64 [pairs]: the window that each place lies in, ascending; None where all are shuffled together."""


def draw_order(shards: np.ndarray, shards_per_window: int | None, seed: int, epoch: int) -> EpochOrder:
    """
    Args:
        shards: int64 [pairs], the shard that each lies in.
        shards_per_window: None where all are shuffled together.
    """
    generator = np.random.default_rng((seed, epoch))
    shuffled = generator.permutation(len(shards))
    if shards_per_window is None:
        return EpochOrder(epoch, shuffled, None)
    names, members = np.unique(shards, return_inverse=True)
    window_of_shard = generator.permutation(len(names)) // shards_per_window
    windows = window_of_shard[members[shuffled]]
    by_window = np.argsort(windows, kind="stable")
    return EpochOrder(epoch, shuffled[by_window], windows[by_window])
