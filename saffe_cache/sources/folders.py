"""Folders of splits: class folders, or files that a metadata.jsonl lists.

Symbolic links in a user's folder are followed. A metadata.jsonl often comes with a downloaded dataset, so file names in
it must stay below the folder of their split.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Iterator
from pathlib import Path

from saffe_cache.core.features import Modality
from saffe_cache.sources.items import Columns, Format, MediaFile, SourceItem, texts_of

logger = logging.getLogger(__name__)

IMAGE_SUFFIXES = frozenset({".jpg", ".jpeg", ".jfif", ".png", ".webp", ".bmp", ".gif", ".tif", ".tiff"})
AUDIO_SUFFIXES = frozenset({".wav", ".flac", ".ogg", ".mp3"})


def _is_folder(data: str) -> bool:
    return Path(data).expanduser().is_dir()


def folder_items(data: str, columns: Columns) -> Iterator[SourceItem]:
    """The items of all splits, in the order of their names.

    Raises:
        ValueError: a metadata.jsonl is invalid.
    """
    for split_dir in sorted(path for path in Path(data).expanduser().iterdir() if path.is_dir()):
        metadata = split_dir / "metadata.jsonl"
        yield from _listed_items(metadata, columns) if metadata.exists() else _class_folder_items(split_dir)


FOLDERS = Format(
    layout="folders SPLIT/CLASS/file or SPLIT/metadata.jsonl (file_name, captions or label)",
    recognises=_is_folder,
    read_items=folder_items,
)


def _class_folder_items(split_dir: Path) -> Iterator[SourceItem]:
    skipped = [path for path in sorted(split_dir.iterdir()) if not path.is_dir()]
    for class_dir in sorted(path for path in split_dir.iterdir() if path.is_dir()):
        for path in sorted(class_dir.rglob("*")):
            modality = _modality_of(path)
            if modality is not None:
                yield SourceItem(
                    id=path.relative_to(split_dir.parent).as_posix(),
                    split=split_dir.name,
                    media={modality: MediaFile(path)},
                    labels=(class_dir.name,),
                )
            elif not path.is_dir():
                skipped.append(path)
    if skipped:
        logger.warning(
            "%s: %d files are skipped, for instance %s: no photo or sound in a class folder.",
            *(split_dir, len(skipped), skipped[0].relative_to(split_dir)),
        )


def _listed_items(metadata: Path, columns: Columns) -> Iterator[SourceItem]:
    seen: set[str] = set()
    with metadata.open(encoding="utf-8-sig", errors="surrogateescape") as lines:
        for number, line in enumerate(lines, start=1):
            if line.strip():
                item = _listed_item(metadata.parent, f"{metadata}:{number}", line, columns)
                if item.id in seen:
                    raise ValueError(f"{metadata}:{number}: {item.id} is listed twice. Give each file one line.")
                seen.add(item.id)
                yield item


def _listed_item(split_dir: Path, where: str, line: str, columns: Columns) -> SourceItem:
    file_field = columns.image or columns.audio or "file_name"
    try:
        entry = json.loads(line)
        name = str(entry[file_field])
        item_id = str(entry[columns.id]) if columns.id else Path(name).as_posix()
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        raise ValueError(
            f"{where}: expected a JSON object with {file_field}, found {error!r}. Correct the line."
        ) from None
    if Path(name).is_absolute() or ".." in Path(name).parts or "\0" in name:
        raise ValueError(
            f"{where}: {file_field} {name!r} is outside its folder. Move the file, or a link to it, into {split_dir}."
        )
    path = split_dir / name
    modality = _modality_of(path)
    captions, caption_problem = texts_of(entry.get(columns.find("caption", entry)))
    labels, label_problem = texts_of(entry.get(columns.find("label", entry)))
    return SourceItem(
        id=f"{split_dir.name}/{item_id}",
        split=split_dir.name,
        media={modality: MediaFile(path)} if modality else {},
        captions=captions,
        labels=labels,
        problem=caption_problem or label_problem or ("" if modality else f"unknown kind of file {path.suffix!r}"),
    )


def _modality_of(path: Path) -> Modality | None:
    suffix = path.suffix.lower()
    return "image" if suffix in IMAGE_SUFFIXES else "audio" if suffix in AUDIO_SUFFIXES else None
