"""What a dataset is made of, before anything is read from it."""

from __future__ import annotations

import errno
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from saffe_cache.core.features import Modality

_OF_THE_MACHINE = {errno.EMFILE, errno.ENFILE, errno.ENOMEM}


def blames_the_file(error: Exception) -> bool:
    """Whether an error tells that a file is broken, and not that the machine lacks file handles or memory."""
    return not isinstance(error, OSError) or error.errno not in _OF_THE_MACHINE


@dataclass(frozen=True)
class Media:
    """A photo or a sound, not read yet: a file, or a row of a dataset."""

    path: Path | None = None
    dataset: Any = None
    """A datasets.Dataset whose `column` is not decoded."""
    column: str = ""
    row: int = 0

    def read(self) -> bytes:
        """The encoded bytes.

        Raises:
            OSError: the file cannot be read, or the row has none.
        """
        if self.path is not None:
            return self.path.read_bytes()
        value = self.dataset[self.row][self.column] or {"bytes": None, "path": None}
        if value["bytes"] is not None:
            return bytes(value["bytes"])
        if value["path"] is None:
            raise OSError(f"row {self.row} has no {self.column}")
        return Path(value["path"]).read_bytes()


@dataclass(frozen=True, kw_only=True)
class SourceItem:
    """One item of a dataset, before anything is read from it."""

    id: str
    split: str
    media: Mapping[Modality, Media]
    captions: tuple[str, ...] = ()
    labels: tuple[str, ...] = ()
    problem: str = ""
    """Why it cannot be used; empty for a usable one."""
    hashes: Mapping[Modality, bytes] = field(default_factory=dict)
    """SHA-256 of each medium, once it was read."""


@dataclass(frozen=True, kw_only=True)
class Columns:
    """Names of a dataset's columns; None finds them by their type and usual names."""

    image: str | None = None
    audio: str | None = None
    caption: str | None = None
    label: str | None = None
    id: str | None = None


def texts_of(value: Any) -> tuple[tuple[str, ...], str]:
    """A column's text or texts, and a problem where one of them is empty or no text."""
    values = [] if value is None else value if isinstance(value, (list, tuple)) else [value]
    texts = tuple(str(text).strip() for text in values if isinstance(text, (str, int)))
    if len(texts) < len(values) or not all(texts):
        return tuple(text for text in texts if text), "empty caption or label"
    return texts, ""
