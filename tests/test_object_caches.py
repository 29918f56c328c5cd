"""Extraction to an S3 server, and training from it, while the server is slow, fails, and goes away."""

from __future__ import annotations

import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from extraction_cases import files_of, tiny_config
from s3_server import S3Proxy, url
from store_cases import convert, verify
from synthetic_cache import WIDTH, make_cache

from saffe_cache.cli import main
from saffe_cache.extraction.config import ExtractConfig
from saffe_cache.extraction.extract import extract
from saffe_cache.store.reader import open_cache
from saffe_cache.store.storage import Storage
from saffe_cache.training.config import TrainConfig
from saffe_cache.training.train import train


def files_behind(cache: str) -> dict[str, bytes]:
    """As `files_of` of a local cache."""
    storage = Storage(cache)
    names = [*storage.list("encoders"), *storage.list("tables")]
    return {name: storage.read(name) for name in names if not (name.startswith("encoders/") and name.count("/") == 2)}


@contextmanager
def away_after(s3: S3Proxy, requests: int, seconds: float | None) -> Iterator[list[int]]:
    """The server goes away at some request, and comes back after a time, if ever. Yields the number of times."""
    times: list[int] = []
    last, done = len(s3.requests) + requests, threading.Event()

    def watch() -> None:
        while not done.is_set() and len(s3.requests) < last:
            done.wait(0.002)
        if not done.is_set():
            s3.stop()
            times.append(len(s3.requests))
            if seconds is not None:
                done.wait(seconds)
                s3.start()

    thread = threading.Thread(target=watch)
    thread.start()
    try:
        yield times
    finally:
        done.set()
        thread.join()
        if not s3.is_up:
            s3.start()


@pytest.fixture
def config(tmp_path: Path, tiny_model: Callable[[str], Path]) -> ExtractConfig:
    return tiny_config(tmp_path, tiny_model, train=70)  # two shards of photos


@pytest.fixture
def local(config: ExtractConfig) -> dict[str, bytes]:
    return files_of(extract(config))


def test_bytes_equal_a_local_cache_while_requests_fail(
    s3: S3Proxy, config: ExtractConfig, local: dict[str, bytes], tmp_path: Path
) -> None:
    s3.share_failing, s3.latency_seconds = 0.05, 0.01
    assert files_behind(extract(replace(config, cache=url(tmp_path)))) == local
    assert verify(url(tmp_path))[1] == []
    assert len(open_cache(url(tmp_path)).table) == 76


def test_extraction_waits_for_a_server_that_comes_back(
    s3: S3Proxy, config: ExtractConfig, local: dict[str, bytes], tmp_path: Path
) -> None:
    with away_after(s3, 60, seconds=1.0) as times:
        extract(replace(config, cache=url(tmp_path)))
    assert len(times) == 1
    assert files_behind(url(tmp_path)) == local


def test_extraction_without_its_server_ends_and_resumes(
    s3: S3Proxy,
    config: ExtractConfig,
    local: dict[str, bytes],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setenv("SAFFE_RETRY_SECONDS", "0.5")
    for requests in (5, 40, 60):
        with away_after(s3, requests, seconds=None) as times:
            assert main(arguments(config, url(tmp_path))) == 1
        told = capfd.readouterr().err
        assert len(times) == 1
        assert "Traceback" not in told
        assert "Run the same command again to resume." in told.splitlines()[-1]
    assert main(arguments(config, url(tmp_path))) == 0
    assert files_behind(url(tmp_path)) == local


def arguments(config: ExtractConfig, cache: str) -> list[str]:
    """Of the command that this config is."""
    encoders = [f"--encoder={name}={path}" for name, path in config.encoder.items()]
    layers = [f"--layers={name}={','.join(map(str, chosen))}" for name, chosen in config.layers.items()]
    others = ["--storage=float32", "--batch-size=4", "--device=cpu"]
    return ["extract", f"--data={config.data}", f"--cache={cache}", *encoders, *layers, *others]


@pytest.mark.parametrize("verb", ["extract", "verify", "train"])
def test_refused_credentials_are_one_line(
    verb: str, s3: S3Proxy, config: ExtractConfig, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    s3.refuses = True
    given = {
        "extract": arguments(config, url(tmp_path)),
        "verify": ["cache", "verify", url(tmp_path)],
        "train": ["train", f"--cache={url(tmp_path)}", f"--out={tmp_path / 'run'}"],
    }[verb]
    assert main(given) == 1
    told = capfd.readouterr().err
    assert "Traceback" not in told
    assert "the store refuses access" in told.splitlines()[-1]


@pytest.mark.slow
def test_two_writers_never_both_win(s3: S3Proxy, config: ExtractConfig, tmp_path: Path) -> None:
    """Two processes that add other layers of the same encoders at the same time: nothing that one reports is lost."""
    s3.latency_seconds = 0.02
    given = {2: replace(config, layers={"image": (2,), "text": (1,)}), 3: replace(config, layers={"image": (3,)})}
    processes = {
        layer: subprocess.Popen(
            [sys.executable, "-m", "saffe_cache", *arguments(one, url(tmp_path))],
            stderr=subprocess.PIPE,
            text=True,
        )
        for layer, one in given.items()
    }
    told = {layer: process.communicate(timeout=300)[1] for layer, process in processes.items()}
    won = [layer for layer, process in processes.items() if process.returncode == 0]
    assert won, told
    assert set(won) <= set(open_cache(url(tmp_path)).encoder("image").layers)
    for layer in given.keys() - set(won):
        assert "Traceback" not in told[layer]
        assert "another process" in told[layer].splitlines()[-1]
        assert main(arguments(given[layer], url(tmp_path))) == 0
    assert open_cache(url(tmp_path)).encoder("image").layers == [2, 3]
    assert verify(url(tmp_path))[1] == []


@pytest.mark.slow
@pytest.mark.parametrize("compression", ["none", "zstd"])
def test_training_streamed_from_s3_equals_a_local_one(
    compression: Any, s3: S3Proxy, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    plain = make_cache(tmp_path / "plain", {"train": 200, "dev": 30}, captions=2, text_width=WIDTH, joint=True)
    convert(plain, tmp_path / "small", compression=compression, shard_mb=0)
    convert(plain, url(tmp_path), compression=compression, shard_mb=0)

    def trained(cache: str, name: str, **changes: Any) -> bytes:
        given: dict[str, Any] = {"epochs": 2, "batch_size": 32, "log": ("none",), "control_epochs": 1, "device": "cpu"}
        run = train(TrainConfig(cache=cache, out=str(tmp_path / name), **given, **changes))
        return (Path(run) / "model.safetensors").read_bytes()

    expected = trained(str(tmp_path / "small"), "local")
    s3.share_failing = 0.02
    before = len(s3.requests)
    assert trained(url(tmp_path), "streamed", residency="streamed") == expected
    during = len(s3.requests) - before
    with away_after(s3, during // 2, seconds=1.0) as times:
        assert trained(url(tmp_path), "outage", residency="streamed") == expected
    assert len(times) == 1
    monkeypatch.setenv("SAFFE_RETRY_SECONDS", "0.5")
    s3.share_failing = 0.0
    away = away_after(s3, during // 2, seconds=None)
    with away, pytest.raises(OSError, match="Run the same command again to resume"):
        trained(url(tmp_path), "resumed", residency="streamed")
    assert trained(url(tmp_path), "resumed", residency="streamed") == expected
