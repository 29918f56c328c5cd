"""Results whose verbs do not write result.json yet, in the form that the page shows."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from saffe_cache.core.results import Measurement, Result
from saffe_cache.core.sections import Section
from saffe_cache.core.tables import Cell, Row, Table
from saffe_cache.report import sections as old
from saffe_cache.report import tables
from saffe_cache.report.match_section import match_section
from saffe_cache.report.matches import read_matches


@dataclass(frozen=True, kw_only=True)
class OldResult(Result):
    """A section that report/ makes of a file."""

    verb: str  # type: ignore[misc]
    made: tuple[Any, ...]
    remarks: tuple[str, ...] = ()
    controls: tuple[str, ...] = ()

    def measurements(self) -> Iterator[Measurement]:
        return (Measurement("", f"control: {name}", "", 0.0) for name in self.controls)

    def sections(self) -> list[Section]:
        return [_section(one) for one in self.made]

    def notes(self) -> list[str]:
        return list(self.remarks)


def _section(one: old.Section) -> Section:
    whole = [(table, False) for table in (one.table, *one.more) if table]
    return Section(
        title=one.title,
        lead=one.lead,
        facts=one.facts,
        definitions=one.words,
        texts=one.texts,
        tables=[_table(*table) for table in (*whole, *((table, True) for table in one.folded))],
        figures=list(one.plots),
    )


def _table(table: tables.Table, folded: bool) -> Table:
    def cell(of: tables.Cell) -> Cell:
        return Cell(of.text, of.note)

    rows = [Row(cell(row.head), tuple(map(cell, row.cells)), row.kind) for row in table.rows]  # type: ignore[arg-type]
    return Table(table.caption, table.header, tuple(rows), folded)


def _matches(folder: Path) -> OldResult:
    found = read_matches(folder / "match.json")
    controls = tuple(one.name for one in found.controls)
    return OldResult(verb="match", failures=found.failures, made=(match_section(found, "old", []),), controls=controls)


OLD: Mapping[str, Callable[[Path], OldResult]] = {
    "match.json": _matches,
}
"""By the file that a folder holds."""
