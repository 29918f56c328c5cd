"""Items of several media: rows of every form of data, their tables, and extraction that adds an encoder later."""

from __future__ import annotations

import hashlib
import io
import json
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pandas
import pytest
import soundfile
from data_forms import png, write, write_csv, write_tar
from extraction_cases import tiny_config
from several_cache import WIDTHS, make_several_cache

from saffe_cache.core.features import CacheError
from saffe_cache.core.items import Item
from saffe_cache.extraction.config import ExtractConfig, RepairConfig
from saffe_cache.extraction.extract import extract
from saffe_cache.extraction.repair import repair
from saffe_cache.inputs.pairs import training_pairs
from saffe_cache.sources.items import Columns
from saffe_cache.sources.registry import read_items
from saffe_cache.store.config import InspectConfig
from saffe_cache.store.inspect import inspect_cache
from saffe_cache.store.reader import open_cache
from saffe_cache.store.table import TableBuilder
from saffe_cache.training.config import TrainConfig
from saffe_cache.training.resolve import resolve_run

PHOTOS = [png(0), png(1), None]
SUBSETS = [{"image", "audio"}, {"image"}, {"audio"}]
"""Of the three items."""


def wav(seed: int) -> bytes:
    buffer = io.BytesIO()
    soundfile.write(buffer, np.sin(np.arange(4000) * (0.1 + seed / 10)), 8000, format="WAV")
    return buffer.getvalue()


SOUNDS = [wav(0), None, wav(2)]


def write_files(folder: Path) -> list[dict[str, Any]]:
    """The files of three items, and their rows."""
    rows = []
    for number, (photo, sound) in enumerate(zip(PHOTOS, SOUNDS, strict=True)):
        row: dict[str, Any] = {"image": None, "audio": None, "caption": f"word{number}"}
        for column, suffix, data in (("image", "png", photo), ("audio", "wav", sound)):
            if data is not None:
                write(folder / f"{number}.{suffix}", data)
                row[column] = f"{number}.{suffix}"
        rows.append(row)
    return rows


def as_jsonl(folder: Path) -> Any:
    rows = write_files(folder / "train")
    write(folder / "train" / "metadata.jsonl", "\n".join(map(json.dumps, rows)))
    return str(folder)


def as_csv(folder: Path) -> Any:
    rows = [
        {"image_path": one["image"], "audio_path": one["audio"], "caption": one["caption"]}
        for one in write_files(folder)
    ]
    write_csv(folder / "train.csv", rows)
    return str(folder / "train.csv")


def as_parquet(folder: Path) -> Any:
    pandas.DataFrame(write_files(folder)).to_parquet(folder / "metadata.parquet")
    return str(folder)


def as_named_columns(folder: Path) -> Any:
    rows = [{"photo": one["image"], "sound": one["audio"], "caption": one["caption"]} for one in write_files(folder)]
    write(folder / "metadata.jsonl", "\n".join(map(json.dumps, rows)))
    return str(folder)


def as_dataset(folder: Path) -> Any:
    def cells(values: list[bytes | None]) -> list[dict[str, Any] | None]:
        return [None if value is None else {"bytes": value, "path": None} for value in values]

    columns = {"image": cells(PHOTOS), "audio": cells(SOUNDS), "caption": [f"word{number}" for number in range(3)]}
    return (
        datasets.Dataset.from_dict(columns)
        .cast_column("image", datasets.Image())
        .cast_column("audio", datasets.Audio())
    )


def as_stream(folder: Path) -> Any:
    return as_dataset(folder).to_iterable_dataset()


def as_dicts(folder: Path) -> Any:
    rows = zip(PHOTOS, SOUNDS, strict=True)
    return [{"image": photo, "audio": sound, "caption": f"word{number}"} for number, (photo, sound) in enumerate(rows)]


def as_tar(folder: Path) -> Any:
    members: dict[str, bytes] = {}
    for number, (photo, sound) in enumerate(zip(PHOTOS, SOUNDS, strict=True)):
        found = {"png": photo, "wav": sound, "txt": f"word{number}".encode()}
        members |= {f"{number}.{suffix}": data for suffix, data in found.items() if data is not None}
    folder.mkdir(parents=True, exist_ok=True)
    return str(write_tar(folder / "train.tar", members))


@pytest.mark.parametrize(
    "make", [as_jsonl, as_csv, as_parquet, as_named_columns, as_dataset, as_stream, as_dicts, as_tar]
)
def test_a_row_of_several_media_is_one_item(make: Callable[[Path], Any], tmp_path: Path) -> None:
    columns = Columns(image="photo", audio="sound") if make is as_named_columns else Columns()
    items = read_items(make(tmp_path / "data"), columns, ())
    assert [item.problem for item in items] == ["", "", ""]
    assert [set(item.hashes) for item in items] == SUBSETS
    contents: list[Mapping[str, bytes | None]] = [{"image": PHOTOS[n], "audio": SOUNDS[n]} for n in range(3)]
    for item, content in zip(items, contents, strict=True):
        for modality, digest in item.hashes.items():
            data = content[modality]
            assert data is not None
            assert digest == hashlib.sha256(data).digest()
    assert [item.captions for item in items] == [(f"word{number}",) for number in range(3)]


def test_other_columns_named_as_media_are_no_files(tmp_path: Path) -> None:
    write(tmp_path / "train" / "0.png", png(0))
    write(tmp_path / "train" / "metadata.jsonl", json.dumps({"file_name": "0.png", "audio": "none", "video": 3}))
    (item,) = read_items(str(tmp_path), Columns(), ())
    assert (set(item.hashes), item.problem) == ({"image"}, "")


