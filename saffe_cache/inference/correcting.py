"""The search correction of an index: its bank of training texts, and what it subtracts from the scores of items.

The bank is that of evaluation (see `inputs.bank`), mapped by the run's query side, so that searches rank as evaluation
does. It is drawn from the run's cache once and kept with the index: an update corrects new items with the same bank,
and needs no cache.
"""

from __future__ import annotations

import logging
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import numpy as np

from saffe_cache.core.features import CacheError
from saffe_cache.core.outputs import CONFIG, read_json
from saffe_cache.inference.config import IndexConfig
from saffe_cache.inference.search_index import BANK, IndexManifest
from saffe_cache.inputs.bank import draw_bank
from saffe_cache.inputs.feature_loader import FeatureLoader
from saffe_cache.inputs.media import seen_by
from saffe_cache.inputs.pairs import same_training_pairs
from saffe_cache.protocols.setting import Queries, Setting
from saffe_cache.retrieval.baselines import unit_rows
from saffe_cache.retrieval.correction import SearchCorrection
from saffe_cache.store.reader import open_cache

if TYPE_CHECKING:
    from saffe_cache.inference.model import TrainedFusion

logger = logging.getLogger(__name__)


class IndexBank(NamedTuple):
    """The bank of an index."""

    correction: SearchCorrection
    vectors: np.ndarray
    """float32 [texts, width]: unit vectors of training texts as the run maps queries. In an index with a ridge
    regression, the text encoder's own unit vectors follow in the same rows, [texts, width + k]."""

    def biases(self, vectors: np.ndarray, width: int) -> np.ndarray:
        """What is subtracted from the scores of items, float32 [items, 1]; [items, 2] with a ridge regression's.

        `vectors` [items, width + k] are those of the items, as of the bank.
        """
        parts = [slice(0, width), *([slice(width, None)] if vectors.shape[1] > width else [])]
        found = [self.correction.biases(vectors[:, part], self.vectors[:, part]) for part in parts]
        return np.stack(found, axis=1)


def index_bank(fusion: TrainedFusion, config: IndexConfig, out: Path, old: IndexManifest | None) -> IndexBank | None:
    """The bank that an index has or should have; None where it has no search correction.

    Raises:
        ValueError: the correction that was requested needs a cache that is not found, or has no bank there.
    """
    if old is not None and (config.search_correction is None or config.correction == old.correction):
        if old.correction is None:
            return None
        return IndexBank(old.correction, np.load(out / old.generation / BANK, allow_pickle=False))
    if old is not None:
        raise ValueError(
            f"--out {out}: it is another index (search correction {old.correction or 'none'} there, "
            f"{config.correction or 'none'} now). Repeat its options, choose another --out, or delete it."
        )
    if config.correction is None:
        return None
    try:
        return IndexBank(config.correction, _bank_vectors(fusion, config, config.correction))
    except ValueError as error:
        if config.search_correction is not None:
            raise
        logger.info("Searches are not corrected: %s", error)
        return None


def _bank_vectors(fusion: TrainedFusion, config: IndexConfig, correction: SearchCorrection) -> np.ndarray:
    place, spec = config.cache or read_json(Path(fusion.folder) / CONFIG)["config"].get("cache"), fusion.spec
    try:
        cache = open_cache(place or "")
    except CacheError:
        raise ValueError(
            f"--search-correction {correction.kind}: its bank of texts is in the cache that the run was trained on, "
            f"which is not in {place or 'a known place'}. Say where it is with --cache."
        ) from None
    cache = seen_by(cache, spec)
    training, _ = same_training_pairs(spec, cache, fusion.folder)
    bank = draw_bank(correction, cache, spec, training, np.zeros(0, np.int64))
    inputs = FeatureLoader(cache, spec, fusion.device)
    texts = Queries.of_texts(inputs, bank.texts)
    vectors = Setting(inputs, training).queries(fusion.model, texts)
    if config.ridge:
        vectors = np.concatenate([vectors, unit_rows(texts.vectors)], axis=1)
    return np.asarray(vectors, np.float32)
