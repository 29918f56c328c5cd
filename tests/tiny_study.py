"""A study of one module: the share of even numbers below each of some limits. tests/test_harness.py adds it."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

from saffe_cache.core.results import Measurement, Section
from saffe_cache.core.tables import Cell, Row, Table, percent
from saffe_cache.studies.harness import Study, StudyResult, run_study


@dataclass(frozen=True, kw_only=True)
class CountConfig:
    """Count even numbers."""

    out: str
    """Folder of the result."""
    limits: tuple[int, ...] = (2, 3, 5)
    """Limits, one cell each."""
    device: str = "auto"
    """Ignored."""


@dataclass(frozen=True, kw_only=True)
class Share:
    """One cell."""

    limit: int
    share: float


@dataclass(frozen=True, kw_only=True)
class CountResult(StudyResult):
    """Shares of even numbers."""

    verb: ClassVar[str] = "count"

    shares: tuple[Share, ...]

    def measurements(self) -> Iterator[Measurement]:
        for one in self.shares:
            yield Measurement(f"below {one.limit}", "count", "share", one.share, chance=0.5)

    def sections(self) -> list[Section]:
        rows = tuple(Row(Cell(f"{one.limit}"), (Cell(percent(one.share)),)) for one in self.shares)
        return [Section(title=self.title, tables=[Table("Even numbers.", ("limit", "even"), rows)])]


def count(config: CountConfig) -> str:
    """Count, and return the output folder."""

    def measure(study: Study) -> CountResult:
        cells = study.cells(Share, {f"below-{limit}": lambda limit=limit: share(limit) for limit in config.limits})
        failures = [f"below {one.limit}: {one.share:.2f}, expected 0.5" for one in cells.values() if one.share > 0.6]
        return CountResult(
            title=Path(config.out).name,
            split="test",
            shares=tuple(cells.values()),
            failures=tuple(failures),
            seconds=study.seconds,
        )

    return run_study("count", config, {"data": "numbers"}, measure)


def share(limit: int) -> Share:
    return Share(limit=limit, share=sum(number % 2 == 0 for number in range(limit)) / limit)
