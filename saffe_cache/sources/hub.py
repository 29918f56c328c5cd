"""Datasets of the Hugging Face library, saved in a folder or on the hub. The only importer of datasets."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from saffe_cache.core.features import Modality
from saffe_cache.sources.items import Columns, Media, SourceItem, texts_of

_USUAL_NAMES = {
    "caption": ("captions", "caption", "text", "sentences", "sentence", "raw"),
    "label": ("labels", "label", "fine_label", "category", "class"),
}


def saved_items(folder: Path, columns: Columns) -> Iterator[SourceItem]:
    """The items of a folder that save_to_disk wrote; a dataset without splits is "train" if it does not say.

    Raises:
        ValueError: the columns are not as they must be.
    """
    import datasets

    loaded = datasets.load_from_disk(str(folder))
    if not isinstance(loaded, dict):
        loaded = {str(loaded.split or "train").partition("[")[0]: loaded}  # the split may be train[:100]
    for split, dataset in loaded.items():
        yield from _dataset_items(dataset, str(split), columns)


def hub_items(data: str, columns: Columns) -> Iterator[SourceItem]:
    """The items of a dataset id.

    Raises:
        ValueError: the hub did not give it, or its columns are not as they must be.
    """
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


def _dataset_items(dataset: Any, split: str, columns: Columns) -> Iterator[SourceItem]:
    chosen = _choose_columns(dataset, split, columns)
    media = _media(dataset, split, chosen)
    names = list(dict.fromkeys(name for role, name in chosen.items() if name and role not in media))
    entries: Iterable[Mapping[str, Any]] = dataset.select_columns(names) if names else ({} for _ in range(len(dataset)))
    seen: set[str] = set()
    for row, entry in enumerate(entries):
        captions, caption_problem = texts_of(entry[chosen["caption"]] if chosen["caption"] else None)
        labels, label_problem = _labels_of(dataset.features, chosen["label"], entry)
        item_id = f"{split}/{entry[chosen['id']] if chosen['id'] else row}"
        if item_id in seen:
            raise ValueError(f"row {row}: the id {item_id} is taken by a row before. Name another --column id=NAME.")
        seen.add(item_id)
        yield SourceItem(
            id=item_id,
            split=split,
            media={modality: replace(medium, row=row) for modality, medium in media.items()},
            captions=captions,
            labels=labels,
            problem=caption_problem or label_problem,
        )


def _choose_columns(dataset: Any, split: str, columns: Columns) -> dict[str, str | None]:
    """The column of each role, None where there is none."""
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


def _media(dataset: Any, split: str, chosen: Mapping[str, str | None]) -> dict[Modality, Media]:
    """Row 0 of the columns of photos and sounds. Texts in them are taken as paths.

    Raises:
        ValueError: a column holds something else.
    """
    import datasets

    media: dict[Modality, Media] = {}
    features: tuple[tuple[Modality, Any], ...] = (("image", datasets.Image), ("audio", datasets.Audio))
    for modality, feature in features:
        name = chosen[modality]
        if name is None:
            continue
        kind = dataset.features[name]
        if not isinstance(kind, feature) and getattr(kind, "dtype", "").removeprefix("large_") not in (
            "string",
            "binary",
        ):
            raise ValueError(f"split {split}: column {name} has {kind}, expected {modality}, bytes or paths.")
        undecoded = dataset.select_columns([name]).cast_column(name, feature(decode=False))
        media[modality] = Media(dataset=undecoded, column=name)
    return media


def _labels_of(features: Any, column: str | None, entry: Mapping[str, Any]) -> tuple[tuple[str, ...], str]:
    """Class names, also where the dataset holds class numbers."""
    import datasets

    if column is None:
        return (), ""
    value, feature = entry[column], features[column]
    feature = getattr(feature, "feature", feature)  # of a list's elements
    if not isinstance(feature, datasets.ClassLabel) or value is None:
        return texts_of(value)
    numbers = value if isinstance(value, list) else [value]
    if any(number is None or number < 0 for number in numbers):  # -1 marks what is not labelled
        return (), "no label"
    return tuple(feature.int2str(number) for number in numbers), ""
