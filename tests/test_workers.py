"""One extraction by several processes: ranges, claims, the plan, deaths and takeovers."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from extraction_cases import draw, dying_behind, files_of, make_captioned, tiny_config
from hypothesis import given, settings
from hypothesis import strategies as st
from s3_server import BUCKET, S3Proxy
from store_cases import verify

from saffe_cache.core.atomic_io import FolderInUseError
from saffe_cache.core.features import CacheError
from saffe_cache.core.items import Inputs
from saffe_cache.extraction import shared_plan
from saffe_cache.extraction.config import ExtractConfig, encode_options
from saffe_cache.extraction.extract import extract
from saffe_cache.extraction.planning import Job, cut_blocks
from saffe_cache.extraction.ranges import blocks_for, cut_ranges, missing_rows, owned_rows
from saffe_cache.extraction.shared_plan import finish_work, plan_work
from saffe_cache.extraction.workers import Worker
from saffe_cache.store import claims
from saffe_cache.store.claims import Claims, Holder, Watch, held_cache
from saffe_cache.store.config import StatusConfig
from saffe_cache.store.layout import ArraySpec, ShardEntry
from saffe_cache.store.manifest import ArrayManifest
from saffe_cache.store.reader import open_cache
from saffe_cache.store.storage import Storage
from saffe_cache.store.work import cache_status, read_plan

TinyModel = Callable[[str], Path]


# ranges


@st.composite
def jobs(draw: st.DrawFn) -> Job:
    """Arrays of rows per input and per token, some shards of which are committed."""
    lengths = draw(st.lists(st.integers(0, 9), min_size=1, max_size=60))
    offsets = np.concatenate([[0], np.cumsum(lengths)]).astype(np.int64)
    finished = draw(st.integers(0, len(lengths) - 1))
    specs = {
        name: ArraySpec(
            row_shape=(2,), dtype="float32", dimension_names=("image", "x"), shard_rows=draw(st.integers(1, 12))
        )
        for name in ("hidden_states/1", "hidden_states/2", "pooled")
    }
    manifest = SimpleNamespace(
        arrays={name: ArrayManifest(spec) for name, spec in specs.items()}, finished_rows=finished
    )
    options = encode_options(
        ExtractConfig(data="", cache="", encoder={"image": "x"}, batch_size=draw(st.integers(1, 7)))
    )
    job = Job(
        encoder=SimpleNamespace(num_tokens=None),  # type: ignore[arg-type]
        manifest=manifest,  # type: ignore[arg-type]
        options=options,
        inputs=Inputs(np.zeros((len(lengths), 32), np.uint8)),
        is_wanted=np.ones(len(lengths), bool),
        name_of=str,
        offsets=offsets,
    )
    for name, spec in specs.items():
        rows = job.first_row(name, len(lengths))
        job.arrays[name] = spec, rows
        for index in range(-(-rows // spec.shard_rows)):
            full = min(spec.shard_rows, rows - index * spec.shard_rows)
            held = min(full, job.first_row(name, finished) - index * spec.shard_rows)
            if draw(st.integers(0, 3)) == 0:
                held = full
            if held > 0:
                manifest.arrays[name].commit(index, entry(held))
    firsts = [job.input_of(name, job.rows_of(name)) for name in job.missing]
    job.start = min(firsts, default=len(lengths)) // job.block_rows * job.block_rows
    return job


def entry(rows: int) -> ShardEntry:
    return ShardEntry(rows=rows, crc32c=0)


@settings(deadline=None, max_examples=300)
@given(jobs(), st.integers(1, 4))
def test_every_missing_shard_has_one_owner_whose_blocks_hold_it(job: Job, num_workers: int) -> None:
    edges = cut_ranges(job, num_workers)
    ranges = [range(first, stop) for first, stop in pairwise(edges)]
    assert edges[0] == 0
    assert edges[-1] == job.num_inputs
    assert all(len(one) for one in ranges)
    for name, (spec, num_rows) in job.arrays.items():
        owned = [row for inputs in ranges for row in owned_rows(job, name, inputs)]
        assert owned == list(range(num_rows))
        assert all(
            owned_rows(job, name, inputs).start % spec.shard_rows == 0
            for inputs in ranges
            if owned_rows(job, name, inputs)
        )
    for inputs in ranges:
        rows = missing_rows(job, inputs)
        blocks = blocks_for(job, job.start, rows)
        assert all(block in list(cut_blocks(job.start, job.num_inputs, job.block_rows)) for block in blocks)
        encoded = {number for block in blocks for number in block}
        for name, part in rows.items():
            assert {job.input_of(name, row) for row in part} <= encoded
            assert set(absent_rows(job, name)) & set(owned_rows(job, name, inputs)) <= set(part)


def absent_rows(job: Job, name: str) -> Iterator[int]:
    """Rows that no committed shard has."""
    spec, num_rows = job.arrays[name]
    array = job.manifest.arrays[name]
    held = dict(enumerate(array.shards)) | array.later
    for row in range(num_rows):
        index, within = divmod(row, spec.shard_rows)
        if index not in held or within >= held[index].rows:
            yield row


# claims


def test_one_of_many_claimants_wins(tmp_path: Path) -> None:
    storage, won = Storage(tmp_path), []
    barrier = threading.Barrier(8)

    def claim(number: int) -> None:
        mine = Claims(storage, "claims", f"claimant {number}")
        barrier.wait()
        if (found := mine.take("7")) is not None:
            won.append(found)

    threads = [threading.Thread(target=claim, args=(number,)) for number in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(won) == 1
    won[0].release()


def leave_claim(storage: Storage, name: str, **changes: Any) -> Holder:
    """A claim as another process would leave it."""
    holder = replace(Holder.current("another"), at=time.time(), **changes)
    storage.write(name, holder.to_bytes())
    return holder


def test_claim_of_a_dead_process_is_taken_over_once(tmp_path: Path) -> None:
    storage = Storage(tmp_path)
    ended = subprocess.Popen([sys.executable, "-c", ""])
    ended.wait()
    leave_claim(storage, "claims/7.0", pid=ended.pid)
    claim = Claims(storage, "claims", "a").take("7")
    assert claim is not None
    assert claim.name == "claims/7.1"
    assert Claims(storage, "claims", "b").take("7") is None
    claim.release()


def test_process_id_of_a_later_process_is_no_sign_of_life(tmp_path: Path) -> None:
    leave_claim(Storage(tmp_path), "claims/7.0", started="1")
    claim = Claims(Storage(tmp_path), "claims", "a").take("7")
    assert claim is not None
    claim.release()


def test_claim_elsewhere_is_dead_when_its_counter_stands(tmp_path: Path) -> None:
    storage, now = Storage(tmp_path), [0.0]
    watching = Claims(storage, "claims", "a", clock=lambda: now[0])
    holder = leave_claim(storage, "claims/7.0", machine="elsewhere", pid=1)
    for now[0] in (0.0, 30.0, 59.0):
        assert watching.take("7") is None
    storage.write("claims/7.0", replace(holder, counter=1).to_bytes())
    for now[0] in (60.0, 119.0):
        assert watching.take("7") is None
    now[0] = 120.0
    claim = watching.take("7")
    assert claim is not None
    claim.release()


def test_holder_notices_that_it_was_taken_over(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(claims, "HEARTBEAT_SECONDS", 0.02)
    storage = Storage(tmp_path)
    claim = Claims(storage, "claims", "a").take("7")
    assert claim is not None
    deadline = time.monotonic() + 10
    while Watch(storage).look(claim.name)[0].counter < 2:  # type: ignore[union-attr]
        assert time.monotonic() < deadline
    assert not claim.is_lost
    leave_claim(storage, "claims/7.1")
    while not claim.is_lost:
        assert time.monotonic() < deadline
        time.sleep(0.01)
    claim.release()


def test_range_that_failed_is_free_at_once(tmp_path: Path) -> None:
    board = Claims(Storage(tmp_path), "claims", "a")
    first = board.take("7")
    assert first is not None
    first.give_up("no memory")
    second = board.take("7")
    assert second is not None
    second.release()


def test_writers_behind_a_url_exclude_each_other() -> None:
    storage = Storage("memory://leases")
    with held_cache(storage), pytest.raises(FolderInUseError, match="another process is writing"), held_cache(storage):
        pass
    with (
        held_cache(storage, shared=True),
        held_cache(storage, shared=True),
        pytest.raises(FolderInUseError),
        held_cache(storage),
    ):
        pass
    leave_claim(storage, "writers/writer-dead", started="1")
    with held_cache(storage):
        assert len(storage.list("writers")) == 1
    assert storage.list("writers") == []


def test_workers_and_a_writer_exclude_each_other(tmp_path: Path) -> None:
    storage = Storage(tmp_path)
    with held_cache(storage, shared=True), held_cache(storage, shared=True):
        storage.write("left", b"")
        (tmp_path / ".x.partial").write_bytes(b"")
        with pytest.raises(FolderInUseError), held_cache(storage):
            pass
    assert sorted(path.name for path in tmp_path.iterdir()) == ["left"]
    with held_cache(storage), pytest.raises(FolderInUseError), held_cache(storage, shared=True):
        pass


# in one process


@pytest.fixture
def config(tmp_path: Path, tiny_model: TinyModel) -> ExtractConfig:
    """Five ranges of photos, and one of texts."""
    return replace(tiny_config(tmp_path, tiny_model, train=300), shard_mb=0)


def alone(config: ExtractConfig) -> ExtractConfig:
    """The same, in one process and another cache."""
    return replace(config, cache=f"{config.cache}.alone", rank=None, world_size=None)


def ranked(config: ExtractConfig, rank: int, world_size: int = 4) -> ExtractConfig:
    return replace(config, rank=rank, world_size=world_size)


def manifests(cache: str) -> dict[str, Any]:
    """All manifests, without the times in their histories."""
    found = {}
    for path in sorted(Path(cache).rglob("zarr.json")):
        content = (
            json.loads(path.read_text())["attributes"].get("saffe_cache", {})
            if "attributes" in path.read_text()
            else {}
        )
        for one in content.get("history", []):
            one.pop("seconds", None)
            one.pop("limit", None)
            one["config"] |= {"cache": "", "max_invalid": 0}
        found[path.relative_to(cache).as_posix()] = content
    return found


def assert_equal_to_one_process(config: ExtractConfig) -> None:
    extract(alone(config))
    expected = files_of(alone(config).cache)
    found = files_of(config.cache)
    assert [name for name in expected | found if expected.get(name) != found.get(name)] == []
    assert manifests(config.cache) == manifests(alone(config).cache)
    assert verify(config.cache)[1] == []


def test_workers_in_turn_equal_one_process(config: ExtractConfig) -> None:
    plan = plan_work(config)
    assert plan is not None
    assert len(plan.pieces) == 6
    assert read_plan(Storage(config.cache)) == plan
    with (
        Worker(ranked(config, 2), "a", shows_progress=False) as one,
        Worker(ranked(config, 1), "b", shows_progress=False) as two,
    ):
        assert [one.run(4), one.run(4)][1] is None
        while (done := two.run_free()) is not None:
            assert done.num_inputs > 0
            one.run_free()
        assert one.is_finished
    with (
        pytest.raises(FolderInUseError),
        held_cache(Storage(config.cache), shared=True),
        held_cache(Storage(config.cache)),
    ):
        pass
    finish_work(config)
    finish_work(config)
    assert plan_work(config) is None
    assert_equal_to_one_process(config)


def test_new_items_and_layers_by_workers_equal_one_process(config: ExtractConfig) -> None:
    data = Path(config.data)
    first = replace(config, layers={"image": (3,), "text": (3,)}, max_items={"train": 130})
    for one in (first, alone(first)):
        extract(one)
    lines = (data / "train" / "metadata.jsonl").read_text()
    draw(data / "train" / "new.png", 5)
    added = json.dumps({"file_name": "new.png", "captions": ["word1 word2"]})
    (data / "train" / "metadata.jsonl").write_text(f"{lines}\n{added}")
    extract(ranked(config, 0))
    assert_equal_to_one_process(config)


def test_texts_in_several_ranges_equal_one_process(config: ExtractConfig) -> None:
    entry = {"file_name": "000.png", "captions": [f"word{n % 40} word{n // 40} {n}" for n in range(3500)]}
    (Path(config.data) / "dev" / "metadata.jsonl").write_text(json.dumps(entry))
    texts = replace(config, encoder={"text": config.encoder["text"]}, layers={"text": (1, 3)}, splits=("dev",))
    plan = plan_work(texts, num_workers=4)
    assert plan is not None
    assert len(plan.pieces) > 2
    with Worker(texts, "a", shows_progress=False) as worker:
        for number in reversed(range(worker.num_ranges)):
            worker.run(number)
    extract(ranked(texts, 1))
    assert_equal_to_one_process(texts)


def test_worker_that_fails_leaves_its_range_to_others(config: ExtractConfig) -> None:
    plan = plan_work(config)
    assert plan is not None
    with dying_behind(20), Worker(ranked(config, 0), "rank 0", shows_progress=False) as worker:
        worker.run_all()
    state = cache_status(StatusConfig(cache=config.cache))
    image, text = state.encoders
    assert (image.done, image.free, [one.state for one in image.begun]) == (1, 3, ["dead"])
    assert (text.done, text.free) == (0, 1)
    assert "ranges: 1 done, 0 running, 0 failed, 1 dead, 3 free" in str(state)
    assert json.loads(str(cache_status(StatusConfig(cache=config.cache, json=True))))["encoders"][0]["done"] == 1
    extract(ranked(config, 1))
    assert_equal_to_one_process(config)
    assert "no shared work" in str(cache_status(StatusConfig(cache=config.cache)))
    assert not (Path(config.cache) / "work").exists()


def test_single_process_goes_on_without_the_workers(config: ExtractConfig) -> None:
    plan = plan_work(config)
    assert plan is not None
    with Worker(config, "a", shows_progress=False) as worker:
        worker.run(1)
        worker.run(3)
    extract(config)
    assert not (Path(config.cache) / "work").exists()
    assert_equal_to_one_process(config)


def test_rank_that_finishes_an_old_plan_encodes_what_is_new_too(config: ExtractConfig) -> None:
    photos = replace(config, encoder={"image": config.encoder["image"]}, layers={"image": (3,)})
    plan_work(photos)
    data = Path(config.data)
    draw(data / "train" / "new.png", 5)
    with (data / "train" / "metadata.jsonl").open("a") as file:
        file.write("\n" + json.dumps({"file_name": "new.png", "captions": ["word1 word2"]}))
    extract(ranked(replace(config, layers={"image": (3,)}), 1))
    cache = open_cache(config.cache)
    assert sorted(one.manifest.modality for one in cache.encoders.values()) == ["image", "text"]
    assert any("new" in one for one in cache.table.ids)
    assert all(
        one.manifest.finished_rows == len(cache.table.inputs[one.manifest.modality]) for one in cache.encoders.values()
    )
    assert not (Path(config.cache) / "work").exists()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"batch_size": 8}, "--batch-size is 8, the plan says 4"),
        ({"layers": {"image": (3,), "text": (3,)}}, "--layers is .*, the plan says"),
        ({"storage": "float16"}, "--storage is 'float16', the plan says 'float32'"),
        ({"prompt": "a {}"}, "--prompt is"),
    ],
)
def test_options_that_give_other_bytes_are_refused(config: ExtractConfig, changes: Any, message: str) -> None:
    plan_work(config)
    with pytest.raises(CacheError, match=message), Worker(replace(ranked(config, 1), **changes), "rank 1"):
        pass


def test_other_encoder_or_less_data_is_refused(config: ExtractConfig, tmp_path: Path, tiny_model: TinyModel) -> None:
    plan_work(config)
    other = replace(ranked(config, 1), encoder={**config.encoder, "image": str(tiny_model("vit"))})
    with (
        Worker(other, "rank 1", shows_progress=False) as worker,
        pytest.raises(CacheError, match="its encoder is image-"),
    ):
        worker.run(0)
    less = replace(ranked(config, 1), data=str(make_captioned(tmp_path / "less", {"train": 20})))
    with Worker(less, "rank 1", shows_progress=False) as worker, pytest.raises(CacheError, match="not among --data"):
        worker.run(0)


def test_file_that_changed_after_the_plan_is_refused(config: ExtractConfig) -> None:
    plan_work(config)
    draw(Path(config.data) / "train" / "000.png", 77)
    with Worker(config, "a", shows_progress=False) as worker, pytest.raises(OSError, match=r"train/000.* changed"):
        worker.run_all()


def test_objects_streams_and_half_a_rank_are_refused(config: ExtractConfig) -> None:
    with pytest.raises(ValueError, match="--rank"):
        replace(config, rank=1)
    with pytest.raises(ValueError, match="--rank"):
        ranked(config, 4)
    with pytest.raises(ValueError, match="--streaming"):
        replace(ranked(config, 1), streaming=True)
    with pytest.raises(ValueError, match="--data"):
        extract(replace(ranked(config, 1), data=[("x.png", "a")]))


def test_too_many_unreadable_files_stop_the_workers(config: ExtractConfig) -> None:
    for number in range(12):
        path = Path(config.data) / "train" / f"{number:03}.png"
        path.write_bytes(path.read_bytes()[:60] + bytes([number]))
    with pytest.raises(CacheError, match="--max-invalid"):
        extract(ranked(config, 0))
    state = cache_status(StatusConfig(cache=config.cache))
    assert [one.state for one in state.encoders[0].begun] == ["failed"]
    allowed = replace(config, max_invalid=0.1)
    extract(ranked(allowed, 0))
    assert_equal_to_one_process(allowed)


def test_those_who_wait_hear_why_planning_failed(
    config: ExtractConfig, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("INFO")
    monkeypatch.setattr(shared_plan, "POLL_SECONDS", 0.01)
    storage = Storage(config.cache)
    claim = Claims(storage, "work/planning", "rank 0").take("plan")
    assert claim is not None
    heard: list[str] = []

    def wait() -> None:
        try:
            plan_work(config)
        except CacheError as error:
            heard.append(str(error))

    thread = threading.Thread(target=wait)
    thread.start()
    deadline = time.monotonic() + 30
    while "waiting for the plan of rank 0" not in caplog.text:
        assert time.monotonic() < deadline
        time.sleep(0.01)
    claim.give_up("the disk is full")
    thread.join()
    assert "rank 0" in heard[0]
    assert "could not plan the extraction: the disk is full" in heard[0]
    assert plan_work(config) is not None


# processes

RANK = """
import os, signal, sys, time
import saffe_cache.extraction.workers
from saffe_cache.cli import extract_command
from saffe_cache.store.reader import open_cache
from saffe_cache.store.storage import Storage

