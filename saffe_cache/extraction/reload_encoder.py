"""The very encoder that a cache was made with, opened again as its manifest names it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from saffe_cache.core.features import CacheError
from saffe_cache.encoders.encoder import FrozenEncoder, load_encoder
from saffe_cache.extraction.history import PastExtraction
from saffe_cache.extraction.planning import encoder_request
from saffe_cache.store.manifest import EncoderManifest


def reopen_encoder(
    manifest: EncoderManifest, past: Sequence[PastExtraction], moved: str | None, option: str
) -> FrozenEncoder:
    """
    Args:
        manifest: of the encoder.
        past: its extractions, at least one.
        moved: where it is now; None for where the latest of them found it.
        option: how a user gives that, for the message.

    Raises:
        ValueError: it cannot be had.
        CacheError: it is another.
    """
    recorded, made_with = past[-1].config, manifest.fingerprint
    place = moved or recorded.encoder[manifest.modality]
    request = replace(
        encoder_request(recorded, manifest.modality),
        model_id=place,
        revision=made_with.fields.get("revision"),
        dtype=str(made_with.fields.get("dtype", "float32")),
        layers=None,
    )
    encoder = load_encoder(request)
    if encoder.fingerprint.key != manifest.key:
        differences = "; ".join(encoder.fingerprint.differences(made_with))
        raise CacheError(
            f"{place} is not what the cache was made with ({differences}). Give that with {option}, "
            "with the same library versions, or extract into a new cache."
        )
    return encoder
