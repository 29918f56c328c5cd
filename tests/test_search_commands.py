"""`saffe index` and `saffe search` with a trained run, and what other software reads of an index."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pandas
import pytest
from quick_runs import quick_train
from test_trained_fusion import Models, write_photos

import saffe_cache as sc
from saffe_cache.cli import main


class Indexed(NamedTuple):
    photos: Path
    run: str
    out: Path
    gallery: Path


@pytest.fixture(scope="module")
def indexed(tmp_path_factory: pytest.TempPathFactory, tiny_model: Models) -> Indexed:
    """Photos, a run that fuses photos with captions or none, and an index of the photos."""
    folder = tmp_path_factory.mktemp("search")
    photos = write_photos(folder / "photos")
    encoder = {"image": str(tiny_model("dinov2")), "text": str(tiny_model("bert"))}
    cache = sc.extract(data=str(photos), cache=str(folder / "cache.zarr"), encoder=encoder, device="cpu")
    options = {"gallery_text": "first_caption", "text_dropout": 0.3, "epochs": 1, "batch_size": 16}
    run = quick_train(cache, folder / "run", fusion="concat", **options)
    shutil.rmtree(cache)  # a run searches without it
    gallery, out = folder / "gallery.parquet", folder / "photos.index"
    arguments = ["--run", run, "--out", str(out), "--no-paired", "--device", "cpu", "--export", str(gallery)]
    assert main(["index", str(photos), *arguments]) == 0
    return Indexed(photos, run, out, gallery)


def test_vectors_are_those_of_the_run(indexed: Indexed) -> None:
    index = sc.SearchIndex.open(indexed.out, device="cpu")
    expected = index.fusion.embed_items(indexed.photos, paired=False)
    assert index.ids == expected.ids
    np.testing.assert_allclose(index.vectors, expected.vectors, atol=1e-5)
    photo = indexed.photos / "test" / "3.png"
    assert index.search(image=photo, k=1)[0].id == "test/3.png"
    both = index.fusion.embed_pairs([photo], ["word1 word9"])
    assert index.search("word1 word9", photo, 5) == index.hits(both, 5)
    assert index.search("word1", k=3) == index.hits(index.fusion.embed_texts(["word1"]), 3)


def test_indexing_again_embeds_nothing(indexed: Indexed, capsys: pytest.CaptureFixture[str]) -> None:
    command = ["index", str(indexed.photos), "--run", indexed.run, "--out", str(indexed.out), "--no-paired"]
    assert main([*command, "--device", "cpu"]) == 0
    assert capsys.readouterr().out == f"0 added, 0 changed, 0 removed, 52 kept\n{indexed.out}\n"
    assert main(["index", *command[1:-1], "--paired", "--device", "cpu"]) == 1
    assert "--paired False there, True now" in capsys.readouterr().err


def test_usage_names_the_optional_text(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main(["search", "--help"])
    assert capsys.readouterr().out.startswith("usage: saffe search INDEX [TEXT] [options]\n")


def test_search_prints_lines_or_json(indexed: Indexed, capsys: pytest.CaptureFixture[str]) -> None:
    photo = str(indexed.photos / "train" / "5.png")
    assert main(["search", str(indexed.out), "word1", "--image", photo, "-k", "3", "--device", "cpu"]) == 0
    assert capsys.readouterr().out.startswith(f"3 of 52 items; the data are in {indexed.photos}\n")
    assert main(["search", str(indexed.out), "--image", photo, "--k", "99", "--json", "--device", "cpu"]) == 0
    found = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert len(found) == 52
    assert found[0]["id"] == "train/5.png"
    assert found[0]["score"] == pytest.approx(1, abs=1e-4)
    assert found[0]["text"].startswith("word1")
    assert found[0]["file"] == photo


@pytest.mark.parametrize(
    ("arguments", "error"),
    [
        (["INDEX", "word1", "--run", "nowhere"], "nowhere"),
        (["INDEX", "--image", "nothing.png"], "--image nothing.png: there is no such file."),
        (["nowhere", "word1"], "nowhere: no index there (index.json is missing). Make one with saffe index"),
    ],
)
def test_errors_are_one_line(
    arguments: list[str], error: str, indexed: Indexed, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["search", *(str(indexed.out) if one == "INDEX" else one for one in arguments)]) == 1
    shown = capsys.readouterr().err
    assert error in shown
    assert shown.count("\n") == 1


def test_pandas_reads_the_exported_gallery(indexed: Indexed) -> None:
    index = sc.SearchIndex.open(indexed.out)
    frame = pandas.read_parquet(indexed.gallery)
    assert list(frame) == ["id", "vector", "caption", "label", "split", "captions", "labels"]
    assert tuple(frame["id"]) == index.ids
    np.testing.assert_array_equal(np.stack(frame["vector"]), index.vectors)
    assert frame["caption"].tolist() == [texts[0] for texts in index.texts]
    assert [tuple(texts) for texts in frame["captions"]] == list(index.texts)
    assert frame["label"].isna().all()
    assert set(frame["split"]) == {"train", "test"}


def test_datasets_reads_the_exported_gallery(indexed: Indexed, tmp_path: Path) -> None:
    import datasets

    loaded = datasets.load_dataset("parquet", data_files=str(indexed.gallery), split="train", cache_dir=str(tmp_path))
    vectors = sc.SearchIndex.open(indexed.out).vectors
    assert loaded.features["vector"].length == vectors.shape[1]
    np.testing.assert_array_equal(np.array(loaded["vector"][:], np.float32), vectors)


def test_lancedb_finds_what_the_index_finds(indexed: Indexed, tmp_path: Path) -> None:
    lancedb = pytest.importorskip("lancedb")
    import pyarrow.parquet

    index = sc.SearchIndex.open(indexed.out, device="cpu")
    table = lancedb.connect(tmp_path).create_table("photos", pyarrow.parquet.read_table(indexed.gallery))
    query = index.fusion.embed_texts(["word1 word9"])
    found = table.search(query[0]).distance_type("dot").limit(5).to_list()
    assert [row["id"] for row in found] == index.search_vectors(query, 5)[1][0].tolist()


def test_every_photo_of_a_folder_is_indexed(
    indexed: Indexed, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """However deep it lies, with captions or an empty one; what `saffe extract` would leave out too."""
    photos = iter(sorted((indexed.photos / "test").glob("*.png")))
    names = [
        "a.png",
        "2023/b.png",
        "2023/june/c.png",
        "2023/june/lake/d.png",
        "train/cat/e.png",
        "told/f.png",
        "told/g.png",
    ]
    for name in names:
        (tmp_path / "mine" / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(next(photos), tmp_path / "mine" / name)
    told = [{"file_name": "f.png", "captions": ["word1"]}, {"file_name": "g.png", "captions": [" "]}]
    (tmp_path / "mine" / "told" / "metadata.jsonl").write_text("\n".join(map(json.dumps, told)))
    (tmp_path / "mine" / "notes.txt").write_text("no photo")
    out = tmp_path / "mine.index"
    command = ["index", str(tmp_path / "mine"), "--run", indexed.run, "--out", str(out), "--no-paired"]
    assert main([*command, "--device", "cpu"]) == 0
    assert capsys.readouterr().out == f"7 added, 0 changed, 0 removed, 0 kept\n{out}\n"
    index = sc.SearchIndex.open(out, device="cpu")
    assert sorted(index.ids) == sorted(names)
    assert all(str(index.file_of(name)).endswith(name) for name in names)
    texts = dict(zip(index.ids, index.texts, strict=True))
    assert (texts["told/f.png"], texts["told/g.png"]) == (("word1",), ())


def test_folder_with_photos_one_level_down_is_indexed(indexed: Indexed, tmp_path: Path) -> None:
    (tmp_path / "mine" / "cats").mkdir(parents=True)
    shutil.copyfile(indexed.photos / "test" / "0.png", tmp_path / "mine" / "cats" / "x.png")
    index = sc.load_run(indexed.run, device="cpu").index(tmp_path / "mine", tmp_path / "out", paired=False)
    assert index.ids == ("cats/x.png",)
