"""`saffe cache export`: the cache as one HDF5 file, or its numbers alone with the token ids of language models."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from saffe_cache.core.features import CacheError
from saffe_cache.encoders.causal_tokens import CausalTokens
from saffe_cache.store.config import ExportConfig
from saffe_cache.store.decoded import export_decoded
from saffe_cache.store.exchange import export_hdf5
from saffe_cache.store.reader import Cache, EncoderCache


def export_cache(config: ExportConfig) -> str:
    """Write a cache as one file that `import_cache` reads, or with `decoded` its numbers for other programs.

    Raises:
        CacheError: a part of the cache is missing or damaged, or a language model's tokenizer gives other tokens now.
        OSError: the target exists, or cannot be written.
    """
    return export_decoded(config, _token_ids) if config.decoded else export_hdf5(config)


def _token_ids(cache: Cache, encoder: EncoderCache) -> Sequence[Sequence[int]] | None:
    """Of a language model whose tokens are all cached; the cache holds no other tokenizers."""
    manifest, finished = encoder.manifest, encoder.manifest.finished_rows
    if not manifest.is_language_model or manifest.selected_tokens != "all":
        return None
    texts, weights = cache.table.inputs["text"].texts, encoder.language_model()
    assert texts is not None
    found = CausalTokens(weights.tokenizer, weights.spec).encode(texts[:finished])
    if [len(ids) for ids in found] != np.diff(encoder.offsets[: finished + 1]).tolist():
        raise CacheError(
            f"{cache.storage.root}: {encoder.key}: the tokenizer now splits texts differently than at extraction. "
            "Install the versions that the manifest's history names, or extract into a new cache."
        )
    return found
