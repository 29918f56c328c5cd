"""AudioCaps and Clotho as they are downloaded: CSV files, and sounds in folders beside or below them.

AudioCaps lists clips of YouTube, one caption a row (audiocap_id, youtube_id, start_time, caption); its tables are
train.csv, val.csv and test.csv. Programs that fetch the clips name them in several ways. Clips disappear, so those
without a file are left out, and what is left is logged: results on other numbers of clips do not compare. Clotho's
tables, such as clotho_captions_development.csv, name the file and its five captions (file_name, caption_1 …).
"""

from __future__ import annotations

import logging
from collections.abc import Collection, Iterator, Mapping
from pathlib import Path
from typing import Any

from saffe_cache.core.features import Modality
from saffe_cache.sources.files import decoded, split_of, table_rows, walk
from saffe_cache.sources.items import SPLIT_NAMES, Columns, Format, MediaFile, SourceItem

logger = logging.getLogger(__name__)

_AUDIOCAPS = ("audiocap_id", "youtube_id", "start_time", "caption")
_CLOTHO = ("file_name", "caption_1", "caption_2", "caption_3", "caption_4", "caption_5")
_OF_CLOTHO = {"development": "train", "evaluation": "test"}
"""Clotho's names of splits that saffe has others for."""
_HEADER_BYTES = 4096


def _tables(data: str, columns: tuple[str, ...], prefix: str = "") -> list[Path]:
    """The CSV files with exactly these columns: the data itself, or those in its folder."""
    path = Path(data).expanduser()
    found = [path] if path.suffix.lower() == ".csv" else sorted(path.glob("*.csv")) if path.is_dir() else []
    return [one for one in found if one.name.startswith(prefix) and _header(one) == columns]


def _header(path: Path) -> tuple[str, ...]:
    try:
        with path.open("rb") as file:
            line = decoded(file.read(_HEADER_BYTES)).splitlines()[:1]
    except OSError:
        return ()
    return tuple(name.strip(' "') for name in line[0].split(",")) if line else ()


class _Sounds:
    """The sounds in a folder and below by their names without suffix."""

    def __init__(self, root: Path) -> None:
        self._root = root
        self._of_stem: dict[str, list[str]] = {}
        for name, kind in walk(root).media.items():
            if kind == "audio":
                self._of_stem.setdefault(Path(name).stem, []).append(name)

    def find(self, stems: Collection[str], folders: Collection[str]) -> MediaFile | None:
        """The first sound with one of these names; rather in one of these folders, and in no other split's."""
        others = (SPLIT_NAMES | _OF_CLOTHO.keys()) - {*folders}
        named = (({*one.split("/")[:-1]}, one) for stem in stems for one in self._of_stem.get(stem, ()))
        found = [(not parts & {*folders}, one) for parts, one in named if not parts & others]
        return MediaFile(str(self._root / min(found, key=lambda one: one[0])[1])) if found else None


def _audiocaps_items(data: str, columns: Columns) -> Iterator[SourceItem]:
    tables = _tables(data, _AUDIOCAPS)
    sounds = _Sounds(tables[0].parent)
    columns.require(_AUDIOCAPS, f"--data {data}")
    for table in tables:
        split = split_of(table.name)
        clips: dict[tuple[str, str], list[Mapping[str, Any]]] = {}
        for _, row in table_rows(table, ", ".join(_AUDIOCAPS)):
            clips.setdefault((str(row["youtube_id"]), str(row["start_time"])), []).append(row)
        num_found = 0
        for (video, start), rows in clips.items():
            file = sounds.find(_names_of_clip(video, start, [str(one["audiocap_id"]) for one in rows]), (split,))
            if file is not None:
                num_found += 1
                entry = {**rows[0], "caption": [one["caption"] for one in rows]}
                yield columns.item(f"{video}_{start}", split, {"audio": file}, entry, _AUDIOCAPS)
        _report(table, split, len(clips), num_found)


def _names_of_clip(video: str, start: str, ids: Collection[str]) -> list[str]:
    """The names under which programs store a clip, without suffix."""
    whole = start.partition(".")[0]
    names = [f"{video}_{start}", f"{video}_{whole}", video, *ids]
    if whole.isdigit():
        names += [f"{video}_{whole}_{int(whole) + 10}", f"{video}_{1000 * int(whole)}"]
    return [name for one in dict.fromkeys(names) for name in (one, f"Y{one}")]


def _clotho_items(data: str, columns: Columns) -> Iterator[SourceItem]:
    tables = _tables(data, _CLOTHO, "clotho_captions_")
    sounds = _Sounds(tables[0].parent)
    columns.require(_CLOTHO, f"--data {data}")
    for table in tables:
        own = table.stem.removeprefix("clotho_captions_")
        split = _OF_CLOTHO.get(own, own)
        num_rows = num_found = 0
        for _, row in table_rows(table, ", ".join(_CLOTHO)):
            num_rows += 1
            file = sounds.find([Path(str(row["file_name"])).stem], (own, split))
            if file is not None:
                num_found += 1
                media: dict[Modality, MediaFile] = {"audio": file}
                yield columns.item(str(row["file_name"]), split, media, row, _CLOTHO)
        _report(table, split, num_rows, num_found)


def _report(table: Path, split: str, num_clips: int, num_found: int) -> None:
    level = logging.INFO if num_found == num_clips else logging.WARNING
    logger.log(level, "%s: %d of its %d sounds have a file; they are split %s.", table, num_found, num_clips, split)


AUDIOCAPS = Format(
    layout="AudioCaps' tables (audiocap_id, youtube_id, start_time, caption) with the clips beside them",
    recognises=lambda data: bool(_tables(data, _AUDIOCAPS)),
    read_items=_audiocaps_items,
)
CLOTHO = Format(
    layout="Clotho's tables (clotho_captions_development.csv …) with the folders of its sounds beside them",
    recognises=lambda data: bool(_tables(data, _CLOTHO, "clotho_captions_")),
    read_items=_clotho_items,
)
