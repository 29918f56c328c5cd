"""CIDEr-D: how much a generated caption shares with people's captions of the same photo, rare words counting more.

    CIDEr-D_n(c, S) = 10/m · sum over j of exp(-(l(c) - l(s_j))² / 2σ²) · min(g(c), g(s_j)) · g(s_j) / (|g(c)| |g(s_j)|)

for n-grams of n words, and the mean over n = 1 to 4; σ = 6. g(c) holds for each n-gram its count in the caption times
log(photos / photos with a reference that has it), l is the number of words, s_1 … s_m are the photo's references.
Source: Vedantam et al., CIDEr, CVPR 2015, eqs. 1 to 3 and 10. Counts are clipped before they are divided by the
caption's length, as in the authors' code.

Captions are split into lower-case words at everything but letters, digits and _; the authors' tokenizer (PTB) differs
in rare words such as "don't". Document frequencies are those of the scored photos, so values for different sets of
photos do not compare. Languages without spaces between words need another metric.
"""

from __future__ import annotations

import re
from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence
from functools import cached_property
from itertools import chain

import numpy as np

from saffe_cache.core.results import Estimate
from saffe_cache.retrieval.metrics import bootstrap_interval
from saffe_cache.studies.captioning.result import CONTROL, CaptionScores

_LONGEST, _SIGMA = 4, 6.0

Ngram = tuple[str, ...]


class CiderD:
    """The references of all photos, indexed by n-gram."""

    def __init__(self, references: Sequence[Sequence[str]]) -> None:
        """`references`: people's captions of each photo, at least one."""
        self._sizes = np.array([len(own) for own in references])
        self._counts = [_ngrams(caption) for caption in chain(*references)]
        self._num_words = np.array([_num_words(counts) for counts in self._counts])
        owners = np.repeat(np.arange(len(references)), self._sizes)
        having: dict[Ngram, set[int]] = defaultdict(set)
        for owner, counts in zip(owners.tolist(), self._counts, strict=True):
            for ngram in counts:
                having[ngram].add(owner)
        self._weights = {ngram: float(np.log(len(references) / len(photos))) for ngram, photos in having.items()}
        self._unseen = float(np.log(len(references)))
        vectors = [self._vector(counts) for counts in self._counts]
        self._norms = np.array([_norms(vector) for vector in vectors])
        found: dict[Ngram, list[tuple[int, float]]] = defaultdict(list)
        for row, vector in enumerate(vectors):
            for ngram, value in vector.items():
                found[ngram].append((row, value))
        self._rows = {ngram: np.array([row for row, _ in places]) for ngram, places in found.items()}
        self._values = {ngram: np.array([value for _, value in places]) for ngram, places in found.items()}

    def of(self, caption: str) -> np.ndarray:
        """CIDEr-D of one caption for every photo, from 0 to 10; float64 [photos]."""
        sums = np.add.reduceat(self._of_each(_ngrams(caption)), self._starts)
        return np.asarray(sums / self._sizes)

    @cached_property
    def of_people(self) -> np.ndarray:
        """Mean CIDEr-D of each photo's references, each against the photo's others; float64 [photos].

        NaN where a photo has only one.
        """
        found = np.full(len(self._sizes), np.nan)
        for photo, (start, size) in enumerate(zip(self._starts, self._sizes, strict=True)):
            if size > 1:
                own = slice(start, start + size)
                among = np.array([self._of_each(counts)[own] for counts in self._counts[own]])
                found[photo] = among[~np.eye(size, dtype=bool)].mean()
        return found

    @property
    def _starts(self) -> np.ndarray:
        return np.asarray(np.cumsum(self._sizes) - self._sizes)

    def _of_each(self, counts: Mapping[Ngram, int]) -> np.ndarray:
        """Of a caption against each reference of all photos, float64 [references]."""
        vector = self._vector(counts)
        products = np.zeros_like(self._norms)
        for ngram, value in vector.items():
            if ngram in self._rows:
                values = self._values[ngram]
                products[self._rows[ngram], len(ngram) - 1] += np.minimum(value, values) * values
        norms = _norms(vector) * self._norms
        cosines = np.divide(products, norms, out=np.zeros_like(products), where=norms > 0)
        longer = _num_words(counts) - self._num_words
        return np.asarray(10 * cosines.mean(axis=1) * np.exp(-(longer**2) / (2 * _SIGMA**2)))

    def _vector(self, counts: Mapping[Ngram, int]) -> dict[Ngram, float]:
        return {ngram: count * self._weights.get(ngram, self._unseen) for ngram, count in counts.items()}


def score_captions(
    generated: Sequence[str],
    references: Sequence[Sequence[str]],
    other: np.ndarray,
    *,
    plain: str,
    constants: Sequence[str],
) -> CaptionScores:
    """CIDEr-D of `result.CAPTIONS`, with bootstrap intervals over photos.

    Args:
        generated: the model's caption of each photo.
        references: people's captions of each photo.
        other: for each photo another one, as `other_photos` draws them.
        plain: what the model says without a photo.
        constants: captions, of which the best for all photos is chosen, knowing their references.
    """
    cider, own = CiderD(references), np.arange(len(references))
    by_model, by_person = (
        np.array([cider.of(one) for one in said]) for said in (generated, [of[0] for of in references])
    )
    constant = max(constants, key=lambda one: float(cider.of(one).mean()))
    found = {
        "photo": by_model[own, own],
        CONTROL: by_model[other, own],
        "plain_model": cider.of(plain),
        "constant": cider.of(constant),
        "people_shuffled": by_person[other, own],
        "people": cider.of_people,
    }
    if np.isnan(found["people"]).any():
        del found["people"]
    return CaptionScores(
        cider={name: _mean(values) for name, values in found.items()},
        differences={name: _mean(found["photo"] - values) for name, values in found.items() if name != "photo"},
        said={"plain_model": plain, "constant": constant},
    )


def _mean(values: np.ndarray) -> Estimate:
    low, high = bootstrap_interval(values, np.ones(len(values)))
    return Estimate(value=float(values.mean()), low=low, high=high)


def _ngrams(caption: str) -> Counter[Ngram]:
    words = re.findall(r"\w+", caption.lower())
    return Counter(tuple(words[at : at + n]) for n in range(1, _LONGEST + 1) for at in range(len(words) - n + 1))


def _num_words(counts: Mapping[Ngram, int]) -> int:
    return sum(count for ngram, count in counts.items() if len(ngram) == 1)


def _norms(vector: Mapping[Ngram, float]) -> np.ndarray:
    """Of the n-grams of each n, float64 [4]."""
    squares = np.zeros(_LONGEST)
    for ngram, value in vector.items():
        squares[len(ngram) - 1] += value**2
    return np.asarray(np.sqrt(squares))
