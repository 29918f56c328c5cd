"""Pairs of a photo and a text, its own or another photo's.

Every text, and every photo, is in as many pairs with others as the ratio says for each pair of its own, so neither
carries any information alone. Pairs stay within a split; splits are by photo.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np
from scipy.sparse import csr_matrix
from scipy.sparse.csgraph import maximum_flow

from saffe_cache.inputs.pairs import Pairs

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
        """For training a control."""
        return replace(self, labels=np.random.default_rng(seed).permutation(self.labels))

    def with_photos_shuffled(self, seed: int) -> Examples:
        """For judging a control: each photo replaced by another, by the same one in all its pairs."""
        distinct, place = np.unique(self.photos, return_inverse=True)
        order = np.random.default_rng(seed).permutation(len(distinct))
        others = np.empty_like(distinct)
        others[order] = distinct[np.roll(order, 1)]  # one cycle, so no photo keeps its place
        return replace(self, photos=others[place])


def num_kinds(pairs: Pairs) -> int:
    """Number of photos that their texts distinguish: in a cache of classes, the number of classes."""
    return len({tuple(sorted(texts.tolist())) for texts in pairs.texts})


def matching_examples(pairs: Pairs) -> Examples:
    """Each photo with each of its texts."""
    return Examples(pairs.rows[pairs.owners], pairs.texts.values, np.ones(len(pairs.texts.values), np.int64))


def draw_examples(pairs: Pairs, count: int, negatives: int, seed: int) -> Examples:
    """For training: photos with one or several of their texts. A smaller set's matching pairs are among a larger's.

    Args:
        pairs: to draw from.
        count: of examples, including those with another's text. If few texts allow no other assignment, each is used
            equally often, and up to one of each stays unused.
        negatives: texts of others for each of its own.
        seed: of the choice and the order.

    Raises:
        ValueError: there are too few, or no such assignment exists.
    """
    photos, texts = _positives(pairs, seed)
    kept = count // (1 + negatives)
    if not 0 < kept <= len(photos):
        most = len(photos) * (1 + negatives)
        raise ValueError(
            f"--scales: found {count}, expected {1 + negatives} to {most} pairs, which {len(pairs)} "
            f"training photos give at 1:{negatives}."
        )
    return _with_negatives(pairs, photos[:kept], texts[:kept], negatives, seed)


def draw_judged(pairs: Pairs, negatives: int, seed: int) -> Examples:
    """For validation and test: every photo once with a text of its own, as long as each text is used equally often.

    Raises:
        ValueError: no such assignment exists.
    """
    generator = np.random.default_rng([seed, 1])
    chosen = pairs.texts.offsets[:-1] + generator.integers(np.diff(pairs.texts.offsets))
    photos, texts = _evenly(pairs.rows, pairs.texts.values[chosen], generator)
    _, counts = np.unique(texts, return_counts=True)
    kept = counts.min() * len(counts)
    return _with_negatives(pairs, photos[:kept], texts[:kept], negatives, seed)


def _positives(pairs: Pairs, seed: int) -> tuple[np.ndarray, np.ndarray]:
    return _evenly(pairs.rows[pairs.owners], pairs.texts.values, np.random.default_rng([seed, 0]))


def _evenly(photos: np.ndarray, texts: np.ndarray, generator: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
    """In random order, but each text a first time before any a second time: classes in turn."""
    order = generator.permutation(len(texts))
    by_text = order[np.argsort(texts[order], kind="stable")]
    _, first, counts = np.unique(texts[by_text], return_index=True, return_counts=True)
    turn = np.empty(len(texts), np.int64)
    turn[by_text] = np.arange(len(texts)) - np.repeat(first, counts)
    order = order[np.argsort(turn[order], kind="stable")]
    return photos[order], texts[order]


def _with_negatives(pairs: Pairs, photos: np.ndarray, texts: np.ndarray, negatives: int, seed: int) -> Examples:
    """Each photo also with texts of others, assigned from the same texts.

    Raises:
        ValueError: no such assignment exists.
    """
    generator = np.random.default_rng([seed, 2])
    width = int(pairs.texts.values.max()) + 1
    own = pairs.rows[pairs.owners] * width + pairs.texts.values
    others = _exchanged(photos * width, texts, own, negatives, generator)
    if others is None:
        whole = len(texts) - len(texts) % len(np.unique(texts))  # one more text of a class may leave no assignment
        photos, texts = photos[:whole], texts[:whole]
        others = _flown(photos * width, texts, own, negatives, generator)
    labels = np.repeat([1, 0], [len(texts), len(others)])
    return Examples(np.concatenate([photos, others // width]), np.concatenate([texts, others % width]), labels)


def _exchanged(
    codes: np.ndarray, texts: np.ndarray, own: np.ndarray, negatives: int, generator: np.random.Generator
) -> np.ndarray | None:
    """Codes of photos with others' texts: the texts in random order, exchanged until no photo has one of its own.

    None if no such order is found by chance, as with few classes.

    Args:
        codes: of the photos; with a text added, those of pairs.
        texts: to assign.
        own: codes of the photos with all of their own texts.
        negatives: how often all of them are assigned.
        generator: of the order.
    """
    taken = set(own.tolist())
    found = []
    for _ in range(negatives):
        assigned = generator.permutation(texts)
        for _ in range(_ROUNDS):
            wrong = [place for place, code in enumerate((codes + assigned).tolist()) if code in taken]
            if not wrong:
                break
            for place, other in zip(wrong, generator.integers(len(assigned), size=len(wrong)).tolist(), strict=True):
                if (
                    int(codes[place] + assigned[other]) not in taken
                    and int(codes[other] + assigned[place]) not in taken
                ):
                    assigned[place], assigned[other] = assigned[other], assigned[place]
        else:
            return None
        found.append(codes + assigned)
        taken.update(found[-1].tolist())
    return np.concatenate(found)


def _flown(
    codes: np.ndarray, texts: np.ndarray, own: np.ndarray, negatives: int, generator: np.random.Generator
) -> np.ndarray:
    """As `_exchanged`, by a maximum flow from photos to texts, which finds an assignment if there is one.

    Raises:
        ValueError: there is none.
    """
    (photos, of_photo), (distinct, of_text) = (
        (values[order], negatives * counts[order])
        for values, counts in (np.unique(side, return_counts=True) for side in (codes, texts))
        for order in [generator.permutation(len(values))]
    )
    impossible = ValueError(
        f"--negatives: found {negatives}, and the {len(distinct)} different texts of {len(texts)} pairs cannot be "
        "assigned so that each photo gets that many of others. Use fewer, or fewer pairs, or more texts."
    )
    if of_text.max() * (1 + negatives) > negatives * len(texts):  # more than all others' pairs have room for
        raise impossible
    pairs = photos[:, None] + distinct
    at_photo, at_text = np.nonzero(~np.isin(pairs, own))
    first, source, sink = len(photos), len(photos) + len(distinct), len(photos) + len(distinct) + 1
    tails = np.concatenate([np.full(first, source), at_photo, np.arange(first, source)])
    heads = np.concatenate([np.arange(first), first + at_text, np.full(len(distinct), sink)])
    limits = np.concatenate([of_photo, np.ones(len(at_text)), of_text]).astype(np.int32)
    found = maximum_flow(csr_matrix((limits, (tails, heads)), shape=(sink + 1, sink + 1)), source, sink)
    if found.flow_value < negatives * len(texts):
        raise impossible
    assigned: np.ndarray = pairs[found.flow[:first, first:source].nonzero()]
    return assigned
