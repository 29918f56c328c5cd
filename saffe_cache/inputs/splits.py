"""Splits by photo content: what a run trains on, and what it never sees."""

from __future__ import annotations

import hashlib
from pathlib import Path

import numpy as np

from saffe_cache.core.features import ItemTable, Modality
from saffe_cache.inputs.pairs import Pairs, select_pairs
from saffe_cache.inputs.spec import RunSpec
from saffe_cache.store.reader import Cache


def training_pairs(spec: RunSpec, cache: Cache) -> tuple[Pairs, Pairs, int]:
    """The pairs that a run trains on, those that it is validated on, and the number of photos shared by splits.

    A photo that stands in another split too, by content, is not trained on.
    """
    gallery, text = cache.encoders[spec.gallery_key], cache.encoders[spec.text_key]
    beside = spec.gallery_text == "first_caption"
    pairs = select_pairs(cache.table, gallery, text, spec.train_split, spec.pairs, first_beside=beside)
    rows = cache.table.rows[gallery.manifest.modality]
    elsewhere = rows[np.array(cache.table.splits) != spec.train_split]
    shared = np.isin(pairs.rows, elsewhere)
    if shared.all():
        raise ValueError(
            f"--train-split {spec.train_split}: all of its {len(pairs)} photos stand in other splits too. "
            "Keep a photo in one split."
        )
    pairs = pairs.take(np.flatnonzero(~shared))
    hashes = cache.table.inputs[gallery.manifest.modality].content_hash
    if spec.validation == "heldout":
        pairs, validation = hold_out(pairs, spec.validation_fraction, spec.seed, hashes)
    else:
        validation = select_pairs(cache.table, gallery, text, spec.validation, spec.pairs, first_beside=beside)
    return keep_part(pairs, spec.train_fraction, spec.seed, hashes), validation, int(shared.sum())


def data_fingerprint(cache: Cache, spec: RunSpec, *parts: Pairs) -> str:
    """Hash over the content of pairs that a run sees."""
    return content_fingerprint(cache.table, cache.encoders[spec.gallery_key].manifest.modality, *parts)


def same_training_pairs(spec: RunSpec, cache: Cache, run_dir: str | Path) -> tuple[Pairs, Pairs]:
    """The pairs that a run was trained on and validated on, from the cache that it was trained on.

    Raises:
        ValueError: the cache holds other data than the run has seen: it is another one, or has grown.
    """
    training, validation, _ = training_pairs(spec, cache)
    if data_fingerprint(cache, spec, training, validation) != spec.data:
        raise ValueError(
            f"--run {run_dir}: it was trained on other photos or texts than {cache.storage.root} holds now for "
            f"split {spec.train_split!r}: what it has seen is unknown. Give the cache of its training, or train again."
        )
    return training, validation


def hold_out(pairs: Pairs, fraction: float, seed: int, content_hash: np.ndarray) -> tuple[Pairs, Pairs]:
    """Split by photo into a part to train on and one that is kept from it.

    Photos are ordered by a hash of their content and the seed, so the sides change little as the data grow.
    """
    order = _drawn_order(pairs, seed, content_hash)
    count = max(1, round(fraction * len(pairs)))
    if count >= len(pairs):
        raise ValueError(f"{len(pairs)} pairs are too few to hold {fraction:.0%} out. Use more data.")
    return pairs.take(np.sort(order[count:])), pairs.take(np.sort(order[:count]))


def keep_part(pairs: Pairs, fraction: float, seed: int, content_hash: np.ndarray) -> Pairs:
    """A part of the pairs, at least one, drawn like `hold_out`'s: a smaller part lies within a larger one."""
    if fraction == 1:
        return pairs
    last = _drawn_order(pairs, seed, content_hash)[::-1]
    return pairs.take(np.sort(last[: max(1, round(fraction * len(pairs)))]))


def _drawn_order(pairs: Pairs, seed: int, content_hash: np.ndarray) -> np.ndarray:
    """The pairs in the order of a hash of their photo's content and the seed."""
    draws = np.array(
        [
            int.from_bytes(hashlib.sha256(content_hash[row].tobytes() + seed.to_bytes(8, "big")).digest()[:8], "big")
            for row in pairs.rows
        ]
    )
    return np.argsort(draws, kind="stable")


def content_fingerprint(table: ItemTable, modality: Modality, *parts: Pairs) -> str:
    """Hash over the content of some pairs: photos by their bytes, texts by their characters, in order."""
    photo_hash, text_hash = (table.inputs[name].content_hash for name in (modality, "text"))
    digest = hashlib.sha256()
    for pairs in parts:
        digest.update(photo_hash[pairs.rows].tobytes())
        digest.update(text_hash[pairs.texts.values].tobytes())
        digest.update(np.diff(pairs.texts.offsets).astype("<i8").tobytes())
        if pairs.beside is not None:
            digest.update(text_hash[pairs.beside].tobytes())
    return digest.hexdigest()[:16]
