"""Batches ahead of the encoder: threads and processes, a device that lags behind, and workers that die."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Mapping
from concurrent.futures import ProcessPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from extraction_cases import files_of, full_disk_from, make_captioned, tiny_config

from saffe_cache.core.features import CacheError
from saffe_cache.encoders.encoder import FrozenEncoder
from saffe_cache.encoders.transfers import Encoded, Launched
from saffe_cache.extraction import loading
from saffe_cache.extraction.config import ExtractConfig
from saffe_cache.extraction.extract import extract
from saffe_cache.sources.items import MediaFile
from saffe_cache.store.reader import open_cache

pytestmark = pytest.mark.slow

launch_for_real = FrozenEncoder.launch


@pytest.fixture
def config(tmp_path: Path, tiny_model: Callable[[str], Path]) -> ExtractConfig:
    return tiny_config(tmp_path, tiny_model)


class Late(Launched):
    """Reads its inputs and has its numbers no sooner than it is waited for, and some time after, as a GPU may."""

    def __init__(self, encoder: FrozenEncoder, inputs: Mapping[str, torch.Tensor]) -> None:
        self._encoder, self._inputs, self.num_bytes = encoder, inputs, 1
        self._launched: Launched | None = None

    def wait(self) -> None:
        time.sleep(0 if self._launched else 0.02)
        self._launched = self._launched or launch_for_real(self._encoder, self._inputs)

    def encoded(self) -> Encoded:
        self.wait()
        assert self._launched is not None
        return self._launched.encoded()


@pytest.mark.slow
@pytest.mark.parametrize("batch_size", [1, 2, 3])
def test_slow_device_gets_intact_inputs(
    config: ExtractConfig, monkeypatch: pytest.MonkeyPatch, batch_size: int
) -> None:
    """Workers may not fill a batch again before the device is through with it."""
    config = replace(config, batch_size=batch_size, batch_tokens=20, workers=1)  # a short ring, gone round often
    expected = files_of(extract(replace(config, cache=config.cache + ".whole")))
    monkeypatch.setattr(FrozenEncoder, "launch", lambda self, inputs: Late(self, inputs))
    assert files_of(extract(config)) == expected


@pytest.mark.slow
def test_processes_store_what_threads_store(config: ExtractConfig) -> None:
    """Also of a photo that is broken."""
    photo = Path(config.data) / "train" / "003.png"
    photo.write_bytes(photo.read_bytes()[:200])
    threads = replace(config, max_invalid=0.1, workers=2, decode_in="threads")
    processes = replace(threads, decode_in="processes", cache=config.cache + ".processes")
    assert files_of(extract(threads)) == files_of(extract(processes))
    invalid = [open_cache(one.cache).encoder("image").manifest.invalid for one in (threads, processes)]
    assert invalid[0] == invalid[1]
    assert len(invalid[0]) == 1


def test_beside_a_gpu_workers_are_processes(config: ExtractConfig) -> None:
    """Asked of what is chosen; nothing runs on a GPU here."""

    def chosen(decode_in: str, device: str) -> bool:
        job: Any = type("Job", (), {})()
        job.options = type("Options", (), {"decode_in": decode_in})
        job.encoder = type("Encoder", (), {"request": type("Request", (), {"device": device})})
        return loading.decodes_in_processes(job)

    assert chosen("auto", "cuda:1") == (sys.platform == "linux")
    assert not chosen("auto", "cpu")
    assert not chosen("threads", "cuda")
    assert chosen("processes", "cpu")


def test_dead_worker_is_reported_and_the_run_resumes(config: ExtractConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    processes = replace(config, decode_in="processes", workers=2, shard_mb=0)
    whole = extract(replace(processes, cache=config.cache + ".whole"))
    read = MediaFile.read
    parent = os.getpid()

    def dying(self: MediaFile) -> bytes:
        if os.getpid() != parent and self.path.endswith("015.png"):
            os.kill(os.getpid(), signal.SIGKILL)
        return read(self)

    monkeypatch.setattr(MediaFile, "read", dying)
    with pytest.raises(CacheError, match=r"a decoding process was killed.*fewer --workers"):
        extract(processes)
    monkeypatch.setattr(MediaFile, "read", read)
    assert files_of(extract(processes)) == files_of(whole)


def test_worker_found_dead_at_submission_is_reported(config: ExtractConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    """Rather than when its work is waited for."""
    submit, tasks = ProcessPoolExecutor.submit, []

    def late(self: ProcessPoolExecutor, *task: Any) -> Any:
        tasks.append(task)
        if len(tasks) == 5:
            for process in list(self._processes.values()):
                process.kill()
                process.join()
            while not self._broken:
                time.sleep(0.01)
        return submit(self, *task)

    monkeypatch.setattr(ProcessPoolExecutor, "submit", late)
    with pytest.raises(CacheError, match="a decoding process was killed"):
        extract(replace(config, decode_in="processes", workers=2))


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_workers_end_with_a_run_that_is_killed(config: ExtractConfig, tmp_path: Path) -> None:
    data = make_captioned(tmp_path / "many", {"train": 300})
    arguments = [
        *("--data", str(data), "--cache", config.cache, "--encoder", f"image={config.encoder['image']}"),
        *("--device", "cpu", "--decode-in", "processes", "--workers", "2", "--batch-size", "1", "--shard-mb", "0"),
    ]
    code = "import sys; from saffe_cache.cli import extract_command; sys.exit(extract_command())"
    process = subprocess.Popen([sys.executable, "-c", code, *arguments], stderr=subprocess.DEVNULL)
    children: list[int] = []
    while process.poll() is None and len(children) < 2:
        children = children_of(process.pid)
        time.sleep(0.01)
    process.kill()
    process.wait()
    assert len(children) == 2, "it ended before it could be killed: give it more photos"
    deadline = time.monotonic() + 60
    while any(is_running(child) for child in children) and time.monotonic() < deadline:
        time.sleep(0.01)
    assert not any(is_running(child) for child in children)


def children_of(pid: int) -> list[int]:
    try:
        return [int(child) for child in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]
    except FileNotFoundError:
        return []


def is_running(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False


def test_file_that_becomes_unreadable_ends_the_run(config: ExtractConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    """Not the photo's fault: nothing is recorded as invalid, and the run can be resumed."""
    read, reads = MediaFile.read, []

    def failing(self: MediaFile) -> bytes:
        reads.append(self)
        if len(reads) > 40:  # 26 are read for their hashes
            raise OSError(5, "Input/output error")
        return read(self)

    monkeypatch.setattr(MediaFile, "read", failing)
    with pytest.raises(OSError, match="Input/output error"):
        extract(config)
    monkeypatch.setattr(MediaFile, "read", read)
    assert open_cache(extract(config)).encoder("image").manifest.invalid == {}


@pytest.mark.slow
def test_full_disk_ends_the_run(config: ExtractConfig) -> None:
    small = replace(config, shard_mb=0)
    whole = extract(replace(small, cache=config.cache + ".whole"))
    with full_disk_from(11):
        extract(small)
    assert files_of(extract(small)) == files_of(whole)


def test_texts_are_batched_by_length_within_the_budget() -> None:
    token_ids = [[0] * length for length in (1, 2, 2, 5, 9, 30)]
    batches = list(loading.token_batches(range(6), token_ids, 10))
    assert batches == [[0, 1, 2], [3], [4], [5]]
