"""Pairs of a photo and a text, its own or another photo's, and the features that fusions are given.

Every text, and every photo, is in as many pairs with others as the ratio says for each pair of its own, so neither
carries any information alone. Pairs stay within a split; splits are by photo.

Vectors may be degraded, by noise, which destroys information, or by a rotation, which only separates the two spaces.
Gaussian noise on unit vectors of width d leaves a cosine of 1 / sqrt(1 + sigma^2 d) with the clean ones and the square
of that of a pair's, so it destroys each modality as well as the alignment of both (arXiv 2606.01207, eq. 4, treats it
as a control of alignment alone). A rotation of the photos keeps every cosine among photos.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Literal

import numpy as np
import torch
from scipy.linalg import expm
from scipy.sparse import csr_matrix
from scipy.sparse.csgraph import maximum_flow

from saffe_cache.inputs.pairs import Pairs
from saffe_cache.retrieval.baselines import unit_rows
from saffe_cache.store.reader import EncoderCache

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

    `count` includes the examples with another's text, `negatives` for each of its own. If few texts allow no other
    assignment, each is used equally often, and up to one of each stays unused.

    Raises:
        ValueError: there are too few, or no such assignment exists.
    """
    photos, texts = _evenly(pairs.rows[pairs.owners], pairs.texts.values, np.random.default_rng([seed, 0]))
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
    """Codes of pairs with others' texts: these in random order, exchanged until no photo has one of its own.

    `codes` are of the photos; with a text added, they are those of pairs, such as the photos' `own`. None if no such
    order is found by chance, as with few classes.
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
                exchanged = {int(codes[place] + assigned[other]), int(codes[other] + assigned[place])}
                if not exchanged & taken:
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
    sides = []
    for side in (codes, texts):
        values, counts = np.unique(side, return_counts=True)
        order = generator.permutation(len(values))
        sides.append((values[order], negatives * counts[order]))
    (photos, of_photo), (distinct, of_text) = sides
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


Kind = Literal["clean", "noise", "rotation"]
_ROWS_AT_ONCE = 512
_FIRST_ZERO = 3.8317
"""Of the Bessel function J1: the largest angle at which the mean cosine, 2 J1(a) / a, is 0."""
_MEASURED = 2000


@dataclass(frozen=True)
class Degradation:
    """What is done to unit vectors."""

    kind: Kind = "clean"
    level: float = 0.0
    """Noise: its standard deviation in each coordinate. Rotation: 0 for none, 1 for a mean cosine of 0."""

    def __str__(self) -> str:
        return self.kind if self.kind == "clean" else f"{self.kind} {self.level:g}"

    def apply(self, photos: np.ndarray, texts: np.ndarray, seed: int) -> tuple[np.ndarray, np.ndarray]:
        """Noise on both, unit(x + e) as in eq. 4; a rotation of the photos only. The results are unit vectors."""
        generator = np.random.default_rng([seed, 3])
        if self.kind == "rotation":
            return unit_rows(photos @ partial_rotation(photos.shape[1], self.level, generator)), texts
        if self.kind == "noise":
            photos, texts = (
                unit_rows(of + self.level * generator.standard_normal(of.shape, np.float32)) for of in (photos, texts)
            )
        return photos, texts


def partial_rotation(width: int, turn: float, generator: np.random.Generator) -> np.ndarray:
    """A random rotation [d, d], exp(turn S) for a random skew-symmetric S, from none at 0 to no similarity at 1.

    The angles of its planes follow Wigner's semicircle up to a = 3.83 turn, so a vector's mean cosine with itself
    before is 2 J1(a) / a with the Bessel function J1: 0.89 at a quarter, 0.61 at a half, 0.27 at three quarters.
    """
    drawn = generator.standard_normal((width, width))
    skew = (drawn - drawn.T) / np.sqrt(2)  # its spectrum ends at 2 sqrt(d)
    return np.asarray(expm(turn * _FIRST_ZERO * skew / (2 * np.sqrt(width))), np.float32)


@dataclass(frozen=True)
class PairVectors:
    """Unit vectors of some photos and texts, float32 [n, d], and their rows in the encoders' arrays, ascending."""

    photo_rows: np.ndarray
    text_rows: np.ndarray
    photos: np.ndarray
    texts: np.ndarray

    @staticmethod
    def read(photo: EncoderCache, text: EncoderCache, photo_rows: np.ndarray, text_rows: np.ndarray) -> PairVectors:
        """The encoders' own vectors."""
        photos, texts = unit_rows(photo.vectors(photo_rows)), unit_rows(text.vectors(text_rows))
        return PairVectors(photo_rows, text_rows, photos, texts)

    def degraded(self, degradation: Degradation, seed: int) -> PairVectors:
        photos, texts = degradation.apply(self.photos, self.texts, seed)
        return replace(self, photos=photos, texts=texts)

    def mapped(self, to_texts: Callable[[np.ndarray], np.ndarray]) -> PairVectors:
        """Photos mapped into the space of the texts, as unit vectors."""
        return replace(self, photos=unit_rows(to_texts(self.photos)))

    @property
    def widths(self) -> tuple[int, int]:
        return self.photos.shape[1], self.texts.shape[1]

    @property
    def are_comparable(self) -> bool:
        """Whether photos and texts are of one width, so that they have cosines."""
        return self.widths[0] == self.widths[1]

    def of_photos(self, rows: np.ndarray) -> np.ndarray:
        return self.photos[np.searchsorted(self.photo_rows, rows)]

    def of_texts(self, rows: np.ndarray) -> np.ndarray:
        return self.texts[np.searchsorted(self.text_rows, rows)]

    def products(self, pairs: Examples) -> np.ndarray:
        """Products of coordinates, float32 [pairs, d]."""
        return np.asarray(self.of_photos(pairs.photos) * self.of_texts(pairs.texts))

    def cosines(self, pairs: Examples) -> np.ndarray:
        """float32 [pairs]"""
        return np.asarray(self.products(pairs).sum(axis=1))

    def alignment(self, clean: PairVectors, pairs: Examples) -> dict[str, float]:
        """Mean cosines: of photos and of texts with their clean versions; of matching and other pairs if widths agree.

        `clean` are the same vectors before they were degraded. Only the matching ones of `pairs` are measured.
        """
        own = pairs.labels == 1
        photos, texts = pairs.photos[own], pairs.texts[own]
        some = np.unique(photos)[:_MEASURED], np.unique(texts)[:_MEASURED]
        found = {
            "photos_with_clean": _mean_cosine(clean.of_photos(some[0]), self.of_photos(some[0])),
            "texts_with_clean": _mean_cosine(clean.of_texts(some[1]), self.of_texts(some[1])),
        }
        if self.are_comparable:
            found["matching_pairs"] = _mean_cosine(self.of_photos(photos), self.of_texts(texts))
            found["other_pairs"] = _mean_cosine(self.of_photos(photos), np.roll(self.of_texts(texts), 1, axis=0))
        return found

    @cached_property
    def inputs(self) -> Inputs:
        """Sequences of one, of length sqrt(d), so that coordinates are about 1, as starting weights expect."""
        photos, texts = (of * np.float32(of.shape[1] ** 0.5) for of in (self.photos, self.texts))
        arrays = (torch.from_numpy(photos)[:, None], torch.from_numpy(texts)[:, None], torch.ones(len(texts)))
        return Inputs(self.photo_rows, self.text_rows, *arrays)


