"""What a run cost, and what its training would have cost had every step run the encoders again."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from saffe_cache.core.features import CacheError
from saffe_cache.extraction.ledger import Reencoding, extraction_seconds, reencoding
from saffe_cache.report.reading import Evaluation, Run
from saffe_cache.store.reader import open_cache


@dataclass(frozen=True, kw_only=True)
class Costs:
    """Of one run."""

    trainable_parameters: int
    training_seconds: float
    peak_memory_mb: float
    evaluation_seconds: float | None
    """Of its evaluations in this report; None without any."""
    fusing_flops: Mapping[str, int]
    """Of fusing one photo of the gallery, by the protocol of its evaluations, as far as these counted them."""
    cache: Paid | None
    """None where the cache cannot be read any more, or does not know what encoding took."""
    why_no_cache: str


@dataclass(frozen=True, kw_only=True)
class Paid:
    """What the encoders cost, once for all runs of the cache, and would have cost in the loop."""

    extraction_seconds: float
    cache_bytes: int
    """Of hidden states, vectors and offsets."""
    in_loop: Reencoding


BASIS = (
    "Seconds of re-encoding are the photos and texts that went through the FAM, in training and validation, times the "
    "seconds of a forward pass in the quickest extraction of the cache; what autograd would cost, and the control, are "
    "left out, so that it is rather too small. One extraction serves all runs of its cache."
)


def costs_of(run: Run, evaluations: Sequence[Evaluation]) -> Costs:
    """The ledger of a run; `evaluations` are its own."""
    paid, why = None, ""
    try:
        paid = _paid(run)
    except (CacheError, ValueError, TypeError, KeyError, OSError) as error:
        why = str(error)
    told = [one.metrics for one in evaluations]
    seconds = [one.cost.evaluation_seconds for one in told]
    return Costs(
        trainable_parameters=run.result.trainable_parameters,
        training_seconds=run.result.seconds,
        peak_memory_mb=run.result.peak_memory_mb,
        evaluation_seconds=sum(seconds) if seconds else None,
        fusing_flops={one.protocol: one.cost.fusing_flops for one in told},
        cache=paid,
        why_no_cache=why,
    )


def _paid(run: Run) -> Paid:
    """
    Raises:
        CacheError, ValueError, TypeError, KeyError, OSError: the cache is not to be read, or says nothing of it.
    """
    cache = open_cache(str(run.config["cache"]))
    gallery, text = cache.encoders[run.spec.gallery_key], cache.encoders[run.spec.text_key]
    in_loop = reencoding(gallery, text, [vars(run.result)])
    if in_loop is None:
        raise ValueError("nothing in the cache tells how long its encoders take")
    arrays = [array for encoder in (gallery, text) for array in encoder.manifest.arrays.values()]
    return Paid(
        extraction_seconds=extraction_seconds(cache),
        cache_bytes=sum(array.rows * array.spec.row_bytes for array in arrays),
        in_loop=in_loop,
    )
