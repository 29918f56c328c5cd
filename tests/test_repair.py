"""A damaged cache is made again from the data and the encoder, as far as these are what they were."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import pytest
import torch
from extraction_cases import draw, dying_behind, files_of, make_captioned, tiny_config
from store_cases import flip, memory_folder, verify

from saffe_cache.cli import main
from saffe_cache.core.atomic_io import FolderInUseError
from saffe_cache.core.features import CacheError
from saffe_cache.encoders.encoder import FrozenEncoder
from saffe_cache.encoders.transfers import Launched
from saffe_cache.extraction.config import ExtractConfig, RepairConfig
from saffe_cache.extraction.extract import extract
from saffe_cache.extraction.reencode import LostShard, past_extractions
from saffe_cache.extraction.repair import RepairReport, repair
from saffe_cache.store.inspect import Damage
from saffe_cache.store.manifest import read_encoder
from saffe_cache.store.reader import open_cache
from saffe_cache.store.storage import Storage

pytestmark = pytest.mark.usefixtures("no_fsync")


@dataclass(frozen=True)
class Damaged:
    """A copy of a cache, to be damaged and repaired."""

    path: Path
    data: Path
    files: dict[str, bytes]
    """Of the sound cache."""

    def find(self, pattern: str) -> list[Path]:
        """Files of the encoders."""
        found = sorted(path for path in self.path.glob(f"encoders/{pattern}") if path.is_file())
        assert found, pattern
        return found

    def flip(self, pattern: str, position: int = 5) -> None:
        for path in self.find(pattern):
            flip(path, position)

    def repair(self, **options: object) -> RepairReport:
        return repair(RepairConfig(cache=str(self.path), **options))  # type: ignore[arg-type]

    def check_whole(self) -> None:
        assert files_of(str(self.path)) == self.files
        assert verify(self.path)[1] == []


@pytest.fixture(scope="module")
def grown(tiny_model: Callable[[str], Path]) -> Iterator[tuple[Path, Path]]:
    """A cache with a past, and its data.

    Three encoders, of which one came later; photos and texts that were added in the midst of a batch and of a shard; a
    layer that was added after that, in other batches.
    """
    with memory_folder() as folder:
        first = replace(tiny_config(folder, tiny_model, train=129), shard_mb=0)
        extract(first)
        make_captioned(folder / "data", {"more": 8})
        extract(first)
        extract(replace(first, layers={"image": (1,), "text": (0,)}, batch_size=7, batch_tokens=300))
        make_captioned(folder / "data", {"latest": 3})
        extract(replace(first, batch_size=5))
        extract(
            replace(first, encoder={"image": str(tiny_model("vit"))}, layers={}, storage="int8", compression="zstd")
        )
        yield Path(first.cache), folder / "data"


@pytest.fixture
def cache(grown: tuple[Path, Path]) -> Iterator[Damaged]:
    """The data are a copy as well, at another place."""
    with memory_folder() as folder:
        shutil.copytree(grown[0], folder / "cache.zarr")
        shutil.copytree(grown[1], folder / "data")
        yield Damaged(folder / "cache.zarr", folder / "data", files_of(str(grown[0])))


def cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-70_000] or b"x")


@pytest.mark.slow
@pytest.mark.parametrize("damage", [Path.unlink, cut, lambda path: flip(path, 5), lambda path: flip(path, -20)])
def test_every_shard_is_restored_byte_for_byte(cache: Damaged, damage: Callable[[Path], None]) -> None:
    """All shards of all encoders at once: full ones, tails, and those that were made by several extractions."""
    arrays = ("hidden_states/*", "pooled", "offsets")
    shards = [path for array in arrays for path in cache.find(f"*/{array}/c/**/*")]
    for path in shards:
        damage(path)
    report = cache.repair()
    assert len(report.restored) == len(shards)
    assert not report.rounded
    assert not report.left
    cache.check_whole()


def test_intact_parts_are_neither_encoded_nor_written(cache: Damaged, monkeypatch: pytest.MonkeyPatch) -> None:
    """One photo's batch for one tail shard; no layer behind the one that is damaged."""
    [shard] = cache.find("image-tiny-dinov2*/hidden_states/1/c/2/0/0")
    flip(shard, 5)
    before = {path: path.stat().st_ino for path in cache.path.rglob("*") if path.is_file() and path != shard}
    encoded: list[int] = []
    selected: list[tuple[tuple[int, ...], bool]] = []
    launch = FrozenEncoder.launch

    def counting(self: FrozenEncoder, inputs: dict[str, torch.Tensor]) -> Launched:
        encoded.append(len(next(iter(inputs.values()))))
        selected.append((self.layers, self._with_vectors))
        return launch(self, inputs)

    monkeypatch.setattr(FrozenEncoder, "launch", counting)
    cache.repair()
    assert {path: path.stat().st_ino for path in before} == before
    assert set(selected) == {((1,), False)}
    assert sum(encoded) == 7 + 7 + 3 + 3  # inputs 126…142 in sevens, then 143…145 in fives from 143 on
    cache.check_whole()