def _mean_cosine(first: np.ndarray, second: np.ndarray) -> float:
    return float((first * second).sum(axis=1).mean())


@dataclass(frozen=True)
class Inputs:
    """What fusions are given of some photos and texts: sequences [n, tokens, d], and their rows as in `PairVectors`."""

    photo_rows: np.ndarray
    text_rows: np.ndarray
    photos: torch.Tensor
    texts: torch.Tensor
    """Padded with zeros."""
    lengths: torch.Tensor
    """Of the texts, [n]."""

    @staticmethod
    def read_tokens(
        photo: EncoderCache, text: EncoderCache, photo_rows: np.ndarray, text_rows: np.ndarray, layers: tuple[int, int]
    ) -> Inputs:
        """Hidden states of one layer of each, divided by their deviation, in half precision to halve the memory.

        Raises:
            CacheError: one is not cached.
        """
        photo.require_equal_lengths(photo_rows, "saffe match on hidden states")
        photos, texts = _read(photo, photo_rows, layers[0]), _read(text, text_rows, layers[1])
        return Inputs(photo_rows, text_rows, photos, texts, torch.from_numpy(np.diff(text.offsets)[text_rows]))

    @property
    def widths(self) -> tuple[int, int]:
        """Of photos and of texts."""
        return self.photos.shape[2], self.texts.shape[2]

    @property
    def num_tokens(self) -> tuple[int, int]:
        """Of a photo, and of a text on average."""
        return self.photos.shape[1], round(float(self.lengths.float().mean()))

    def batch(self, photos: np.ndarray, texts: np.ndarray) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Photos and texts of these rows, float32 [n, tokens, d], and the texts' mask, bool [n, tokens].

        Texts are padded to the longest of these.
        """
        at_photos, at_texts = np.searchsorted(self.photo_rows, photos), np.searchsorted(self.text_rows, texts)
        lengths = self.lengths[at_texts]
        longest = int(lengths.max())
        mask = torch.arange(longest) < lengths[:, None]
        return self.photos[at_photos].float(), self.texts[at_texts, :longest].float(), mask


def _read(encoder: EncoderCache, rows: np.ndarray, layer: int) -> torch.Tensor:
    """float16 [rows, tokens, d]"""
    name = f"hidden_states/{layer}"
    deviation, (*within, width) = encoder.statistics(name).std, encoder.array(name).spec.row_shape
    longest = int(np.diff(encoder.offsets)[rows].max()) if encoder.manifest.is_ragged else 1
    whole = np.zeros((len(rows), longest * math.prod(within), width), np.float16)
    for start in range(0, len(rows), _ROWS_AT_ONCE):
        these = slice(start, start + _ROWS_AT_ONCE)
        states = encoder.tokens(rows[these], (layer,)).states[0]
        whole[these, : states.shape[1]] = states / deviation
    return torch.from_numpy(whole)
