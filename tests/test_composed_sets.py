"""FashionIQ, CIRR and CIRCO, read from tiny replicas in their exact layout."""

from __future__ import annotations

import json
import logging
import shutil
from collections.abc import Callable, Sequence
from pathlib import Path

import pytest
from PIL import Image

from saffe_cache.core.items import QueryOf
from saffe_cache.sources.items import Columns, SourceItem
from saffe_cache.sources.registry import read_items
from saffe_cache.store.table import TableBuilder

Files = dict[str, object]


def write(root: Path, files: Files, photos: Sequence[str]) -> Path:
    for number, name in enumerate(photos):
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (4, 4), (number, 0, 0)).save(root / name)
    for name, value in files.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text(json.dumps(value))
    return root


def read(root: Path, *splits: str) -> tuple[list[SourceItem], list[SourceItem]]:
    """Photos and queries."""
    items = read_items(str(root), Columns(), splits)
    photos = [item for item in items if item.query is None]
    assert items[: len(photos)] == photos
    return photos, items[len(photos) :]


def fashion_iq(root: Path) -> Path:
    files: Files = {
        "captions/cap.dress.train.json": [
            {"target": "B002", "candidate": "B001", "captions": ["is darker.", "has longer sleeves "]},
            {"target": "B001", "candidate": "B003", "captions": ["is red", ""]},
        ],
        "captions/cap.toptee.train.json": [
            {"target": "B005", "candidate": "B002", "captions": ["is blue", "is blue"]},
        ],
        "captions/cap.dress.val.json": [
            {"target": "B011", "candidate": "B010", "captions": ["is shorter", "is plain"]},
        ],
        "captions/cap.dress.test.json": [{"candidate": "B020", "captions": ["is shorter", "is plain"]}],
        "image_splits/split.dress.train.json": ["B001", "B002", "B003", "B004"],
        "image_splits/split.toptee.train.json": ["B005", "B002"],
        "image_splits/split.dress.val.json": ["B010", "B011"],
        "image_splits/split.dress.test.json": ["B020"],
    }
    numbers = ("001", "002", "003", "004", "005", "010", "011", "020")
    return write(root, files, [f"images/B{number}.png" for number in numbers])


_MEMBERS = ["dev-1-0-img0", "dev-1-1-img1", "dev-2-0-img0", "dev-3-0-img0", "dev-4-0-img0", "dev-5-0-img0"]


def cirr(root: Path) -> Path:
    query = {
        "pairid": 12063,
        "reference": "dev-1-0-img0",
        "target_hard": "dev-1-1-img1",
        "target_soft": {"dev-1-1-img1": 1.0, "dev-2-0-img0": 0.5},
        "caption": "two dogs instead of one",
        "img_set": {"id": 7, "members": _MEMBERS, "reference_rank": 0, "target_rank": 2},
    }
    held_back = {"pairid": 3, "reference": "test1-1-0-img0", "caption": "a cat", "img_set": {"id": 1, "members": []}}
    files: Files = {
        "cirr/captions/cap.rc2.val.json": [query],
        "cirr/captions/cap.rc2.test1.json": [held_back],
        "cirr/image_splits/split.rc2.val.json": {name: f"./dev/{name}.png" for name in (*_MEMBERS, "dev-9-0-img0")},
        "cirr/image_splits/split.rc2.test1.json": {"test1-1-0-img0": "./test1/test1-1-0-img0.png"},
    }
    return write(
        root, files, [f"dev/{name}.png" for name in (*_MEMBERS, "dev-9-0-img0")] + ["test1/test1-1-0-img0.png"]
    )


