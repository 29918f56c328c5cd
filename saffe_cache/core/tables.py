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

    @property
    def text_columns(self) -> list[bool]:
        """Whether each column after the headings holds texts, which are aligned on the left, and not numbers."""
        columns = range(len(self.header) - 1)
        return [not all(_NUMBER.fullmatch(row.cells[place].text) for row in self.rows) for place in columns]

    def to_text(self, width: int = WIDTH) -> str:
        """Aligned columns below the caption, in blocks that fit the width; long notes of headings stand below them."""
        heads = [row.head for row in self.rows]
        short = [cell if len(cell.note) <= _LONGEST_NOTE else Cell(cell.text) for cell in heads]
        first = _Column(self.header[0] if self.header else "", list(map(_head_in_line, short)), is_text=True)
        columns = [
            _column(name, [row.cells[place] for row in self.rows], is_text)
            for place, (name, is_text) in enumerate(zip(self.header[1:], self.text_columns, strict=True))
        ]
        lines = textwrap.wrap(self.caption, width)
        for block in _blocks(first, columns, width):
            lines += ["", *_joined([first, *block])]
        notes = dict.fromkeys((head.text, head.note) for head in heads if len(head.note) > _LONGEST_NOTE)
        if notes:
            lines += ["", *(line for text, note in notes for line in wrapped(f"{text}: {note}", "  "))]
        return "\n".join(map(printable, lines)).strip("\n")

    def to_markdown(self) -> str:
        """A pipe table below the caption."""
        above = [self.caption, ""] if self.caption else []
        rows = [_piped([_head_in_line(row.head), *map(_in_line, row.cells)]) for row in self.rows]
        return "\n".join([*above, _piped(self.header), "|---" * len(self.header) + "|", *rows, ""])


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


def drawn(count: int, drawn_from: int) -> str:
    """How many there are, and of how many they were drawn: 0 where they are all."""
    return f"{count:,} of {drawn_from:,}" if drawn_from else f"{count:,}"


def duration(seconds: float | None) -> str:
    """Seconds in the unit that people would use."""
    if seconds is None:
        return "unknown"
    if seconds < 1:
        return f"{1000 * seconds:.3g} ms"
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


def wrapped(text: str, bullet: str = "", hang: int = 0) -> list[str]:
    """Lines of a paragraph, indented below its bullet and by `hang` columns more."""
    return textwrap.wrap(printable(text), WIDTH, initial_indent=bullet, subsequent_indent=" " * (len(bullet) + hang))


_NUMBER = re.compile(r"|–|[-+±]?[\d.,]+ ?[%\w]{0,3}")
_LONGEST_NOTE = 24
"""Characters of a heading's note that still stands in its row."""


def _head_in_line(cell: Cell) -> str:
    return f"{cell.text} ({cell.note})" if cell.note else cell.text


def _in_line(cell: Cell) -> str:
    return f"{cell.text} {cell.note}" if cell.note else cell.text


def _piped(cells: Sequence[str]) -> str:
    return "| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |"


class _Column:
    """A column in a terminal; its heading takes as many lines as keep it narrow. Texts are aligned on the left."""

    def __init__(self, heading: str, cells: Sequence[str], is_text: bool) -> None:
        words, widest = heading.replace("_", " "), max(map(len, cells), default=0)
        longest_word = max(map(len, words.split()), default=0)
        self._cells, self._align = cells, "<" if is_text else ">"
        self.heading = textwrap.wrap(words, max(widest, longest_word, _HEADING_WIDTH))
        self.width = max(widest, *map(len, self.heading), 0)

    def lines(self, num_heading: int) -> list[str]:
        filled = [""] * (num_heading - len(self.heading)) + self.heading
        return [f"{one:{self._align}{self.width}}" for one in (*filled, *self._cells)]


_HEADING_WIDTH = 10
"""Characters of a line of a heading over narrow cells."""


def _column(name: str, cells: Sequence[Cell], is_text: bool) -> _Column:
    """Values below values, notes below notes."""
    if is_text:
        return _Column(name, list(map(_in_line, cells)), is_text=True)
    value, note = (max((len(getattr(cell, part)) for cell in cells), default=0) for part in ("text", "note"))
    shown = [f"{cell.text:>{value}}" + (f" {cell.note:<{note}}" if note else "") for cell in cells]
    return _Column(name, shown, is_text=False)


def _blocks(first: _Column, columns: Sequence[_Column], width: int) -> Iterator[list[_Column]]:
    """Consecutive columns that fit beside the first one; at least one each."""
    block: list[_Column] = []
    for column in columns:
        if block and first.width + sum(2 + one.width for one in (*block, column)) > width:
            yield block
            block = []
        block.append(column)
    if block or not columns:
        yield block


def _joined(columns: Sequence[_Column]) -> Iterator[str]:
    num_heading = max(len(column.heading) for column in columns)
    for parts in zip(*(column.lines(num_heading) for column in columns), strict=True):
        line = "  ".join(parts).rstrip()
        if line:
            yield line
