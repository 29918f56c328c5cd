"""The item table on disk, and its growth."""

from __future__ import annotations

import hashlib
from dataclasses import replace
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from store_cases import memory_folder

from saffe_cache.core.features import CacheError
from saffe_cache.core.items import Inputs, Item, ItemTable, Ragged
from saffe_cache.core.texts import Coded, Texts
from saffe_cache.store import table as table_module
from saffe_cache.store.parts import (
    Part,
    StoredInputs,
    check_whole,
    merge,
    read_table,
    remove_unlisted,
    table_to_arrays,
    write_part,
    write_table,
)
from saffe_cache.store.root import RootManifest, existing_root, write_root
from saffe_cache.store.storage import Storage, describe_group, read_group, write_group
from saffe_cache.store.table import TableBuilder, text_hash

pytestmark = [pytest.mark.filterwarnings("error"), pytest.mark.usefixtures("no_fsync")]
PROMPTS = ("a photo of a {}.", "{}")


def digest(text: str) -> bytes:
    return hashlib.sha256(text.encode()).digest()


def photo(number: int, **fields: object) -> Item:
    item = Item(id=f"photo {number}", split="train", hashes={"image": digest(f"photo {number}")})
    return replace(item, **fields)  # type: ignore[arg-type]


def build(*items: Item, table: ItemTable | None = None) -> ItemTable:
    builder = TableBuilder(table, PROMPTS)
    for item in items:
        builder.add(item)
    return builder.build()


def root_of(*tables: str, version: int = 2) -> RootManifest:
    return RootManifest(tables, (), version)


def read_back(folder: Path, table: ItemTable) -> ItemTable:
    return read_table(Storage(folder), root_of(*write_table(Storage(folder), table)))


def write_columns(storage: Storage, arrays: dict[str, np.ndarray]) -> RootManifest:
    """A table of format version 1."""
    write_group(storage, "tables/1", describe_group("saffe-items", arrays, {}), arrays)
    return root_of("1", version=1)


def check_equal(found: ItemTable, expected: ItemTable) -> None:
    for name in ("ids", "splits", "problems", "class_names"):
        assert getattr(found, name) == getattr(expected, name)
    for name in ("captions", "labels", "class_texts"):
        for part in ("offsets", "values"):
            mine, theirs = getattr(getattr(found, name), part), getattr(getattr(expected, name), part)
            assert mine.dtype == theirs.dtype == np.int64
            np.testing.assert_array_equal(mine, theirs)
    assert found.rows.keys() == expected.rows.keys()
    for modality, rows in expected.rows.items():
        np.testing.assert_array_equal(found.rows[modality], rows)
    assert found.inputs.keys() == expected.inputs.keys()
    for modality, inputs in expected.inputs.items():
        np.testing.assert_array_equal(found.inputs[modality].content_hash, inputs.content_hash)
        assert found.inputs[modality].texts == inputs.texts


any_text = st.text(st.characters(codec=None), max_size=12)
"""With lone surrogates, NUL, combining marks and what else Python's strings can hold."""


@st.composite
def tables(draw: st.DrawFn) -> ItemTable:
    def texts(size: int, unique: bool = False) -> tuple[str, ...]:
        return tuple(draw(st.lists(any_text, min_size=size, max_size=size, unique=unique)))

    def ragged(size: int, end: int) -> Ragged:
        numbers = st.lists(st.integers(0, end - 1), max_size=3) if end else st.just([])
        return Ragged.from_rows(draw(st.lists(numbers, min_size=size, max_size=size)))

    def column(size: int, end: int) -> np.ndarray:
        return np.array(draw(st.lists(st.integers(-1, end - 1), min_size=size, max_size=size)), np.int64)

    def hashes(size: int) -> np.ndarray:
        return np.frombuffer(draw(st.binary(min_size=32 * size, max_size=32 * size)), np.uint8).reshape(size, 32)

    count, classes, num_texts = draw(st.integers(0, 3)), draw(st.integers(0, 2)), draw(st.integers(0, 3))
    inputs = {
        "text": Inputs(hashes(num_texts), Texts.of(texts(num_texts))),
        "image": Inputs(hashes(2)),
        "video": Inputs(hashes(1)),
    }
    inputs = {name: inputs[name] for name in draw(st.sets(st.sampled_from(sorted(inputs))))}
    num_texts, num_images, num_videos = (len(inputs.get(name, ())) for name in ("text", "image", "video"))
    return ItemTable(
        ids=Texts.of(texts(count, unique=True)),
        splits=Coded.of(texts(count)),
        problems=Texts.of(texts(count)),
        rows={"image": column(count, num_images), "audio": column(count, 0), "video": column(count, num_videos)},
        captions=ragged(count, num_texts),
        labels=ragged(count, classes),
        class_names=texts(classes, unique=True),
        class_texts=ragged(classes, num_texts),
        inputs=inputs,
    )


