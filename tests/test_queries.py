"""Composed queries: read from queries.jsonl, kept in the item table, encoded with the other texts."""

from __future__ import annotations

import hashlib
import json
import logging
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from extraction_cases import draw, tiny_config
from test_store_table import check_equal, read_back, root_of, write_columns

from saffe_cache.core.features import CacheError
from saffe_cache.core.items import Item, ItemTable, QueryOf
from saffe_cache.extraction.exporting import export_cache
from saffe_cache.extraction.extract import extract
from saffe_cache.inputs.pairs import pair_kind
from saffe_cache.sources.items import Columns, SourceItem
from saffe_cache.sources.registry import list_items, read_items
from saffe_cache.store.config import ExportConfig, InspectConfig
from saffe_cache.store.inspect import inspect_cache
from saffe_cache.store.parts import read_table, table_from_arrays, table_to_arrays, write_part, write_table
from saffe_cache.store.reader import open_cache
from saffe_cache.store.root import write_root
from saffe_cache.store.storage import Storage
from saffe_cache.store.table import TableBuilder


def write_lines(path: Path, *lines: object) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join((line if isinstance(line, str) else json.dumps(line)) + "\n" for line in lines))


def make_shop(folder: Path, *queries: object, dev: bool = False) -> Path:
    """Four photos of a split, and its queries."""
    for split in ("train", *(["dev"] if dev else [])):
        for number in range(4):
            draw(folder / split / f"{number}.png", number + (100 if split == "dev" else 0))
        write_lines(folder / split / "metadata.jsonl", *({"file_name": f"{n}.png", "label": "shoe"} for n in range(4)))
    write_lines(folder / "train" / "queries.jsonl", *queries)
    return folder


def of_line(**fields: object) -> dict[str, object]:
    return {"reference": "0.png", "text": "in red", "targets": ["1.png", "2.png"]} | fields


def queries_of(folder: Path, columns: Columns | None = None) -> list[SourceItem]:
    return [item for item in read_items(str(folder), columns or Columns(), ()) if item.query is not None]


# ---- queries.jsonl ----


def test_lines_are_queries_after_all_photos(tmp_path: Path) -> None:
    fields = {"texts": ["a and b", "b and a"], "members": ["0.png", "3.png"], "group": "shoe", "id": "first"}
    lines = [of_line(), {key: value for key, value in of_line(**fields).items() if key != "text"}]
    items = read_items(str(make_shop(tmp_path, *lines, dev=True)), Columns(), ())
    assert [item.query is not None for item in items] == [False] * 8 + [True] * 2
    one, other = items[-2:]
    assert one.id == "train/queries/1"
    assert (one.split, one.captions, one.labels, one.problem, one.hashes) == ("train", ("in red",), (), "", {})
    assert one.query == QueryOf("train/0.png", ("train/1.png", "train/2.png"))
    assert (other.id, other.captions, other.labels) == ("train/queries/first", ("a and b", "b and a"), ("shoe",))
    assert other.query == QueryOf("train/0.png", ("train/1.png", "train/2.png"), ("train/0.png", "train/3.png"))


def test_queries_above_splits_take_that_of_their_photo(tmp_path: Path) -> None:
    make_shop(tmp_path, dev=True)
    (tmp_path / "train" / "queries.jsonl").unlink()
    write_lines(tmp_path / "queries.jsonl", {"reference": "dev/3.png", "text": "in red", "targets": "dev/0.png"})
    [query] = queries_of(tmp_path)
    assert (query.id, query.split, query.query) == ("dev/queries/1", "dev", QueryOf("dev/3.png", ("dev/0.png",)))


