"""`saffe serve` on a real index: hits, photos, comparison and heat maps are those of the run that made it."""

from __future__ import annotations

import hashlib
import io
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from browser import browsing, find_browser
from colour_fusion import ColourFusion, paint
from PIL import Image
from served_index import Client, serving
from test_trained_fusion import World, trained, world

from saffe_cache.encoders.pictures import quick_pictures
from saffe_cache.inference import serving as serving_module
from saffe_cache.inference.config import IndexConfig
from saffe_cache.inference.heatmap import HeatMap
from saffe_cache.inference.indexing import index, update_index
from saffe_cache.inference.model import load_run
from saffe_cache.inference.search_index import SearchIndex
from saffe_cache.inference.serving import ServedIndex
from saffe_cache.retrieval.baselines import unit_rows
from saffe_cache.training.runs import RIDGE, kept_ridge

sys.path.append(str(Path(__file__).parent / "benchmarks"))

import serve_load

__all__ = ["world"]

Models = Callable[[str], Path]


@pytest.fixture(scope="module")
def photos(world: World, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A copy, whose files tests may change."""
    return Path(shutil.copytree(world.photos, tmp_path_factory.mktemp("data") / "photos"))


@pytest.fixture(scope="module")
def run(world: World, tmp_path_factory: pytest.TempPathFactory) -> str:
    return trained(world, tmp_path_factory.mktemp("served") / "run", "linear")


@pytest.fixture(scope="module")
def found(run: str, photos: Path) -> SearchIndex:
    out = Path(run).parent / "index"
    index(IndexConfig(data=str(photos), run=run, out=str(out), splits=("test",), ridge=True, device="cpu"))
    return SearchIndex.open(out, device="cpu")


@pytest.fixture(scope="module")
def client(found: SearchIndex) -> Iterator[Client]:
    with serving(ServedIndex(found)) as client:
        yield client


def ids_of(answer: Any, system: str = "fusion") -> list[str]:
    return [hit["id"] for hit in answer.content["systems"][system]]


def test_hits_are_those_of_the_index(client: Client, found: SearchIndex, photos: Path) -> None:
    photo = photos / "test" / "3.png"
    assert ids_of(client.search("word1 word9")) == [hit.id for hit in found.search("word1 word9", k=24)]
    assert ids_of(client.search("", photo.read_bytes())) == [hit.id for hit in found.search(image=photo, k=24)]
    assert ids_of(client.ask("/api/like?id=test/3.png&k=4")) == [hit.id for hit in found.like("test/3.png", k=4)]
    assert client.search("", photo.read_bytes()).content["systems"]["fusion"][0]["id"] == "test/3.png"
    answer = client.search("word1", photo.read_bytes())
    assert answer.status == 400
    assert "no text enters fusion linear" in answer.error


def test_comparison_is_with_the_runs_ridge_regression(client: Client, found: SearchIndex, photos: Path) -> None:
    fusion, ridge = found.fusion, kept_ridge(found.fusion.folder)
    assert ridge is not None
    paths = [photos / name for name in found.ids]
    gallery = fusion.embed_with_ridge(paths)[1]
    np.testing.assert_allclose(found.ridge_vectors_at(slice(None)), gallery, atol=1e-6)
    photo = photos / "test" / "5.png"
    own, text = fusion.embed_with_ridge([photo])[1], unit_rows(fusion.text_vectors(["word1 word9"]))
    for answer, query in (
        (client.search("word1 word9", options="&systems=fusion,ridge&k=5"), text),
        (client.search("", photo.read_bytes(), "&systems=fusion,ridge&k=5"), own),
        (client.ask("/api/like?id=test/5.png&systems=fusion,ridge&k=5"), own),
    ):
        scores = np.sort((gallery @ query[0]).astype(np.float64))[::-1][:5]
        shown = [hit["score"] for hit in answer.content["systems"]["ridge"]]
        np.testing.assert_allclose(shown, scores, atol=1e-5)
        assert ids_of(answer, "ridge")[0] == found.ids[int(np.argmax(gallery @ query[0]))]
    assert ids_of(client.search("word1", options="&systems=ridge"), "ridge")


def test_an_update_keeps_the_ridge_of_unchanged_items(run: str, photos: Path, tmp_path: Path) -> None:
    data = Path(shutil.copytree(photos / "test", tmp_path / "data" / "test")).parent
    config = IndexConfig(data=str(data), run=run, out=str(tmp_path / "index"), ridge=True, device="cpu")
    index(config)
    shutil.copy(photos / "train" / "1.png", data / "test" / "new.png")
    with (data / "test" / "metadata.jsonl").open("a") as file:
        file.write('\n{"file_name": "new.png", "captions": ["word3"]}')
    changes = index(config)
    assert (changes.added, changes.kept) == (1, 12)
    updated = SearchIndex.open(tmp_path / "index", device="cpu")
    expected = updated.fusion.embed_with_ridge([data / name for name in updated.ids])
    np.testing.assert_allclose(updated.vectors, expected[0], atol=1e-5)
    np.testing.assert_allclose(updated.ridge_vectors_at(slice(None)), expected[1], atol=1e-6)


def test_index_without_a_ridge_says_why(run: str, photos: Path, tmp_path: Path) -> None:
    index(IndexConfig(data=str(photos), run=run, out=str(tmp_path / "index"), splits=("test",), device="cpu"))
    old = tmp_path / "old"
    shutil.copytree(run, old)
    (old / RIDGE).unlink()
    for place, expected in ((None, "the index was made without --ridge"), (old, "the run keeps no ridge regression")):
        with serving(ServedIndex(SearchIndex.open(tmp_path / "index", place, device="cpu"))) as client:
            assert expected in client.ask("/api/index").content["no_ridge"]
            answer = client.search("word1", options="&systems=fusion,ridge")
            assert answer.status == 400
            assert expected in answer.error
    with pytest.raises(ValueError, match="holds no ridge regression"):
        index(IndexConfig(data=str(photos), run=str(old), out=str(tmp_path / "b"), ridge=True, device="cpu"))


def test_heat_map_is_the_heads_attention(client: Client, found: SearchIndex, photos: Path) -> None:
    fusion = found.fusion
    answer = client.ask("/api/heatmap?id=test/2.png&text=word1").content
    weights = np.array(answer["weights"])
    states, _, texts = fusion.features(photos / "test" / "2.png")
    assert texts is None
    maps = []
    for state, queries in zip(states, fusion.model.head.pool_queries, strict=True):
        tokens = torch.nn.functional.layer_norm(state[0], state.shape[-1:])
        maps.append((tokens @ queries.detach()).softmax(dim=0).mean(dim=1))
    expected = torch.stack(maps).mean(dim=0)[-weights.size :]
    np.testing.assert_allclose(weights.ravel(), expected / expected.sum(), atol=1e-5)
    assert weights.sum() == pytest.approx(1, abs=1e-5)
    side = len(weights)
    assert answer["about"] == f"The fusion's mean attention to {side} x {side} patches: yellow is most."


@pytest.mark.skipif(find_browser() is None, reason="no chromium or chrome is installed")
def test_browser_searches_a_real_index(client: Client, found: SearchIndex, photos: Path, tmp_path: Path) -> None:
    hits = "[...document.querySelectorAll('.hits .id')].map(one => one.textContent)"
    status = "document.getElementById('status').textContent"
    with browsing(tmp_path, is_online=True) as page:
        page.open(client.address, 390)
        page.wait("index !== null")
        page.type("word1 word9")
        page.press("Enter")
        page.wait(f"{status}.startsWith('12 hits for')")
        assert page.run(hits) == [hit.id for hit in found.search("word1 word9", k=24)]
        page.run("document.getElementById('compare').click()")
        page.wait(f"{hits}.length === 24")
        page.press("Escape")
        page.upload("#file-image", photos / "test" / "4.png")
        page.wait(f"{status}.startsWith('12 hits for the photo')")
        assert page.run(f"{hits}[0]") == "test/4.png"
        page.run("document.querySelector('.hit').click()")
        page.run("document.getElementById('look').click()")
        page.wait("document.getElementById('heat') !== null")
        assert page.run("document.getElementById('why').textContent").endswith("patches: yellow is most.")
        page.wait("document.querySelector('#frame img').naturalWidth === 48")
        assert page.complaints == []


def test_run_without_patches_says_so(world: World, photos: Path, tmp_path: Path) -> None:
    run = trained(world, tmp_path / "run", "linear", head="mean")
    index(IndexConfig(data=str(photos), run=run, out=str(tmp_path / "index"), splits=("test",), device="cpu"))
    with serving(ServedIndex(SearchIndex.open(tmp_path / "index", device="cpu"))) as client:
        why = client.ask("/api/index").content["no_heat_map"]
        assert why == "Fusion linear with head mean has no attention to the photo's tokens: there is no heat map."
        answer = client.ask("/api/heatmap?id=test/0.png")
        assert (answer.status, answer.error) == (400, why)


def test_text_moves_the_map_of_a_fusion_that_takes_it(world: World, photos: Path, tmp_path: Path) -> None:
    options = {"gallery_text": "first_caption", "text_dropout": 0.3, "query_side": "text"}
    run = trained(world, tmp_path / "run", "reuse", **options)
    out = str(tmp_path / "index")
    index(IndexConfig(data=str(photos), run=run, out=out, splits=("test",), paired=False, device="cpu"))
    with serving(ServedIndex(SearchIndex.open(tmp_path / "index", device="cpu"))) as client:
        assert client.ask("/api/index").content["takes_both"]
        maps = [client.ask(f"/api/heatmap?id=test/0.png&text={text}").content for text in ("word1", "word2", "")]
        assert "with your text" in maps[0]["about"]
        assert "text" not in maps[2]["about"]
        assert not np.allclose(maps[0]["weights"], maps[1]["weights"], atol=1e-6)
        assert client.search("word1", (photos / "test" / "1.png").read_bytes()).status == 200


def test_only_the_indexed_content_is_shown(found: SearchIndex, photos: Path, tmp_path: Path) -> None:
    data = tmp_path / "photos"
    shutil.copytree(photos, data)
    out = tmp_path / "index"
    index(IndexConfig(data=str(data), run=str(found.fusion.folder), out=str(out), splits=("test",), device="cpu"))
    secret = tmp_path / "secret.png"
    Image.new("RGB", (8, 8), "red").save(secret)
    with serving(ServedIndex(SearchIndex.open(out, device="cpu"))) as client:
        assert Image.open(io.BytesIO(client.ask("/api/thumbnail?id=test/0.png").body)).size == (48, 40)
        for number, change in enumerate((Path.unlink, lambda path: path.unlink() or path.symlink_to(secret))):
            change(data / "test" / f"{number + 1}.png")
            answer = client.ask(f"/api/thumbnail?id=test/{number + 1}.png")
            assert answer.status == 404
            assert answer.error.startswith("The photo cannot be shown: ")
            assert client.ask(f"/api/heatmap?id=test/{number + 1}.png").status == 404
        assert "has changed since it was indexed" in answer.error
        for name in ("train/0.png", "../secret.png", str(secret)):
            assert client.ask(f"/api/thumbnail?id={name}").status == 404


def test_photos_of_a_table_are_shown(found: SearchIndex, photos: Path, tmp_path: Path) -> None:
    files = [(photos / "test" / f"{number}.png").read_bytes() for number in range(6)]
    columns = {"image": [{"bytes": one, "path": None} for one in files], "caption": [f"word{n}" for n in range(6)]}
    (tmp_path / "data").mkdir()
    pq.write_table(pa.table(columns), tmp_path / "data" / "test.parquet")
    out = tmp_path / "index"
    index(IndexConfig(data=str(tmp_path / "data"), run=str(found.fusion.folder), out=str(out), device="cpu"))
    opened = SearchIndex.open(out, device="cpu")
    served = ServedIndex(opened)
    assert [hashlib.sha256(served.file(name)).digest() for name in opened.ids] == [
        hashlib.sha256(one).digest() for one in files
    ]
    with serving(served) as client:
        assert client.ask(f"/api/thumbnail?id={opened.ids[0]}").status == 200


@pytest.mark.parametrize("family", ["dinov2", "clip-vision", "vit"])
@pytest.mark.parametrize("size", [(64, 48), (31, 90), (50, 50)])
def test_seen_part_is_what_the_processor_keeps(family: str, size: tuple[int, int], tiny_model: Models) -> None:
    """By a photo whose pixels say where they are."""
    from transformers import AutoImageProcessor

    quick = quick_pictures(AutoImageProcessor.from_pretrained(tiny_model(family), backend="pil"))
    assert quick is not None
    width, height = size
    across, down = np.meshgrid(np.linspace(0, 255, width), np.linspace(0, 255, height))
    picture = Image.fromarray(np.stack([across, down, 0 * down], axis=2).round().astype(np.uint8))
    pixels = quick._pixels(picture)
    assert pixels is not None
    left, top, right, bottom = quick.seen_part(width, height)
    seen = [pixels[:, 0, 0].mean(), pixels[0, :, 1].mean(), pixels[:, -1, 0].mean(), pixels[-1, :, 1].mean()]
    np.testing.assert_allclose(np.array(seen) / 255, [left, top, right, bottom], atol=0.06)


@pytest.mark.slow
def test_command_serves_until_it_is_interrupted(found: SearchIndex, tmp_path: Path) -> None:
    code = "import sys; from saffe_cache.cli import main; sys.exit(main())"
    command = [sys.executable, "-c", code, "serve", str(found.folder), "--port", "0", "--device", "cpu"]
    for options, number, status in (([], signal.SIGINT, 0), (["--host", "0.0.0.0"], signal.SIGTERM, 0)):
        log = tmp_path / "log"
        with log.open("wb") as file:
            process = subprocess.Popen(
                [*command, *options], stderr=file, stdout=subprocess.PIPE, env={**os.environ, "PYTHONPATH": os.getcwd()}
            )
        deadline = time.monotonic() + 120
        while not (address := re.search(r"Open http://([\d.]+):(\d+)/ in a browser", log.read_text())):
            assert process.poll() is None, log.read_text()
            assert time.monotonic() < deadline
            time.sleep(0.1)
        client = Client(int(address[2]))
        assert len(ids_of(client.search("word1 word9"))) == 12
        assert ("other machines can search this index" in log.read_text()) == bool(options)
        process.send_signal(number)
        assert process.wait(30) == status, log.read_text()
        assert process.stdout is not None
        assert process.stdout.read().decode().startswith("http://")
        assert "Traceback" not in log.read_text()
        with pytest.raises(ConnectionRefusedError):
            client.ask("/")


@pytest.mark.slow
def test_fifty_clients_are_answered_in_flat_memory(found: SearchIndex) -> None:
    with serve_load.started(str(found.folder), "--device", "cpu") as (pid, port):
        serve_load.run_load(pid, port, seconds=2)
        load = serve_load.run_load(pid, port, seconds=6)
    assert not load.failures
    assert set(load.seconds) == {"text", "photo", "like", "thumbnail", "heat map", "page"}
    assert load.growth < 0.2, load.memory_mb


def test_class_name_is_no_text_of_a_photo(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    paint(tmp_path / "photos" / "train" / "poppies" / "a.png", "red")
    (tmp_path / "run").mkdir()
    fusion: Any = ColourFusion(tmp_path / "run")
    config = IndexConfig(data=str(tmp_path / "photos"), run="", out=str(tmp_path / "index"), paired=True)
    update_index(fusion, config)
    opened, seen = SearchIndex.open(tmp_path / "index", fusion), []

    def record(*arguments: Any) -> HeatMap:
        seen.append(arguments[2])
        return HeatMap(np.ones((2, 2), np.float32), (0, 0, 1, 1))

    monkeypatch.setattr(serving_module, "heat_map", record)
    ServedIndex(opened).heat_map("train/poppies/a.png", None)
    assert opened.texts == (("poppies",),)
    assert seen == [None]  # as it was indexed


def test_index_of_pairs_takes_the_photos_own_text(world: World, photos: Path, tmp_path: Path) -> None:
    run = trained(world, tmp_path / "run", "reuse", gallery_text="first_caption", query_side="text")
    index(IndexConfig(data=str(photos), run=run, out=str(tmp_path / "index"), splits=("test",), device="cpu"))
    opened = SearchIndex.open(tmp_path / "index", device="cpu")
    served = ServedIndex(opened)
    assert opened.manifest.paired
    answers = [served.heat_map("test/0.png", text) for text in ("word1", None)]
    assert json.dumps(answers[0]) == json.dumps(answers[1])
    assert "with the photo's own text" in answers[0]["about"]
    assert not load_run(run, device="cpu").why_not_paired