def test_blocks_and_metadata_are_restored(cache: Damaged) -> None:
    """Weights, their checksums, whole folders, and what other programs read of the arrays."""
    cache.flip("image-tiny-dinov2*/blocks/2/query_weight/c/0/0")
    cache.find("text-*/blocks/1/mlp_in_bias/c/0")[0].unlink()
    cache.find("image-tiny-vit*/blocks/2/zarr.json")[0].write_text("{}")
    cache.find("text-*/offsets/zarr.json")[0].unlink()
    cache.find("image-tiny-vit*/hidden_states/2/zarr.json")[0].write_text("[]")
    shutil.rmtree(cache.find("image-tiny-dinov2*/hidden_states/zarr.json")[0].parent)
    shutil.rmtree(cache.find("text-*/blocks/zarr.json")[0].parent)
    report = cache.repair()
    assert not report.left
    cache.check_whole()
    assert cache.find("text-*/blocks/zarr.json")
    assert cache.repair().restored == []


def test_damaged_index_needs_no_data_and_no_encoder(cache: Damaged, tmp_path: Path) -> None:
    cache.flip("image-tiny-dinov2*/hidden_states/3/c/1/0/0", -10)
    assert not cache.repair(data=(str(tmp_path / "none"),), encoder={"image": str(tmp_path / "none")}).left
    cache.check_whole()


@pytest.mark.parametrize("dies_at", [3, *(pytest.param(number, marks=pytest.mark.slow) for number in (0, 9))])
def test_killed_repair_is_finished_by_the_next_one(cache: Damaged, dies_at: int) -> None:
    cache.flip("*/hidden_states/*/c/1/0*")
    cache.flip("*/hidden_states/*/c/1/0/0")
    cache.flip("*/blocks/2/query_weight/c/0/0")
    damaged = len(verify(cache.path)[1])
    with dying_behind(dies_at):
        cache.repair()
    left = len(verify(cache.path)[1])
    assert left < damaged
    assert len(cache.repair().restored) == left
    cache.check_whole()


