"""What an extraction says of where its time went."""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from extraction_cases import full_disk_from, tiny_config

from saffe_cache.encoders.encoder import FrozenEncoder
from saffe_cache.encoders.transfers import Launched
from saffe_cache.extraction.config import ExtractConfig
from saffe_cache.extraction.encoding import Seconds
from saffe_cache.extraction.extract import extract
from saffe_cache.sources.items import MediaFile
from saffe_cache.store.reader import open_cache
from saffe_cache.store.writer import _ArrayWriter

PAUSE = 0.1
"""Seconds, many times what a batch of tiny models takes."""


@pytest.fixture
def config(tmp_path: Path, tiny_model: Callable[[str], Path]) -> ExtractConfig:
    config = tiny_config(tmp_path, tiny_model)
    return replace(config, encoder={"image": config.encoder["image"]}, layers={}, workers=1)


def slow_down(monkeypatch: pytest.MonkeyPatch, owner: type, name: str) -> None:
    """Let each call of a method take a while longer."""
    method = getattr(owner, name)

    def slowly(self: Any, *arguments: Any) -> Any:
        time.sleep(PAUSE)
        return method(self, *arguments)

    monkeypatch.setattr(owner, name, slowly)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("owner", "method", "limit", "words"),
    [
        (MediaFile, "read", "data", "Reading and decoding limited the speed: use more --workers"),
        (FrozenEncoder, "launch", "encoding", "The encoder limited the speed"),
        (Launched, "wait", "encoding", "The encoder limited the speed"),
        (_ArrayWriter, "append", "writer", "Writing limited the speed: use a faster disk"),
    ],
)
def test_bottleneck_is_found_and_logged(
    config: ExtractConfig,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
    owner: type,
    method: str,
    limit: str,
    words: str,
) -> None:
    slow_down(monkeypatch, owner, method)
    caplog.set_level("INFO")
    extract(replace(config, shard_mb=0))
    assert words in caplog.text
    (entry,) = open_cache(config.cache).encoder("image").manifest.history
    assert entry["limit"] == limit
    seconds = entry["seconds"]
    waited = [seconds[name] for name in ("waiting_for_data", "encoding", "waiting_for_writer")]
    assert PAUSE < max(waited) <= sum(waited) <= seconds["total"]
    assert seconds["writing"] >= (PAUSE if limit == "writer" else 0)


def test_seconds_add_up_also_when_something_fails() -> None:
    seconds = Seconds()

    def fail() -> None:
        with seconds.spent_on("encoding"):
            time.sleep(0.001)
            raise KeyError

    for _ in range(2):
        with pytest.raises(KeyError):
            fail()
    assert seconds.encoding >= 0.002
    assert seconds.limit == "encoding"
    assert json.loads(json.dumps(seconds.to_json())).keys() == vars(seconds).keys()
    assert Seconds(waiting_for_data=2, encoding=1, writing=9).limit == "data"
    assert Seconds(waiting_for_writer=2, encoding=1, total=9).limit == "writer"


def test_resumed_extraction_logs_its_own_part(tmp_path: Path, tiny_model: Callable[[str], Path]) -> None:
    config = tiny_config(tmp_path / "more", tiny_model, train=80)
    small = replace(config, encoder={"image": config.encoder["image"]}, layers={}, shard_mb=0)
    with full_disk_from(72):
        extract(small)
    extract(small)
    (entry,) = open_cache(config.cache).encoder("image").manifest.history
    assert entry["inputs"] == [64, 86]
