"""Indexing a folder and searching it: what is found, what an update embeds, what a kill leaves, what is refused."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
from colour_fusion import COLOURS, ColourFusion, paint

from saffe_cache.core.atomic_io import FolderInUseError
from saffe_cache.core.features import IndexKind
from saffe_cache.inference import indexing, search_index
from saffe_cache.inference.config import IndexConfig, SearchConfig
from saffe_cache.inference.indexing import Changes, update_index
from saffe_cache.inference.search_index import FAISS, ITEMS, MANIFEST, FoundHits, SearchIndex, find_run


class Photos:
    """A folder of photos, a run, and an index of them."""

    def __init__(self, folder: Path) -> None:
        self.data, self.out, self.run = folder / "photos", folder / "photos.index", folder / "run"
        self.run.mkdir(parents=True)
        self.fusion = ColourFusion(self.run)
        self.texts = {f"{name}.png": f"a {name} square" for name in COLOURS}
        for name in COLOURS:
            paint(self.data / "train" / f"{name}.png", name)
        self.write_texts()

    def write_texts(self) -> None:
        lines = [json.dumps({"file_name": name, "captions": [text]}) for name, text in self.texts.items()]
        (self.data / "train" / "metadata.jsonl").write_text("\n".join(lines))

    def update(self, fusion: Any = None, **options: Any) -> Changes:
        config = IndexConfig(data=str(self.data), run="", out=str(self.out), **options)
        return update_index(fusion or self.fusion, config)

    def open(self) -> SearchIndex:
        return SearchIndex.open(self.out, self.fusion)  # type: ignore[arg-type]


@pytest.fixture
def photos(tmp_path: Path) -> Photos:
    return Photos(tmp_path)


def counts(changes: Changes) -> tuple[int, int, int, int]:
    return changes.added, changes.changed, changes.removed, changes.kept


def contents(index: SearchIndex) -> tuple[Any, ...]:
    return index.ids, index.texts, index.labels, index.splits, index.vectors.tolist()


def test_text_photo_and_both_find_what_they_mean(photos: Photos) -> None:
    photos.update()
    index = photos.open()
    assert index.search("something blue", k=1)[0][::2] == ("train/blue.png", "a blue square")
    assert index.search(image=photos.data / "train" / "red.png", k=1)[0].id == "train/red.png"
    assert index.search("something green", photos.data / "train" / "red.png", k=1)[0].id == "train/green.png"
    assert repr(index) == f"<SearchIndex of {len(COLOURS)} image items in {photos.out}>"
    scores = [hit.score for hit in index.search("red", k=99)]
    assert len(scores) == len(COLOURS)
    assert scores == sorted(scores, reverse=True)
    assert scores[0] == pytest.approx(1)


def test_columns_are_in_the_order_of_the_data(photos: Photos) -> None:
    photos.update()
    index = photos.open()
    assert index.ids == tuple(f"train/{name}" for name in photos.texts)
    assert index.texts == tuple((text,) for text in photos.texts.values())
    files = [index.file_of(name) for name in index.ids]
    expected = photos.fusion.embed_images(files)
    np.testing.assert_allclose(index.vectors, expected, atol=1e-6)
    assert index.search_vectors(expected, 1)[1][:, 0].tolist() == list(index.ids)
    assert [index.like(name, 1)[0].id for name in index.ids] == list(index.ids)


def test_composed_queries_are_not_indexed(photos: Photos) -> None:
    line = {"reference": "red.png", "text": "in blue", "targets": ["blue.png"]}
    (photos.data / "train" / "queries.jsonl").write_text(json.dumps(line))
    photos.update()
    assert sorted(photos.open().ids) == sorted(f"train/{name}.png" for name in COLOURS)


def test_update_embeds_only_what_is_new_or_changed(photos: Photos) -> None:
    assert counts(photos.update()) == (6, 0, 0, 0)
    photos.fusion.num_embedded = 0
    assert counts(photos.update()) == (0, 0, 0, 6)
    assert photos.fusion.num_embedded == 0
    paint(photos.data / "train" / "red.png", (128, 0, 10))
    paint(photos.data / "train" / "grey.png", (90, 90, 90))
    (photos.data / "train" / "blue.png").unlink()
    del photos.texts["blue.png"]
    photos.texts["grey.png"] = "a grey square"
    photos.write_texts()
    assert counts(photos.update()) == (1, 1, 1, 4)
    assert photos.fusion.num_embedded == 2
    assert "train/blue.png" not in photos.open().ids


@pytest.mark.parametrize("paired", [False, True])
def test_an_updated_index_equals_a_new_one(photos: Photos, paired: bool) -> None:
    photos.update(paired=paired)
    paint(photos.data / "train" / "red.png", (128, 0, 10))
    photos.texts["white.png"] = "a yellow square, they say"
    (photos.data / "train" / "green.png").unlink()
    del photos.texts["green.png"]
    photos.write_texts()
    photos.fusion.num_embedded = 0
    assert counts(photos.update(paired=paired)) == (0, 1 + paired, 1, 4 - paired)
    assert photos.fusion.num_embedded == 1 + paired
    updated = contents(photos.open())
    photos.out = photos.out.with_name("new.index")
    photos.update(paired=paired)
    assert contents(photos.open()) == updated


def test_renamed_and_duplicate_photos_are_not_embedded_again(photos: Photos) -> None:
    photos.update()
    photos.fusion.num_embedded = 0
    (photos.data / "train" / "red.png").rename(photos.data / "train" / "crimson.png")
    paint(photos.data / "train" / "red again.png", "red")
    photos.texts["crimson.png"] = photos.texts["red again.png"] = photos.texts.pop("red.png")
    photos.write_texts()
    assert counts(photos.update()) == (2, 0, 1, 5)
    assert photos.fusion.num_embedded == 0


def test_new_captions_reach_the_table_without_embedding(photos: Photos) -> None:
    photos.update()
    photos.fusion.num_embedded = 0
    photos.texts["red.png"] = "blood"
    photos.write_texts()
    assert counts(photos.update()) == (0, 0, 0, 6)
    assert photos.fusion.num_embedded == 0
    assert photos.open().search("red", k=1)[0].text == "blood"


def test_paired_items_are_fused_with_their_first_caption(photos: Photos) -> None:
    photos.texts["red.png"] = "in truth green"
    photos.write_texts()
    photos.update(paired=True)
    nearest = {hit.id for hit in photos.open().search("green", k=2)}
    assert nearest == {"train/green.png", "train/red.png"}


def test_unreadable_photos_are_counted_and_named(photos: Photos) -> None:
    (photos.data / "train" / "noise.png").write_bytes(b"no picture")
    (photos.data / "train" / "empty.png").write_bytes(b"")
    photos.texts |= {"noise.png": "noise", "empty.png": "nothing"}
    photos.write_texts()
    changes = photos.update()
    assert counts(changes) == (6, 0, 0, 0)
    shown = str(changes)
    assert "2 could not be embedded:\n" in shown
    assert "train/noise.png: cannot be read" in shown
    assert "train/empty.png: unreadable image: the file is empty" in shown
    assert photos.open().problems == changes.problems
    assert counts(photos.update()) == (0, 0, 0, 6)
    paint(photos.data / "train" / "noise.png", (3, 4, 5))
    assert counts(photos.update()) == (1, 0, 0, 6)
    assert list(photos.open().problems) == ["train/empty.png"]


def test_a_folder_without_a_readable_photo_is_refused(photos: Photos) -> None:
    for path in (photos.data / "train").glob("*.png"):
        path.write_bytes(b"no picture")
    with pytest.raises(ValueError, match=r"none of its 6 items could be embedded; train/red\.png: cannot"):
        photos.update()


def test_an_empty_folder_is_refused(photos: Photos, tmp_path: Path) -> None:
    photos.data = tmp_path / "empty"
    photos.data.mkdir()
    with pytest.raises(ValueError, match=r"--data .*empty: found no"):
        photos.update()
    assert not photos.out.exists()


@pytest.mark.parametrize(
    ("options", "fingerprint", "found"),
    [
        ({}, "ba9876543210", "run 0123456789ab there, ba9876543210 now"),
        ({"index": "hnsw"}, None, "--index flat there, hnsw now"),
        ({"paired": True}, None, "--paired False there, True now"),
        ({"splits": ("train",)}, None, "--splits"),
    ],
)
def test_another_run_or_other_options_are_refused(
    photos: Photos, options: dict[str, Any], fingerprint: str | None, found: str
) -> None:
    photos.update()
    before = (photos.out / MANIFEST).read_bytes()
    with pytest.raises(
        ValueError, match=rf"it is another index \({found}.*Repeat its options, choose another --out, or delete it"
    ):
        photos.update(ColourFusion(photos.run, fingerprint or photos.fusion.fingerprint), **options)
    assert (photos.out / MANIFEST).read_bytes() == before


def test_other_data_do_not_replace_an_index(photos: Photos, tmp_path: Path) -> None:
    photos.update()
    photos.data = tmp_path / "other"
    paint(photos.data / "train" / "x.png", "red")
    with pytest.raises(ValueError, match=r"none of its 6 items is among the 1 of the data, such as 'train/x\.png'"):
        photos.update()


def test_a_folder_that_holds_something_else_is_refused(photos: Photos) -> None:
    photos.out.mkdir()
    (photos.out / "thesis.tex").write_text("")
    with pytest.raises(ValueError, match=r"holds thesis\.tex, which is no part of an index\. Choose another --out"):
        photos.update()


@pytest.mark.parametrize("folder", ["data", "out"])
def test_an_export_into_the_data_or_the_index_is_refused(photos: Photos, folder: str) -> None:
    place = getattr(photos, folder) / "gallery.parquet"
    with pytest.raises(ValueError, match=r"gallery\.parquet: it lies in .*\. Choose another place"):
        photos.update(export=str(place))
    assert photos.fusion.num_embedded == 0
    with pytest.raises(ValueError, match="it is a folder, expected the name of a file"):
        photos.update(export=str(photos.run))


def test_an_index_among_its_data_is_refused(photos: Photos) -> None:
    photos.out = photos.data / "index"
    with pytest.raises(ValueError, match=r"index: it lies in the data, .*\. Choose another --out"):
        photos.update()


def test_moved_data_and_runs_are_found_after_an_update(photos: Photos, tmp_path: Path) -> None:
    photos.update()
    photos.data = photos.data.rename(tmp_path / "new photos")
    photos.fusion.folder = photos.run.rename(tmp_path / "new run")
    photos.fusion.num_embedded = 0
    generation = photos.open().manifest.generation
    assert counts(photos.update()) == (0, 0, 0, 6)
    index = photos.open()
    assert (photos.fusion.num_embedded, index.manifest.generation) == (0, generation)
    assert index.file_of("train/red.png") == tmp_path / "new photos" / "train" / "red.png"
    assert find_run(photos.out, index.manifest).samefile(tmp_path / "new run")


def test_readers_follow_an_update(photos: Photos, monkeypatch: pytest.MonkeyPatch) -> None:
    """A generation that was removed after its name was read is not missed."""
    photos.update()
    before = [search_index.read_manifest(photos.out)]
    paint(photos.data / "train" / "red.png", (128, 0, 10))
    photos.update()
    read = search_index.read_manifest
    monkeypatch.setattr(search_index, "read_manifest", lambda folder: before.pop() if before else read(folder))
    assert photos.open().manifest == read(photos.out)


def test_readers_follow_an_update_while_they_open(photos: Photos, monkeypatch: pytest.MonkeyPatch) -> None:
    """A file that was removed after it was checked is not missed."""
    photos.update()
    paint(photos.data / "train" / "red.png", (128, 0, 10))
    opened, updates = search_index.map_index, [photos.update]

    def open_late(*arguments: Any) -> Any:
        if updates:
            updates.pop()()
        return opened(*arguments)

    monkeypatch.setattr(search_index, "map_index", open_late)
    assert photos.open().manifest == search_index.read_manifest(photos.out)


def test_pairs_are_refused_where_no_text_enters(photos: Photos) -> None:
    fusion = ColourFusion(photos.run, why_not_paired="no text enters fusion linear")
    with pytest.raises(ValueError, match=r"--paired: no text enters fusion linear\."):
        photos.update(fusion, paired=True)
    photos.update(fusion)
    index = SearchIndex.open(photos.out, fusion)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=r"cannot be fused: no text enters fusion linear\. Or search by one of them\."):
        index.search("red", photos.data / "train" / "red.png")


def test_runs_of_pairs_index_pairs_by_default(photos: Photos) -> None:
    photos.fusion.spec.gallery_text = "first_caption"
    photos.fusion.why_not_alone = "the run was trained on pairs alone"
    photos.update()
    assert photos.open().manifest.paired
    with pytest.raises(ValueError, match=r"a photo alone finds nothing: .* on pairs alone\. Or add a text\."):
        photos.open().search(image=photos.data / "train" / "red.png")
    with pytest.raises(ValueError, match="--no-paired: the run was trained on pairs alone"):
        photos.update(paired=False)


@pytest.mark.parametrize("kind", ["flat", "hnsw", "ivf", "ivf_pq"])
def test_every_kind_is_indexed_and_opened(tmp_path: Path, kind: IndexKind, monkeypatch: pytest.MonkeyPatch) -> None:
    vectors = np.random.default_rng(0).normal(size=(10_000, 16)).astype(np.float32)
    vectors /= np.linalg.norm(vectors, axis=1, keepdims=True)
    manifest = indexing._manifest(ColourFusion(tmp_path), IndexConfig(data="x", run="", out="", index=kind), tmp_path)  # type: ignore[arg-type]
    manifest = indexing.replace(manifest, width=16, num_items=len(vectors))
    names = [f"train/{item}" for item in range(len(vectors))]
    texts = [(f"text {item}",) for item in range(len(vectors))]
    columns = indexing.ItemColumns.of(
        names, texts, [()] * len(names), ["train"] * len(names), [""] * len(names), [bytes(32)] * len(names)
    )
    indexing.write_json(
        tmp_path / MANIFEST, indexing.asdict(indexing._write_files(columns, vectors, manifest, tmp_path))
    )
    index = SearchIndex.open(tmp_path)
    np.testing.assert_array_equal(index.vectors, vectors)
    found = [hit.id for hit in index.like("train/17", 5)]
    assert found[0] == "train/17"
    assert index.search_vectors(vectors[[3, 4]], 1)[1][:, 0].tolist() == ["train/3", "train/4"]
    assert index._text(17) == "text 17"


def test_too_few_items_for_the_kind_are_refused_at_once(photos: Photos) -> None:
    with pytest.raises(ValueError, match=r"index ivf: 6 vectors, .* Use flat or hnsw"):
        photos.update(index="ivf")
    assert photos.fusion.num_embedded == 0


def test_missing_index_says_how_to_make_one(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"none: no index there .* Make one with saffe index --out"):
        SearchIndex.open(tmp_path / "none")


@pytest.mark.parametrize("name", [ITEMS, FAISS])
@pytest.mark.parametrize("damage", ["flipped", "truncated", "missing"])
def test_damaged_files_are_refused(photos: Photos, name: str, damage: str) -> None:
    photos.update()
    path = next(photos.out.glob(f"g-*/{name}"))
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data if damage == "flipped" else data[:-9])
    if damage == "missing":
        path.unlink()
    expected = "missing" if damage == "missing" else r"bytes with the checksum \d+, expected"
    with pytest.raises(
        ValueError, match=rf"{name}: .*{expected}.* Restore it, or delete .*photos\.index and index again"
    ):
        SearchIndex.open(photos.out)


def test_damaged_manifest_is_refused(photos: Photos) -> None:
    photos.update()
    path = photos.out / MANIFEST
    content = json.loads(path.read_text())
    path.write_text(json.dumps(content | {"width": "wide"}))
    with pytest.raises(ValueError, match=r"index\.json: damaged \(width: 'wide', expected int\)"):
        SearchIndex.open(photos.out)
    path.write_text(json.dumps(content | {"version": 9}))
    with pytest.raises(ValueError, match=r"index\.json: version 9, expected 1"):
        SearchIndex.open(photos.out)


def test_the_run_is_found_where_the_index_says(photos: Photos, tmp_path: Path) -> None:
    photos.update()
    manifest = photos.open().manifest
    assert find_run(photos.out, manifest).samefile(photos.run)
    moved = tmp_path / "moved"
    moved.mkdir()
    photos.out.rename(moved / "photos.index")
    assert find_run(moved / "photos.index", manifest) == photos.run
    photos.run.rename(moved / "run")
    assert find_run(moved / "photos.index", manifest).samefile(moved / "run")
    (moved / "run").rename(moved / "elsewhere")
    with pytest.raises(ValueError, match=r"its run is no longer in .*run\. Say where it is with --run"):
        find_run(moved / "photos.index", manifest)


def test_another_run_is_refused_at_the_first_search(photos: Photos) -> None:
    photos.update()
    index = SearchIndex.open(photos.out, ColourFusion(photos.run, "ba9876543210"))  # type: ignore[arg-type]
    assert index.like("train/red.png", 1)[0].id == "train/red.png"
    with pytest.raises(ValueError, match=r"run ba9876543210, but .* was made with run 0123456789ab"):
        index.search("red")


@pytest.mark.parametrize(
    ("query", "error"),
    [
        ({}, "found nothing to search by, expected a text or a photo"),
        ({"text": " "}, "the text to search by is empty"),
        ({"audio": "x.wav"}, "found a sound to search by, but it is an index of photos. Search by a text or a photo."),
        ({"text": "red", "k": 0}, "k=0 exceeds the gallery"),
    ],
)
def test_unusable_queries_are_refused(photos: Photos, query: dict[str, Any], error: str) -> None:
    photos.update()
    with pytest.raises(ValueError, match=error):
        photos.open().search(**query)


def test_unknown_id_is_refused(photos: Photos) -> None:
    photos.update()
    with pytest.raises(ValueError, match=r"no item 'x'; the first one is 'train/red\.png'"):
        photos.open().like("x")


def test_found_hits_print_as_lines_and_as_json(photos: Photos) -> None:
    photos.texts["red.png"] = "a \x1b[31mred\x1b[0m square " + "so " * 40
    photos.write_texts()
    photos.update()
    index = photos.open()
    hits = index.search("red", k=2)
    first, second, _ = str(FoundHits(index, hits, as_json=False)).splitlines()
    assert first == f"2 of 6 items; the data are in {photos.data}"
    assert second.startswith(r" 1.000  train/red.png     a \x1b[31mred")
    assert second.endswith("…")
    found = [json.loads(line) for line in str(FoundHits(index, hits, as_json=True)).splitlines()]
    assert [one["id"] for one in found] == [hit.id for hit in hits]
    assert found[0]["file"] == str(photos.data / "train" / "red.png")


def test_search_needs_something_to_search_for() -> None:
    with pytest.raises(ValueError, match="found nothing to search for, expected a text, --image, --audio or --video"):
        SearchConfig(index="x")


def test_names_that_are_no_unicode_survive(photos: Photos, tmp_path: Path) -> None:
    odd = os.fsdecode(b"Gr\xf6\xdfe.png")
    paint(tmp_path / "odd" / "train" / "x.png", "blue")
    (tmp_path / "odd" / "train" / "x.png").rename(tmp_path / "odd" / "train" / odd)
    photos.data = tmp_path / "odd"
    photos.update(export=str(tmp_path / "gallery.parquet"))
    assert photos.open().ids == (f"train/{odd}",)
    assert pq.read_table(tmp_path / "gallery.parquet")["id"].to_pylist() == ["train/Gr\\udcf6\\udcdfe.png"]


def test_a_second_writer_is_refused(photos: Photos) -> None:
    photos.update()
    script = f"""