def circo(root: Path) -> Path:
    query = {
        "reference_img_id": 397,
        "target_img_id": 1203,
        "relative_caption": "has two people",
        "shared_concept": "a kite on a beach",
        "gt_img_ids": [1203, 45, 9],
        "id": 0,
        "semantic_aspects": ["cardinality"],
    }
    held_back = {"reference_img_id": 9, "relative_caption": "is red", "shared_concept": "a bus", "id": 4}
    files: Files = {
        "annotations/val.json": [query],
        "annotations/test.json": [held_back],
        "COCO2017_unlabeled/annotations/image_info_unlabeled2017.json": {"images": [{"id": 9}]},
    }
    return write(root, files, [f"COCO2017_unlabeled/unlabeled2017/{n:012}.jpg" for n in (9, 45, 397, 1203, 5000)])


def test_fashioniq_has_categories_and_four_texts(tmp_path: Path) -> None:
    photos, queries = read(fashion_iq(tmp_path))
    assert [(item.id, item.labels) for item in photos if item.split == "train"] == [
        ("train/B001", ("dress",)),
        ("train/B002", ("dress", "toptee")),
        ("train/B003", ("dress",)),
        ("train/B004", ("dress",)),
        ("train/B005", ("toptee",)),
    ]
    assert [item.id for item in photos if item.split != "train"] == ["test/B020", "val/B010", "val/B011"]
    assert not any(item.problem for item in (*photos, *queries))
    assert all(item.hashes for item in photos)
    assert [(item.id, item.labels, item.query) for item in queries] == [
        ("train/queries/dress-1", ("dress",), QueryOf("train/B001", ("train/B002",))),
        ("train/queries/dress-2", ("dress",), QueryOf("train/B003", ("train/B001",))),
        ("val/queries/dress-1", ("dress",), QueryOf("val/B010", ("val/B011",))),
        ("train/queries/toptee-1", ("toptee",), QueryOf("train/B002", ("train/B005",))),
    ]
    assert queries[0].captions == (
        "is darker and has longer sleeves",
        "has longer sleeves and is darker",
        "is darker",
        "has longer sleeves",
    )
    assert queries[1].captions == ("is red",)
    assert queries[3].captions == ("is blue and is blue", "is blue")


def test_cirr_has_members_and_its_hard_target(tmp_path: Path) -> None:
    photos, queries = read(cirr(tmp_path))
    assert [item.id for item in photos] == ["test1/test1-1-0-img0", *(f"val/{n}" for n in (*_MEMBERS, "dev-9-0-img0"))]
    [query] = queries
    assert (query.id, query.captions, query.labels) == ("val/queries/12063", ("two dogs instead of one",), ())
    members = tuple(f"val/{name}" for name in _MEMBERS)
    assert query.query == QueryOf("val/dev-1-0-img0", ("val/dev-1-1-img1",), members)


def test_circo_has_several_targets_among_all_photos(tmp_path: Path) -> None:
    photos, queries = read(circo(tmp_path))
    assert [item.id for item in photos] == [f"val/{number:012}" for number in (9, 45, 397, 1203, 5000)]
    [query] = queries
    assert (query.id, query.captions) == ("val/queries/0", ("has two people",))
    targets = tuple(f"val/{number:012}" for number in (1203, 45, 9))
    assert query.query == QueryOf("val/000000000397", targets)


@pytest.mark.parametrize(("make", "split"), [(fashion_iq, "train"), (cirr, "val"), (circo, "val")])
def test_benchmarks_become_tables_with_queries(tmp_path: Path, make: Callable[[Path], Path], split: str) -> None:
    builder = TableBuilder(None, ("a {}",))
    photos, queries = read(make(tmp_path))
    for item in (*photos, *queries):
        builder.add(item)
    table = builder.build()
    found = table.queries_in(split)
    of_split = [item for item in queries if item.split == split]
    assert [table.ids[row] for row in table.references[found]] == [one.query.reference for one in of_split if one.query]
    assert [tuple(table.ids.take(row)) for row in table.targets.take(found)] == [
        one.query.targets for one in of_split if one.query
    ]