@settings(deadline=None, max_examples=40, derandomize=True)
@given(tables())
def test_table_is_read_back_equal(table: ItemTable) -> None:
    with memory_folder() as folder:
        check_equal(read_back(folder / "2", table), table)
        storage = Storage(folder / "1")
        check_equal(read_table(storage, write_columns(storage, table_to_arrays(table))), table)


def test_unusual_texts_are_read_back_equal(tmp_path: Path) -> None:
    strange = ("", "\0", "\ud800 alone", "\ud83d\ude00 as two halves", "😀", "e\u0301", "\u202eright to left", "\r\n")
    table = build(photo(0, captions=strange, labels=strange[2:5]))
    found = read_back(tmp_path, table)
    check_equal(found, table)
    assert found.inputs["text"].texts is not None
    assert found.inputs["text"].texts[: len(strange)] == strange


def test_equal_inputs_are_one_row() -> None:
    table = build(
        photo(0, captions=("a", "b", "a"), labels=("x_y",)),
        photo(1, hashes={"image": digest("photo 0"), "audio": digest("sound")}, captions=("b",), labels=("x_y", "z")),
    )
    assert table.rows["image"].tolist() == [0, 0]
    assert table.rows["audio"].tolist() == [-1, 0]
    assert [row.tolist() for row in table.captions] == [[0, 1, 0], [1]]
    assert table.class_names == ("x_y", "z")
    assert [row.tolist() for row in table.labels] == [[0], [0, 1]]
    texts = table.inputs["text"].texts
    assert texts == ("a", "b", "a photo of a x y.", "x y", "a photo of a z.", "z")
    assert [row.tolist() for row in table.class_texts] == [[2, 3], [4, 5]]
    assert table.inputs["text"].content_hash.tobytes() == b"".join(map(text_hash, texts))
    assert table.inputs["image"].content_hash.tobytes() == digest("photo 0")


names = st.sampled_from("abcdef")
new_items = st.builds(
    lambda number, image, captions, labels, problem: Item(
        id=f"item {number}",
        split="train",
        hashes={"image": digest(image)},
        captions=tuple(captions),
        labels=tuple(labels),
        problem=problem,
    ),
    st.integers(0, 30),
    names,
    st.lists(names, max_size=3),
    st.lists(names, max_size=2),
    st.sampled_from(["", "", "broken"]),
)


@settings(deadline=None, max_examples=60, derandomize=True)
@given(st.lists(new_items, max_size=12, unique_by=lambda item: item.id), st.integers(0, 12))
def test_rows_never_move_and_adding_again_changes_nothing(items: list[Item], cut: int) -> None:
    """Grown in two sessions, by way of the disk's form or not, the table is that of one session."""
    old, new = build(*items[:cut]), build(*items)
    check_equal(build(*items[cut:], table=old), new)
    for modality, inputs in old.inputs.items():
        count = len(inputs)
        np.testing.assert_array_equal(new.inputs[modality].content_hash[:count], inputs.content_hash)
    again = TableBuilder(new, PROMPTS)
    assert not any(again.add(item) for item in items)
    check_equal(again.build(), new)


