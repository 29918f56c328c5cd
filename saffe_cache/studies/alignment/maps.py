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

from saffe_cache.core.features import Ragged
from saffe_cache.core.results import Estimate
from saffe_cache.retrieval.baselines import LinearMap, unit_rows
from saffe_cache.retrieval.metrics import bootstrap_interval, paired_bootstrap, recall_at_k
from saffe_cache.retrieval.mlp import MlpFit, fit_mlp
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
    """By cosine, of photos in the texts' space.

    Args:
        photos: [n, d].
        texts: the distinct texts, [m, d].
        rows: int [n], the text of each photo.
        texts_search: whether the texts, one of each photo, search the photos; else photos search the texts.
    """
    return answers_of_scores(unit_rows(photos) @ unit_rows(texts).T, rows, texts_search=texts_search)


def answers_of_scores(scores: np.ndarray, rows: np.ndarray, *, texts_search: bool) -> Answers:
    """By scores of photos with distinct texts, [n, m]."""
    scores, own = (scores[:, rows].T, np.arange(len(rows))) if texts_search else (scores, rows)
    of_own = scores[np.arange(len(own)), own][:, None]
    ties = (scores == of_own).sum(axis=1) - 1
    return Answers(1 + (scores > of_own).sum(axis=1) + ties / 2, scores.argmax(axis=1), own)


def mlp_answers(
    fitted: tuple[np.ndarray, np.ndarray],
    judged: tuple[np.ndarray, np.ndarray],
    texts: np.ndarray,
    num_judged_texts: int,
    epochs: int,
    seed: int,
    *,
    texts_search: bool,
) -> Answers:
    """Answers of saffe evaluate's MLP on pooled features: two layers, trained with InfoNCE like a FAM.

    A fifth of the photos to fit on choose its dropout and epoch.

    Args:
        fitted: features [n, d] of the photos to fit on, and the text of each, int [n].
        judged: the same of the photos to judge.
        texts: the distinct texts, [m, t].
        num_judged_texts: how many of them, from the first, take part in the search on judged photos.
        epochs: at most.
        seed: of starting weights, order and dropout.
        texts_search: see `answers`.
    """
    features, rows = fitted
    held = np.arange(len(features)) % _VALIDATION_PART == 0
    texts = unit_rows(texts)

    def judge(fit: MlpFit) -> float:
        distinct, place = np.unique(rows[held], return_inverse=True)
        queries = fit.queries(texts[distinct])
        found = answers(fit.gallery(features[held]), queries, place, texts_search=texts_search)
        return float((1 / found.ranks).mean())

    positives = Ragged.from_rows([row] for row in rows[~held])
    fit = fit_mlp(features[~held], texts, positives, judge, epochs=epochs, seed=seed)
    queries = fit.queries(texts[:num_judged_texts])
    return answers(fit.gallery(judged[0]), queries, judged[1], texts_search=texts_search)


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
