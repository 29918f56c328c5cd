"""The bank of a search correction: training queries of a run, drawn by their content and the run's seed.

It never holds what an evaluation searches with: a text or photo that an item of another split has too, by content, is
left out, and so is everything of the evaluated split. So the bank of a run is the same on every split, and in an index.
"""

from __future__ import annotations

import numpy as np

from saffe_cache.inputs.pairs import Pairs, drawn_order
from saffe_cache.inputs.spec import RunSpec
from saffe_cache.retrieval.correction import MOST_BANK_PHOTOS, MOST_BANK_TEXTS, Bank, SearchCorrection
from saffe_cache.store.reader import Cache


def draw_bank(correction: SearchCorrection, cache: Cache, spec: RunSpec, training: Pairs, reported: np.ndarray) -> Bank:
    """The bank of a run's training pairs; `reported` are text rows that must not be in it.

    Raises:
        ValueError: fewer texts are left than the correction needs.
    """
    table, seed = cache.table, spec.seed
    others = np.flatnonzero(~table.splits.are(spec.train_split))
    labels = np.unique(table.labels.take(others).values)
    known = [table.captions.take(others).values, table.class_texts.take(labels).values, reported]
    trained = np.unique(training.texts.values)
    candidates = np.setdiff1d(trained, np.concatenate(known))
    least = correction.least_bank()
    if len(candidates) < least:
        fewer = "Use none." if least == 1 or not len(candidates) else "Use none, or a smaller --correction-k."
        raise ValueError(
            f"--search-correction {correction.kind}: {len(trained) - len(candidates)} of the {len(trained)} training "
            f"texts belong to other splits or to the reported one, expected at least {least} others for its bank. "
            f"{fewer}"
        )
    modality = cache.encoders[spec.gallery_key].manifest.modality
    hashes, photo_hashes = table.inputs["text"].content_hash, table.inputs[modality].content_hash
    texts = candidates[drawn_order(candidates, seed, hashes)[:MOST_BANK_TEXTS]]
    photos = drawn_order(training.rows, seed, photo_hashes)[:MOST_BANK_PHOTOS]
    return Bank(correction, np.sort(texts), np.sort(photos))
