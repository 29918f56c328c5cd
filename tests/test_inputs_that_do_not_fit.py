"""Inputs that an encoder cannot take as they are: truncated and equal texts, short sounds, failing processors."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from extraction_cases import make_captioned, tiny_config
from store_cases import describe
from tiny_models import WORDS, load_tiny

from saffe_cache.core.features import CacheError
from saffe_cache.encoders.encoder import FrozenEncoder
from saffe_cache.extraction.config import ExtractConfig
from saffe_cache.extraction.extract import extract
from saffe_cache.store.reader import open_cache

soundfile = pytest.importorskip("soundfile")

Models = Callable[[str], Path]


def captioned(folder: Path, captions: list[str]) -> Path:
    """Photos of one split with one caption each."""
    make_captioned(folder, {"train": len(captions)})
    lines = [{"file_name": f"{number:03}.png", "caption": text} for number, text in enumerate(captions)]
    (folder / "train" / "metadata.jsonl").write_text("\n".join(map(json.dumps, lines)))
    return folder


@pytest.fixture
def config(tmp_path: Path, tiny_model: Models) -> ExtractConfig:
    return tiny_config(tmp_path, tiny_model, train=1)


# Texts


@pytest.mark.parametrize("name", ["bert", "gpt2", "clip-text"])
def test_only_texts_beyond_the_limit_are_counted(name: str, tiny_model: Models) -> None:
    encoder = load_tiny(name, tiny_model(name), max_length=6)
    texts = [" ".join(WORDS[:count]) for count in (1, 3, 4, 5, 30)]
    ids = encoder.tokenize(texts)
    assert [len(one) for one in ids] == [3, 5, 6, 6, 6]
    assert encoder.count_truncated(texts, ids) == 2
    assert encoder.count_truncated(texts[:3], ids[:3]) == 0


def test_truncated_texts_are_logged_kept_and_shown(
    config: ExtractConfig, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    texts = [f"word1 word2 word3 word{i}" for i in range(6)]
    config = replace(config, data=str(captioned(tmp_path / "long", texts)), max_length=5)
    cache = open_cache(extract(config))
    key = cache.encoder("text").manifest.key
    assert f"{key}: 6 of 6 texts are longer than 5 tokens and are truncated" in caplog.text
    assert [entry["truncated"] for entry in cache.encoder("text").manifest.extractions] == [6]
    assert "6 texts are longer than 5 tokens and were truncated" in describe(config.cache)
    assert f"{key}, split train: 6 of 6 distinct texts have the same tokens" in caplog.text
    whole = replace(config, max_length=None, cache=config.cache + ".2")
    caplog.clear()
    assert "were truncated" not in describe(extract(whole))
    assert "texts" not in caplog.text


def test_counts_of_truncated_texts_include_earlier_ones(config: ExtractConfig, tmp_path: Path) -> None:
    texts = [f"word1 word2 word3 word{i}" for i in range(6)]
    config = replace(config, data=str(captioned(tmp_path / "few", texts[:4])), max_length=5)
    extract(config)
    extract(replace(config, data=str(captioned(tmp_path / "more", [*texts, "word1"]))))
    cache = open_cache(extract(replace(config, layers={"text": (0, 1, 2)})))
    assert [entry["truncated"] for entry in cache.encoder("text").manifest.extractions] == [4, 6, 6]


def test_only_new_texts_are_tokenized(config: ExtractConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    texts = [f"word1 word2 word{i}" for i in range(6)]
    config = replace(config, data=str(captioned(tmp_path / "few", texts[:4])))
    extract(config)
    tokenized, tokenize = list[str](), FrozenEncoder.tokenize

    def counted(encoder: FrozenEncoder, texts: Sequence[str]) -> list[list[int]]:
        tokenized.extend(texts)
        return tokenize(encoder, texts)

    monkeypatch.setattr(FrozenEncoder, "tokenize", counted)
    extract(config)
    assert not set(tokenized) & set(texts)
    extract(replace(config, data=str(captioned(tmp_path / "more", texts))))
    assert set(tokenized) & set(texts) == set(texts[4:])


def test_other_tokens_than_planned_end_the_run(
    config: ExtractConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = replace(config, data=str(captioned(tmp_path / "few", ["word1 word2", "word1"])), layers={"text": (1,)})
    extract(config)
    tokenize = FrozenEncoder.tokenize
    monkeypatch.setattr(FrozenEncoder, "tokenize", lambda *given: [ids[:3] for ids in tokenize(*given)])
    with pytest.raises(CacheError, match=r"text 0 has 3 tokens, expected 4 as in the cache\. Install the library"):
        extract(replace(config, layers={"text": (0, 1)}))


@pytest.mark.parametrize(("num_equal", "warns"), [(2, False), (3, True)])
def test_texts_that_share_their_vector_are_counted(
    num_equal: int, warns: bool, config: ExtractConfig, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """Unknown words become one token. 2 of 40 are 5 %, which is still allowed."""
    known = [f"word{i} word{i + 1}" for i in range(39)] + ["word5 word9"]
    texts = [f"unknown{i}" for i in range(num_equal)] + known[num_equal:]
    extract(replace(config, data=str(captioned(tmp_path / "equal", texts))))
    assert (f"split train: {num_equal} of 40 distinct texts have the same tokens" in caplog.text) == warns


# Photos and sounds


def sounds(folder: Path, waveforms: list[np.ndarray]) -> Path:
    for number, waveform in enumerate(waveforms):
        path = folder / "train" / f"class{number % 2}" / f"{number}.wav"
        path.parent.mkdir(parents=True, exist_ok=True)
        soundfile.write(path, waveform, 16_000)
    return folder


def noise(samples: int, seed: int = 0) -> np.ndarray:
    return 0.1 * np.random.default_rng(seed).standard_normal(samples)


@pytest.mark.parametrize("name", ["whisper", "ast"])
def test_sound_without_one_frame_is_invalid(
    name: str, config: ExtractConfig, tmp_path: Path, tiny_model: Models
) -> None:
    data = sounds(tmp_path / "sounds", [noise(160), noise(399), noise(400), noise(4000)])
    config = replace(config, data=str(data), encoder={"audio": str(tiny_model(name))}, layers={})
    with pytest.raises(CacheError, match=r"2 of 4 inputs are unreadable.*the sound has \d+ samples, expected 400 or"):
        extract(config)
    cache = open_cache(extract(replace(config, max_invalid=0.5)))
    encoder = cache.encoder("audio")
    assert encoder.usable(cache.table.rows["audio"]).sum() == 2
    assert sorted(encoder.manifest.invalid.values()) == [
        f"ValueError: the sound has {count} samples, expected 400 or more, one window of a spectrum"
        for count in (160, 399)
    ]


@pytest.mark.parametrize("error", [AssertionError("odd"), IndexError("odd"), RuntimeError("odd"), ZeroDivisionError()])
def test_any_error_of_one_input_makes_it_invalid(
    error: Exception, config: ExtractConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    prepare, calls = FrozenEncoder.prepare_into, []

    def fails_once(self: FrozenEncoder, raw: Any, out: Any) -> None:
        calls.append(raw)
        if len(calls) == 2:
            raise error
        prepare(self, raw, out)

    monkeypatch.setattr(FrozenEncoder, "prepare_into", fails_once)
    config = replace(config, data=str(make_captioned(tmp_path / "photos", {"train": 5})), decode_in="threads")
    cache = open_cache(extract(replace(config, max_invalid=0.2)))
    assert list(cache.encoder("image").manifest.invalid.values()) == [f"{type(error).__name__}: {error}"]
    calls.clear()
    with pytest.raises(CacheError, match=r"1 of 5 inputs are unreadable, more than --max-invalid 0\.1"):
        extract(replace(config, max_invalid=0.1, cache=config.cache + ".2"))


def test_channels_of_opposite_phase_do_not_cancel_out(tmp_path: Path) -> None:
    from saffe_cache.sources.decoding import decode

    one = noise(4000)
    for left, right, expected in [(one, -one, one), (0.5 * one, -0.51 * one, -0.51 * one), (one, 0 * one, one / 2)]:
        soundfile.write(tmp_path / "stereo.wav", np.stack([left, right], axis=1), 16_000)
        found = decode("audio", (tmp_path / "stereo.wav").read_bytes(), 16_000)
        np.testing.assert_allclose(found, expected, atol=1e-4)
