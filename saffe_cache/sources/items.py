"""What a dataset format is, and the items that it yields, with references to media that are not read yet."""

from __future__ import annotations

import errno
from collections.abc import Callable, Collection, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, Protocol

from saffe_cache.core.features import Item, Modality

Role = Literal["image", "audio", "caption", "label", "id"]
_USUAL_NAMES: Mapping[str, tuple[str, ...]] = {
    "caption": ("captions", "caption", "text", "sentences", "sentence", "raw"),
    "label": ("labels", "label", "fine_label", "category", "class"),
}
SPLIT_NAMES = frozenset(
    ("train", "training", "val", "valid", "validation", "dev", "test", "testing", "eval", "evaluation")
)
"""Usual names of splits."""
_MACHINE_FAULTS = {errno.EMFILE, errno.ENFILE, errno.ENOMEM}


def is_file_fault(error: Exception) -> bool:
    """Whether an error means that a file is broken, and not that the machine lacks file handles or memory."""
    return not isinstance(error, OSError) or error.errno not in _MACHINE_FAULTS


class Media(Protocol):
    """A photo or a sound that is not read yet."""

    def read(self) -> bytes:
        """The encoded bytes. Worker threads and forked processes call this.

        Raises:
            OSError: they cannot be read.
        """


@dataclass(frozen=True)
class MediaFile:
    """Media in a file of its own."""

    path: Path

    def read(self) -> bytes:
        return self.path.read_bytes()


@dataclass(frozen=True, kw_only=True)
class SourceItem(Item):
    """One item of a dataset with its media. Formats leave `hashes` empty; `registry` fills it in."""

    media: Mapping[Modality, Media]
    columns: tuple[str, ...] = ()
    """All columns or fields of its row, for messages."""


@dataclass(frozen=True, kw_only=True)
class Columns:
    """Names of a dataset's columns or fields; None finds them by their type and usual names.

    `caption` and `label` may be several, separated by commas.
    """

    image: str | None = None
    audio: str | None = None
    caption: str | None = None
    label: str | None = None
    id: str | None = None

    def find(self, role: Role, names: Collection[str]) -> tuple[str, ...]:
        """The columns of a role among `names`: the chosen ones, otherwise the first usual name."""
        chosen = getattr(self, role)
        if chosen is not None:
            return tuple(name for name in _split(chosen, names) if name in names)
        return tuple(name for name in _USUAL_NAMES.get(role, ()) if name in names)[:1]

    def texts(self, role: Role, entry: Mapping[str, Any]) -> tuple[tuple[str, ...], str]:
        """The texts of a role in one row, and a problem if one of them is empty or no text."""
        return texts_of([value for name in self.find(role, entry) for value in as_list(entry[name])])

    def require(self, names: Collection[str], where: str) -> None:
        """
        Raises:
            ValueError: a chosen column is not among `names`, or a role that takes one column has several.
        """
        for role, chosen in vars(self).items():
            parts = _split(chosen, names) if chosen is not None else ()
            absent = [name for name in parts if name not in names]
            if absent:
                raise ValueError(
                    f"{where}: no column {absent[0]}; the columns are {', '.join(names) or 'none'}. Choose them with "
                    "--column ROLE=NAME."
                )
            if len(parts) > 1 and role not in _USUAL_NAMES:
                raise ValueError(
                    f"{where}: --column {role}={chosen}: found {len(parts)} columns, expected one. Several are only "
                    "possible for caption and label."
                )


@dataclass(frozen=True, kw_only=True)
class Format:
    """How one kind of dataset is recognised and read. `data` is what `--data` says."""

    layout: str
    """What such a dataset looks like, for error messages."""
    recognises: Callable[[str], bool]
    """Whether the data has this format; looks at names of files, without reading them."""
    read_items: Callable[[str, Columns], Iterator[SourceItem]]
    """Yield the items in a fixed order, with unique ids. Media are not read.

    Raises:
        ValueError: the dataset or its columns are invalid.
    """


def texts_of(value: Any) -> tuple[tuple[str, ...], str]:
    """The text or texts in a column's value, and a problem if one of them is empty or no text."""
    values = as_list(value)
    texts = tuple(str(text).strip() for text in values if isinstance(text, (str, int)))
    if len(texts) < len(values) or not all(texts):
        return tuple(text for text in texts if text), "empty caption or label"
    return texts, ""


def as_list(value: Any) -> list[Any]:
    """The values in a cell, which holds none, one or a list."""
    return [] if value is None else list(value) if isinstance(value, (list, tuple)) else [value]


def _split(chosen: str, names: Collection[str]) -> tuple[str, ...]:
    """The columns that an option names: one, also with commas in its name, or several."""
    return (chosen,) if chosen in names else tuple(name.strip() for name in chosen.split(","))
