"""Every form of data yields the same items: a matrix of source forms, columns and splits."""

from __future__ import annotations

import hashlib
from pathlib import Path

import pytest
from data_forms import FORMS, by_split, drawn

from saffe_cache.sources.items import Columns
from saffe_cache.sources.registry import read_items

SPLITS = (("train",), ("train", "test"))
MATRIX = [(form, roles, splits) for form, one in FORMS.items() for roles in one.roles for splits in SPLITS]


@pytest.fixture(autouse=True)
def own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of the datasets library, which copies what it reads."""
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "cache")


@pytest.mark.parametrize(("form", "roles", "splits"), MATRIX)
def test_forms_have_equal_items(form: str, roles: str, splits: tuple[str, ...], tmp_path: Path) -> None:
    items = drawn(splits, roles.split(","))
    made = FORMS[form].make(tmp_path / "data", items)
    expected = {
        f"{split}/{FORMS[form].id_of(one, number)}": (
            split,
            one.captions,
            (one.label,) if one.label else (),
            {"image": hashlib.sha256(one.photo).digest()},
            "",
        )
        for split, of_split in by_split(items).items()
        for number, one in enumerate(of_split)
    }
    found = read_items(made, Columns(), (), streaming=FORMS[form].streaming)
    assert {item.id: (item.split, item.captions, item.labels, item.hashes, item.problem) for item in found} == expected
    assert [item.media["image"].read() for item in found] == [
        next(one.photo for one in items if hashlib.sha256(one.photo).digest() == item.hashes["image"]) for item in found
    ]
    last = read_items(made, Columns(), splits[-1:], {splits[-1]: 1}, streaming=FORMS[form].streaming)
    assert [item.split for item in last] == [splits[-1]]
