"""Datasets into items, and files into pictures and sounds. The only module that knows where data comes from.

Four kinds of `--data`, told apart by what lies there:

    folder of splits with class folders       train/cat/1.jpg                      label = folder name
    folder of splits with metadata.jsonl      train/metadata.jsonl, train/1.jpg    captions and labels as listed
    folder saved by datasets.save_to_disk     columns found by name
    anything else                             an id on the Hugging Face hub, columns found by name
"""

from __future__ import annotations

import hashlib
import io
import json
from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from saffe_cache.features import Modality

IMAGE_SUFFIXES = frozenset({".jpg", ".jpeg", ".png", ".webp", ".bmp", ".gif", ".tif", ".tiff"})
AUDIO_SUFFIXES = frozenset({".wav", ".flac", ".ogg", ".mp3"})


@dataclass(frozen=True)
class Media:
    """A photo or a sound, not read yet: a file, or a row of a dataset."""

    path: Path | None = None
    dataset: Any = None
    column: str = ""
    row: int = 0

    def read(self) -> bytes:
        """The encoded bytes.

        Raises:
            OSError: the file cannot be read.
        """
        if self.path is not None:
            return self.path.read_bytes()
        value = self.dataset[self.row][self.column]
        return bytes(value["bytes"]) if value["bytes"] is not None else Path(value["path"]).read_bytes()


@dataclass(frozen=True, kw_only=True)
class SourceItem:
    """One item of a dataset, before anything is read from it."""

    id: str
    split: str
    media: Mapping[Modality, Media]
    captions: tuple[str, ...] = ()
    labels: tuple[str, ...] = ()
    problem: str = ""
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


def read_items(data: str, columns: Columns, splits: tuple[str, ...]) -> list[SourceItem]:
    """All items of a dataset, with the hash of their content; unreadable ones carry a problem.

    `splits` narrows to some; empty takes all.

    Raises:
        ValueError: nothing usable lies there.
    """
    folder = Path(data).expanduser()
    if not folder.is_dir():
        if folder.exists() or data.startswith((".", "/", "~")):
            raise ValueError(f"--data {data}: not a folder. Give a folder of splits or a dataset id of the hub.")
        items = list(_hub_items(data, columns))
    elif (folder / "dataset_info.json").exists() or (folder / "dataset_dict.json").exists():
        items = list(_saved_items(folder, columns))
    else:
        items = list(_folder_items(folder))
    items = [item for item in items if not splits or item.split in splits]
    if not items:
        raise ValueError(
            f"--data {data}: no items{' in splits ' + ', '.join(splits) if splits else ''}. Expected folders "
            "SPLIT/CLASS/file or SPLIT/metadata.jsonl, a folder saved by datasets.save_to_disk, or a hub id."
        )
    with ThreadPoolExecutor() as pool:
        return list(pool.map(_hash_item, items))


def decode(modality: Modality, data: bytes, sampling_rate: int | None = None) -> Any:
    """An RGB picture, upright; or a mono float32 waveform at the sampling rate (Hz).

    Raises:
        OSError, ValueError: the bytes are no readable picture or sound.
    """
    return _decode_image(data) if modality == "image" else _decode_audio(data, sampling_rate or 16_000)


def _decode_image(data: bytes) -> Any:
    from PIL import Image, ImageOps

    try:
        with Image.open(io.BytesIO(data)) as image:
            return ImageOps.exif_transpose(image).convert("RGB")
    except (SyntaxError, Image.DecompressionBombError) as error:  # what PIL raises beside OSError
        raise ValueError(f"{type(error).__name__}: {error}") from None


def _decode_audio(data: bytes, sampling_rate: int) -> np.ndarray:
    try:
        import soundfile
        import soxr
    except ImportError as error:
        raise ImportError(f"Sounds need the package {error.name}: pip install 'saffe-cache[audio]'.") from None
    waveform, rate = soundfile.read(io.BytesIO(data), dtype="float32", always_2d=True)
    if not len(waveform):
        raise ValueError("the sound has no samples")
    return np.asarray(soxr.resample(waveform.mean(axis=1), rate, sampling_rate), dtype=np.float32)


def _hash_item(item: SourceItem) -> SourceItem:
    """Read the item's files once, for their hashes."""
    problem, hashes = item.problem, {}
    for modality, media in item.media.items():
        try:
            data = media.read()
        except OSError as error:
            problem = problem or f"unreadable {modality}: {error.strerror or error}"
            continue
        hashes[modality] = hashlib.sha256(data).digest()
        if not data:
            problem = problem or f"unreadable {modality}: the file is empty"
    return SourceItem(
        id=item.id,
        split=item.split,
        media=item.media,
        captions=item.captions,
        labels=item.labels,
        problem=problem,
        hashes=hashes,
    )


def _folder_items(folder: Path) -> Iterator[SourceItem]:
    for split_dir in sorted(path for path in folder.iterdir() if path.is_dir()):
        metadata = split_dir / "metadata.jsonl"
        yield from _listed_items(metadata) if metadata.exists() else _class_folder_items(split_dir)


def _class_folder_items(split_dir: Path) -> Iterator[SourceItem]:
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


