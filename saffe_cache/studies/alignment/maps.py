"""Retrieval between two encoders on unseen photos: without a map, with a ridge regression, an MLP, or between tokens.

Maps go from photos to texts and are fitted on other photos than they are judged on. Captions search the judged photos,
one caption for each; photos search the classes. So chance is 1 / photos, or 1 / classes. Late interaction compares
tokens with tokens rather than mean with mean.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import NamedTuple

import numpy as np
import torch
from torch.nn import functional

from saffe_cache.core.items import Ragged
from saffe_cache.core.results import Estimate
from saffe_cache.retrieval.baselines import LinearMap, unit_rows
from saffe_cache.retrieval.fitting import MlpFit, fit_mlp
from saffe_cache.retrieval.metrics import bootstrap_interval, paired_bootstrap, recall_at_k
from saffe_cache.studies.alignment.result import MapScore

_VALIDATION_PART = 5
"""The fraction of the photos to fit on that chooses the MLP's epoch and dropout is one divided by this."""
_WORDS_AT_ONCE = 512


class Answers(NamedTuple):
    """How judged photos and their texts find each other."""

    ranks: np.ndarray
    """float64 [queries]: of the own photo of each caption, or of the own class of each photo; a tie is half a place."""
    first: np.ndarray
    """int64 [queries]: the first result."""
    own: np.ndarray
    """int64 [queries]: the right result."""

    @property
    def hits(self) -> np.ndarray:
        """1.0 where the right one comes first, [queries]."""
        return recall_at_k(self.ranks, 1)

    @property
    def recall_at_1(self) -> float:
        return float(self.hits.mean())

    def null(self, orders: Sequence[np.ndarray]) -> np.ndarray:
        """R@1 with the judged pairs permuted, one for each order.

        The map stays: it has not seen the judged photos, so if it knows nothing of the pairing, each order is as likely
        as the true one.
        """
        return np.array([(self.first == self.own[order]).mean() for order in orders])

    def null_of_deals(self, deals: Sequence[np.ndarray]) -> np.ndarray:
        """R@1 with texts assigned at random to photos or to classes: a permutation of them for each deal.

        For vectors without a fit. All photos of a class then miss or hit together, as they do in truth.
        """
        return np.array([(self.first == deal[self.own]).mean() for deal in deals])

    def score(self, nulls: np.ndarray, seed: int) -> MapScore:
        """R@1 with its bootstrap interval over photos, with the gallery as it is, as in saffe evaluate."""
        low, high = bootstrap_interval(self.hits, np.ones(len(self.hits)), seed=seed)
        return MapScore(
            value=self.recall_at_1,
            low=low,
            high=high,
            null_mean=float(nulls.mean()),
            null_high=float(np.quantile(nulls, 0.95)),
            median_rank=float(np.median(self.ranks)),
        )

    def gap(self, other: Answers, part: float = 1.0) -> Estimate:
        """R@1 less (a fraction of) another system's."""
        difference = self.hits - part * other.hits
        mean, low, high = paired_bootstrap(difference, np.arange(len(difference)))
        return Estimate(value=mean, low=low, high=high)


def answers(photos: np.ndarray, texts: np.ndarray, rows: np.ndarray, *, texts_search: bool) -> Answers:
    """By cosine, of photos [n, d] in the space of the distinct texts [m, d]; see `answers_of_scores`."""
    return answers_of_scores(unit_rows(photos) @ unit_rows(texts).T, rows, texts_search=texts_search)


def answers_of_scores(scores: np.ndarray, rows: np.ndarray, *, texts_search: bool) -> Answers:
    """By scores of photos with distinct texts, [n, m].

    `rows` are the text of each photo, int [n]. Texts, one of each photo, search photos, or photos search texts.
    """
    scores, own = (scores[:, rows].T, np.arange(len(rows))) if texts_search else (scores, rows)
    of_own = scores[np.arange(len(own)), own][:, None]
    ties = (scores == of_own).sum(axis=1) - 1
    return Answers(1 + (scores > of_own).sum(axis=1) + ties / 2, scores.argmax(axis=1), own)


def fit_text_mlp(features: np.ndarray, rows: np.ndarray, texts: np.ndarray, seed: int, *, texts_search: bool) -> MlpFit:
    """saffe evaluate's MLP from pooled features of photos [n, d] to their texts: two layers, trained like a FAM.

    `rows` are the text of each photo among the distinct ones [m, t]. A fifth of the photos choose dropout and epoch.
    """
    held, texts = np.arange(len(features)) % _VALIDATION_PART == 0, unit_rows(texts)
    distinct, place = np.unique(rows[held], return_inverse=True)

    def judge(fit: MlpFit) -> float:
        gallery, queries = fit.gallery(features[held]), fit.queries(texts[distinct])
        return float((1 / answers(gallery, queries, place, texts_search=texts_search).ranks).mean())

    return fit_mlp(features[~held], texts, Ragged.from_rows([row] for row in rows[~held]), judge, seed=seed)


def normed(tokens: torch.Tensor) -> torch.Tensor:
    """Each token of zero mean and unit variance over its channels: a layer norm without gain and bias."""
    return functional.layer_norm(tokens.float(), tokens.shape[-1:])


@torch.inference_mode()
def maxsim(
    photos: Iterable[torch.Tensor], texts: Sequence[torch.Tensor], ridge: LinearMap, text_mean: np.ndarray
) -> np.ndarray:
    """Mean over a text's tokens of the largest cosine with a photo's tokens, float32 [photos, texts].

    The ridge regression, which was fitted to means of tokens, maps each photo token. The mean over texts, which all
    tokens share, is subtracted from both sides. Source: Khattab and Zaharia, SIGIR 2020 (ColBERT), with a mean instead
    of the sum, so that long texts do not score higher.

    Args:
        photos: normed tokens, some photos at a time, [photos, tokens, d].
        texts: normed tokens of each, [tokens, t].
        ridge: from means of photo tokens to means of text tokens.
        text_mean: mean of the targets that it was fitted to, [t].
    """
    weight, mean = torch.from_numpy(ridge.weight), torch.from_numpy(text_mean)
    bias = torch.from_numpy(ridge.bias) - mean
    lengths = [len(text) for text in texts]
    words = functional.normalize(torch.cat(list(texts)) - mean, dim=-1)
    scores = []
    for some in photos:
        mapped = functional.normalize(some @ weight.T + bias, dim=-1).flatten(0, 1)
        cosines = (mapped @ part.T for part in torch.split(words, _WORDS_AT_ONCE))
        best = torch.cat([part.view(*some.shape[:2], -1).amax(dim=1) for part in cosines], dim=1)
        scores.append(torch.stack([of.mean(dim=1) for of in torch.split(best, lengths, dim=1)], dim=1))
    return np.asarray(torch.cat(scores).numpy())
