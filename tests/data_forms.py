"""One small dataset written in every form that `--data` takes, for the tests that compare what is read."""

from __future__ import annotations

import csv
import io
import json
import tarfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pandas
from PIL import Image


@dataclass(frozen=True)
class Drawn:
    """A photo and what is said about it."""

    split: str
    name: str
    photo: bytes
    captions: tuple[str, ...]
    label: str | None

    @property
    def row(self) -> dict[str, Any]:
        """Its columns of texts."""
        texts: dict[str, Any] = {"captions": list(self.captions)} if self.captions else {}
        return texts | ({"label": self.label} if self.label else {})


def png(seed: int) -> bytes:
    buffer = io.BytesIO()
    pixels = np.random.default_rng(seed).integers(0, 256, (40, 30, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(buffer, "PNG")
    return buffer.getvalue()


def drawn(splits: Sequence[str] = ("train", "test"), roles: Sequence[str] = ("caption", "label")) -> list[Drawn]:
    """Three photos of each split, with two captions and one of two classes."""
    made = []
    for number in range(3 * len(splits)):
        captions = (f"word{number} word1", f'word{number} ünd, "so"; on') if "caption" in roles else ()
        label = ("cat", "dog")[number % 2] if "label" in roles else None
        made.append(Drawn(splits[number // 3], f"{number:05}", png(number), captions, label))
    return made


def write(path: Path, data: bytes | str) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(data.encode() if isinstance(data, str) else data)
    return path


def write_photos(folder: Path, items: Sequence[Drawn]) -> None:
    for one in items:
        write(folder / one.split / f"{one.name}.png", one.photo)


def by_split(items: Sequence[Drawn]) -> dict[str, list[Drawn]]:
    splits: dict[str, list[Drawn]] = {}
    for one in items:
        splits.setdefault(one.split, []).append(one)
    return splits


def flat_row(one: Drawn) -> dict[str, Any]:
    """Its texts where a cell cannot hold a list."""
    numbered = {f"caption_{number}": text for number, text in enumerate(one.captions)}
    return numbered | ({"label": one.label} if one.label else {})


def write_csv(path: Path, rows: Sequence[Mapping[str, Any]], separator: str = ",", encoding: str = "utf-8") -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w", encoding=encoding, newline="") as file:
        writer = csv.DictWriter(file, list(dict.fromkeys(name for row in rows for name in row)), delimiter=separator)
        writer.writeheader()
        writer.writerows(rows)


def metadata_jsonl(folder: Path, items: Sequence[Drawn]) -> str:
    write_photos(folder, items)
    for split, of_split in by_split(items).items():
        lines = (json.dumps({"file_name": f"{one.name}.png", **one.row}) for one in of_split)
        write(folder / split / "metadata.jsonl", "\n".join(lines))
    return str(folder)


def metadata_csv(folder: Path, items: Sequence[Drawn]) -> str:
    write_photos(folder, items)
    for split, of_split in by_split(items).items():
        rows = [{"file_name": f"{one.name}.png", **flat_row(one)} for one in of_split]
        write_csv(folder / split / "metadata.csv", rows)
    return str(folder)


def root_metadata_parquet(folder: Path, items: Sequence[Drawn]) -> str:
    write_photos(folder, items)
    rows = [{"file_name": f"{one.split}/{one.name}.png", **one.row} for one in items]
    pandas.DataFrame(rows).to_parquet(folder / "metadata.parquet")
    return str(folder)


def sidecars(one: Drawn, *, as_json: bool) -> dict[str, bytes]:
    """The files beside a photo, by suffix."""
    if as_json:
        return {"json": json.dumps(one.row).encode()}
    texts = {"txt": "\n".join(one.captions).encode()} if one.captions else {}
    return texts | ({"cls": one.label.encode()} if one.label else {})


def texts_beside(folder: Path, items: Sequence[Drawn]) -> str:
    write_photos(folder, items)
    for one in items:
        for suffix, data in sidecars(one, as_json=False).items():
            write(folder / one.split / f"{one.name}.{suffix}", data)
    return str(folder)


def json_beside(folder: Path, items: Sequence[Drawn]) -> str:
    write_photos(folder, items)
    for one in items:
        write(folder / one.split / f"{one.name}.json", sidecars(one, as_json=True)["json"])
    return str(folder)


def img2dataset(folder: Path, items: Sequence[Drawn]) -> str:
    """As it writes files, once for each split: shard folders, and a table and counts beside each."""
    for split, of_split in by_split(items).items():
        for one in of_split:
            base = folder / split / "00000" / one.name
            write(base.with_suffix(".png"), one.photo)
            write(base.with_suffix(".json"), json.dumps({"key": one.name, "status": "success", **one.row}))
            if one.captions:
                write(base.with_suffix(".txt"), "\n".join(one.captions))
        write(folder / split / "00000_stats.json", json.dumps({"count": 4, "successes": 3}))
        pandas.DataFrame([{"key": one.name, "status": "success"} for one in of_split]).to_parquet(
            folder / split / "00000.parquet"
        )
    return str(folder)


def class_folders(folder: Path, items: Sequence[Drawn]) -> str:
    for one in items:
        write(folder / one.split / str(one.label) / f"{one.name}.png", one.photo)
    return str(folder)


def write_tar(path: Path, files: Mapping[str, bytes]) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w") as archive:
        for name, data in files.items():
            member = tarfile.TarInfo(name)
            member.size = len(data)
            archive.addfile(member, io.BytesIO(data))
    return path


def tar_files(items: Sequence[Drawn], *, as_json: bool) -> dict[str, bytes]:
    files = {}
    for one in items:
        files[f"{one.name}.png"] = one.photo
        files |= {f"{one.name}.{suffix}": data for suffix, data in sidecars(one, as_json=as_json).items()}
    return files


def tars(folder: Path, items: Sequence[Drawn]) -> str:
    for split, of_split in by_split(items).items():
        write_tar(folder / split / "000.tar", tar_files(of_split, as_json=False))
    return str(folder)


def tar_range(folder: Path, items: Sequence[Drawn]) -> str:
    splits = by_split(items)
    for split, of_split in splits.items():
        for number, part in enumerate((of_split[:2], of_split[2:])):
            write_tar(folder / f"set-{split}-{number:03}.tar", tar_files(part, as_json=True))
    return str(folder / f"set-{{{','.join(splits)}}}-{{000..001}}.tar" if len(splits) > 1 else folder / "set-*.tar")


def table_rows(items: Sequence[Drawn], row: Callable[[Drawn], Mapping[str, Any]]) -> list[dict[str, Any]]:
    return [{"image_path": f"{one.split}/{one.name}.png", "split": one.split, **row(one)} for one in items]


def csv_table(folder: Path, items: Sequence[Drawn]) -> str:
    """A row for each caption, as in Flickr8k's captions.txt."""
    write_photos(folder, items)
    rows = [
        {**row, "caption": text, "label": one.label}
        for row, one in zip(table_rows(items, lambda _: {}), items, strict=True)
        for text in one.captions or ("",)
    ]
    write_csv(folder / "table.csv", rows)
    return str(folder / "table.csv")


def semicolon_table(folder: Path, items: Sequence[Drawn]) -> str:
    """As Excel writes it in many countries: semicolons, and a byte order mark."""
    write_photos(folder, items)
    write_csv(folder / "table.csv", table_rows(items, flat_row), ";", "utf-8-sig")
    return str(folder / "table.csv")


def tsv_table(folder: Path, items: Sequence[Drawn]) -> str:
    write_photos(folder, items)
    write_csv(folder / "table.tsv", table_rows(items, flat_row), "\t", "utf-16")
    return str(folder / "table.tsv")


def json_table(folder: Path, items: Sequence[Drawn]) -> str:
    write_photos(folder, items)
    return str(write(folder / "table.json", json.dumps(table_rows(items, lambda one: one.row))))


def jsonl_tables(folder: Path, items: Sequence[Drawn]) -> str:
    """A table for each split, which names it."""
    write_photos(folder, items)
    for split, of_split in by_split(items).items():
        lines = (json.dumps({"filename": f"{split}/{one.name}.png", **one.row}) for one in of_split)
        write(folder / f"{split}.jsonl", "\n".join(lines))
    return str(folder / "*.jsonl")


def parquet_table(folder: Path, items: Sequence[Drawn]) -> str:
    write_photos(folder, items)
    pandas.DataFrame(table_rows(items, lambda one: one.row)).to_parquet(folder / "table.parquet")
    return str(folder / "table.parquet")


def dataset_dict(items: Sequence[Drawn]) -> datasets.DatasetDict:
    made = {}
    for split, of_split in by_split(items).items():
        columns: dict[str, Any] = {"image": [{"bytes": one.photo, "path": None} for one in of_split]}
        features: dict[str, Any] = {"image": datasets.Image()}
        if items[0].captions:
            columns["sentences"] = [[{"raw": text} for text in one.captions] for one in of_split]
            features["sentences"] = datasets.List({"raw": datasets.Value("string")})
        if items[0].label:
            columns["label"] = [("cat", "dog").index(str(one.label)) for one in of_split]
            features["label"] = datasets.ClassLabel(names=["cat", "dog"])
        made[split] = datasets.Dataset.from_dict(columns, features=datasets.Features(features))
    return datasets.DatasetDict(made)


def snapshot(folder: Path, items: Sequence[Drawn]) -> str:
    for split, one in dataset_dict(items).items():
        path = folder / "data" / f"{split}-00000-of-00001.parquet"
        path.parent.mkdir(parents=True, exist_ok=True)
        one.to_parquet(path)
    return str(folder)


def parquet_files(folder: Path, items: Sequence[Drawn]) -> str:
    return f"{snapshot(folder, items)}/data/*.parquet"


def parquet_of_bytes(folder: Path, items: Sequence[Drawn]) -> str:
    """As img2dataset writes it: bytes in a column jpg, without types of the datasets library."""
    folder.mkdir(parents=True, exist_ok=True)
    for split, of_split in by_split(items).items():
        rows = [{"jpg": one.photo, **one.row} for one in of_split]
        pandas.DataFrame(rows).to_parquet(folder / f"{split}.parquet")
    return str(folder / "{" / "}").replace("/{/}", "/*.parquet")


def saved(folder: Path, items: Sequence[Drawn]) -> str:
    dataset_dict(items).save_to_disk(folder)
    return str(folder)


class TorchPhotos:
    """A map-style dataset as torchvision's: pairs of a photo and its captions, or its class number."""

    classes = ("cat", "dog")

    def __init__(self, items: Sequence[Drawn]) -> None:
        self._items = items

    def __len__(self) -> int:
        return len(self._items)

    def __getitem__(self, index: int) -> tuple[Any, Any]:
        one = self._items[index]
        return one.photo, list(one.captions) if one.captions else self.classes.index(str(one.label))


@dataclass(frozen=True, kw_only=True)
class Form:
    """A form, and how it names items within a split."""

    make: Callable[[Path, Sequence[Drawn]], Any]
    id_of: Callable[[Drawn, int], str] = lambda one, number: f"{one.name}.png"
    """From the item and its number in its split."""
    roles: tuple[str, ...] = ("caption", "label", "caption,label", "")
    """The columns that it can hold."""
    streaming: bool = False


def _number(one: Drawn, number: int) -> str:
    return str(number)


def _objects(make: Callable[[list[Drawn]], Any]) -> Callable[[Path, Sequence[Drawn]], Any]:
    return lambda _, items: {split: make(of_split) for split, of_split in by_split(items).items()}


FORMS: Mapping[str, Form] = {
    "metadata.jsonl": Form(make=metadata_jsonl),
    "metadata.csv": Form(make=metadata_csv),
    "metadata.parquet above splits": Form(make=root_metadata_parquet),
    "texts beside photos": Form(make=texts_beside),
    "json beside photos": Form(make=json_beside),
    "img2dataset": Form(make=img2dataset, id_of=lambda one, _: f"00000/{one.name}.png"),
    "class folders": Form(make=class_folders, id_of=lambda one, _: f"{one.label}/{one.name}.png", roles=("label",)),
    "folder of tars": Form(make=tars, id_of=lambda one, _: f"000/{one.name}"),
    "range of tars": Form(make=tar_range, id_of=lambda one, number: f"set-{one.split}-{number // 2:03}/{one.name}"),
    "csv, a row per caption": Form(make=csv_table),
    "csv with semicolons": Form(make=semicolon_table),
    "tsv in UTF-16": Form(make=tsv_table),
    "json table": Form(make=json_table),
    "jsonl tables": Form(make=jsonl_tables),
    "parquet table of paths": Form(make=parquet_table),
    "snapshot": Form(make=snapshot, id_of=_number),
    "snapshot, streamed": Form(make=snapshot, id_of=_number, streaming=True),
    "parquet files": Form(make=parquet_files, id_of=_number),
    "parquet files, streamed": Form(make=parquet_files, id_of=_number, streaming=True),
    "parquet of bytes": Form(make=parquet_of_bytes, id_of=_number),
    "save_to_disk": Form(make=saved, id_of=_number),
    "DatasetDict": Form(make=lambda _, items: dataset_dict(items), id_of=_number),
    "frames": Form(
        make=_objects(lambda items: pandas.DataFrame([{"image": one.photo, **one.row} for one in items])),
        id_of=_number,
    ),
    "lists of pairs": Form(
        make=_objects(lambda items: [(one.photo, one.captions) for one in items]), id_of=_number, roles=("caption",)
    ),
    "lists of dicts": Form(
        make=_objects(lambda items: [{"image": one.photo, **one.row} for one in items]), id_of=_number
    ),
    "torch datasets": Form(make=_objects(TorchPhotos), id_of=_number, roles=("caption", "label")),
}
