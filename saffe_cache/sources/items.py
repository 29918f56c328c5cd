"""What a dataset format is, and the items that it yields, with references to media that are not read yet."""

from __future__ import annotations

import errno
import re
from collections.abc import Callable, Collection, Iterator, Mapping
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, Literal, Protocol

from saffe_cache.core.features import Modality
from saffe_cache.core.items import Item

Role = Literal["image", "audio", "video", "caption", "label", "id", "split"]
_USUAL_NAMES: Mapping[str, tuple[str, ...]] = {
    "image": ("image", "jpg", "jpeg", "png", "webp"),
    "audio": ("audio", "wav", "flac", "mp3", "ogg"),
    "video": ("video", "mp4", "webm", "mov", "mkv", "avi"),
    "caption": ("txt", "captions", "caption", "text", "sentences", "sentence", "raw", "prompt"),
    "label": ("labels", "label", "fine_label", "category", "class", "cls"),
    "split": ("split",),
}
_NUMBERED = re.compile(rf"({'|'.join(_USUAL_NAMES['caption'])})_?(\d+)")
_LIST_ROLES = ("caption", "label")
"""Roles that several columns may have."""
SPLIT_NAMES = frozenset(
    ("train", "training", "val", "valid", "validation", "dev", "test", "testing", "eval", "evaluation")
)
"""Usual names of splits."""
EMPTY_TEXT = "empty caption or label"
"""Problem of an item that lacks nothing else."""
_MACHINE_FAULTS = {errno.EMFILE, errno.ENFILE, errno.ENOMEM}


def is_file_fault(error: Exception) -> bool:
    """Whether an error means that a file is broken, and not that the machine lacks file handles or memory."""
    return not isinstance(error, OSError) or error.errno not in _MACHINE_FAULTS


class NoMediaError(OSError):
    """A row has nothing in a column of media, as where an item lacks one of several."""


class Media(Protocol):
    """A photo or a sound that is not read yet."""

    def read(self) -> bytes:
        """The encoded bytes. Worker threads and forked processes call this.

        Raises:
            OSError: they cannot be read.
        """


@dataclass(frozen=True, slots=True)
class MediaFile:
    """Media in a file of its own, or in a part of an archive."""

    path: str
    start: int = 0
    size: int | None = None
    """In bytes; None for the whole file."""

    def read(self) -> bytes:
        with open(self.path, "rb") as file:
            if self.size is None:
                return file.read()
            file.seek(self.start)
            data = file.read(self.size)
        if len(data) < self.size:
            raise OSError(f"{self.path} ends within it")
        return data


@dataclass(frozen=True, kw_only=True, slots=True)
class SourceItem(Item):
    """One item of a dataset with its media. Formats leave `hashes` empty; `hashing` fills it in."""

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
    video: str | None = None
    caption: str | None = None
    label: str | None = None
    id: str | None = None
    split: str | None = None

    def find(self, role: Role, names: Collection[str]) -> tuple[str, ...]:
        """The columns of a role among `names`: the chosen ones, otherwise the first usual name.

        Captions may also be in numbered columns, such as caption_0 to caption_4.
        """
        return _found(role, getattr(self, role), tuple(names))

    def texts(self, role: Role, entry: Mapping[str, Any]) -> tuple[tuple[str, ...], str]:
        """The texts of a role in one row, and a problem if one of them is empty or no text."""
        return texts_of([value for name in self.find(role, entry) for value in as_list(entry[name])])

    def item(
        self,
        name: object,
        split: str,
        media: Mapping[Modality, Media],
        entry: Mapping[str, Any],
        fields: tuple[str, ...],
        problem: str = "",
    ) -> SourceItem:
        """The item of one row, whose id is its split with its name, or with the chosen column's value.

        Raises:
            ValueError: the row lacks the chosen id.
        """
        if self.id is not None and entry.get(self.id) is None:
            raise ValueError(f"{split}/{name}: found no {self.id}, which --column id={self.id} names. Choose another.")
        if self.split is not None and entry.get(self.split) is not None:
            split = str(entry[self.split])
        captions, caption_problem = self.texts("caption", entry)
        labels, label_problem = self.texts("label", entry)
        if "-1" in labels:  # marks unlabelled items
            labels, label_problem = (), "no label"
        return SourceItem(
            id=f"{split}/{name if self.id is None else entry[self.id]}",
            split=split,
            media=media,
            captions=captions,
            labels=labels,
            problem=problem or caption_problem or label_problem,
            columns=fields,
        )

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
            if len(parts) > 1 and role not in _LIST_ROLES:
                raise ValueError(
                    f"{where}: --column {role}={chosen}: found {len(parts)} columns, expected one. Several are only "
                    "possible for caption and label."
                )


