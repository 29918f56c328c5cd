"""Datasets that are odd but not wrong, from the photos and captions to a training: what comes out, or what is said."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import transformers
from extraction_cases import draw, tiny_config
from PIL import Image
from quick_runs import quick_train
from store_cases import verify

from saffe_cache.core.features import CacheError
from saffe_cache.extraction.config import ExtractConfig
from saffe_cache.extraction.extract import extract
from saffe_cache.store.reader import open_cache


@pytest.fixture
def config(tmp_path: Path, tiny_model: Callable[[str], Path]) -> ExtractConfig:
    """Of an empty folder of data."""
    made = tiny_config(tmp_path, tiny_model, train=1)
    return replace(made, data=str(tmp_path / "odd"))


def write_items(config: ExtractConfig, *entries: dict[str, object]) -> None:
    """One photo each."""
    split_dir = Path(config.data) / "train"
    for number, _ in enumerate(entries):
        draw(split_dir / f"{number}.png", number)
    lines = [json.dumps({"file_name": f"{number}.png", **entry}) for number, entry in enumerate(entries)]
    (split_dir / "metadata.jsonl").write_text("\n".join(lines))


STRANGE = {
    "10,000 words": " ".join(["word7"] * 10_000),
    "lone surrogate": "word7 \ud800 word9",
    "control characters": "word7 \0 \x1b[2J \x07 word9",
    "right to left": "שלום \u202e עולם",
    "no letters": "👩🏽‍🚀 …",
    "no spaces": "日本語の説明",
}


def test_strange_captions_are_encoded_and_kept(config: ExtractConfig) -> None:
    write_items(config, *({"caption": text} for text in STRANGE.values()))
    cache = open_cache(extract(config))
    assert cache.table.inputs["text"].texts == tuple(STRANGE.values())
    text = cache.encoder("text")
    assert not text.manifest.invalid
    assert text.usable(np.arange(len(STRANGE))).all()
    assert np.isfinite(text.vectors(np.arange(len(STRANGE)))).all()
    assert np.diff(text.offsets).max() < 300, "a text is cut at what the model allows"
    assert verify(config.cache)[1] == []


def test_dataset_of_one_item_is_extracted_but_not_trained_on(config: ExtractConfig, tmp_path: Path) -> None:
    write_items(config, {"caption": "word7"})
    extract(config)
    assert len(open_cache(config.cache).table) == 1
    with pytest.raises(ValueError, match=r"1 pairs are too few to hold out 10%\. Use more data"):
        quick_train(config.cache, tmp_path / "run", fusion="linear")


def test_dataset_without_texts_has_photos_only(config: ExtractConfig, tmp_path: Path) -> None:
    write_items(config, {}, {}, {})
    with pytest.raises(
        ValueError, match=r"the data has no text inputs; its columns are file_name\. Name one with --col"
    ):
        extract(config)
    extract(replace(config, encoder={"image": config.encoder["image"]}, layers={}))
    assert len(open_cache(config.cache).encoder("image").usable(np.arange(3))) == 3
    with pytest.raises(CacheError, match=r"it holds no text encoder\. Add one: saffe extract --encoder text="):
        quick_train(config.cache, tmp_path / "run", fusion="linear")


def test_one_class_trains_without_any_ranking(config: ExtractConfig, tmp_path: Path) -> None:
    write_items(config, *({"label": "cat"} for _ in range(6)))
    extract(config)
    assert open_cache(config.cache).table.class_names == ("cat",)
    run = Path(quick_train(config.cache, tmp_path / "run", fusion="linear", epochs=1, control_epochs=0))
    assert json.loads((run / "result.json").read_text())["train_photos"] == 5


def test_a_caption_that_is_empty_counts_as_unreadable(config: ExtractConfig) -> None:
    write_items(config, {"caption": "word7"}, {"caption": " "})
    with pytest.raises(CacheError, match=r"1 of 2 items are unreadable.*train/1\.png: empty caption or label"):
        extract(config)


def test_moved_revision_is_reported_as_second_encoder(
    config: ExtractConfig, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """The commit that the hub names is part of what an encoder is known by."""
    write_items(config, {"caption": "word7"}, {"caption": "word9"})
    load = transformers.Dinov2Model.from_pretrained

    def moved_to(commit: str, *given: Any, **options: Any) -> Any:
        model, info = load(*given, **options)
        model.config._commit_hash = commit
        return model, info

    for commit in ("a" * 40, "b" * 40):
        monkeypatch.setattr(transformers.Dinov2Model, "from_pretrained", partial(moved_to, commit))
        extract(replace(config, encoder={"image": config.encoder["image"]}, layers={}))
    assert f"same model with other settings (revision: '{'b' * 40}' != '{'a' * 40}'); a second group" in caplog.text
    with pytest.raises(CacheError, match=r"2 image encoders; it holds .* Choose one with --encoder image="):
        open_cache(config.cache).encoder("image")


@pytest.mark.parametrize("decode_in", ["threads", pytest.param("processes", marks=pytest.mark.slow)])
def test_low_grey_is_counted_and_can_be_scaled(
    decode_in: str, config: ExtractConfig, caplog: pytest.LogCaptureFixture
) -> None:
    """Photos of 12 bits in 16, as cameras write them, are nearly black unless their range is said."""
    config = replace(config, decode_in=decode_in)
    write_items(config, {"text": "word1"}, {"text": "word2"}, {"text": "word3"})
    values = np.random.default_rng(0).integers(0, 4096, (40, 30), dtype=np.uint16)
    Image.fromarray(values).save(Path(config.data) / "train" / "1.png")
    whole = open_cache(extract(config)).encoder("image")
    assert "1 grey pictures with 16 bits have no value above 4095" in caplog.text
    assert "the first is train/1.png. Say it with --grey-bits" in caplog.text
    caplog.clear()
    said = open_cache(extract(replace(config, grey_bits=12, cache=config.cache + "-12"))).encoder("image")
    assert "16 bits" not in caplog.text
    eight = Image.fromarray(((values.astype(np.uint32) * 510 + 4095) // 8190).astype(np.uint8))
    eight.save(Path(config.data) / "train" / "1.png")
    scaled = open_cache(extract(replace(config, cache=config.cache + "-8"))).encoder("image")
    rows = np.arange(3)
    assert sorted(map(tuple, said.vectors(rows))) == sorted(map(tuple, scaled.vectors(rows)))
    assert sorted(map(tuple, said.vectors(rows))) != sorted(map(tuple, whole.vectors(rows)))
    assert said.key != whole.key
