"""Samples: a photo or sound with the files beside it that share its name, in a folder or in a tar archive.

`1.jpg` with `1.txt`, `1.caption` (a caption per line), `1.json` (an object whose fields are columns) or `1.cls` (a
class), as img2dataset and webdataset write them. Archives are read in place. The builder of datasets would copy them,
and refuse those whose first samples differ in their files.
"""

from __future__ import annotations

import json
import logging
import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

from saffe_cache.core.features import Modality
from saffe_cache.sources.files import (
    SIDECARS,
    decoded,
    expand,
    is_metadata,
    modality_of,
    split_of,
    suffix_of,
    tar_members,
)
from saffe_cache.sources.items import SPLIT_NAMES, Columns, Format, Media, SourceItem

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Sample:
    """A photo or sound, or several, and what lies beside them."""

    name: str
    """Within its split; the item's id if no column is chosen for it."""
    split: str
    files: Mapping[str, Media]
    """By suffix, without its first dot."""
    known: Mapping[str, Any]
    """Columns that its folders or its archive give."""
    kinds: Mapping[str, Modality]
    """The photos and sounds among its files."""

    @cached_property
    def entry(self) -> Mapping[str, Any]:
        """Its columns; an error stands for those of a file that cannot be read."""
        entry = dict(self.known)
        for field, file in self.files.items():
            kind = suffix_of(f"x.{field}")
            if kind not in SIDECARS:
                continue
            try:
                text = decoded(file.read())
                value: Any = json.loads(text) if kind == ".json" else text.strip() if kind == ".cls" else _lines(text)
            except (OSError, ValueError, RecursionError) as error:
                entry[field] = error
                continue
            entry |= value if isinstance(value, dict) else {field: value}
        return entry


def fields_of(samples: Iterable[Sample]) -> tuple[str, ...]:
    """All columns of some samples: suffixes of files, and what the files say."""
    return tuple(dict.fromkeys(name for one in samples for name in (*one.files, *one.entry)))


def sample_items(
    samples: Iterable[Sample], columns: Columns, where: str, fields: tuple[str, ...]
) -> Iterator[SourceItem]:
    """The items of samples, each with the files of the chosen columns or of the usual suffixes."""
    unused: dict[str, str] = {}
    for one in samples:
        media: dict[Modality, Media] = {}
        for modality, field in _media_fields(one, columns):
            if modality in media:
                unused.setdefault(field, one.name)
            else:
                media[modality] = one.files[field]
        errors = [
            f"its {name} cannot be read: {value}" for name, value in one.entry.items() if isinstance(value, Exception)
        ]
        entry = {name: value for name, value in one.entry.items() if not isinstance(value, Exception)}
        problem = errors[0] if errors else "" if media else f"no photo or sound beside {', '.join(one.files)}"
        yield columns.item(one.name, one.split, media, entry, fields, problem)
    if unused:
        logger.warning(
            "%s: the files %s are left out: another photo or sound of their samples is taken; for instance in %s. "
            "Choose with --column image=SUFFIX.",
            *(where, ", ".join(unused), next(iter(unused.values()))),
        )


def _media_fields(sample: Sample, columns: Columns) -> Iterator[tuple[Modality, str]]:
    """The files that are photos or sounds, the ones to take first."""
    modalities: tuple[Literal["image", "audio", "video"], ...] = ("image", "audio", "video")
    if len(sample.kinds) == 1 and columns.image is columns.audio is columns.video is None:
        yield from ((kind, field) for field, kind in sample.kinds.items())
        return
    chosen = {one for other in modalities if getattr(columns, other) for one in columns.find(other, sample.files)}
    for modality in modalities:
        kinds = [field for field, kind in sample.kinds.items() if kind == modality and field not in chosen]
        first = columns.find(modality, sample.files)
        if getattr(columns, modality) is None:
            first = (*(one for one in first if one not in chosen), *sorted(kinds, key=lambda field: field.count(".")))
        yield from ((modality, field) for field in dict.fromkeys(first))


def _lines(text: str) -> list[str]:
    """A caption per line; an empty one if there is none."""
    return [line for line in text.split("\n") if line.strip()] or [""]


def tar_samples(path: Path, name: str) -> Iterator[Sample]:
    """The samples in a tar archive, in order; `name` is its path for ids, and names its split.

    Raises:
        ValueError: the archive is damaged.
    """
    members, others = tar_members(path)
    table = next((one for one in members if is_metadata(one)), None)
    if table:
        raise ValueError(
            f"{path}: found a folder in an archive, with {table}, expected samples KEY.jpg with KEY.txt or KEY.json. "
            "Unpack it, and use the folder."
        )
    folders = {one.rpartition("/")[0] for one in members}
    if len(folders) > 1 and not any(suffix_of(one) in SIDECARS for one in members):
        logger.warning("%s: its %d folders are not taken as classes. Unpack it to have classes.", path, len(folders))
    split = split_of(name)
    folder = name.removesuffix(".tar").removeprefix(f"{split}/")
    samples: dict[str, dict[str, Media]] = {}
    for member, file in members.items():
        match = re.fullmatch(r"((?:.*/|)[^./]+)\.([^/]+)", member)
        if not match:
            others.append(member)
            continue
        files = samples.setdefault(match[1], {})
        if match[2].lower() in files:
            raise ValueError(f"{path}: the sample {match[1]} has two files .{match[2].lower()}. Rename one.")
        files[match[2].lower()] = file
    if others:
        logger.warning("%s: %d files or links are skipped; for instance %s.", path, len(others), others[0])
    for key, files in samples.items():
        kinds = {field: kind for field in files if (kind := modality_of(f"x.{field}"))}
        yield Sample(f"{folder}/{key}", split, files, {"__key__": key}, kinds)


def tar_items(data: str, columns: Columns) -> Iterator[SourceItem]:
    """
    Raises:
        ValueError: an archive is damaged or missing, or a chosen column is in none.
    """
    paths = expand(data)
    samples = [one for path in paths for one in tar_samples(path, _short(path))]
    where, fields = f"--data {data}", fields_of(samples)
    columns.require(fields, where)
    yield from sorted(sample_items(samples, columns, where, fields), key=lambda item: item.split)


def _short(path: Path) -> str:
    """The archive's name, with its folder if that is a split."""
    return f"{path.parent.name}/{path.name}" if path.parent.name in SPLIT_NAMES else path.name


TARS = Format(
    layout="tar archives of samples (KEY.jpg, KEY.txt or KEY.json), also as {000..099}.tar",
    recognises=lambda data: data.lower().endswith(".tar") and bool(expand(data)),
    read_items=tar_items,
)
