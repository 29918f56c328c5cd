"""Matching pairs on a plane, by t-SNE."""

from __future__ import annotations

from typing import Any

import numpy as np
from sklearn.manifold import TSNE


def embed_pairs(photos: np.ndarray, texts: np.ndarray, seed: int) -> dict[str, Any]:
    """Places of both, [pairs, 2] each, and the share of photos whose nearest text on the plane is their own.

    Args:
        photos: unit vectors [pairs, d].
        texts: unit vectors [pairs, d], in the same order.
        seed: of the start.
    """
    count = len(photos)
    method = TSNE(metric="cosine", init="random", random_state=seed, perplexity=min(30.0, (2 * count - 1) / 3))
    places = method.fit_transform(np.concatenate([photos, texts]))
    nearest = np.linalg.norm(places[:count, None] - places[None, count:], axis=2).argmin(axis=1)
    return {
        "photos": np.round(places[:count].astype(float), 3).tolist(),
        "texts": np.round(places[count:].astype(float), 3).tolist(),
        "own_is_nearest": float((nearest == np.arange(count)).mean()),
    }
