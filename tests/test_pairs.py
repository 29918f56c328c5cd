"""The pairs of a split against a loop over its items, and what else looks at all items at once."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from saffe_cache.core.items import Inputs, ItemTable, Ragged
from saffe_cache.core.texts import Coded, Texts
from saffe_cache.inputs.pairs import select_pairs

NUM_PHOTOS, NUM_TEXTS, NUM_CLASSES = 5, 6, 3


@st.composite
def tables(draw: st.DrawFn) -> ItemTable:
    count = draw(st.integers(1, 9))

    def rows(end: int, most: int, size: int = count) -> Ragged:
        return Ragged.from_rows(
            draw(st.lists(st.lists(st.integers(0, end - 1), max_size=most), min_size=size, max_size=size))
        )

    def strings(*of: str) -> list[str]:
        return draw(st.lists(st.sampled_from(of), min_size=count, max_size=count))

    photos = draw(st.lists(st.integers(-1, NUM_PHOTOS - 1), min_size=count, max_size=count))
    return ItemTable(
        ids=Texts.of(f"item {number}" for number in range(count)),
        splits=Coded.of(strings("train", "test")),
        problems=Texts.of(strings("", "", "", "broken")),
        rows={"image": np.array(photos, np.int64)},
        captions=rows(NUM_TEXTS, 4),
        labels=rows(NUM_CLASSES, 3),
        class_names=("a", "b", "c"),
        class_texts=rows(NUM_TEXTS, 3, NUM_CLASSES),
        inputs={"image": Inputs(np.zeros((NUM_PHOTOS, 32), np.uint8))},
    )


def encoder(broken: set[int]) -> Any:
    def usable(rows: np.ndarray) -> np.ndarray:
        return (rows >= 0) & ~np.isin(rows, list(broken))

    return SimpleNamespace(manifest=SimpleNamespace(modality="image"), usable=usable)


def by_item(table: ItemTable, photos: set[int], texts: set[int], kind: str, least: int) -> tuple[list[Any], int]:
    """Id, photo, texts and labels of each pair in order, and the number of unusable items."""
    found: dict[int, tuple[str, list[int], list[int]]] = {}
    unusable = 0
    for item, split in enumerate(table.splits):
        labels, photo = table.labels[item].tolist(), int(table.rows["image"][item])
        own = [row for label in labels for row in table.class_texts[label].tolist()]
        own = table.captions[item].tolist() if kind == "captions" else own
        if split != "train":
            continue
        if table.problems[item] or photo in photos | {-1} or set(own) & texts or len(set(own)) < least:
            unusable += 1
            continue
        of_photo = found.setdefault(photo, (table.ids[item], [], []))
        for kept, more in zip(of_photo[1:], (own, labels), strict=True):
            kept += [one for one in dict.fromkeys(more) if one not in kept]
    return [(name, photo, texts, labels) for photo, (name, texts, labels) in found.items()], unusable


broken_rows = st.sets(st.integers(0, NUM_TEXTS - 1), max_size=1)


@settings(deadline=None, max_examples=300, derandomize=True)
@given(tables(), broken_rows, broken_rows, st.sampled_from(["captions", "classes"]), st.booleans())
def test_pairs_are_those_of_a_loop_over_items(
    table: ItemTable, photos: set[int], texts: set[int], kind: Any, first_paired: bool
) -> None:
    expected, unusable = by_item(table, photos, texts, kind, 1 + first_paired)
    if not expected:
        words = f"none of its {unusable} items" if unusable else "has no items"
        with pytest.raises(ValueError, match=words):
            select_pairs(table, encoder(photos), encoder(texts), "train", kind, first_paired=first_paired)
        return
    found = select_pairs(table, encoder(photos), encoder(texts), "train", kind, first_paired=first_paired)
    assert found.num_unusable == unusable
    assert (found.ids, found.rows.tolist()) == ([one[0] for one in expected], [one[1] for one in expected])
    assert [rows.tolist() for rows in found.texts] == [one[2][first_paired:] for one in expected]
    assert [rows.tolist() for rows in found.labels] == [one[3] for one in expected]
    if first_paired:
        assert found.paired_texts is not None
        assert found.paired_texts.tolist() == [one[2][0] for one in expected]


any_text = st.text(st.characters(codec=None), max_size=5)


@settings(deadline=None, max_examples=200, derandomize=True)
@given(st.lists(any_text, max_size=8), any_text, st.data())
def test_columns_of_strings_are_like_tuples(strings: list[str], other: str, data: st.DataObject) -> None:
    expected = tuple(strings)
    chosen = data.draw(st.lists(st.integers(0, len(strings) - 1))) if strings else []
    part = data.draw(st.slices(len(strings)))
    for column in (Texts.of(strings), Coded.of(strings)):
        assert column == expected
        assert expected == column
        assert (tuple(column), len(column), column[part]) == (expected, len(expected), expected[part])
        assert column.take(np.array(chosen, np.int64)) == [strings[place] for place in chosen]
        assert type(column).joined([column, type(column).of([other]), column]) == (*expected, other, *expected)  # type: ignore[list-item]
        assert (other in column) == (other in expected)
        assert column != (*expected, other)
        for text in expected:
            assert (column.index(text), column.count(text)) == (expected.index(text), expected.count(text))
    coded = Coded.of(strings)
    assert coded.counts() == {text: expected.count(text) for text in sorted(set(expected))}
    assert coded.are(other).tolist() == [text == other for text in expected]
    Texts.of(strings).check_decodes()
