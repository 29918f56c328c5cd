"""What a run cost, and what its training would have cost had every step run the encoders again."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from saffe_cache.features import CacheError
from saffe_cache.reporting.reading import Evaluation, Run
from saffe_cache.runs import RunSpec, training_pairs
from saffe_cache.store.manifest import EncoderManifest
from saffe_cache.store.reader import Cache, open_cache


@dataclass(frozen=True, kw_only=True)
class Costs:
    """Of one run."""

    trainable_parameters: int
    training_seconds: float
    peak_memory_mb: float
    evaluation_seconds: float | None
    """Of its evaluations in this report; None without any."""
    cache: Paid | None
    """None where the cache cannot be read any more."""
    why_no_cache: str


@dataclass(frozen=True, kw_only=True)
class Paid:
    """What its two encoders cost, once for all runs of the cache."""

    extraction_seconds: float
    cache_bytes: int
    """Of hidden states, vectors and offsets."""
    photos_seen: int
    """In training, over all epochs."""
    texts_seen: int
    photo_seconds: float
    """Of encoding one photo: the least of the cache's extractions."""
    text_seconds: float

    @property
    def re_encoding_seconds(self) -> float:
        return self.photos_seen * self.photo_seconds + self.texts_seen * self.text_seconds


BASIS = (
    "Seconds of re-encoding are photos and texts that training saw, over all epochs, times the seconds in which the "
    "quickest extraction of the cache encoded one. Validations, the control and texts of classes are left out, so that "
    "it is rather too small. One extraction serves all runs of its cache."
)


def costs_of(run: Run, evaluations: Sequence[Evaluation]) -> Costs:
    """The ledger of a run; `evaluations` are its own."""
    paid, why = None, ""
    try:
        cache = open_cache(str(run.config["cache"]))
        paid = _paid(run, run.spec, cache)
    except (CacheError, ValueError, TypeError, KeyError, OSError) as error:
        why = str(error)
    seconds = [one.metrics.cost.evaluation_seconds for one in evaluations]
    return Costs(
        trainable_parameters=run.result.trainable_parameters,
        training_seconds=run.result.seconds,
        peak_memory_mb=run.result.peak_memory_mb,
        evaluation_seconds=sum(seconds) if seconds else None,
        cache=paid,
        why_no_cache=why,
    )


def _paid(run: Run, spec: RunSpec, cache: Cache) -> Paid:
    manifests = [cache.encoders[key].manifest for key in (spec.gallery_key, spec.text_key)]
    extractions = [_extractions(manifest) for manifest in manifests]
    training, _, _ = training_pairs(spec, cache)
    epochs = max((line.epoch for line in run.log), default=0)
    return Paid(
        extraction_seconds=sum(float(one["seconds"]["total"]) for of_encoder in extractions for one in of_encoder),
        cache_bytes=sum(
            array.rows * array.spec.row_bytes for manifest in manifests for array in manifest.arrays.values()
        ),
        photos_seen=epochs * len(training),
        texts_seen=epochs * len(training.texts.values) if spec.pairs == "captions" else 0,
        photo_seconds=_least_seconds(extractions[0]),
        text_seconds=_least_seconds(extractions[1]),
    )


def _extractions(manifest: EncoderManifest) -> list[Mapping[str, Any]]:
    """
    Raises:
        ValueError: the manifest tells of none.
    """
    found: list[Mapping[str, Any]] = [one for one in manifest.history if {"inputs", "seconds"} <= one.keys()]
    if not found:
        raise ValueError(f"{manifest.key}: its history tells of no extraction that came to its end")
    return found


def _least_seconds(extractions: Sequence[Mapping[str, Any]]) -> float:
    """Of encoding one input."""
    rates: list[float] = []
    for one in extractions:
        start, stop = one["inputs"]
        if stop > start:
            rates.append(float(one["seconds"]["encoding"]) / (stop - start))
    return min(rates)
