"""Late interaction: does it help to compare tokens with tokens, rather than mean with mean?"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import numpy as np
import torch
from torch.nn import functional

from saffe_cache.studies.alignment.maps import RidgeMap

_WORDS_AT_ONCE = 512


def normed(tokens: torch.Tensor) -> torch.Tensor:
    """Each token of zero mean and unit variance over its channels: a layer norm without gain and bias."""
    return functional.layer_norm(tokens.float(), tokens.shape[-1:])


@torch.inference_mode()
def maxsim(photos: Iterable[torch.Tensor], texts: Sequence[torch.Tensor], ridge: RidgeMap) -> np.ndarray:
    """Mean over a text's tokens of the largest cosine with a photo's tokens, float32 [photos, texts].

    The ridge regression, which was fitted to means of tokens, maps each photo token. Both sides are taken from the mean
    over texts, which all tokens share. Source: Khattab and Zaharia, SIGIR 2020 (ColBERT), with a mean in the place of
    the sum, so that long texts score no higher.

    Args:
        photos: normed tokens, some photos at a time, [photos, tokens, d].
        texts: normed tokens of each, [tokens, t].
        ridge: from means of photo tokens to means of text tokens.
    """
    weight, center = torch.from_numpy(ridge.weight), torch.from_numpy(ridge.center)
    lengths = [len(text) for text in texts]
    words = functional.normalize(torch.cat(list(texts)) - torch.from_numpy(ridge.target_center), dim=-1)
    scores = []
    for some in photos:
        mapped = functional.normalize((some - center) @ weight, dim=-1)
        best = torch.cat([_nearest(mapped, part) for part in torch.split(words, _WORDS_AT_ONCE)], dim=1)
        scores.append(torch.stack([of.mean(dim=1) for of in torch.split(best, lengths, dim=1)], dim=1))
    return np.asarray(torch.cat(scores).numpy())


def _nearest(photos: torch.Tensor, words: torch.Tensor) -> torch.Tensor:
    """Largest product of each word [words, t] with a token of each photo [photos, tokens, t]: [photos, words]."""
    return (photos.flatten(0, 1) @ words.T).view(*photos.shape[:2], -1).amax(dim=1)
