"""What a run trains on, in terms of a cache: encoders, layers, pairs, splits."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np

from saffe_cache.core.json_schema import made_of
from saffe_cache.fusion.registry import FUSIONS
from saffe_cache.fusion.shape import FamShape
from saffe_cache.inputs.pairs import PairKind, Pairs, content_fingerprint, hold_out, keep_part, select_pairs
from saffe_cache.store.reader import Cache

GalleryText = Literal["null", "first_caption", "matched"]


@dataclass(frozen=True, kw_only=True)
class RunSpec:
    """Everything that evaluation needs to know of a run."""

    gallery_key: str
    text_key: str
    gallery_layers: tuple[int, ...]
    text_layers: tuple[int, ...]
    """Empty where text does not enter the fusion."""
    pairs: PairKind
    train_split: str
    validation: str
    """The split that the best epoch was chosen on, or "heldout" for a part of the train split."""
    validation_fraction: float
    seed: int
    """Of the order of photos and of what is held out."""
    shape: FamShape
    gallery_text: GalleryText
    """What lies beside a photo in training."""
    trains_pairs: bool = False
    """Whether photos are fused with several texts in training."""
    pairs_alone: bool = False
    """Whether that is all that is trained, so that a gallery with null text means nothing."""
    sees_null: bool = True
    """Whether the null text lies beside photos in training."""
    train_fraction: float = 1.0
    """Part of the photos that are left to train on."""
    shuffled_shards: int | None = None
    """Photos of so many shards are shuffled together in a streamed training; None for all photos."""
    data: str = ""
    """Hash over the photos and texts that the run trains on and is validated on."""

    @staticmethod
    def from_json(content: Mapping[str, Any]) -> RunSpec:
        """
        Raises:
            TypeError, ValueError: a field is missing, unknown or of another kind.
        """
        spec = made_of(RunSpec, content)
        if spec.shape.fusion not in FUSIONS:
            raise ValueError(f"fusion: {spec.shape.fusion!r:.60}, expected {' or '.join(FUSIONS)}")
        return spec


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