def test_rows_that_differ_in_a_second_file_are_refused(tmp_path: Path) -> None:
    for name, data in (("0.png", png(0)), ("0.wav", wav(0)), ("1.wav", wav(1))):
        write(tmp_path / name, data)
    write_csv(tmp_path / "train.csv", [{"image": "0.png", "audio": f"{number}.wav"} for number in range(2)])
    with pytest.raises(ValueError, match=r"train/0\.png is listed twice"):
        read_items(str(tmp_path / "train.csv"), Columns(), ())


def test_an_item_may_gain_a_medium_and_captions_but_not_lose() -> None:
    def item(captions: tuple[str, ...] = (), **hashes: bytes) -> Item:
        return Item(
            id="train/0", split="train", hashes={name: data * 32 for name, data in hashes.items()}, captions=captions
        )  # type: ignore[misc]

    table = TableBuilder(None, ("{}",))
    table.add(item(image=b"a"))
    grown = TableBuilder(table.build(), ("{}",))
    assert grown.add(item(("a cat",), image=b"a", audio=b"b"))
    rows = grown.build().rows
    assert [rows[name].tolist() for name in ("image", "audio", "video")] == [[0], [0], [-1]]
    for other in (
        item(("a cat",), image=b"a"),
        item(("a cat",), image=b"c", audio=b"b"),
        item((), image=b"a", audio=b"b"),
    ):
        builder = TableBuilder(grown.build(), ("{}",))
        builder.add(other)
        with pytest.raises(CacheError, match="have changed"):
            builder.build()


@pytest.fixture
def config(tmp_path: Path, tiny_model: Callable[[str], Path]) -> ExtractConfig:
    """Photos and texts of the three items, to be extracted with two tiny encoders."""
    return replace(tiny_config(tmp_path, tiny_model, train=1), data=as_jsonl(tmp_path / "several"))


def digests(cache: str) -> dict[str, str]:
    files = (path for path in Path(cache).rglob("*") if path.is_file())
    return {str(path.relative_to(cache)): hashlib.sha256(path.read_bytes()).hexdigest() for path in files}


def test_a_third_modality_writes_only_its_own_arrays(
    config: ExtractConfig, tiny_model: Callable[[str], Path], capsys: pytest.CaptureFixture[str]
) -> None:
    before = digests(extract(config))
    sounds = replace(config, encoder={"audio": str(tiny_model("whisper"))}, layers={})
    extract(replace(sounds, plan=True))
    printed = capsys.readouterr().out
    assert "2 of 2 distinct inputs to encode" in printed
    assert "dinov2" not in printed
    assert digests(config.cache) == before
    after = digests(extract(sounds))
    key = open_cache(config.cache).encoder("audio").key
    assert {name for name in after if after[name] != before.get(name)} == {
        "zarr.json",
        *(name for name in after if name.startswith(f"encoders/{key}/")),
    }
    assert after.keys() >= before.keys()
    cache = open_cache(config.cache)
    assert {name: rows.tolist() for name, rows in cache.table.rows.items()} == {
        "image": [0, 1, -1],
        "audio": [0, -1, 1],
        "video": [-1, -1, -1],
    }
    described = inspect_cache(InspectConfig(cache=config.cache))
    assert "split train: 3 items, 0 unreadable; 1 with audio, 1 with image, 1 with image + audio" in described


def test_media_added_to_the_data_keep_the_old_arrays(config: ExtractConfig, tiny_model: Callable[[str], Path]) -> None:
    table = Path(config.data) / "train" / "metadata.jsonl"
    whole = [json.loads(line) for line in table.read_text().splitlines()][:2]
    write(table, "\n".join(json.dumps({key: one[key] for key in ("image", "caption")}) for one in whole))
    before = digests(extract(config))
    write(table, "\n".join(map(json.dumps, whole)))
    after = digests(extract(replace(config, encoder={"audio": str(tiny_model("whisper"))}, layers={})))
    changed = {name for name, digest in before.items() if after.get(name) != digest}
    assert not any(name.startswith("encoders/") for name in changed)
    assert open_cache(config.cache).table.rows["audio"].tolist() == [0, -1]


def test_repair_restores_an_item_with_several_media(config: ExtractConfig, tiny_model: Callable[[str], Path]) -> None:
    extract(replace(config, encoder={**config.encoder, "audio": str(tiny_model("whisper"))}, layers={}))
    before = digests(config.cache)
    key = open_cache(config.cache).encoder("audio").key
    for name in before:
        if name.startswith(f"encoders/{key}/hidden_states/3/c/"):
            (Path(config.cache) / name).write_bytes(b"damaged")
    report = repair(RepairConfig(cache=config.cache))
    assert (len(report.restored), report.left) == (1, [])
    assert digests(config.cache) == before


def test_one_cache_has_runs_of_each_gallery(tmp_path: Path) -> None:
    path = make_several_cache(tmp_path / "several.zarr", {"train": 60, "dev": 20}, classes=4, lacks=7)
    config, cache, found = TrainConfig(cache=path, out="", fusion="linear"), open_cache(path), {}
    for gallery in ("auto", "image", "audio"):
        found[gallery] = resolve_run(replace(config, gallery=gallery), cache)
        modality = "audio" if gallery == "audio" else "image"
        assert found[gallery].shape.hidden_size == WIDTHS[modality]
        assert len(training_pairs(found[gallery], cache).training) == 60 - 9
    assert found["auto"] == found["image"]
    with pytest.raises(CacheError, match="holds no video encoder"):
        resolve_run(replace(config, gallery="video"), cache)
