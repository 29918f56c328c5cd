"""Sounds on the page: hits and queries are players of what the data hold, also beside photos."""

from __future__ import annotations

import base64
import io
import json
import re
import sys
import wave
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest
from browser import browsing, find_browser
from extraction_cases import draw
from quick_runs import report_of
from report_cases import make_page
from tiny_models import WORDS

from saffe_cache.core.features import Modality, spoken_of
from saffe_cache.core.results import read_report
from saffe_cache.evaluation.details import read_details
from saffe_cache.extraction.config import ExtractConfig
from saffe_cache.extraction.extract import extract
from saffe_cache.report.gallery import SAMPLING_RATE, SECONDS
from saffe_cache.studies.bridge.bridge import bridge
from saffe_cache.studies.bridge.config import BridgeConfig
from saffe_cache.studies.bridge.result import BridgeResult
from saffe_cache.training.config import TrainConfig
from saffe_cache.training.train import train

soundfile = pytest.importorskip("soundfile")

PLAYER = re.compile(r'<audio [^>]*src="data:audio/wav;base64,([^"]+)" aria-label="[^:"]*: ([^,"]+),')


class Made(NamedTuple):
    """Of items that have a photo, a sound and a caption: an evaluation of sounds, and a bridge between both media."""

    evaluation: str
    bridge: str


def samples_of(number: int) -> np.ndarray:
    """int16; those of the first item are longer than a page plays."""
    size = (SECONDS + 1) * SAMPLING_RATE if number == 0 else 2000 + 100 * number
    return np.random.default_rng(number).integers(-(2**15), 2**15, size).astype(np.int16)


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory, tiny_model: Callable[[str], Path]) -> Made:
    folder = tmp_path_factory.mktemp("sounds")
    lines = []
    for number in range(40):
        draw(folder / f"{number}.png", number)
        soundfile.write(folder / f"{number}.wav", samples_of(number), SAMPLING_RATE)
        files = {"image": f"{number}.png", "audio": f"{number}.wav"}
        split, caption = "dev" if number < 10 else "train", f"{WORDS[number]} {WORDS[number - 1]}"
        lines.append(json.dumps({**files, "split": split, "caption": caption}))
    data = folder / "items.jsonl"
    data.write_text("\n".join(lines))
    encoders = {"image": "dinov2", "audio": "whisper", "text": "bert"}
    cache = extract(
        ExtractConfig(
            data=str(data),
            cache=str(folder / "cache.zarr"),
            encoder={medium: str(tiny_model(name)) for medium, name in encoders.items()},
            layers={"image": (3,), "audio": (3,), "text": (3,)},
            device="cpu",
        )
    )
    options: dict[str, Any] = {"fusion": "ridge", "log": ("none",), "device": "cpu"}
    runs = [
        train(TrainConfig(cache=cache, out=str(folder / medium), gallery=medium, **options))
        for medium in ("image", "audio")
    ]
    evaluation = report_of(cache, runs[1], split="dev", baselines="all")["out"]
    config = BridgeConfig(cache=cache, run=tuple(runs), split="dev", out=str(folder / "bridge"), device="cpu")
    return Made(evaluation, bridge(config))


def test_hits_play_the_samples_of_their_files(made: Made, tmp_path: Path) -> None:
    page = make_page([made.evaluation], tmp_path / "page")
    players = {name: base64.b64decode(content) for content, name in PLAYER.findall(page)}
    assert set(players) == {f"dev/{number}.png" for number in range(10)}  # an item's id is the name of its first file
    for name, content in players.items():
        with wave.open(io.BytesIO(content)) as sound:
            assert (sound.getnchannels(), sound.getsampwidth(), sound.getframerate()) == (1, 2, SAMPLING_RATE)
            played = np.frombuffer(sound.readframes(sound.getnframes()), "<i2")
        np.testing.assert_array_equal(played, samples_of(int(Path(name).stem))[: SECONDS * SAMPLING_RATE])
    assert page.count("data:audio/wav") == 10  # a sound that is found again leads to its player
    assert set(re.findall(r'<a href="#(sound-\d+)"', page)) <= set(re.findall(r'<audio [^>]*id="(sound-\d+)"', page))
    assert "media-src data:" in page