@pytest.mark.parametrize(
    "change",
    [
        {"split": "test"},
        {"hashes": {"image": digest("another")}},
        {"hashes": {}},
        {"captions": ("one",)},
        {"captions": ("two", "one")},
        {"labels": ("x",)},
        {"labels": ()},
    ],
)
def test_changed_content_is_refused(change: dict[str, object]) -> None:
    item = photo(1, captions=("one", "two"), labels=("x", "y"))
    other, table = replace(item, **change), build(photo(0), item)  # type: ignore[arg-type]
    part = {"hashes": "file"}.get(next(iter(change)), next(iter(change)))
    with pytest.raises(CacheError, match=rf"1 items have changed since.*'photo 1' \({part}\)"):
        build(other, table=table)
    builder = TableBuilder(table, PROMPTS, may_change=True)
    assert builder.add(other)
    assert builder.changed == {"photo 1": part}
    changed, fresh = builder.build(), build(photo(0), other)
    assert (changed.ids, changed.splits) == (fresh.ids, fresh.splits)
    assert changed.rows["image"][0] == 0
    for modality, inputs in table.inputs.items():
        np.testing.assert_array_equal(changed.inputs[modality].content_hash[: len(inputs)], inputs.content_hash)


def test_corrected_item_keeps_its_place() -> None:
    broken = photo(1, hashes={}, problem="no such file")
    old = build(photo(0), broken, photo(2, labels=("x",)))
    assert old.problems == ("", "no such file", "")
    assert old.rows["image"].tolist() == [0, -1, 1]
    builder = TableBuilder(old, PROMPTS)
    assert not builder.add(replace(broken, problem="still none"))
    assert builder.add(photo(1, captions=("now it is there",)))
    assert not builder.add(photo(2, problem="gone"))  # a usable item's rows are there, whatever became of its file
    table = builder.build()
    assert table.ids == old.ids
    assert table.problems == ("", "", "")
    assert table.rows["image"].tolist() == [0, 2, 1]
    assert table.captions[1].tolist() == [2]


def test_inputs_of_unusable_items_are_not_extracted() -> None:
    table = build(photo(0, problem="broken", captions=("c",), labels=("x",)))
    assert not table.inputs
    assert table.class_names == ()
    assert table.in_split("train").tolist() == [0]


def test_a_table_that_lacks_a_column_is_refused(tmp_path: Path) -> None:
    storage = Storage(tmp_path)
    root = write_columns(storage, table_to_arrays(build(photo(0))))
    text = storage.read("tables/1/zarr.json").decode()
    storage.write("tables/1/zarr.json", text.replace('"rows/image"', '"rows/other"').encode())
    with pytest.raises(CacheError, match=r"tables/1.*rows/other"):
        read_table(storage, root)


@pytest.mark.parametrize("damage", ["missing", "flipped", "short"])
@pytest.mark.parametrize("column", ["ids/utf8", "rows/image", "inputs/image/content_hash", "captions/offsets"])
def test_damaged_columns_are_refused(tmp_path: Path, column: str, damage: str) -> None:
    """Zarr alone would take a missing chunk for zeros: a table of wrong pairs."""
    storage = Storage(tmp_path)
    root = write_columns(storage, table_to_arrays(build(photo(0), photo(1))))
    [chunk] = [path for path in (tmp_path / "tables/1" / column / "c").rglob("0") if path.is_file()]
    data = chunk.read_bytes()
    chunk.unlink()
    if damage != "missing":
        chunk.write_bytes(data[:-1] if damage == "short" else bytes([data[0] ^ 1]) + data[1:])
    with pytest.raises(CacheError, match=rf"tables/1.*{column}"):
        read_table(storage, root)


