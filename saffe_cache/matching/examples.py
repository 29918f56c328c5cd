"""Pairs of a photo and a text, its own or another photo's.

Every text stands in as many pairs with another's photo as the ratio says for each pair with its own, and so does every
photo: neither tells anything alone. Within a split only; splits are by photo.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np

from saffe_cache.pairs import Pairs

_ROUNDS = 200


@dataclass(frozen=True)
class Examples:
    """Rows in the encoders' arrays, int64 [n] each, and whether they belong together, int64 [n] of 0 and 1."""

    photos: np.ndarray
    texts: np.ndarray
    labels: np.ndarray

    def __len__(self) -> int:
        return len(self.labels)

    def with_labels_permuted(self, seed: int) -> Examples:
        """What a control is trained on."""
        return replace(self, labels=np.random.default_rng(seed).permutation(self.labels))

    def with_photos_shuffled(self, seed: int) -> Examples:
        """At each photo's place another one, the same in all its pairs: what a control is judged on."""
        distinct, place = np.unique(self.photos, return_inverse=True)
        order = np.random.default_rng(seed).permutation(len(distinct))
        others = np.empty_like(distinct)
        others[order] = distinct[np.roll(order, 1)]  # one cycle: no photo keeps its place
        return replace(self, photos=others[place])


def most_examples(pairs: Pairs, negatives: int) -> int:
    """How many `draw_examples` can give."""
    return len(_positives(pairs, 0)[0]) * (1 + negatives)


def matching_examples(pairs: Pairs) -> Examples:
    """Each photo with each of its texts."""
    return Examples(pairs.rows[pairs.owners], pairs.texts.values, np.ones(len(pairs.texts.values), np.int64))


def draw_examples(pairs: Pairs, count: int, negatives: int, seed: int) -> Examples:
    """For training: photos with one or several of their texts. A smaller count's matching pairs are among a larger's.

    Args:
        pairs: to draw from.
        count: of examples, those of another's text included.
        negatives: texts of others for each of its own.
        seed: of which, and in what order.

    Raises:
        ValueError: there are too few.
    """
    photos, texts = _positives(pairs, seed)
    kept = count // (1 + negatives)
    if not 0 < kept <= len(photos):
        most = len(photos) * (1 + negatives)
        raise ValueError(f"--scales: found {count}, expected {1 + negatives} to {most} pairs, which the data allow.")
    return _with_negatives(pairs, photos[:kept], texts[:kept], negatives, seed)


def draw_judged(pairs: Pairs, negatives: int, seed: int) -> Examples:
    """For validation and test: every photo once with a text of its own, as far as each text is used equally often."""
    generator = np.random.default_rng([seed, 1])
    chosen = pairs.texts.offsets[:-1] + generator.integers(np.diff(pairs.texts.offsets))
    photos, texts = _evenly(pairs.rows, pairs.texts.values[chosen], generator)
    _, counts = np.unique(texts, return_counts=True)
    kept = counts.min() * len(counts)
    return _with_negatives(pairs, photos[:kept], texts[:kept], negatives, seed)


def _positives(pairs: Pairs, seed: int) -> tuple[np.ndarray, np.ndarray]:
    return _evenly(pairs.rows[pairs.owners], pairs.texts.values, np.random.default_rng([seed, 0]))


def _evenly(photos: np.ndarray, texts: np.ndarray, generator: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
    """In random order, but each text for the first time before any for the second time: classes in turn."""
    order = generator.permutation(len(texts))
    by_text = order[np.argsort(texts[order], kind="stable")]
    _, first, counts = np.unique(texts[by_text], return_index=True, return_counts=True)
    turn = np.empty(len(texts), np.int64)
    turn[by_text] = np.arange(len(texts)) - np.repeat(first, counts)
    order = order[np.argsort(turn[order], kind="stable")]
    return photos[order], texts[order]


def _with_negatives(pairs: Pairs, photos: np.ndarray, texts: np.ndarray, negatives: int, seed: int) -> Examples:
    """Each photo also with texts of others, dealt from the same ones."""
    generator = np.random.default_rng([seed, 2])
    width = int(max(texts.max(), pairs.texts.values.max())) + 1
    taken = set((pairs.rows[pairs.owners] * width + pairs.texts.values).tolist())
    dealt = []
    for _ in range(negatives):
        others = _deal(photos * width, texts, taken, generator, negatives)
        taken.update((photos * width + others).tolist())
        dealt.append(others)
    labels = np.zeros(len(photos) * (1 + negatives), np.int64)
    labels[: len(photos)] = 1
    return Examples(np.tile(photos, 1 + negatives), np.concatenate([texts, *dealt]), labels)


def _deal(
    codes: np.ndarray, texts: np.ndarray, taken: set[int], generator: np.random.Generator, negatives: int
) -> np.ndarray:
    """The texts in another order, in which no photo has one that is taken: exchanged until it is so.

    Raises:
        ValueError: there is no such order, as far as was searched.
    """
    dealt = generator.permutation(texts)
    for _ in range(_ROUNDS):
        wrong = [place for place, code in enumerate((codes + dealt).tolist()) if code in taken]
        if not wrong:
            return dealt
        for place, other in zip(wrong, generator.integers(len(dealt), size=len(wrong)).tolist(), strict=True):
            if int(codes[place] + dealt[other]) not in taken and int(codes[other] + dealt[place]) not in taken:
                dealt[place], dealt[other] = dealt[other], dealt[place]
    raise ValueError(
        f"--negatives: found {negatives}, and the {len(np.unique(texts))} different texts of {len(texts)} photos "
        "cannot be dealt so that each photo gets so many of others. Ask for fewer, or give more texts."
    )
