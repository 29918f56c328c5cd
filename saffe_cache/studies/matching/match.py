"""Concatenation against cross-attention: does a text belong to a photo? All from one cache.

Cells (saffe_cache/studies/harness.py) are a setting, a scale, a system and a seed each; and what made features
pre-aligned, the costs, and the pairs on planes.
"""

from __future__ import annotations

from functools import partial

from saffe_cache.inputs.pairs import Pairs, gallery_modality, pair_kind, select_pairs
from saffe_cache.inputs.spec import SplitOptions
from saffe_cache.inputs.splits import content_fingerprint, hold_out, split_pairs
from saffe_cache.store.reader import Cache, EncoderCache, open_cache
from saffe_cache.studies.harness import run_study
from saffe_cache.studies.matching.config import MatchConfig

_EXTRA = ("sklearn", "scipy")


def match(config: MatchConfig) -> str:
    """Measure, and return the output folder.

    Raises:
        CacheError, ValueError: cache, splits and options do not go together; the folder holds another result.
        ImportError: scikit-learn is not installed.
        OSError: the disk is full or gone, or another process writes to the output folder.
    """
    try:
        from saffe_cache.studies.matching.running import compare, plan
    except ImportError as error:
        if error.name not in _EXTRA:
            raise
        raise ImportError(f"saffe match needs the package {error.name}: pip install 'saffe-cache[match]'.") from None
    cache = open_cache(config.cache)
    modality = gallery_modality(cache)
    photo, text = (cache.encoder(kind, config.encoder.get(kind)) for kind in (modality, "text"))
    parts = split_parts(config, cache, photo, text)
    planned = plan(config, photo, text, parts)
    resolved = {
        "photo": photo.key,
        "text": text.key,
        "layers": planned.layers if planned.token_cells else None,
        "data": content_fingerprint(cache.table, modality, *(parts[name] for name in sorted(parts))),
    }
    return run_study("match", config, resolved, partial(compare, config, planned, photo, text, parts))


def split_parts(config: MatchConfig, cache: Cache, photo: EncoderCache, text: EncoderCache) -> dict[str, Pairs]:
    """Photos to train on, to choose on, to report on, and to align with; no photo, by content, is in two of them.

    Raises:
        ValueError: a split is absent, or has no photo of its own.
    """
    kind = pair_kind(cache.table)
    test = select_pairs(cache.table, photo, text, config.split, kind)
    splits = SplitOptions(
        train_split=config.train_split,
        validation=config.validation,
        validation_fraction=config.validation_fraction,
    )
    training, validation, _ = split_pairs(cache, (photo, text), kind, splits, 0, reported=test)
    parts = {"train": training, "validation": validation, "test": test}
    if config.align_fraction:
        hashes = cache.table.inputs[photo.manifest.modality].content_hash
        parts["train"], parts["aligning"] = hold_out(training, config.align_fraction, 0, hashes)
    return parts