@pytest.mark.parametrize(
    ("column", "values", "words"),
    [
        ("splits/offsets", np.array([0, 5]), "splits/offsets do not ascend from 0 to the length of their values"),
        ("ids/offsets", np.array([0, 7, 14], np.float32), "ids/offsets do not ascend"),
        ("ids/offsets", np.array([[0, 7, 14]]), "ids/offsets do not ascend"),
        ("captions/offsets", np.array([0, 2, 1]), "captions/offsets do not ascend"),
        ("captions/values", np.array([0.0], np.float32), "captions/offsets do not ascend"),
        ("captions/values", np.array([3]), "captions has 3 to 3, expected 0 to 2"),
        ("labels/values", np.array([-1]), "labels has -1 to -1, expected 0 to 0"),
        ("rows/image", np.array([0, 2]), "rows/image has 0 to 2, expected -1 to 1"),
        ("rows/image", np.array([0]), r"rows/image is \(1,\) int64, expected \(2,\) int64"),
        ("rows/audio", np.array([-1, 0]), "rows/audio has -1 to 0, expected -1 to -1"),
        ("ids/utf8", np.frombuffer(b"photo 0photo 0", np.uint8), "ids has a duplicate entry"),
        ("ids/utf8", np.frombuffer(b"photo 0photo \xff", np.uint8), "can't decode byte 0xff"),
        ("inputs/image/content_hash", np.zeros((2, 31), np.uint8), r"content_hash is \(2, 31\) uint8"),
        ("inputs/text/content_hash", np.zeros((4, 32), np.uint8), "inputs/text has 4 hashes of 3 texts"),
        ("class_texts/offsets", np.array([0, 0, 2]), r"its columns have \[2, 2, 2, 2, 2\] items and 2 class"),
    ],
)
def test_contradictory_columns_are_refused(tmp_path: Path, column: str, values: np.ndarray, words: str) -> None:
    """With checksums that are true of them: each would be an index out of range later, or a wrong pair."""
    storage = Storage(tmp_path)
    arrays = table_to_arrays(build(photo(0, captions=("a",), labels=("x",)), photo(1))) | {column: values}
    root = write_columns(storage, arrays)
    with pytest.raises(CacheError, match=rf"tables/1: .*{words}.*Restore it from a copy"):
        read_table(storage, root)


def test_growth_is_written_as_a_small_part(tmp_path: Path) -> None:
    """Until the small parts are as many rows as the large one."""
    storage, items = Storage(tmp_path), [photo(number, captions=(f"caption {number}",)) for number in range(60)]
    root = root_of(*write_table(storage, build(*items[:40])))
    numbers = []
    for count in range(41, 61):
        builder = TableBuilder(read_table(storage, root), PROMPTS)
        assert [builder.add(item) for item in items[:count]] == [False] * (count - 1) + [True]
        part = builder.part()
        assert part is not None
        assert part.numbers.tolist() == [count - 1]
        root = root_of(*write_part(storage, root, part))
        numbers.append(len(root.tables))
        check_equal(read_table(storage, root), build(*items[:count]))
    assert max(numbers) <= 5
    assert root.tables[0].startswith("1-")


def test_a_changed_item_replaces_its_old_version(tmp_path: Path) -> None:
    storage, items = Storage(tmp_path), [photo(number, captions=(f"caption {number}",)) for number in range(40)]
    old, other = build(*items), replace(items[3], captions=("another", "caption 5"), labels=("x",))
    root = root_of(*write_table(storage, old))
    builder = TableBuilder(old, PROMPTS, may_change=True)
    assert builder.add(other)
    assert builder.add(photo(40))
    part = builder.part()
    assert part is not None
    assert part.numbers.tolist() == [3, 40]
    grown = root_of(*write_part(storage, root, part))
    found = read_table(storage, grown)
    assert len(grown.tables) == 2
    check_equal(found, builder.build())
    assert found.captions[3].tolist() == [40, 5]
    assert (found.ids, found.class_names) == ((*old.ids, "photo 40"), ("x",))
    assert not TableBuilder(found, PROMPTS).add(other)


def test_columns_are_made_while_items_are_added(monkeypatch: pytest.MonkeyPatch) -> None:
    items = [
        photo(number, captions=(f"caption {number % 7}", f"caption {number}"), labels=(f"class {number % 3}",))
        for number in range(50)
    ]
    expected = build(*items)
    monkeypatch.setattr(table_module, "_MOST_PENDING", 4)
    builder = TableBuilder(build(*items[:5]), PROMPTS)
    assert [builder.add(item) for item in items] == [False] * 5 + [True] * 45
    assert not any(builder.add(item) for item in items[::-1])
    check_equal(builder.build(), expected)
    part = builder.part()
    assert part is not None
    assert part.numbers.tolist() == list(range(5, 50))
    assert part.table.inputs["text"].texts == [f"caption {number}" for number in range(5, 50)]
    check_equal(merge([Part(np.arange(5), build(*items[:5])), part]).table, expected)


def test_a_table_of_version_1_becomes_a_part_when_it_grows(tmp_path: Path) -> None:
    storage, items = Storage(tmp_path), [photo(number) for number in range(5)]
    root = write_columns(storage, table_to_arrays(build(*items[:4])))
    builder = TableBuilder(read_table(storage, root), PROMPTS)
    builder.add(items[4])
    part = builder.part()
    assert part is not None
    [name] = write_part(storage, root, part)
    assert name.startswith("2-")
    check_equal(read_table(storage, root_of(name)), build(*items))


