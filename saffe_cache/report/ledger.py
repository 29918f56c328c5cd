"""What trainings cost, and what they would have cost if every step ran the encoders again."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from saffe_cache.core.features import CacheError
from saffe_cache.core.outputs import CONFIG, read_json
from saffe_cache.core.results import Result, Section
from saffe_cache.core.tables import ABSENT, Cell, Row, Table, duration, size
from saffe_cache.extraction.ledger import Reencoding, extraction_seconds, reencoding
from saffe_cache.store.reader import open_cache
from saffe_cache.training.result import TrainResult

_LEAD = (
    "Re-encoding: the photos and texts that went through the FAM, in training and validation, times the seconds of a "
    "forward pass in the fastest extraction into the cache. The cost of autograd and of the control is left out, so "
    "the true figure is higher. One extraction serves all runs of its cache."
)
_HEADER = ("", "trainable parameters", "training", "extraction", "cache", "photos seen", "re-encoding at every step")


@dataclass(frozen=True, kw_only=True)
class _Paid:
    """What the encoders cost once, and would have cost in the loop."""

    extraction_seconds: float
    cache_bytes: int
    """Of hidden states, vectors and offsets."""
    in_loop: Reencoding


def costs_section(results: Mapping[str, tuple[Path, Result]]) -> Section | None:
    """The costs of all trainings among some results, by short name; None where there are none."""
    rows = [_row(name, path, of) for name, (path, of) in results.items() if isinstance(of, TrainResult)]
    table = Table("What was paid, and what re-encoding would have cost.", _HEADER, tuple(rows))
    return Section(title="Cost ledger", lead=_LEAD, tables=[table]) if rows else None


def _row(name: str, folder: Path, result: TrainResult) -> Row:
    cells = [
        Cell(f"{result.trainable_parameters / 1e6:.2f} M"),
        Cell(duration(result.seconds), f"{result.peak_memory_mb:,} MB"),
    ]
    try:
        paid = _paid(folder, result)
    except (CacheError, ValueError, TypeError, KeyError, OSError) as error:
        return Row(Cell(name), (*cells, Cell(ABSENT, str(error)), *[Cell(ABSENT)] * 3))
    times = paid.in_loop.seconds / result.seconds if result.seconds else 0.0
    cells += [
        Cell(duration(paid.extraction_seconds), "once, for all runs"),
        Cell(size(paid.cache_bytes)),
        Cell(f"{paid.in_loop.photos_seen:,}", f"and {paid.in_loop.texts_seen:,} texts"),
        Cell(duration(paid.in_loop.seconds), f"{times:.0f} times its training"),
    ]
    return Row(Cell(name), tuple(cells))


def _paid(folder: Path, result: TrainResult) -> _Paid:
    """
    Raises:
        CacheError, ValueError, TypeError, KeyError, OSError: the cache cannot be read, or does not say.
    """
    content = read_json(folder / CONFIG)
    cache = open_cache(str(content["config"]["cache"]))
    gallery, text = (cache.encoders[content["run"][f"{side}_key"]] for side in ("gallery", "text"))
    in_loop = reencoding(gallery, text, [vars(result)])
    if in_loop is None:
        raise ValueError("nothing in the cache says how long its encoders take")
    arrays = [array for encoder in (gallery, text) for array in encoder.manifest.arrays.values()]
    return _Paid(
        extraction_seconds=extraction_seconds(cache),
        cache_bytes=sum(array.rows * array.spec.row_bytes for array in arrays),
        in_loop=in_loop,
    )
