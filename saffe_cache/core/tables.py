"""One description of a table, shown in a terminal, in Markdown and on a page."""

from __future__ import annotations

import re
import textwrap
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Literal

from saffe_cache.core.features import printable

WIDTH = 100
"""Columns of a terminal."""
ABSENT = "–"
"""Shown where there is no value."""

RowKind = Literal["fam", "baseline", "control", "failed", "chance", "plain"]


@dataclass(frozen=True)
class Cell:
    """A value as it is shown."""

    text: str
    note: str = ""
    """Shown smaller below the text on a page, and after it in a terminal."""


@dataclass(frozen=True)
class Row:
    """A heading and its cells."""

    head: Cell
    cells: tuple[Cell, ...]
    kind: RowKind = "plain"


@dataclass(frozen=True)
class Table:
    """A table with its caption; `header` names the column of the headings first."""

    caption: str
    header: tuple[str, ...]
    rows: tuple[Row, ...]
    folded: bool = False
    """Whether a page shows it only on request."""

    def to_text(self, width: int = WIDTH) -> str:
        """Aligned columns below the caption, in blocks of columns that fit the width; the headings are repeated.

        Long notes of headings stand below the table. Of texts that are no numbers the left edges are aligned.
        """
        heads = [Cell(_heading(self.header[0])) if self.header else Cell(""), *(row.head for row in self.rows)]
        short = [cell if len(cell.note) <= _LONGEST_NOTE else Cell(cell.text) for cell in heads]
        first = [_head_in_line(cell) for cell in short]
        columns = [
            _aligned(_heading(name), [row.cells[place] for row in self.rows])
            for place, name in enumerate(self.header[1:])
        ]
        lines = textwrap.wrap(self.caption, width)
        for block in _blocks(first, columns, width):
            lines += ["", *_joined(first, block)]
        notes = dict.fromkeys((head.text, head.note) for head in heads if len(head.note) > _LONGEST_NOTE)
        if notes:
            lines += ["", *(line for text, note in notes for line in wrapped(f"{text}: {note}", "  "))]
        return "\n".join(map(printable, lines)).strip("\n")

    def to_markdown(self) -> str:
        """A pipe table below the caption."""
        rows = [[_head_in_line(row.head), *map(_in_line, row.cells)] for row in self.rows]
        lines = [
            *([self.caption, ""] if self.caption else []),
            _piped(self.header),
            "|---" * len(self.header) + "|",
            *map(_piped, rows),
        ]
        return "\n".join(lines) + "\n"


def plain_row(head: str, *texts: str) -> Row:
    """A row of texts."""
    return Row(Cell(head), tuple(map(Cell, texts)))


def percent(value: float, digits: int = 1) -> str:
    """A fraction as a percentage, without the sign."""
    return f"{100 * value:.{digits}f}"


def interval_cell(value: float | None, low: float | None = None, high: float | None = None, digits: int = 1) -> Cell:
    """A fraction as a percentage, with its interval as the note."""
    if value is None:
        return Cell(ABSENT)
    if low is None or high is None:
        return Cell(percent(value, digits))
    return Cell(percent(value, digits), f"[{percent(low)}, {percent(high)}]")


def duration(seconds: float | None) -> str:
    """Seconds in the unit that people would use."""
    if seconds is None:
        return "unknown"
    if seconds < 1:
        return f"{1000 * seconds:.1f} ms"
    if seconds < 120:
        return f"{seconds:.0f} s" if seconds >= 10 else f"{seconds:.1f} s"
    return f"{seconds / 60:.0f} min" if seconds < 7200 else f"{seconds / 3600:.1f} h"


def size(num_bytes: float) -> str:
    """Bytes in the unit that people would use."""
    return f"{num_bytes / 1e6:.0f} MB" if num_bytes < 1e9 else f"{num_bytes / 1e9:.1f} GB"


def flops(count: float | None) -> str:
    """FLOPs in the unit that people would use."""
    if count is None:
        return ABSENT
    scale, unit = next(((scale, unit) for scale, unit in ((1e9, "G"), (1e6, "M")) if count >= scale), (1e3, "K"))
    return f"{count / scale:.2f} {unit}"


def wrapped(text: str, bullet: str = "") -> list[str]:
    """Lines of a paragraph, indented below its bullet."""
    return textwrap.wrap(printable(text), WIDTH, initial_indent=bullet, subsequent_indent=" " * len(bullet))


_LONGEST_NOTE = 24
"""Characters of a heading's note that still stands in its row."""


def _heading(name: str) -> str:
    return name.replace("_", " ")


def _head_in_line(cell: Cell) -> str:
    return f"{cell.text} ({cell.note})" if cell.note else cell.text


def _in_line(cell: Cell) -> str:
    return f"{cell.text} {cell.note}" if cell.note else cell.text


def _piped(cells: Sequence[str]) -> str:
    return "| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |"


def _aligned(name: str, cells: Sequence[Cell]) -> list[str]:
    """A column's heading and cells, of one width: values below values, notes below notes."""
    value, note = (max((len(getattr(cell, part)) for cell in cells), default=0) for part in ("text", "note"))
    if all(re.fullmatch(r"|–|[-+±]?[\d.,]+ ?[%\w]{0,3}", cell.text) for cell in cells):
        shown = [f"{cell.text:>{value}}" + (f" {cell.note:<{note}}" if note else "") for cell in cells]
        width = max(len(name), *map(len, shown), 0) if shown else len(name)
        return [f"{one:>{width}}" for one in (name, *shown)]
    shown = [_in_line(cell) for cell in cells]
    width = max(map(len, (name, *shown)))
    return [f"{one:<{width}}" for one in (name, *shown)]


def _blocks(first: Sequence[str], columns: Sequence[Sequence[str]], width: int) -> Iterator[list[Sequence[str]]]:
    """Consecutive columns that fit beside the first one; at least one each."""
    block: list[Sequence[str]] = []
    left = width - max(map(len, first))
    for column in columns:
        if block and sum(len(one[0]) + 2 for one in [*block, column]) > left:
            yield block
            block = []
        block.append(column)
    if block or not columns:
        yield block


def _joined(first: Sequence[str], columns: Sequence[Sequence[str]]) -> Iterator[str]:
    width = max(map(len, first))
    for place, head in enumerate(first):
        line = "  ".join([f"{head:<{width}}", *(column[place] for column in columns)]).rstrip()
        if line:
            yield line
