"""A dataset format is one module and one entry of the registry: one is added on the fly, and extracted from."""

from __future__ import annotations

import zipfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import pytest
from extraction_cases import tiny_config

from saffe_cache.extraction.config import ExtractConfig
from saffe_cache.extraction.extract import extract
from saffe_cache.sources import registry
from saffe_cache.sources.items import Columns, Format, SourceItem
from saffe_cache.store.reader import open_cache


@dataclass(frozen=True)
class ZipMember:
    """Media in an archive."""

    archive: str
    name: str

    def read(self) -> bytes:
        with zipfile.ZipFile(self.archive) as archive:
            return archive.read(self.name)


def zip_items(data: str, columns: Columns) -> Iterator[SourceItem]:
    with zipfile.ZipFile(data) as archive:
        for name in sorted(one for one in archive.namelist() if one.endswith(".png")):
            split, _, stem = name.removesuffix(".png").partition("/")
            texts = archive.read(f"{split}/{stem}.txt").decode().splitlines()
            yield SourceItem(id=name, split=split, media={"image": ZipMember(data, name)}, captions=tuple(texts))


ZIP_OF_PAIRS = Format(
    layout="a zip with SPLIT/NAME.png and SPLIT/NAME.txt",
    recognises=lambda data: data.endswith(".pairs"),
    read_items=zip_items,
)


@pytest.fixture
def folder_config(tmp_path: Path, tiny_model: Callable[[str], Path]) -> ExtractConfig:
    return tiny_config(tmp_path, tiny_model, train=5)


@pytest.fixture
def zip_config(folder_config: ExtractConfig, tmp_path: Path) -> ExtractConfig:
    """The same photos and captions in an archive."""
    target = tmp_path / "photos.pairs"
    with zipfile.ZipFile(target, "w") as archive:
        for item in registry.read_items(folder_config.data, Columns(), ()):
            archive.writestr(item.id, item.media["image"].read())
            archive.writestr(item.id.replace(".png", ".txt"), "\n".join(item.captions))
    return replace(folder_config, data=str(target), cache=str(tmp_path / "from-zip.zarr"))


@pytest.mark.slow
def test_new_format_extracts_as_a_folder_does(
    folder_config: ExtractConfig, zip_config: ExtractConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(registry, "FORMATS", (ZIP_OF_PAIRS, *registry.FORMATS))
    expected, found = open_cache(extract(folder_config)), open_cache(extract(zip_config))
    assert found.table.ids == expected.table.ids
    for key, encoder in expected.encoders.items():
        for name, array in encoder.manifest.arrays.items():
            rows = np.arange(array.rows)
            stored = found.encoders[key].array(name).read_stored(rows)
            np.testing.assert_array_equal(stored, encoder.array(name).read_stored(rows))
    assert extract(replace(zip_config, max_items={"train": 2})) == zip_config.cache  # and a second run adds nothing


def test_unknown_data_names_every_format(zip_config: ExtractConfig) -> None:
    with pytest.raises(ValueError, match=r"photos\.pairs: found no dataset, expected .*save_to_disk; or .*folders"):
        extract(zip_config)
