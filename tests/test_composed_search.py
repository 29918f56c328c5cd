"""A photo and a text search an index as the composed protocol ranks; other runs say that they cannot."""

from __future__ import annotations

import json
import zlib
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest
from quick_runs import quick_train

import saffe_cache as sc
from data.composed import draw_composed
from saffe_cache.evaluation.details import FAM, Details, read_details
from saffe_cache.fusion.registry import FUSIONS
from saffe_cache.inference.config import IndexConfig, SearchConfig
from saffe_cache.inference.indexing import index
from saffe_cache.inference.search_index import SearchIndex, search
from saffe_cache.inference.serving import ServedIndex
from saffe_cache.report.report import ReportConfig, make_report

COMPOSING = ("concat", *(name for name, entry in FUSIONS.items() if entry.scores == "own"))
SHORT: dict[str, Any] = {"epochs": 1, "batch_size": 16, "control_epochs": 0}


class World(NamedTuple):
    data: Path
    cache: str


class Ready(NamedTuple):
    """A run that was trained on composed queries, an index of test photos and the evaluation of test queries."""

    run: str
    index: SearchIndex
    details: Details
    evaluated: str


def in_known_words(line: str) -> str:
    """The line with texts of the tiny text encoder's own words, different ones for different texts."""
    row = json.loads(line)
    for name in {"texts", "captions"} & row.keys():
        digests = [zlib.crc32(text.encode()) for text in row[name]]
        row[name] = [" ".join(f"word{(digest >> shift) % 40}" for shift in (0, 8, 16)) for digest in digests]
    return json.dumps(row)


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory, tiny_model: Any) -> World:
    folder = tmp_path_factory.mktemp("composed")
    data = draw_composed(folder / "data", {"train": 4, "dev": 2, "test": 3}, seed=0, size=28)
    for listing in data.glob("*/*.jsonl"):
        listing.write_text("\n".join(map(in_known_words, listing.read_text().splitlines())))
    cache = sc.extract(
        data=str(data),
        cache=str(folder / "cache.zarr"),
        encoder={"image": str(tiny_model("dinov2")), "text": str(tiny_model("bert"))},
        layers={"image": (1, 2), "text": (1, 2)},
        device="cpu",
    )
    return World(data, cache)


@pytest.fixture(scope="module", params=COMPOSING)
def ready(request: pytest.FixtureRequest, world: World, tmp_path_factory: pytest.TempPathFactory) -> Ready:
    folder = tmp_path_factory.mktemp(request.param)
    run = quick_train(world.cache, folder / "run", fusion=request.param, pairs="composed", **SHORT)
    out = sc.evaluate(
        sc.EvaluateConfig(
            cache=world.cache, run=run, split="test", reference="kept", baselines="none", out=str(folder / "evaluated")
        )
    )
    config = IndexConfig(data=str(world.data), run=run, out=str(folder / "index"), splits=("test",), ridge=True)
    return Ready(run, SearchIndex.open(index(config).out, device="cpu"), read_details(Path(out)), out)


def asked(ready: Ready, world: World) -> list[tuple[str, Path, list[str]]]:
    """Text, reference photo and the first photos of each query, as the evaluation has them."""
    details = ready.details
    first = details.systems[FAM].first
    return [
        (text, world.data / details.photo_ids[place], [details.photo_ids[one] for one in row])
        for text, place, row in zip(details.texts, details.asking, first, strict=True)
    ]


def test_hits_are_in_the_order_of_the_composed_protocol(ready: Ready, world: World) -> None:
    queries = asked(ready, world)
    assert len(queries) == 24
    lines = [json.loads(line) for line in (world.data / "test" / "queries.jsonl").read_text().splitlines()]
    expected = {(line["texts"][0], line["reference"]) for line in lines}
    assert {(text, photo.name) for text, photo, _ in queries} == expected
    for text, photo, first in queries[::4]:
        hits = ready.index.search(text, image=photo, k=len(first))
        assert [hit.id for hit in hits] == first
        assert [hit.score for hit in hits] == sorted((hit.score for hit in hits), reverse=True)


def test_text_and_photo_alone_search_the_same_index(ready: Ready, world: World) -> None:
    text, photo, _ = asked(ready, world)[0]
    found = ready.index
    of_photo = [hit.id for hit in found.search(image=photo, k=99)]
    assert of_photo[0] == f"test/{photo.name}"
    of_both, of_text = ([hit.id for hit in found.search(text, image=one, k=99)] for one in (photo, None))
    assert set(of_text) == set(of_both) == set(of_photo) == set(found.ids)
    assert of_photo != of_both != of_text
    vectors = found.fusion.embed_images([photo])
    np.testing.assert_allclose(found.vectors_at(np.array([found.position_of[of_photo[0]]])), vectors, atol=1e-5)


def test_the_command_and_the_page_find_the_same(ready: Ready, world: World) -> None:
    text, photo, first = asked(ready, world)[1]
    given = SearchConfig(index=str(ready.index.folder), text=text, image=str(photo), k=5, device="cpu")
    assert [hit.id for hit in search(given).hits] == first[:5]
    served = ServedIndex(ready.index)
    assert served.about["composes"]
    assert served.about["takes_both"]
    hits = served.search(text, {"image": photo.read_bytes()}, 5, ["fusion"])
    assert [hit.id for hit in hits["fusion"]] == first[:5]
    compared = served.search(text, {"image": photo.read_bytes()}, 5, ["fusion", "ridge"])
    assert [hit.id for hit in compared["fusion"]] == first[:5]
    assert len(compared["ridge"]) == 5


def test_an_index_of_photos_with_texts_is_refused(ready: Ready, world: World, tmp_path: Path) -> None:
    config = IndexConfig(data=str(world.data), run=ready.run, out=str(tmp_path / "index"), paired=True)
    with pytest.raises(ValueError, match="--paired: the run was trained on composed queries, which"):
        index(config)


def test_a_run_of_captions_says_that_it_does_not_compose(world: World, tmp_path: Path) -> None:
    run = quick_train(world.cache, tmp_path / "run", fusion="linear", pairs="captions", **SHORT)
    made = index(IndexConfig(data=str(world.data), run=run, out=str(tmp_path / "index"), splits=("test",))).out
    photo = world.data / "test" / "test-00000.png"
    found = SearchIndex.open(made, device="cpu")
    with pytest.raises(ValueError, match=r"a text and a photo cannot be fused: .* --pairs composed"):
        found.search("make the star blue", image=photo)
    with pytest.raises(ValueError, match="embed_queries: the run was trained with --pairs captions"):
        found.fusion.embed_queries([photo], ["make the star blue"])
    assert not ServedIndex(found).about["composes"]


def test_the_report_shows_reference_text_and_hits(ready: Ready, world: World, tmp_path: Path) -> None:
    page = Path(make_report(ReportConfig(runs=(ready.evaluated,), out=str(tmp_path / "page")))).read_text()
    cards = page.split('<article class="card"')[1:]
    assert cards
    known = {text: photo.name for text, photo, _ in asked(ready, world)}
    for card in cards:
        text = card.split("<h4>")[1].split("</h4>")[0]
        shown = card.split('aria-label="the reference: ')[1].split(",")[0]
        assert shown in {f"test/{name}" for of, name in known.items() if of == text} | {f"test/{known[text]}"}
        assert card.count("rank 1, ") == card.count('data-system="')
