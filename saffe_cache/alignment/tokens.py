"""Late interaction: does it help to compare tokens with tokens, rather than mean with mean?"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch.nn import functional

from saffe_cache.alignment.maps import RidgeMap

_TEXTS_AT_ONCE = 8


def normed(tokens: torch.Tensor) -> torch.Tensor:
    """Each token of zero mean and unit variance over its channels: a layer norm without gain and bias."""
    return functional.layer_norm(tokens.float(), tokens.shape[-1:])


@torch.inference_mode()
def maxsim(photos: torch.Tensor, texts: Sequence[torch.Tensor], ridge: RidgeMap) -> np.ndarray:
    """Mean over a text's tokens of the largest cosine with a photo's tokens, float32 [photos, texts].

    The ridge regression, which was fitted to means of tokens, maps each photo token. Both sides are taken from the mean
    over texts, which all tokens share. Source: Khattab and Zaharia, SIGIR 2020 (ColBERT), sec. 3.2, with a mean in the
    place of the sum, so that long texts score no higher.

    Args:
        photos: normed tokens, [photos, tokens, d].
        texts: normed tokens of each, [tokens, t].
        ridge: from means of photo tokens to means of text tokens.
    """
    weight, center = torch.from_numpy(ridge.weight), torch.from_numpy(ridge.center)
    mapped = functional.normalize((photos - center) @ weight, dim=-1)
    num_photos, num_tokens, width = mapped.shape
    flat = mapped.reshape(-1, width)
    shared = torch.from_numpy(ridge.target_center)
    scores = np.empty((num_photos, len(texts)), np.float32)
    for start in range(0, len(texts), _TEXTS_AT_ONCE):
        these = texts[start : start + _TEXTS_AT_ONCE]
        tokens = functional.normalize(torch.cat(list(these)) - shared, dim=-1)
        best = (flat @ tokens.T).view(num_photos, num_tokens, -1).amax(dim=1)
        parts = torch.split(best, [len(text) for text in these], dim=1)
        scores[:, start : start + len(these)] = torch.stack([part.mean(dim=1) for part in parts], dim=1).numpy()
    return scores