from pathlib import Path
from saffe_cache.core.atomic_io import hold_folder
with hold_folder(Path({str(photos.out)!r})):
    print("held", flush=True)
    input()
"""
    with subprocess.Popen([sys.executable, "-c", script], stdin=subprocess.PIPE, stdout=subprocess.PIPE) as other:
        assert other.stdout is not None
        assert other.stdout.readline() == b"held\n"
        with pytest.raises(FolderInUseError, match="another process is writing to it"):
            photos.update()
        assert len(photos.open()) == 6
        other.communicate(b"\n")
    assert counts(photos.update()) == (0, 0, 0, 6)


KILLED = """
import os, shutil, signal, sys
import datasets
from pathlib import Path
from colour_fusion import ColourFusion
from saffe_cache.inference import indexing, search_index
from saffe_cache.inference.search_index import SearchIndex

data, out, run = sys.argv[1:4]
config = indexing.IndexConfig(data=data, run="", out=out)
indexing._BLOCK = 2

def forked(action):
    child = os.fork()
    if not child:
        os._exit(action() or 0)
    return os.waitpid(child, 0)[1]

def update(last_moment):
    fusion, moments = ColourFusion(Path(run)), [0]
    def dying(function):
        def called(*arguments, **options):
            moments[0] += 1
            if moments[0] == last_moment:
                os.kill(os.getpid(), signal.SIGKILL)
            return function(*arguments, **options)
        return called
    os.fsync, Path.replace, shutil.rmtree = map(dying, (os.fsync, Path.replace, shutil.rmtree))
    indexing.update_index(fusion, config)

