"""Read tables of metadata, row by row: JSON lines, JSON, CSV, TSV and Parquet."""

from __future__ import annotations

import codecs
import csv
import io
import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

TABLE_SUFFIXES = (".jsonl", ".csv", ".tsv", ".parquet", ".json")


def table_rows(path: Path, expected: str) -> Iterator[tuple[str, Mapping[str, Any]]]:
    """The rows of a table, each with its place for messages. An empty cell of a CSV or TSV file is None.

    Args:
        path: the file; its suffix is one of `TABLE_SUFFIXES`.
        expected: the fields of a row, for messages.

    Raises:
        ValueError: the table is invalid.
    """
    rows = {".jsonl": _json_lines, ".json": _json_rows, ".parquet": _parquet_rows}.get(path.suffix, _csv_rows)
    for where, row in rows(path):
        if not isinstance(row, dict):
            raise ValueError(f"{where}: expected a JSON object with {expected}, found {row!r}. Correct the line.")
        yield where, row


def decoded(data: bytes) -> str:
    """The text of a file in UTF-8 or UTF-16; bytes that are no UTF-8 become surrogates."""
    if data[:2] in (codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE):
        return data.decode("utf-16", "replace")
    if b"\0" in data[:2]:  # the first character is ASCII in all tables
        return data.decode("utf-16-be" if data[:1] == b"\0" else "utf-16-le", "replace")
    return data.decode("utf-8-sig", "surrogateescape")


def _json_lines(path: Path) -> Iterator[tuple[str, Any]]:
    for number, line in enumerate(io.StringIO(decoded(path.read_bytes()), newline=None), start=1):
        if line.strip():
            yield f"{path}:{number}", _parsed(line)


def _json_rows(path: Path) -> Iterator[tuple[str, Any]]:
    rows = _parsed(decoded(path.read_bytes()))
    if isinstance(rows, json.JSONDecodeError) and rows.msg == "Extra data":
        yield from _json_lines(path)
        return
    for number, row in enumerate(rows if isinstance(rows, list) else [rows]):
        yield f"{path}: row {number}", row


def _parsed(text: str) -> Any:
    """A JSON value, or the error of one that is invalid."""
    try:
        return json.loads(text)
    except (ValueError, RecursionError) as error:
        return error


def _csv_rows(path: Path) -> Iterator[tuple[str, Any]]:
    """Rows of a CSV or TSV file; its first line shows whether commas, tabs, semicolons or bars separate its cells."""
    csv.field_size_limit(2**31 - 1)
    text = decoded(path.read_bytes())
    first = text.partition("\n")[0]
    separator = max("\t,;|" if path.suffix == ".tsv" else ",\t;|", key=first.count)
    reader = csv.DictReader(io.StringIO(text, newline=""), delimiter=separator)
    try:
        for row in reader:
            if None in row or None in row.values():
                raise csv.Error(f"expected {len(reader.fieldnames or ())} cells as in its first line")
            yield f"{path}:{reader.line_num}", {name: value or None for name, value in row.items()}
    except csv.Error as error:
        raise ValueError(f"{path}:{reader.line_num}: {error}. Correct the line.") from None


def _parquet_rows(path: Path) -> Iterator[tuple[str, Any]]:
    import pyarrow.parquet

    try:
        rows = pyarrow.parquet.read_table(path).to_pylist()
    except pyarrow.ArrowException as error:
        raise ValueError(f"{path}: no readable Parquet file ({error}). Write it again.") from None
    yield from ((f"{path}: row {number}", row) for number, row in enumerate(rows))
