"""Folders of splits: class folders, or files that metadata.jsonl lists.

A link in a user's folder leads where the user wants it to, and is followed. But metadata.jsonl often comes with a
dataset: a name in it stays below its split's folder.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Iterator
from pathlib import Path

from saffe_cache.core.features import Modality
from saffe_cache.sources.items import Media, SourceItem, texts_of

logger = logging.getLogger(__name__)

IMAGE_SUFFIXES = frozenset({".jpg", ".jpeg", ".jfif", ".png", ".webp", ".bmp", ".gif", ".tif", ".tiff"})
AUDIO_SUFFIXES = frozenset({".wav", ".flac", ".ogg", ".mp3"})


def folder_items(folder: Path) -> Iterator[SourceItem]:
    """The items of all splits, in the order of their names.

    Raises:
        ValueError: a metadata.jsonl is not as it must be.
    """
    for split_dir in sorted(path for path in folder.iterdir() if path.is_dir()):
        metadata = split_dir / "metadata.jsonl"
        yield from _listed_items(metadata) if metadata.exists() else _class_folder_items(split_dir)


def _class_folder_items(split_dir: Path) -> Iterator[SourceItem]:
    left_out = [path for path in sorted(split_dir.iterdir()) if not path.is_dir()]
    for class_dir in sorted(path for path in split_dir.iterdir() if path.is_dir()):
        for path in sorted(class_dir.rglob("*")):
            modality = _modality_of(path)
            if modality is not None:
                yield SourceItem(
                    id=path.relative_to(split_dir.parent).as_posix(),
                    split=split_dir.name,
                    media={modality: Media(path)},
                    labels=(class_dir.name,),
                )
            elif not path.is_dir():
                left_out.append(path)
    if left_out:
        logger.warning(
            "%s: %d files are left out, for instance %s: no photo or sound in a class folder.",
            split_dir,
            len(left_out),
            left_out[0].relative_to(split_dir),
        )


def _listed_items(metadata: Path) -> Iterator[SourceItem]:
    seen: set[str] = set()
    with metadata.open(encoding="utf-8-sig", errors="surrogateescape") as lines:
        for number, line in enumerate(lines, start=1):
            if line.strip():
                item = _listed_item(metadata, number, line)
                if item.id in seen:
                    raise ValueError(f"{metadata}:{number}: {item.id} is listed twice. Give each file one line.")
                seen.add(item.id)
                yield item


def _listed_item(metadata: Path, number: int, line: str) -> SourceItem:
    where = f"{metadata}:{number}"
    try:
        entry = json.loads(line)
        name = str(entry["file_name"])
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        raise ValueError(f"{where}: expected a JSON object with file_name, found {error!r}. Mend the line.") from None
    split_dir = metadata.parent
    if Path(name).is_absolute() or ".." in Path(name).parts or "\0" in name:
        raise ValueError(
            f"{where}: file_name {name!r} leaves its folder. Move the file, or a link to it, into {split_dir}."
        )
    path = split_dir / name
    modality = _modality_of(path)
    captions, caption_problem = texts_of(entry.get("captions", entry.get("caption", entry.get("text"))))
    labels, label_problem = texts_of(entry.get("labels", entry.get("label")))
    return SourceItem(
        id=f"{split_dir.name}/{Path(name).as_posix()}",
        split=split_dir.name,
        media={modality: Media(path)} if modality else {},
        captions=captions,
        labels=labels,
        problem=caption_problem or label_problem or ("" if modality else f"unknown kind of file {path.suffix!r}"),
    )


def _modality_of(path: Path) -> Modality | None:
    suffix = path.suffix.lower()
    return "image" if suffix in IMAGE_SUFFIXES else "audio" if suffix in AUDIO_SUFFIXES else None