def look(name):
    try:
        index = SearchIndex.open(out)
    except ValueError as error:
        print(name, "no index there" in str(error) and "none", flush=True)
        return
    print(name, *index.ids, sep="|", flush=True)

def resume():
    fusion = ColourFusion(Path(run))
    indexing.update_index(fusion, config)
    print("resumed", fusion.num_embedded, *(one.name[:2] for one in sorted(Path(out).iterdir())), flush=True)

keep = out + ".before"
for moment in range(1, 99):
    shutil.rmtree(out, ignore_errors=True)
    if os.path.exists(keep):
        shutil.copytree(keep, out)
    status = forked(lambda: update(moment))
    if not status:
        break
    assert os.WTERMSIG(status) == signal.SIGKILL, status
    forked(lambda: look("killed"))
    forked(resume)
    forked(lambda: look("after"))
print("finished", moment)
"""


@pytest.mark.slow
@pytest.mark.skipif(not hasattr(os, "fork"), reason="kills processes that it forks")
@pytest.mark.parametrize("has_index", [False, True])
def test_kill_at_any_write_leaves_the_old_or_the_new_index(photos: Photos, has_index: bool) -> None:
    """Processes die by SIGKILL before each fsync, renaming and removal; the next one resumes."""
    old = "killed none"
    if has_index:
        photos.update()
        old = "|".join(["killed", *photos.open().ids])
        photos.out.rename(f"{photos.out}.before")
        for number in range(5):
            paint(photos.data / "train" / f"{number}.png", (10 * number, 50, 60))
            photos.texts[f"{number}.png"] = str(number)
        photos.write_texts()
    new = "|".join(f"train/{name}" for name in photos.texts)
    run = subprocess.run(
        [sys.executable, "-c", KILLED, str(photos.data), str(photos.out), str(photos.run)],
        capture_output=True,
        text=True,
        env=os.environ | {"PYTHONPATH": f"{Path(__file__).parent}{os.pathsep}{Path(__file__).parents[1]}"},
        check=True,
    )
    *lines, finished = run.stdout.splitlines()
    assert len(lines) == 3 * (int(finished.split()[1]) - 1) > 30
    found = [lines[start : start + 3] for start in range(0, len(lines), 3)]
    states = [killed for killed, _, _ in found]
    assert states == sorted(states, key=lambda state: state != old), "the old one, then the new one"
    assert set(states) == {old, f"killed|{new}"}
    num_new = 5 if has_index else 6
    embedded = [int(resumed.split()[1]) for _, resumed, _ in found]
    assert embedded[0] == num_new
    assert embedded == sorted(embedded, reverse=True)
    assert {0, 2 - has_index} <= set(embedded), "blocks that were embedded are not repeated"
    assert {resumed.split(maxsplit=2)[2] for _, resumed, _ in found} == {"g- in"}, "nothing is left over"
    assert {after for _, _, after in found} == {f"after|{new}"}
