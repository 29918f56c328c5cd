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


@dataclass(frozen=True, kw_only=True)
class Columns:
    """Names of a dataset's columns or fields; None finds them by their type and usual names."""

    image: str | None = None
    audio: str | None = None
    caption: str | None = None
    label: str | None = None
    id: str | None = None

    def find(self, role: Role, names: Collection[str]) -> str | None:
        """The column of a role: the chosen one, otherwise the first usual name among `names`."""
        return getattr(self, role) or next((name for name in _USUAL_NAMES.get(role, ()) if name in names), None)

    def require(self, names: Collection[str], where: str) -> None:
        """
        Raises:
            ValueError: a chosen column is not among `names`.
        """
        for chosen in vars(self).values():
            if chosen is not None and chosen not in names:
                raise ValueError(
                    f"{where}: no column {chosen}; the columns are {', '.join(names)}. Choose them with --column "
                    "ROLE=NAME."
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
    values = [] if value is None else value if isinstance(value, (list, tuple)) else [value]
    texts = tuple(str(text).strip() for text in values if isinstance(text, (str, int)))
    if len(texts) < len(values) or not all(texts):
        return tuple(text for text in texts if text), "empty caption or label"
    return texts, ""
