"""The media and texts of a split's items, in memory."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch

from saffe_cache.core.features import Modality
from saffe_cache.core.items import Ragged
from saffe_cache.fusion.media import Media, Medium
from saffe_cache.retrieval.baselines import unit_rows
from saffe_cache.retrieval.scores import Scores, caption_scores, class_scores
from saffe_cache.store.reader import Cache, EncoderCache


@dataclass(frozen=True)
class Examples:
    """Items with their media and texts."""

    rows: Mapping[Modality, np.ndarray]
    """int64 [n]: the input of each item, -1 where it has none."""
    media: Media
    texts: Ragged
    """Positions in `vectors` of each item's texts: its captions, or the names of its classes."""
    vectors: np.ndarray
    """Unit vectors of the distinct texts, [m, size]; of a class the mean over its prompts."""
    labels: Ragged
    """Classes of each item, by their positions in `vectors`; empty where captions describe the items."""

    def __len__(self) -> int:
        return len(self.texts)

    @property
    def has_all(self) -> np.ndarray:
        """bool [n]: whether an item has all the media."""
        return np.asarray(np.logical_and.reduce([rows >= 0 for rows in self.rows.values()]))

    @property
    def main_metric(self) -> str:
        return "top1" if len(self.labels.values) else "mrr"

    def take(self, chosen: np.ndarray) -> Examples:
        rows = {name: of[chosen] for name, of in self.rows.items()}
        media = {name: of.take(torch.from_numpy(chosen)) for name, of in self.media.items()}
        return Examples(rows, media, self.texts.take(chosen), self.vectors, self.labels.take(chosen))

    def scores(self, items: np.ndarray, texts: np.ndarray, *, intervals: bool = False) -> Scores:
        """Of unit vectors of the items and of the texts."""
        if len(self.labels.values):
            return class_scores(items, texts, self.labels, intervals=intervals)
        captions = texts[self.texts.values]
        return caption_scores(items, captions, self.texts.owners, intervals=intervals, photos_search=False)


def read_examples(
    cache: Cache,
    encoders: Sequence[EncoderCache],
    text: EncoderCache,
    layers: Mapping[str, tuple[int, ...]],
    split: str,
) -> Examples:
    """The usable items of a split that have a text and at least one of the media.

    Raises:
        ValueError: there are none.
    """
    table = cache.table
    items = table.in_split(split)
    rows = {one.manifest.modality: table.rows[one.manifest.modality][items] for one in encoders}
    usable = {one.manifest.modality: one.usable(rows[one.manifest.modality]) for one in encoders}
    by_class = not len(table.captions.take(items).values)
    described = (table.labels if by_class else table.captions).take(items)
    kept = (table.problems.lengths[items] == 0) & (described.lengths > 0)
    kept &= np.logical_or.reduce(list(usable.values()))
    if not kept.any():
        wanted = " or ".join(rows)
        raise ValueError(f"split {split!r}: none of its {len(items)} items has {wanted} and a text. See inspect.")
    chosen = np.flatnonzero(kept)
    of_media = {name: np.where(usable[name], of, -1)[chosen] for name, of in rows.items()}
    described = described.take(chosen)
    distinct, places = np.unique(described.values, return_inverse=True)
    texts = Ragged(described.offsets, places)
    if by_class:
        vectors = np.stack([unit_rows(text.vectors(table.class_texts[int(one)])).mean(axis=0) for one in distinct])
    else:
        vectors = text.vectors(distinct)
    media = {one.manifest.modality: _read_medium(one, of_media[one.manifest.modality], layers) for one in encoders}
    nothing = Ragged.from_rows([()] * len(texts))
    return Examples(of_media, media, texts, unit_rows(vectors), texts if by_class else nothing)


def _read_medium(encoder: EncoderCache, rows: np.ndarray, layers: Mapping[str, tuple[int, ...]]) -> Medium:
    """Tokens of all layers side by side, float16."""
    present = np.flatnonzero(rows >= 0)
    found = encoder.tokens(rows[present], layers[encoder.manifest.modality])
    tokens = np.concatenate(found.states, axis=2).astype(np.float16)
    mask = np.ones(tokens.shape[:2], bool) if found.mask is None else found.mask
    whole = np.zeros((len(rows), *tokens.shape[1:]), np.float16)
    is_real = np.zeros((len(rows), tokens.shape[1]), bool)
    whole[present], is_real[present] = tokens, mask
    return Medium(torch.from_numpy(whole), torch.from_numpy(is_real))


def fingerprint(cache: Cache, parts: Sequence[Examples]) -> str:
    """Hash of the content of some items."""
    digest = hashlib.sha256()
    for one in parts:
        for name, rows in one.rows.items():
            hashes = cache.table.inputs[name].content_hash[rows]
            digest.update(hashes[rows >= 0].tobytes() + rows.tobytes())
        digest.update(one.vectors.tobytes() + one.texts.values.tobytes())
    return digest.hexdigest()[:16]