log, die_at, arguments = open(sys.argv[1], "a"), int(sys.argv[2]), sys.argv[3:]
write, count = Storage.write, 0
print("ready", flush=True)
sys.stdin.readline()

def counted(self, name, *parts):
    global count
    if "/c/" in name and ("/hidden_states/" in name or "/pooled/" in name):
        count += 1
        if count == die_at:
            os.kill(os.getpid(), signal.SIGKILL)
        log.write(name + "\\n")
        log.flush()
        time.sleep(0.2)  # so that all processes find something to do
    write(self, name, *parts)

Storage.write = counted
sys.exit(extract_command(arguments))
"""


def start_rank(config: ExtractConfig, log: Path, rank: int, die_at: int = 0) -> subprocess.Popen[bytes]:
    """A process with this rank, which waits for a line, and kills itself before it writes its `die_at`th shard."""
    arguments = ["--data", config.data, "--cache", config.cache, "--storage", "float32", "--batch-size", "4"]
    arguments += ["--shard-mb", "0", "--device", "cpu", "--rank", str(rank), "--world-size", "4"]
    for modality, one in config.encoder.items():
        layers = ",".join(map(str, config.layers[modality]))
        arguments += ["--encoder", f"{modality}={one}", "--layers", f"{modality}={layers}"]
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[1])}
    script = [sys.executable, "-c", RANK, str(log), str(die_at), *arguments]
    return subprocess.Popen(script, env=environment, stdin=subprocess.PIPE, stdout=subprocess.PIPE)


def go(process: subprocess.Popen[bytes]) -> None:
    """Let a process begin as soon as it is ready."""
    assert process.stdout is not None
    assert process.stdin is not None
    assert process.stdout.readline() == b"ready\n"
    process.stdin.write(b"\n")
    process.stdin.flush()


@pytest.mark.slow
def test_killed_restarted_and_doubled_ranks_equal_one_process(config: ExtractConfig, tmp_path: Path) -> None:
    """Rank 0 is killed at its third shard and started again; rank 1 is started twice, and the last one never."""
    logs = [tmp_path / f"{number}.log" for number in range(5)]
    killed, again, *others = [
        start_rank(config, log, rank, die_at=3 * (number == 0))
        for number, (log, rank) in enumerate(zip(logs, (0, 0, 1, 1, 2), strict=True))
    ]
    go(killed)
    deadline = time.monotonic() + 60
    while not (Path(config.cache) / "work" / "plan.json").exists():
        assert time.monotonic() < deadline
        time.sleep(0.01)
    for process in others:
        go(process)
    assert killed.wait(120) == -signal.SIGKILL
    go(again)
    for process in (again, *others):
        process.communicate(timeout=120)
        assert process.returncode == 0
    written = [log.read_text().split() for log in logs]
    assert all(len(names) for names in written[2:]), "every process wrote something"
    twice = [name for name, count in Counter(name for names in written for name in names).items() if count > 1]
    assert set(twice) <= set(written[0]), "only what the killed process had not recorded"
    assert len(twice) <= 2
    assert_equal_to_one_process(config)
    assert not (Path(config.cache) / "work").exists()


@pytest.mark.slow
def test_ranks_on_an_object_store_equal_one_process(config: ExtractConfig, s3: S3Proxy, tmp_path: Path) -> None:
    """The rank that made the plan is killed at its third shard, and two others do the rest."""
    shared = replace(config, cache=f"s3://{BUCKET}/ranks.zarr")
    logs = [tmp_path / f"{number}.log" for number in range(3)]
    killed, again, other = [
        start_rank(shared, log, rank, die_at=die_at)
        for log, rank, die_at in zip(logs, (1, 0, 2), (3, 0, 0), strict=True)
    ]
    go(killed)
    assert killed.wait(120) == -signal.SIGKILL
    go(again)
    go(other)
    for process in (again, other):
        process.communicate(timeout=120)
        assert process.returncode == 0
    extract(alone(config))
    storage, expected = Storage(shared.cache), files_of(alone(config).cache)
    assert {name: storage.read(name) for name in expected} == expected
    assert storage.list("work") == storage.list("writers") == []
    written = [name for log in logs for name in log.read_text().split()]
    twice = {name for name, count in Counter(written).items() if count > 1}
    assert twice <= set(logs[0].read_text().split())
    assert verify(shared.cache)[1] == []