@pytest.mark.parametrize(
    ("text", "medium", "expected"),
    [
        ("Photos search a photo's texts", "audio", "Sounds search a sound's texts"),
        ("A photo of a photographer, photos_shuffled", "audio", "A sound of a photographer, photos_shuffled"),
        ("a photo and another photo", "media", "an item and another item"),
        ("the vectors of an image-text model", "video", "the vectors of a video-text model"),
        ("an image-text model's image protocol", "image", "an image-text model's image protocol"),
    ],
)
def test_texts_about_photos_are_put_into_words_of_a_medium(text: str, medium: Modality, expected: str) -> None:
    assert spoken_of(text, medium) == expected


def test_reports_of_sounds_speak_of_sounds(made: Made, tmp_path: Path) -> None:
    trained, evaluated = (read_report(folder) for folder in (Path(made.evaluation).parent, made.evaluation))
    page = re.sub(r"<style>.*?</style>", "", make_page([made.evaluation], tmp_path / "page"), flags=re.DOTALL)
    for text in (trained, evaluated, *re.findall(">([^<]+)<", page)):
        assert not re.search(r"\b[Pp]hotos?\b", text), text
    assert "sounds: 30 to train on, 10 to validate on" in trained
    assert "10 sounds, 10 queries" in evaluated
    assert "ridge: ridge regression from sound features" in evaluated


def test_sounds_that_cannot_be_read_have_a_reason(made: Made, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "soundfile", None)
    page = make_page([made.evaluation], tmp_path / "page")
    assert "<audio" not in page
    assert re.search(r"not shown: Reading sounds needs the package soundfile", page)
    assert "10 of the 10 sounds of its gallery are not shown: Reading sounds needs the package soundfile" in page


def test_bridge_shows_what_each_medium_finds(made: Made, tmp_path: Path) -> None:
    result = BridgeResult.load(made.bridge)
    for direction in result.directions:
        details = read_details(Path(made.bridge) / direction.folder)
        for name, system in details.systems.items():
            assert system.metric.mean() == pytest.approx(direction.systems[name]["map"].value)
            for query, asking in enumerate(details.asking):
                found = [details.photo_ids[place] == details.photo_ids[asking] for place in system.first[query]]
                assert system.is_relevant[query].tolist() == found
                assert sum(found) == 1  # the gallery has ten items, all of which are kept
    page = make_page([made.bridge], tmp_path / "page")
    assert len(re.findall(r"url\(data:image/jpeg", page)) == 10
    cards = re.findall(r'<article class="card".*?</article>', page, re.DOTALL)
    asking = [card for card in cards if ": a sound</h4>" in card]
    assert len(cards) == 2 * len(asking) == 20
    assert all(len(PLAYER.findall(card)) == 1 for card in asking)  # the query; its hits are photos
    others = [name for card in cards if card not in asking for _, name in PLAYER.findall(card)]
    assert sorted(others) == [f"dev/{number}.png" for number in range(10)]  # each once
    for title in ("image to audio", "audio to image"):
        assert f"What single queries find, {title}</h3>" in page
    assert "Query 1: a sound" in page
    assert "Query 1: a photo" in page
    assert (tmp_path / "page" / "data" / "bridge-1-queries-2.csv").exists()


@pytest.mark.skipif(find_browser() is None, reason="no chromium or chrome is installed")
def test_a_browser_plays_them_on_a_phone(made: Made, tmp_path: Path) -> None:
    make_page([made.bridge], tmp_path / "page")
    with browsing(tmp_path) as opened:
        opened.open(tmp_path / "page" / "index.html", 360)
        opened.run("document.querySelectorAll('details').forEach(one => { one.open = true })")
        opened.wait("[...document.querySelectorAll('audio')].every(one => one.readyState > 0 && one.duration > 0.2)")
        assert opened.run("document.querySelectorAll('audio').length") == 20
        assert opened.run("document.documentElement.scrollWidth") <= 360
        assert opened.complaints == []
