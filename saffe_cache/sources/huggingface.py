"""Datasets of the Hugging Face library, saved in a folder or on the hub. The only importer of datasets."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

from saffe_cache.core.features import Modality
from saffe_cache.sources.items import Columns, Format, SourceItem, as_list, texts_of


def _is_saved_dataset(data: str) -> bool:
    folder = Path(data).expanduser()
    return (folder / "dataset_info.json").exists() or (folder / "dataset_dict.json").exists()


def _may_be_hub_id(data: str) -> bool:
    path = Path(data).expanduser()
    return not (path.exists() or path.is_absolute() or data.startswith("."))


def saved_items(data: str, columns: Columns) -> Iterator[SourceItem]:
    """The items of a folder written by save_to_disk. A dataset without splits is "train" unless it names its split.

    Raises:
        ValueError: the columns are invalid.
    """
    import datasets

    loaded = datasets.load_from_disk(str(Path(data).expanduser()))
    if not isinstance(loaded, dict):
        loaded = {str(loaded.split or "train").partition("[")[0]: loaded}  # the split may be train[:100]
    yield from _items_of_splits(data, loaded, columns)


def hub_items(data: str, columns: Columns) -> Iterator[SourceItem]:
    """The items of a dataset id.

    Raises:
        ValueError: the hub does not provide it, or its columns are invalid.
    """
    import datasets

    try:
        loaded = datasets.load_dataset(data)
    except Exception as error:  # the hub's client raises many kinds
        raise ValueError(
            f"--data {data}: no such folder here, and the hub provided no dataset with this id "
            f"({type(error).__name__}: {error}). Check the spelling and the network."
        ) from error
    yield from _items_of_splits(data, loaded, columns)


SAVED_DATASET = Format(
    layout="a folder saved by datasets.save_to_disk", recognises=_is_saved_dataset, read_items=saved_items
)
HUB_DATASET = Format(layout="a dataset id on the Hugging Face hub", recognises=_may_be_hub_id, read_items=hub_items)


@dataclass(frozen=True)
class _Cell:
    """Media in a row of a dataset whose column is not decoded."""

    dataset: Any
    column: str
    row: int

    def read(self) -> bytes:
        value = self.dataset[self.row][self.column] or {"bytes": None, "path": None}
        if value["bytes"] is not None:
            return bytes(value["bytes"])
        if value["path"] is None:
            raise OSError(f"row {self.row} has no {self.column}")
        return Path(value["path"]).read_bytes()


def _items_of_splits(data: str, splits: Mapping[Any, Any], columns: Columns) -> Iterator[SourceItem]:
    columns.require(list(dict.fromkeys(name for one in splits.values() for name in one.features)), f"--data {data}")
    for split, dataset in splits.items():
        yield from _dataset_items(dataset, str(split), columns)


def _dataset_items(dataset: Any, split: str, columns: Columns) -> Iterator[SourceItem]:
    media = _media(dataset, split, columns)
    chosen = {role: columns.find(role, dataset.features) for role in ("caption", "label", "id")}
    names = list(dict.fromkeys(name for of_role in chosen.values() for name in of_role))
    fields = tuple(dataset.features)
    entries: Iterable[Mapping[str, Any]] = dataset.select_columns(names) if names else ({} for _ in range(len(dataset)))
    for row, entry in enumerate(entries):
        captions, caption_problem = columns.texts("caption", entry)
        labels, label_problem = _labels_of(dataset.features, chosen["label"], entry)
        yield SourceItem(
            id=f"{split}/{entry[chosen['id'][0]] if chosen['id'] else row}",
            split=split,
            media={modality: replace(cell, row=row) for modality, cell in media.items()},
            captions=captions,
            labels=labels,
            problem=caption_problem or label_problem,
            columns=fields,
        )


def _media(dataset: Any, split: str, columns: Columns) -> dict[Modality, _Cell]:
    """Row 0 of the columns of photos and sounds, found by their type. Texts in them are paths.

    Raises:
        ValueError: there is no such column, or it has another type.
    """
    import datasets

    media: dict[Modality, _Cell] = {}
    features: tuple[tuple[Literal["image", "audio"], Any], ...] = (("image", datasets.Image), ("audio", datasets.Audio))
    for modality, feature in features:
        of_type = (name for name, kind in dataset.features.items() if isinstance(kind, feature))
        name = next(iter(columns.find(modality, dataset.features)), None) or next(of_type, None)
        if name is None:
            continue
        kind = dataset.features[name]
        kinds = ("string", "binary")
        if not isinstance(kind, feature) and getattr(kind, "dtype", "").removeprefix("large_") not in kinds:
            raise ValueError(f"split {split}: column {name} has {kind}, expected {modality}, bytes or paths.")
        undecoded = dataset.select_columns([name]).cast_column(name, feature(decode=False))
        media[modality] = _Cell(undecoded, name, 0)
    if not media:
        raise ValueError(
            f"split {split}: no image or audio column found; the columns are {', '.join(dataset.features)}. "
            "Choose them with --column ROLE=NAME."
        )
    return media


def _labels_of(features: Any, names: Iterable[str], entry: Mapping[str, Any]) -> tuple[tuple[str, ...], str]:
    """Class names, also where the dataset stores class numbers."""
    import datasets

    values: list[Any] = []
    for name in names:
        feature = getattr(features[name], "feature", features[name])  # of a list's elements
        found = as_list(entry[name])
        if isinstance(feature, datasets.ClassLabel):
            if any(number is None or number < 0 for number in found):  # -1 marks unlabelled items
                return (), "no label"
            found = [feature.int2str(number) for number in found]
        values += found
    return texts_of(values)