def _listed_items(metadata: Path) -> Iterator[SourceItem]:
    seen: set[str] = set()
    with metadata.open(encoding="utf-8", errors="surrogateescape") as lines:
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
        name = entry["file_name"]
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{where}: expected a JSON object with file_name, found {error!r}. Mend the line.") from None
    split_dir = metadata.parent
    path = split_dir / str(name)
    if not path.resolve().is_relative_to(split_dir.resolve()):
        raise ValueError(f"{where}: file_name {name!r} leaves its folder. Move the file into {split_dir}.")
    modality = _modality_of(path)
    captions, caption_problem = _texts_of(entry.get("captions", entry.get("caption", entry.get("text"))))
    labels, label_problem = _texts_of(entry.get("labels", entry.get("label")))
    return SourceItem(
        id=f"{split_dir.name}/{name}",
        split=split_dir.name,
        media={modality: Media(path)} if modality else {},
        captions=captions,
        labels=labels,
        problem=caption_problem or label_problem or ("" if modality else f"unknown kind of file {path.suffix!r}"),
    )


def _texts_of(value: Any) -> tuple[tuple[str, ...], str]:
    """A column's text or texts, and a problem where one of them is empty or no text."""
    values = [] if value is None else value if isinstance(value, (list, tuple)) else [value]
    texts = tuple(str(text).strip() for text in values if isinstance(text, (str, int)))
    if len(texts) < len(values) or not all(texts):
        return tuple(text for text in texts if text), "empty caption or label"
    return texts, ""


def _modality_of(path: Path) -> Modality | None:
    suffix = path.suffix.lower()
    return "image" if suffix in IMAGE_SUFFIXES else "audio" if suffix in AUDIO_SUFFIXES else None


def _saved_items(folder: Path, columns: Columns) -> Iterator[SourceItem]:
    import datasets

    loaded = datasets.load_from_disk(str(folder))
    for split, dataset in loaded.items() if isinstance(loaded, dict) else [("train", loaded)]:
        yield from _dataset_items(dataset, str(split), columns)


def _hub_items(data: str, columns: Columns) -> Iterator[SourceItem]:
    import datasets

    try:
        loaded = datasets.load_dataset(data)
    except Exception as error:  # the hub's client raises many kinds
        raise ValueError(
            f"--data {data}: not a folder here, and the hub did not give a dataset of this id "
            f"({type(error).__name__}: {error}). Check the spelling and the network."
        ) from error
    for split, dataset in loaded.items():
        yield from _dataset_items(dataset, str(split), columns)


_USUAL_NAMES = {
    "caption": ("captions", "caption", "text", "sentences", "sentence", "raw"),
    "label": ("labels", "label", "fine_label", "category", "class"),
}


def _dataset_items(dataset: Any, split: str, columns: Columns) -> Iterator[SourceItem]:
    import datasets

    chosen = _choose_columns(dataset, split, columns)
    media_columns: dict[Modality, str] = {}
    for modality, feature in (("image", datasets.Image), ("audio", datasets.Audio)):
        name = chosen[modality]
        if name is not None:
            dataset = dataset.cast_column(name, feature(decode=False))
            media_columns["image" if modality == "image" else "audio"] = name
    texts = dataset.remove_columns(list(media_columns.values()))
    for row, entry in enumerate(texts):
        captions, caption_problem = _texts_of(entry.get(chosen["caption"]))
        labels, label_problem = _labels_of(dataset.features, chosen["label"], entry)
        yield SourceItem(
            id=f"{split}/{entry[chosen['id']] if chosen['id'] else row}",
            split=split,
            media={m: Media(dataset=dataset, column=name, row=row) for m, name in media_columns.items()},
            captions=captions,
            labels=labels,
            problem=caption_problem or label_problem,
        )


def _choose_columns(dataset: Any, split: str, columns: Columns) -> dict[str, str | None]:
    import datasets

    def by_type(feature: type) -> str | None:
        return next((name for name, kind in dataset.features.items() if isinstance(kind, feature)), None)

    chosen = {
        "image": columns.image or by_type(datasets.Image),
        "audio": columns.audio or by_type(datasets.Audio),
        "id": columns.id,
    }
    for role, usual in _USUAL_NAMES.items():
        chosen[role] = getattr(columns, role) or next((name for name in usual if name in dataset.features), None)
    missing = [name for name in chosen.values() if name is not None and name not in dataset.features]
    if missing or not (chosen["image"] or chosen["audio"]):
        raise ValueError(
            f"split {split}: {'no column ' + missing[0] if missing else 'no image or audio column found'}; "
            f"the columns are {', '.join(dataset.features)}. Name them with --column ROLE=NAME."
        )
    return chosen


def _labels_of(features: Any, column: str | None, entry: Mapping[str, Any]) -> tuple[tuple[str, ...], str]:
    """Class names, also where the dataset holds class numbers."""
    import datasets

    value = entry.get(column) if column else None
    feature = features.get(column) if column else None
    if isinstance(feature, datasets.ClassLabel) and value is not None:
        return ((feature.int2str(value),), "") if value >= 0 else ((), "no label")
    return _texts_of(value)