def nudge(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let photos come out in other last bits, as on another machine."""
    launch = FrozenEncoder.launch

    def nudged(self: FrozenEncoder, inputs: dict[str, torch.Tensor]) -> Launched:
        encoded = launch(self, inputs).encoded()
        states = {i: torch.from_numpy(values * np.float32(1 + 1e-6)) for i, values in encoded.states.items()}
        vectors = {name: torch.from_numpy(values) for name, values in encoded.vectors.items()}
        return Launched(states, vectors, encoded.lengths, None)

    monkeypatch.setattr(FrozenEncoder, "launch", nudged)


def test_rounding_differences_are_reported_and_recorded(cache: Damaged, monkeypatch: pytest.MonkeyPatch) -> None:
    [shard] = cache.find("image-tiny-dinov2*/hidden_states/3/c/1/0/0")
    before = open_cache(cache.path).encoder("image", "dinov2").array("hidden_states/3").read(np.arange(140))
    flip(shard, 5)
    cache.flip("image-tiny-dinov2*/pooled/c/1/0")
    nudge(monkeypatch)
    report = cache.repair()
    assert "hidden_states/3, shard 1: restored within rounding, not byte for byte: its checksum" in report.rounded[0]
    assert [len(report.restored), len(report.rounded), len(report.left)] == [1, 1, 0]
    assert verify(cache.path)[1] == []
    image = open_cache(cache.path).encoder("image", "dinov2")
    np.testing.assert_allclose(image.array("hidden_states/3").read(np.arange(140)), before, rtol=1e-5)
    assert shard.read_bytes() != cache.files[shard.relative_to(cache.path).as_posix()]
    assert image.manifest.history[-1]["repaired"] == [f"{image.key}: hidden_states/3, shard 1"]
    past = past_extractions(image.manifest)
    monkeypatch.undo()
    flip(shard, 5)
    assert len(cache.repair().rounded) == 1  # and back: the history still tells which inputs go together
    assert len(past) == len(past_extractions(read_encoder(Storage(cache.path), image.key))) == 4
    assert files_of(str(cache.path)) == cache.files


def test_kill_between_shard_and_manifest_leaves_damage(cache: Damaged, monkeypatch: pytest.MonkeyPatch) -> None:
    cache.flip("image-tiny-dinov2*/hidden_states/3/c/1/0/0")
    nudge(monkeypatch)
    write = Storage.write
    written = []

    def noted(self: Storage, name: str, *parts: bytes) -> None:
        written.append(name)
        write(self, name, *parts)

    def dying(self: Storage, name: str, *_: bytes) -> None:
        written.append(name)
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(Storage, "write", noted)
        patch.setattr(Storage, "replace", dying)
        with pytest.raises(KeyboardInterrupt):
            cache.repair()
    assert [name.split("/")[-1] for name in written] == ["0", "zarr.json"]
    [problem] = verify(cache.path)[1]
    assert "hidden_states/3/c/1/0/0: its rows differ" in problem
    assert len(cache.repair().rounded) == 1
    assert verify(cache.path)[1] == []


def test_missing_files_are_named_and_the_rest_repaired(cache: Damaged, capsys: pytest.CaptureFixture[str]) -> None:
    """Photo 10 and 11 lie in shard 0, 70 in shard 1; a caption needs no file."""
    (cache.data / "train" / "010.png").unlink()
    draw(cache.data / "train" / "011.png", 4321)
    cache.flip("image-tiny-dinov2*/hidden_states/*/c/[01]/0/0")
    cache.flip("text-*/hidden_states/0/c/0/0")
    moved = ["--data", str(cache.data)]
    table = open_cache(cache.path).table
    order = table.rows["image"][[table.ids.index(f"train/{number:03}.png") for number in (10, 11, 70)]] // 64
    assert order.tolist() == [0, 0, 1], "the dev split comes first"
    assert main(["cache", "repair", str(cache.path), *moved]) == 1
    lines = capsys.readouterr().out.splitlines()
    assert sum("shard 0: damaged and not repaired" in line for line in lines) == 3
    for line in (line for line in lines if "not repaired" in line):
        assert "train/010.png: unreadable image: No such file" in line
        assert "train/011.png: the file has changed since it was extracted" in line
        assert "--data" in line
    assert lines[-1].endswith("7 damaged, 4 repaired, 3 not")
    problems = verify(cache.path)[1]
    assert len(problems) == 3
    assert all(re.search(r"dinov2.*/c/0/0/0: its rows differ.*saffe cache repair", problem) for problem in problems)
    for name in ("010.png", "011.png"):
        (cache.data / "train" / name).write_bytes(Path(str(cache.data)).joinpath("train", "012.png").read_bytes())
    assert main(["cache", "repair", str(cache.path)]) == 0  # the recorded place has them still
    cache.check_whole()


def test_moved_data_and_encoder_are_named(
    cache: Damaged, tiny_model: Callable[[str], Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for path in cache.path.glob("encoders/*/zarr.json"):
        content = json.loads(path.read_bytes())
        for entry in content["attributes"]["saffe_cache"]["history"]:
            entry["config"] |= {"data": "/nowhere/data", "encoder": {"image": "/nowhere/x", "text": "/nowhere/y"}}
        path.write_text(json.dumps(content))
    cache.flip("image-tiny-dinov2*/hidden_states/2/c/0/0/0")
    cache.flip("text-*/pooled/c/0/0")
    assert all("image encoder /nowhere/x: found no model" in line for line in cache.repair().left[:1])
    models = {name: tmp_path / f"tiny-{name}" for name in ("dinov2", "bert", "vit")}
    for name, path in models.items():
        shutil.copytree(tiny_model(name), path)
    encoder = {"image": str(models["dinov2"]), "text": str(models["bert"])}
    [left] = cache.repair(encoder=encoder).left
    assert "--data /nowhere/data: found no dataset" in left
    [left] = cache.repair(encoder={"image": str(models["vit"])}, data=(str(cache.data),)).left
    assert re.search(r"tiny-vit is not the encoder of the cache \(.*model_id: 'tiny-vit' != 'tiny-dinov2'", left)
    with pytest.raises(ValueError, match="--encoder: found smell=…"):
        cache.repair(encoder={"smell": "x"})
    key = open_cache(cache.path).encoder("image", "dinov2").key
    assert not cache.repair(encoder={"image": "/nowhere", key: encoder["image"]}, data=(str(cache.data),)).left
    cache.check_whole()


def test_damaged_table_or_manifest_is_reported_and_untouched(cache: Damaged) -> None:
    cache.flip("image-tiny-vit*/hidden_states/2/c/1/0/0", 100)
    cache.flip("image-tiny-dinov2*/hidden_states/2/c/1/0/0")
    [manifest] = cache.find("image-tiny-vit*/zarr.json")
    content = manifest.read_bytes()
    manifest.write_bytes(content[: len(content) // 2])
    report = cache.repair()
    [left] = report.left
    assert re.search("image-tiny-vit.*: manifest: damaged and not repaired: .*extract this encoder into a new", left)
    assert len(report.restored) == 1
    assert manifest.read_bytes() == content[: len(content) // 2]
    manifest.write_bytes(content)
    ids = min(cache.path.glob("tables/*/items/c/0"))
    flip(ids, 3)
    before = files_of(str(cache.path))
    report = cache.repair()
    assert "item table: damaged and not repaired: no data tell" in report.left[0]
    assert len(report.left) == 2
    assert files_of(str(cache.path)) == before
    flip(ids, 3)
    assert not cache.repair().left
    cache.check_whole()


def test_unfinished_rows_are_left_to_the_extraction(tiny_model: Callable[[str], Path]) -> None:
    with memory_folder() as folder:
        config = replace(tiny_config(folder, tiny_model, train=150), shard_mb=0)
        whole = extract(replace(config, cache=config.cache + ".whole"))
        with dying_behind(25):
            extract(config)
        cache = Damaged(Path(config.cache), folder / "data", files_of(whole))
        cache.flip("image-*/hidden_states/3/c/0/0/0")
        [left] = cache.repair().left
        assert "Finish it with saffe extract, then repair again" in left
        extract(config)
        assert not cache.repair().left
        cache.check_whole()


def test_unreadable_and_unused_inputs_are_kept(tiny_model: Callable[[str], Path]) -> None:
    """A broken photo is a row of NaN, also where its file is gone by now."""
    with memory_folder() as folder:
        config = replace(tiny_config(folder, tiny_model), max_invalid=0.1)
        broken = folder / "data" / "train" / "003.png"
        broken.write_bytes(broken.read_bytes()[:200])
        cache = Damaged(Path(extract(config)), folder / "data", files_of(config.cache))
        for change in (lambda: None, broken.unlink):
            change()
            cache.flip("image-*/hidden_states/3/c/0/0/0")
            assert not cache.repair().left
            cache.check_whole()


def test_row_of_a_changed_photo_may_be_lost(tiny_model: Callable[[str], Path]) -> None:
    """Its file is gone for good, and no item points to it: the shard is whole again, without it."""
    with memory_folder() as folder:
        config = tiny_config(folder, tiny_model)
        extract(config)
        draw(folder / "data" / "train" / "003.png", 4321)
        extract(replace(config, changed="reencode"))
        image = open_cache(config.cache).encoder("image")
        before = image.array("hidden_states/3").read(np.arange(27))
        cache = Damaged(Path(config.cache), folder / "data", {})
        cache.flip("image-*/hidden_states/3/c/0/0/0")
        [rounded] = cache.repair().rounded
        assert "; 1 unused inputs were lost with their files" in rounded
        opened = open_cache(config.cache)
        assert list(opened.encoder("image").manifest.invalid.values()) == ["not among --data"]
        assert opened.encoder("image").usable(opened.table.rows["image"]).all()
        rows = opened.table.rows["image"]
        np.testing.assert_allclose(opened.encoder("image").array("hidden_states/3").read(rows), before[rows], rtol=1e-4)
        assert verify(config.cache)[1] == []


def test_past_extractions_give_the_blocks_of_inputs(grown: tuple[Path, Path]) -> None:
    manifest = open_cache(grown[0]).encoder("image", "dinov2").manifest
    past = past_extractions(manifest)
    assert [(one.start, one.stop, one.block_rows) for one in past] == [
        (0, 135, 4),
        (135, 143, 4),
        (0, 143, 7),
        (143, 146, 5),
    ]
    assert past[2].first_new == {"hidden_states/1": 0}
    pooled = manifest.arrays["pooled"]
    shard = LostShard(
        damage=Damage(part="shard", name="pooled"), spec=pooled.spec, entry=pooled.shards[0], inputs=range(130, 138)
    )
    assert list(past[1].blocks_of(shard)) == [range(135, 136), range(136, 140)]
    shard.inputs = range(146)
    assert list(past[2].blocks_of(shard)) == []


@pytest.mark.parametrize("storage", ["float16", "bfloat16", "float8"])
def test_every_storage_type_is_repaired(tiny_model: Callable[[str], Path], storage: str) -> None:
    with memory_folder() as folder:
        compression = "zstd" if storage == "float16" else "none"
        config = replace(tiny_config(folder, tiny_model), storage=storage, compression=compression)
        cache = Damaged(Path(extract(config)), folder / "data", files_of(config.cache))
        cache.flip("*/hidden_states/3/c/0/0*")
        cache.flip("*/hidden_states/3/c/0/0/0")
        assert not cache.repair().left
        cache.check_whole()


def test_sounds_are_repaired(tiny_model: Callable[[str], Path]) -> None:
    import soundfile

    with memory_folder() as folder:
        for number in range(6):
            path = folder / "sounds" / "train" / f"class{number % 2}" / f"{number}.wav"
            path.parent.mkdir(parents=True, exist_ok=True)
            soundfile.write(path, np.sin(np.arange(4000) * (0.1 + number / 10)), 8000)
        encoders = {"audio": str(tiny_model("whisper")), "text": str(tiny_model("bert"))}
        config = ExtractConfig(
            data=str(folder / "sounds"), cache=str(folder / "cache.zarr"), encoder=encoders, device="cpu"
        )
        cache = Damaged(Path(extract(config)), folder / "sounds", files_of(config.cache))
        cache.flip("audio-*/hidden_states/*/c/0/0")
        assert len(cache.repair().restored) == 2
        cache.check_whole()


@pytest.mark.locks
def test_a_second_writer_is_refused(cache: Damaged) -> None:
    with Storage(cache.path).writer_lock(), pytest.raises(FolderInUseError, match="another process is writing"):
        cache.repair()
    with pytest.raises(CacheError, match="there is no feature cache"):
        repair(RepairConfig(cache=str(cache.path / "none")))
    assert not (cache.path / "none").exists()