@pytest.mark.parametrize(
    ("make", "file"),
    [(fashion_iq, "cap.dress.test.json"), (cirr, "cap.rc2.test1.json"), (circo, "annotations/test.json")],
)
def test_files_without_targets_give_no_queries(
    tmp_path: Path, make: Callable[[Path], Path], file: str, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.WARNING):
        _, queries = read(make(tmp_path))
    assert f"{file}: its 1 queries are left out: they have no targets" in caplog.text
    assert all(one.query and one.query.targets for one in queries)


def test_gallery_without_a_list_is_what_queries_name(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    shutil.rmtree(fashion_iq(tmp_path) / "image_splits")
    with caplog.at_level(logging.WARNING):
        photos, _ = read(tmp_path, "train")
    assert [item.id for item in photos] == [f"train/B00{number}" for number in (1, 2, 3, 5)]
    assert "split.dress.train.json does not exist: the gallery is the 3 photos that queries name" in caplog.text
    assert "1 photos are left out: the benchmark's lists do not name them; for instance images/B004.png" in caplog.text


def test_missing_and_doubled_photos_have_a_problem(tmp_path: Path) -> None:
    (fashion_iq(tmp_path) / "images" / "B001.png").unlink()
    write(tmp_path, {}, ["small/B005.png"])
    photos, queries = read(tmp_path, "train")
    problems = {item.id: item.problem for item in (*photos, *queries) if item.problem}
    assert list(problems) == [
        *("train/B001", "train/B005", "train/queries/dress-1", "train/queries/dress-2", "train/queries/toptee-1")
    ]
    assert problems["train/B001"].startswith("0 photos are named B001, expected one below")
    assert "2 photos are named B005" in problems["train/B005"]
    assert problems["train/queries/dress-1"].startswith("its reference train/B001 cannot be used: 0 photos")
    assert problems["train/queries/dress-2"].startswith("none of its 1 targets can be used: 0 photos")


def test_listed_paths_choose_among_photos_of_one_name(tmp_path: Path) -> None:
    write(cirr(tmp_path), {}, ["small/dev-9-0-img0.png"])
    photos, _ = read(tmp_path, "val")
    assert not any(item.problem for item in photos)


@pytest.mark.parametrize(
    ("make", "file", "content", "message"),
    [
        (fashion_iq, "captions/cap.dress.train.json", "[{", r"cap.dress.train.json: no valid JSON"),
        (fashion_iq, "captions/cap.dress.train.json", "{}", r"expected a list of queries, found \{\}. Fetch it again"),
        (
            *(fashion_iq, "captions/cap.dress.train.json", '[{"candidate": "a"}]'),
            r"query 1: KeyError 'captions', expected the benchmark's own fields, found candidate. Fetch the file again",
        ),
        (
            *(fashion_iq, "captions/cap.dress.train.json", '[{"candidate": "a", "captions": ["b"]}]'),
            "query 1: ValueError has 1 captions, not 2",
        ),
        (fashion_iq, "image_splits/split.dress.train.json", "[1]", "expected a list of names of photos"),
        (cirr, "cirr/captions/cap.rc2.val.json", '[{"pairid": 1}]', "query 1: KeyError 'img_set'"),
        (cirr, "cirr/captions/cap.rc2.val.json", "[[]]", r"query 1: AttributeError .*, found \[\]"),
        (circo, "annotations/val.json", '[{"reference_img_id": Infinity, "relative_caption": "a"}]', "OverflowError"),
        (circo, "annotations/val.json", '[{"relative_caption": "a"}]', "query 1: KeyError 'reference_img_id'"),
    ],
)
def test_damaged_benchmark_files_are_refused(
    tmp_path: Path, make: Callable[[Path], Path], file: str, content: str, message: str
) -> None:
    (make(tmp_path) / file).write_text(content)
    with pytest.raises(ValueError, match=message):
        read(tmp_path)


def test_other_folders_with_annotations_are_no_benchmark(tmp_path: Path) -> None:
    write(tmp_path, {"annotations/val.json": [{"image": 1}]}, ["train/cat/1.png"])
    photos, queries = read(tmp_path)
    assert ([item.id for item in photos], queries) == (["train/cat/1.png"], [])
