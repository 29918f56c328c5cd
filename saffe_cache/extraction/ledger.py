"""The cost of extractions, and of encoding again at every training step instead, from measured rates."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

from saffe_cache.core.features import nouns
from saffe_cache.store.reader import Cache, EncoderCache

_FEWEST = 100
"""Extractions of fewer inputs are ignored if there is a larger one."""


class _Extraction(NamedTuple):
    """A finished extraction."""

    inputs: int
    encoding_seconds: float
    total_seconds: float
    threads: int

    @property
    def seconds_per_input(self) -> float:
        return self.encoding_seconds / self.inputs


@dataclass(frozen=True, kw_only=True)
class Reencoding:
    """The cost of encoders in the training loop. This counts forward passes only; the SAFFE release also runs autograd
    through them, so the true cost is higher."""

    photos_seen: int
    texts_seen: int
    photo_seconds: float
    """Seconds per photo."""
    text_seconds: float
    basis: str
    """Where the rates come from, for people."""

    @property
    def seconds(self) -> float:
        return self.photos_seen * self.photo_seconds + self.texts_seen * self.text_seconds


def extraction_seconds(cache: Cache) -> float:
    """Total time of all finished extractions into the cache."""
    return sum(one.total_seconds for encoder in cache.encoders.values() for one in _extractions(encoder))


def reencoding(gallery: EncoderCache, text: EncoderCache, results: Iterable[Mapping[str, Any]]) -> Reencoding | None:
    """The cost for some runs, from their result.json; None if an encoder's rate is unknown."""
    photo, words, seen = _fastest(gallery), _fastest(text), list(results)
    if photo is None or words is None or any({"photos_seen", "texts_seen"} - one.keys() for one in seen):
        return None
    photo_seconds, text_seconds = photo.seconds_per_input, words.seconds_per_input
    return Reencoding(
        photos_seen=sum(one["photos_seen"] for one in seen),
        texts_seen=sum(one["texts_seen"] for one in seen),
        photo_seconds=photo_seconds,
        text_seconds=text_seconds,
        basis=f"forward passes only, as measured during extraction: {1 / max(photo_seconds, 1e-9):.0f} "
        f"{nouns([gallery.manifest.modality])}/s and "
        f"{1 / max(text_seconds, 1e-9):.0f} texts/s, {photo.threads} threads",
    )


def _fastest(encoder: EncoderCache) -> _Extraction | None:
    """The extraction with the fastest forward passes; None if its history has none."""
    measured = [one for one in _extractions(encoder) if one.inputs]
    enough = [one for one in measured if one.inputs >= _FEWEST] or measured
    return min(enough, key=lambda one: one.seconds_per_input, default=None)


def _extractions(encoder: EncoderCache) -> list[_Extraction]:
    """The extractions in the encoder's history."""
    return [
        _Extraction(
            inputs=entry["inputs"][1] - entry["inputs"][0],
            encoding_seconds=float(entry["seconds"]["encoding"]),
            total_seconds=float(entry["seconds"]["total"]),
            threads=int(entry.get("threads", 1)),
        )
        for entry in encoder.manifest.history
        if {"inputs", "seconds"} <= entry.keys()
    ]