def test_queries_name_files_where_ids_are_a_column(tmp_path: Path) -> None:
    make_shop(tmp_path, of_line())
    write_lines(tmp_path / "train" / "metadata.jsonl", *({"file_name": f"{n}.png", "uid": f"u{n}"} for n in range(4)))
    [query] = queries_of(tmp_path, Columns(id="uid"))
    assert query.query == QueryOf("train/u0", ("train/u1", "train/u2"))


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("{nonsense", r"queries.jsonl:2: expected a JSON object with reference, text or texts, and targets, found"),
        (
            {"reference": "0.png", "text": "in red"},
            r"queries.jsonl:2: .* its fields are reference, text. Correct the line",
        ),
        ({"reference": "0.png", "targets": ["1.png"]}, r"its fields are reference, targets"),
        (of_line(reference=["0.png", "1.png"]), r"reference is \['0.png', '1.png'\], expected the name of a photo"),
        (of_line(targets=[1]), r"targets is \[1\], expected a list of names of photos"),
        (of_line(id=1), r"queries.jsonl:2: id '1' is that of .*queries.jsonl:1 too. Give each query its own id"),
    ],
)
def test_invalid_line_is_refused(tmp_path: Path, line: object, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        read_items(str(make_shop(tmp_path, of_line(), line)), Columns(), ())


@pytest.mark.parametrize(
    ("fields", "problem"),
    [
        ({"reference": "9.png"}, "its reference '9.png' is not among the items. Add the photo, or remove the query"),
        ({"reference": "dev/1.png"}, "its reference 'dev/1.png' is in split dev, expected train. Move one of them"),
        ({"text": "  "}, "empty text"),
        ({"text": None}, "empty text"),
        ({"text": 5}, "a number as text"),
        ({"targets": []}, "no targets"),
        ({"targets": ["9.png", "dev/1.png"]}, "none of its targets is among the items of split train; for instance"),
        ({"targets": ["0.png"]}, "its reference 'train/0.png' is one of its targets. Leave it out of them"),
        ({"reference": "3.png"}, "its reference train/3.png cannot be used: unreadable image: the file is empty"),
        ({"targets": ["3.png"]}, "none of its 1 targets can be used: unreadable image: the file is empty"),
    ],
)
def test_unusable_query_has_a_problem(tmp_path: Path, fields: dict[str, object], problem: str) -> None:
    make_shop(tmp_path, of_line(**fields), dev=True)
    (tmp_path / "train" / "3.png").write_bytes(b"")
    [query] = queries_of(tmp_path)
    assert query.problem.startswith(problem)


def test_table_as_data_says_that_queries_are_not_read(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    make_shop(tmp_path, of_line())
    with caplog.at_level(logging.WARNING):
        assert queries_of(tmp_path / "train" / "metadata.jsonl") == []
    assert "train/queries.jsonl is not read: name the folder as --data to have its queries" in caplog.text


def test_missing_targets_are_left_out_and_counted(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    make_shop(tmp_path, of_line(targets=["9.png", "1.png"], members=["8.png", "2.png"]))
    with caplog.at_level(logging.WARNING):
        [query] = queries_of(tmp_path)
    assert query.query == QueryOf("train/0.png", ("train/1.png",), ("train/2.png",))
    assert "2 targets and members of queries are left out" in caplog.text
    assert "9.png, 8.png" in caplog.text


def test_fewer_items_keep_the_queries_among_them(tmp_path: Path) -> None:
    names = [f"{number}.png" for number in range(4)]
    lines = [of_line(reference=a, targets=[b]) for a in names for b in names if a != b]
    items = list_items(str(make_shop(tmp_path, *lines)), Columns(), (), {"train": 2})
    photos = {item.id for item in items if item.query is None}
    assert len(photos) == 2
    assert sorted((item.query.reference, *item.query.targets) for item in items if item.query) == sorted(
        [tuple(sorted(photos)), tuple(sorted(photos, reverse=True))]
    )


# ---- the item table ----


def photo(number: int) -> Item:
    return Item(id=f"p{number}", split="train", hashes={"image": hashlib.sha256(b"%d" % number).digest()})


def query(name: str, reference: int, targets: tuple[int, ...], text: str = "in red", problem: str = "") -> Item:
    of = QueryOf(f"p{reference}", tuple(f"p{number}" for number in targets), (f"p{reference}",))
    return Item(id=name, split="train", captions=(text, "else"), labels=("shoe",), query=of, problem=problem)


def build(*items: Item, table: ItemTable | None = None) -> ItemTable:
    builder = TableBuilder(table, ("a {}",))
    for item in items:
        builder.add(item)
    return builder.build()


def check_queries(found: ItemTable, expected: ItemTable) -> None:
    check_equal(found, expected)
    np.testing.assert_array_equal(found.references, expected.references)
    assert [row.tolist() for row in found.targets] == [row.tolist() for row in expected.targets]
    assert [row.tolist() for row in found.members] == [row.tolist() for row in expected.members]


@pytest.fixture
def table() -> ItemTable:
    return build(*map(photo, range(4)), query("a", 2, (3, 0)), query("b", 1, (0,), problem="empty text"))


def test_table_keeps_queries_apart_from_items(table: ItemTable) -> None:
    assert table.references.tolist() == [-1, -1, -1, -1, 2, -2]
    assert table.targets[4].tolist() == [3, 0]
    assert table.members[4].tolist() == [2]
    assert not len(table.targets[0])
    assert table.in_split("train").tolist() == [0, 1, 2, 3]
    assert table.queries_in("train").tolist() == [4]
    assert not len(table.queries_in("test"))
    assert build(photo(0)).queries_in("train").tolist() == []


def test_texts_of_queries_describe_no_photos(table: ItemTable) -> None:
    with pytest.raises(ValueError, match="neither captions nor labels"):
        pair_kind(table)
    assert pair_kind(build(replace(photo(9), labels=("shoe",)), table=table)) == "classes"
    assert pair_kind(build(replace(photo(9), captions=("a shoe",)), table=table)) == "captions"


def test_queries_are_read_back_equal(tmp_path: Path, table: ItemTable) -> None:
    check_queries(read_back(tmp_path / "2", table), table)
    storage = Storage(tmp_path / "1")
    check_queries(read_table(storage, write_columns(storage, table_to_arrays(table))), table)
    assert read_back(tmp_path / "3", build(photo(0))).queries is None


def test_queries_are_added_to_a_table_without(tmp_path: Path) -> None:
    storage = Storage(tmp_path)
    root = root_of(*write_table(storage, build(*map(photo, range(4)))))
    write_root(storage, root)
    builder = TableBuilder(read_table(storage, root), ("a {}",))
    assert builder.add(query("a", 2, (3, 0)))
    part = builder.part()
    assert part is not None
    check_queries(read_table(storage, root_of(*write_part(storage, root, part))), builder.build())


@pytest.mark.parametrize(
    ("name", "values", "message"),
    [
        ("queries/references", [-3, -1, -1, -1, 2, -2], "reference has -3 to 2, expected -2 to 5"),
        ("queries/references", [-1], r"reference is \(1,\) int64, expected \(6,\) int64"),
        ("queries/targets/values", [6, 0], "targets has 0 to 6, expected 0 to 5"),
        ("queries/members/offsets", [0, 1], "members has 1 items, expected 6"),
    ],
)
def test_damaged_query_columns_are_refused(table: ItemTable, name: str, values: list[int], message: str) -> None:
    arrays = table_to_arrays(table) | {name: np.array(values, np.int64)}
    with pytest.raises(CacheError, match=message):
        table_from_arrays(arrays, "here")


@pytest.mark.parametrize(
    ("changed", "what"),
    [
        (query("a", 2, (3, 0), "in blue"), "captions"),
        (query("a", 1, (3, 0)), "reference, targets or members"),
        (query("a", 2, (3,)), "reference, targets or members"),
        (query("a", 2, (3, 0, 1)), "reference, targets or members"),
    ],
)
def test_changed_query_is_reported(table: ItemTable, changed: Item, what: str) -> None:
    builder = TableBuilder(table, ("a {}",))
    assert not builder.add(query("a", 2, (3, 0)))
    assert builder.add(changed)
    assert builder.changed == {"a": what}
    with pytest.raises(CacheError, match=f"1 items have changed since they were extracted: 'a' .{what}"):
        builder.build()


def test_query_may_gain_new_photos_as_targets(table: ItemTable) -> None:
    builder = TableBuilder(table, ("a {}",))
    wanted = query("a", 2, (3, 4, 0, 5))
    assert not builder.add(wanted)
    assert builder.add(photo(4))
    assert builder.add(wanted)
    assert builder.build().targets[4].tolist() == [3, 6, 0]
    assert not builder.changed


def test_query_without_its_photo_is_refused() -> None:
    with pytest.raises(ValueError, match="a: its reference 'p1' is not in the table"):
        build(photo(0), query("a", 1, (0,)))


def test_repaired_query_replaces_an_unusable_one(table: ItemTable) -> None:
    repaired = build(query("b", 1, (0,)), table=table)
    assert repaired.references.tolist() == [-1, -1, -1, -1, 2, 1]


# ---- extraction ----


def test_texts_of_queries_are_encoded(tmp_path: Path, tiny_model: Callable[[str], Path]) -> None:
    config = tiny_config(tmp_path, tiny_model, train=5)
    lines = [
        {"reference": "000.png", "texts": ["in red", "a red one"], "targets": ["001.png", "002.png"]},
        {"reference": "001.png", "text": "without sleeves", "targets": ["000.png"], "members": ["003.png"]},
    ]
    write_lines(Path(config.data) / "train" / "queries.jsonl", *lines)
    cache = open_cache(extract(config))
    table, texts = cache.table, cache.table.inputs["text"].texts
    queries = table.queries_in("train")
    assert texts is not None
    assert table.ids.take(table.references[queries]) == ["train/000.png", "train/001.png"]
    assert [texts[row] for row in table.captions.take(queries).values] == ["in red", "a red one", "without sleeves"]
    assert cache.encoder("text").usable(table.captions.take(queries).values).all()
    assert len(table.in_split("train")) == 5
    said = inspect_cache(InspectConfig(cache=config.cache))
    assert "split train: 5 items, 0 unreadable; 2 composed queries, 0 unusable" in said
    assert "split dev: 6 items, 0 unreadable\n" in said
    assert "reference 'train/001.png'\n  text 'without sleeves'\n  1 targets, such as 'train/000.png'" in said
    out = tmp_path / "plain"
    export_cache(ExportConfig(cache=config.cache, file=str(out), decoded=True, format="safetensors"))
    last = json.loads((out / "items.jsonl").read_text().splitlines()[-1])
    assert (last["reference"], last["targets"], last["members"]) == (
        "train/001.png",
        ["train/000.png"],
        ["train/003.png"],
    )
    write_lines(Path(config.data) / "train" / "queries.jsonl", lines[0], lines[1] | {"text": "with sleeves"})
    with pytest.raises(CacheError, match=r"'train/queries/2' \(captions\). Use --changed reencode"):
        extract(config)
    again = open_cache(extract(replace(config, changed="reencode")))
    assert again.encoder("text").usable(again.table.captions.take(queries).values).all()
