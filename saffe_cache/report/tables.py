"""Tables of a page, and the same numbers unrounded as CSV."""

from __future__ import annotations

import csv
import io
from dataclasses import dataclass

_ABSENT = "–"

Value = str | int | float | None


@dataclass(frozen=True)
class Sheet:
    """A CSV file; numbers are whole, fractions are fractions."""

    name: str
    header: tuple[str, ...]
    rows: tuple[tuple[Value, ...], ...]

    def csv(self) -> bytes:
        file = io.StringIO()
        writer = csv.writer(file, lineterminator="\n")
        writer.writerows([self.header, *self.rows])
        return file.getvalue().encode("utf-8", "backslashreplace")


@dataclass(frozen=True)
class Cell:
    """Of a table."""

    text: str
    note: str = ""
    """Beneath, smaller."""


@dataclass(frozen=True)
class TableRow:
    """A heading and its cells."""

    kind: str
    """By which it looks: fam, baseline, control, chance, plain."""
    head: Cell
    cells: tuple[Cell, ...]


@dataclass(frozen=True)
class Table:
    """A table with its caption."""

    caption: str
    header: tuple[str, ...]
    rows: tuple[TableRow, ...]


def percent(value: float, digits: int = 1) -> str:
    return f"{100 * value:.{digits}f}"