@lru_cache(1024)  # the rows of a dataset have few different columns
def _found(role: Role, chosen: str | None, names: tuple[str, ...]) -> tuple[str, ...]:
    if chosen is not None:
        return tuple(name for name in _split(chosen, names) if name in names)
    found = tuple(name for name in _USUAL_NAMES.get(role, ()) if name in names)[:1]
    if found or role != "caption":
        return found
    matches = [match for match in map(_NUMBERED.fullmatch, names) if match]
    return tuple(match[0] for match in sorted(matches, key=lambda match: (match[1], int(match[2]))))


@dataclass(frozen=True, kw_only=True)
class Format:
    """How one kind of dataset is recognised and read. `data` is what `--data` says, or a Python object."""

    layout: str
    """What such a dataset looks like, for error messages."""
    recognises: Callable[[Any], bool]
    """Whether the data has this format; looks at names of files, without reading media."""
    read_items: Callable[[Any, Columns], Iterator[SourceItem]]
    """Yield the items in a fixed order, with unique ids. Media are not read.

    Raises:
        ValueError: the dataset or its columns are invalid.
    """
    stream_items: Callable[[Any, Columns], Iterator[SourceItem]] | None = None
    """The same without a copy on this machine's disk, with hashes; None where reading makes none."""
    read_every: Callable[[Any, Columns], Iterator[SourceItem]] | None = None
    """The same with photos and sounds that belong to no split; None where all belong to one."""


def texts_of(value: Any) -> tuple[tuple[str, ...], str]:
    """The text or texts in a column's value, and a problem if one of them is empty or no text.

    A struct stands for the text in its field of a usual name, as in [{"raw": "a cat"}].
    """
    texts: list[str] = []
    problem = ""
    for one in as_list(value):
        if type(one) is str and (text := one.strip()):  # quickly, since nearly all are
            texts.append(text)
            continue
        names = Columns().find("caption", one) if isinstance(one, Mapping) else ()
        if names:
            inner, wrong = texts_of([text for name in names for text in as_list(one[name])])
            texts += inner
            problem = problem or wrong
        elif isinstance(one, (str, int)) and (text := str(one).strip()):
            texts.append(text)
        elif one is None or isinstance(one, str):
            problem = problem or EMPTY_TEXT
        else:
            problem = problem or f"caption or label is {_described(one)}, expected a text"
    return tuple(texts), problem


def _described(value: Any) -> str:
    if isinstance(value, Mapping):
        return f"a struct with the fields {', '.join(map(str, value)) or 'none'}"
    kind = "a list in a list" if isinstance(value, (list, tuple)) else f"a {type(value).__name__}"
    return f"{kind} ({value!r:.40})"


def as_list(value: Any) -> list[Any]:
    """The values in a cell, which holds none, one or a list; NaN stands for none."""
    if type(value) is list:
        return value
    if hasattr(value, "tolist"):  # of numpy or torch
        value = value.tolist()
    if value is None or value != value:
        return []
    return list(value) if isinstance(value, (list, tuple)) else [value]


def _split(chosen: str, names: Collection[str]) -> tuple[str, ...]:
    """The columns that an option names: one, also with commas in its name, or several."""
    return (chosen,) if chosen in names else tuple(name.strip() for name in chosen.split(","))
