"""What work costs, and what it would have cost to encode anew at every step, from rates that extractions measured."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

from saffe_cache.store.reader import Cache, EncoderCache

_FEWEST = 100
"""Inputs of an extraction whose rate counts, where there is one of so many."""


@dataclass(frozen=True, kw_only=True)
class EncodingRate:
    """How fast an encoder is, as its cache was made."""

    seconds: float
    """For one input."""
    threads: int


class _Extraction(NamedTuple):
    inputs: int
    encoding_seconds: float
    total_seconds: float
    threads: int


@dataclass(frozen=True, kw_only=True)
class Reencoding:
    """What encoders in the loop would have cost. Their forward passes alone; the SAFFE release also runs autograd
    through them, which is left out, so that the true figure is larger."""

    photos_seen: int
    texts_seen: int
    photo_seconds: float
    """For one photo."""
    text_seconds: float
    basis: str
    """Where the rates are from, in words."""

    @property
    def seconds(self) -> float:
        return self.photos_seen * self.photo_seconds + self.texts_seen * self.text_seconds


def extraction_seconds(cache: Cache) -> float:
    """That all extractions into the cache took, those killed left out."""
    return sum(one.total_seconds for encoder in cache.encoders.values() for one in _extractions(encoder))


def encoding_rate(encoder: EncoderCache) -> EncodingRate | None:
    """Its forward passes in the fastest of its extractions; None where its history holds none."""
    measured = [one for one in _extractions(encoder) if one.inputs]
    if not measured:
        return None
    enough = [one for one in measured if one.inputs >= _FEWEST] or measured
    best = min(enough, key=lambda one: one.encoding_seconds / one.inputs)
    return EncodingRate(seconds=best.encoding_seconds / best.inputs, threads=best.threads)


def reencoding(gallery: EncoderCache, text: EncoderCache, results: Iterable[Mapping[str, Any]]) -> Reencoding | None:
    """For some runs' results, as result.json holds them; None where nothing tells how long an encoder takes."""
    photo, words, seen = encoding_rate(gallery), encoding_rate(text), list(results)
    if photo is None or words is None or any({"photos_seen", "texts_seen"} - one.keys() for one in seen):
        return None
    return Reencoding(
        photos_seen=sum(one["photos_seen"] for one in seen),
        texts_seen=sum(one["texts_seen"] for one in seen),
        photo_seconds=photo.seconds,
        text_seconds=words.seconds,
        basis=f"forward passes alone, as the extraction measured them: {_rate(photo)} photos/s and {_rate(words)} "
        f"texts/s, {photo.threads} threads",
    )


def _rate(rate: EncodingRate) -> str:
    return f"{1 / max(rate.seconds, 1e-9):.0f}"


def _extractions(encoder: EncoderCache) -> list[_Extraction]:
    """Those in the encoder's history that came to their end."""
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