def arrow_file(table: pa.Table) -> np.ndarray:
    sink = pa.BufferOutputStream()
    with pa.ipc.new_file(sink, table.schema) as writer:
        writer.write_table(table)
    return np.frombuffer(sink.getvalue(), np.uint8)


def with_column(table: pa.Table, name: str, values: pa.Array) -> pa.Table:
    return table.set_column(table.column_names.index(name), name, values)


@pytest.mark.parametrize(
    ("kind", "change", "words"),
    [
        ("items", lambda items: items.slice(0, 1), "found 1 rows of"),
        ("items", lambda items: items.drop_columns("image"), "image"),
        ("items", lambda items: with_column(items, "image", pa.array([0, None])), "without nulls"),
        ("items", lambda items: with_column(items, "image", pa.array([0, 2])), "rows/image has 0 to 2, expected -1 to"),
        ("items", lambda items: with_column(items, "image", pa.array([0.0, 1.0])), "image: double"),
        ("items", lambda items: with_column(items, "id", pa.array([b"a", b"a"], pa.large_binary())), "ids has a dupl"),
        ("items", lambda items: with_column(items, "id", pa.array([b"a", b"\xff"], pa.large_binary())), "decode byte"),
        (
            "items",
            lambda items: with_column(items, "id", pa.array([b"\xc3", b"\xa4"], pa.large_binary())),
            "within a ch",
        ),
        ("items", lambda items: with_column(items, "number", pa.array([0, 2])), "do not continue those before"),
        ("items", lambda items: with_column(items, "number", pa.array([0, 0])), "do not continue those before"),
        ("items", lambda items: b"no Arrow file", "File is too small"),
    ],
)
def test_contradictory_files_are_refused(tmp_path: Path, kind: str, change: object, words: str) -> None:
    """With checksums that are true of them."""
    storage = Storage(tmp_path)
    [name] = write_table(storage, build(photo(0, captions=("a",), labels=("x",)), photo(1)))
    attributes, arrays = read_group(storage, f"tables/{name}", "saffe-items", (2,))
    with pa.ipc.open_file(pa.BufferReader(arrays[kind])) as file:
        changed = change(file.read_all())  # type: ignore[operator]
    arrays[kind] = np.frombuffer(changed, np.uint8) if isinstance(changed, bytes) else arrow_file(changed)
    fields = {key: attributes[key] for key in ("encoding-version", "rows")}
    write_group(storage, f"tables/{name}", describe_group("saffe-items", arrays, fields), arrays)
    with pytest.raises(CacheError, match=rf"tables/{name}.*{words}.*Restore it from a copy"):
        check_whole(storage, root_of(name))


def test_inputs_are_read_from_the_part_that_replaced_theirs(tmp_path: Path) -> None:
    """On a store whose files cannot be mapped, a reader may come late."""
    url, items = (
        f"memory://{tmp_path.name}/late",
        [photo(number, captions=(f"caption {number}",)) for number in range(9)],
    )
    storage = Storage(url)
    root = root_of(*write_table(storage, build(*items[:3])))
    write_root(storage, root)
    was, late = existing_root(storage), read_table(storage, root)
    builder = TableBuilder(read_table(storage, root), PROMPTS)
    for item in items:
        builder.add(item)
    part = builder.part()
    assert part is not None
    grown = root_of(*write_part(storage, root, part))
    write_root(storage, grown, was)
    remove_unlisted(storage, grown)
    assert len(grown.tables) == 1
    assert late.inputs["text"].texts == ("caption 0", "caption 1", "caption 2")
    storage.remove_folder(f"tables/{grown.tables[0]}")
    with pytest.raises(CacheError, match=r"zarr\.json is missing"):
        assert late.inputs["image"].content_hash


def test_inputs_that_another_thread_has_read_meanwhile() -> None:
    whole, others = Inputs(np.zeros((3, 32), np.uint8)), []

    def read() -> Inputs:
        if not others:
            others.append(None)
            others.append(inputs.content_hash)  # as another thread that begins later and ends earlier
        return whole

    inputs = StoredInputs(3, read)
    assert inputs.content_hash is whole.content_hash
    assert others[1] is whole.content_hash
