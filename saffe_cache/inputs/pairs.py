"""Which items are trained on and judged, and which texts describe them.

Whatever is split is split by photo: items that share a photo (by content hash) stay together.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np

from saffe_cache.core.features import ItemTable, Modality, Ragged
from saffe_cache.inputs.spec import PairKind
from saffe_cache.retrieval.baselines import unit_rows
from saffe_cache.store.reader import Cache, EncoderCache

VALIDATION_SPLITS = ("dev", "val", "valid", "validation")


@dataclass(frozen=True)
class Pairs:
    """Gallery inputs, one row each, and the texts that describe them."""

    kind: PairKind
    ids: tuple[str, ...]
    rows: np.ndarray
    """int64 [n]: the photo's (or sound's) row in its encoder's arrays; no two are equal."""
    texts: Ragged
    """Text rows of each: its captions, or the prompts of its classes."""
    labels: Ragged
    """Class indices of each."""
    beside: np.ndarray | None = None
    """int64 [n]: the text row that lies beside each photo in the gallery; None where none does."""
    num_unusable: int = 0
    """Items left out because an input is unreadable or absent."""

    def __len__(self) -> int:
        return len(self.rows)

    def take(self, chosen: np.ndarray) -> Pairs:
        """Some of them, in the given order."""
        return Pairs(
            self.kind,
            tuple(self.ids[i] for i in chosen),
            self.rows[chosen],
            Ragged.from_rows(self.texts[int(i)] for i in chosen),
            Ragged.from_rows(self.labels[int(i)] for i in chosen),
            None if self.beside is None else self.beside[chosen],
            self.num_unusable,
        )

    def permuted(self, seed: int) -> Pairs:
        """The same photos, each with what belongs to another: what a control is trained on."""
        return replace(self, rows=self.rows[np.random.default_rng(seed).permutation(len(self))])

    @property
    def owners(self) -> np.ndarray:
        """int64: which of the pairs each of `texts.values` belongs to."""
        return np.repeat(np.arange(len(self)), np.diff(self.texts.offsets))


def pair_kind(table: ItemTable) -> PairKind:
    """Captions where the items have any, else classes.

    Raises:
        ValueError: the items have neither.
    """
    if len(table.captions.values):
        return "captions"
    if len(table.labels.values):
        return "classes"
    raise ValueError("the cache's items have neither captions nor labels: there is nothing to align. Extract some.")


def gallery_modality(cache: Cache) -> Modality:
    """ "image", or "audio" in a cache of sounds alone."""
    kinds = {encoder.manifest.modality for encoder in cache.encoders.values()}
    return "audio" if "audio" in kinds and "image" not in kinds else "image"


def in_one_space(gallery: EncoderCache, text: EncoderCache) -> bool:
    """Whether both encoders are halves of one model, of one revision, and project into one space."""
    manifests = gallery.manifest, text.manifest
    models = {(of.fingerprint.fields["model_id"], of.fingerprint.fields.get("revision")) for of in manifests}
    return len(models) == 1 and all(of.vector == "projected" for of in manifests)


def select_pairs(
    table: ItemTable,
    gallery: EncoderCache,
    text: EncoderCache,
    split: str,
    kind: PairKind,
    *,
    first_beside: bool = False,
) -> Pairs:
    """All usable pairs of a split; items with the same photo become one, with the texts of all.

    Args:
        table: the cache's items.
        gallery: of photos or sounds.
        text: of their texts.
        split: its name.
        kind: which texts.
        first_beside: whether the first caption lies beside the photo, and only the others describe it.

    Raises:
        ValueError: the split has no usable pair.
    """
    rows = table.rows[gallery.manifest.modality]
    least = 2 if first_beside else 1
    merged: dict[int, tuple[str, dict[int, None], dict[int, None]]] = {}
    unusable = 0
    for item in table.in_split(split):
        texts = _texts_of(table, int(item), kind)
        usable = not table.problems[item] and gallery.usable(rows[[item]])[0] and text.usable(texts).all()
        if not usable or len(set(texts.tolist())) < least:
            unusable += 1
            continue
        _, seen_texts, seen_labels = merged.setdefault(int(rows[item]), (table.ids[item], {}, {}))
        seen_texts.update(dict.fromkeys(texts.tolist()))
        seen_labels.update(dict.fromkeys(table.labels[int(item)].tolist()))
    if not merged:
        needed = f"at least {least} captions" if first_beside else kind
        raise ValueError(
            f"split {split!r}: none of its {unusable} items has a readable input and {needed}. See inspect."
        )
    texts_of = [list(texts) for _, texts, _ in merged.values()]
    return Pairs(
        kind,
        tuple(item_id for item_id, _, _ in merged.values()),
        np.array(list(merged), np.int64),
        Ragged.from_rows(texts[least - 1 :] for texts in texts_of),
        Ragged.from_rows(list(labels) for _, _, labels in merged.values()),
        np.array([texts[0] for texts in texts_of], np.int64) if first_beside else None,
        unusable,
    )


def _texts_of(table: ItemTable, item: int, kind: PairKind) -> np.ndarray:
    if kind == "captions":
        return table.captions[item]
    classes = [table.class_texts[int(label)] for label in table.labels[item]]
    return np.concatenate(classes) if classes else np.zeros(0, np.int64)


def mean_text_vectors(pairs: Pairs, text: EncoderCache) -> np.ndarray:
    """Mean of the unit vectors of each pair's texts, float32 [n, d]: what a ridge regression aims at."""
    distinct, position = np.unique(pairs.texts.values, return_inverse=True)
    vectors = unit_rows(text.vectors(distinct))[position]
    sums = np.add.reduceat(vectors, pairs.texts.offsets[:-1], axis=0)
    return (sums / np.diff(pairs.texts.offsets)[:, None]).astype(np.float32)


def class_vectors(table: ItemTable, text: EncoderCache) -> np.ndarray:
    """Mean of the unit vectors of each class's prompts, float32 [classes, d]."""
    return np.stack([unit_rows(text.vectors(rows)).mean(axis=0) for rows in table.class_texts]).astype(np.float32)
