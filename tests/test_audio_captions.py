"""Tiny replicas of AudioCaps and Clotho in their own layouts."""

from __future__ import annotations

import logging
from pathlib import Path

import pytest
from data_forms import write, write_csv
from test_several_media import wav

from saffe_cache.sources.items import Columns
from saffe_cache.sources.registry import read_items


def audiocaps(folder: Path, names: dict[str, str]) -> Path:
    """Clips by path, and for each table its rows of (video, start, caption)."""
    tables = {
        "train": [
            ("aaaaaaaaaaa", 30, "a dog barks"),
            ("-bbbbbbbbb_", 0, "rain, and thunder"),
            ("ccccccccccc", 5, "gone"),
        ],
        "test": [("ddddddddddd", 10, f"caption {number}") for number in range(5)],
    }
    number = 0
    for split, rows in tables.items():
        found = []
        for video, start, caption in rows:
            number += 1
            found.append({"audiocap_id": number, "youtube_id": video, "start_time": start, "caption": caption})
        write_csv(folder / f"{split}.csv", found)
    for seed, name in enumerate(names):
        write(folder / name, wav(seed))
    return folder


LAYOUTS = {
    "with the start": ["train/aaaaaaaaaaa_30.wav", "train/-bbbbbbbbb__0.wav", "test/ddddddddddd_10.wav"],
    "with Y": ["audio/Yaaaaaaaaaaa.wav", "audio/Y-bbbbbbbbb_.wav", "audio/Yddddddddddd.wav"],
    "by id": ["train/1.flac", "train/2.flac", "test/6.flac"],
    "with the end": [
        "waveforms/aaaaaaaaaaa_30_40.wav",
        "waveforms/-bbbbbbbbb__0_10.wav",
        "waveforms/ddddddddddd_10_20.wav",
    ],
    "in milliseconds": ["train/aaaaaaaaaaa_30000.wav", "train/-bbbbbbbbb__0.wav", "test/ddddddddddd_10000.wav"],
}


@pytest.mark.parametrize("layout", LAYOUTS)
def test_audiocaps_joins_the_captions_of_a_clip(layout: str, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    data = audiocaps(tmp_path / "audiocaps", dict.fromkeys(LAYOUTS[layout], ""))
    with caplog.at_level(logging.WARNING):
        items = read_items(str(data), Columns(), ())
    assert {item.id: item.captions for item in items} == {
        "test/ddddddddddd_10": tuple(f"caption {number}" for number in range(5)),
        "train/aaaaaaaaaaa_30": ("a dog barks",),
        "train/-bbbbbbbbb__0": ("rain, and thunder",),
    }
    assert all(set(item.hashes) == {"audio"} and not item.problem for item in items)
    assert "train.csv: 2 of its 3 sounds have a file; they are split train." in caplog.text


def test_a_clip_of_another_split_is_not_taken(tmp_path: Path) -> None:
    data = audiocaps(tmp_path, dict.fromkeys(["train/6.wav", "train/1.wav", "test/1.wav"], ""))
    (item,) = read_items(str(data), Columns(), ())
    assert item.id == "train/aaaaaaaaaaa_30"
    assert str(item.media["audio"]).count("train/1.wav") == 1


def test_clotho_has_five_captions_a_sound(tmp_path: Path) -> None:
    for seed, (own, name) in enumerate((("development", "Rain on car.wav"), ("evaluation", "Ümlaut, a.wav"))):
        row = {"file_name": name} | {f"caption_{number}": f"{own} {number}" for number in range(1, 6)}
        write_csv(tmp_path / f"clotho_captions_{own}.csv", [row])
        write(tmp_path / own / name, wav(seed))
    write_csv(tmp_path / "clotho_metadata_development.csv", [{"file_name": "Rain on car.wav", "keywords": "rain"}])
    items = read_items(str(tmp_path), Columns(), ())
    assert [(item.id, item.split, len(item.captions)) for item in items] == [
        ("train/Rain on car.wav", "train", 5),
        ("test/Ümlaut, a.wav", "test", 5),
    ]
    assert items[0].captions[0] == "development 1"
    (one,) = read_items(str(tmp_path / "clotho_captions_evaluation.csv"), Columns(), ())
    assert one.id == items[1].id
