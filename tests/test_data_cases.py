"""Every kind of data in the table of docs/data.md: what is read, what is left out, and what is said."""

from __future__ import annotations

import logging
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from data_cases import CASES, PAGE, Case, written

from saffe_cache.core.features import CacheError
from saffe_cache.extraction.config import ExtractConfig
from saffe_cache.extraction.extract import extract
from saffe_cache.sources.decoding import decode
from saffe_cache.sources.registry import read_items

pytestmark = pytest.mark.usefixtures("own_datasets_cache")


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.found[:60])
def test_each_kind_of_data_is_read_or_refused(
    case: Case,
    tmp_path: Path,
    tiny_model: Callable[[str], Path],
    caplog: pytest.LogCaptureFixture,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setitem(sys.modules, "pillow_heif", None)
    data = case.make(tmp_path / "data")
    said = []
    with caplog.at_level(logging.WARNING):
        try:
            items = read_items(data, case.columns, ())
        except ValueError as error:
            items, said = [], [str(error)]
    good = [item for item in items if not item.problem]
    assert tuple(item.id for item in good) == case.usable
    assert tuple(item.id for item in items if item.problem) == case.unusable
    if case.encodes:
        encoder = {name: str(tiny_model(model)) for name, model in (("image", "dinov2"), ("text", "bert"))}
        if any(item.captions or item.labels for item in items) or "text encoder" not in case.found:
            encoder.pop("text")
        config = ExtractConfig(data=data, cache=str(tmp_path / "cache.zarr"), encoder=encoder, max_invalid=0.4)
        try:
            with caplog.at_level(logging.INFO):
                extract(config)
        except (CacheError, ValueError) as error:
            said.append(str(error))
    else:
        for item in good:
            for modality, media in item.media.items():
                decode(modality, media.read())
    said += [record.getMessage() for record in caplog.records if case.encodes or record.levelno >= logging.WARNING]
    said += [f"{item.id}: {item.problem}" for item in items if item.problem]
    text = "\n".join(said).replace(str(tmp_path / "data"), "DATA")
    assert case.message in text
    assert case.message or not text


def test_table_of_kinds_is_the_cases() -> None:
    page = PAGE.read_text(encoding="utf-8")
    assert written(page) == page, "run python tests/data_cases.py"
