"""Large JPEGs are decoded at a part of their size: with enough pixels, upright, and as the encoder's cache says."""

from __future__ import annotations

import io
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from tiny_models import load_tiny
from transformers import BitImageProcessorPil

from saffe_cache.core.views import crop_box, edge_of_photo
from saffe_cache.encoders.encoder import FrozenEncoder
from saffe_cache.encoders.pictures import quick_pictures
from saffe_cache.extraction.config import ExtractConfig, config_from_json, encode_options
from saffe_cache.extraction.encoding import encode_in_memory
from saffe_cache.extraction.extract import extract
from saffe_cache.extraction.reencode import reload_encoder
from saffe_cache.sources.decoding import decode, has_edge
from saffe_cache.sources.items import Columns
from saffe_cache.sources.registry import read_items
from saffe_cache.store.layout import array_of_view
from saffe_cache.store.reader import Cache, open_cache

Models = Callable[[str], Path]
WIDTH, HEIGHT = 643, 481
LAYER = "hidden_states/3"


def jpeg(width: int = WIDTH, height: int = HEIGHT, mode: str = "RGB", seed: int = 0, **options: Any) -> bytes:
    """Of coarse noise, with a bright left edge."""
    coarse = np.random.default_rng(seed).integers(0, 160, (6, 8, 3), dtype=np.uint8)
    picture = Image.fromarray(coarse).resize((width, height), Image.Resampling.BICUBIC)
    picture.paste((255, 255, 255), (0, 0, width // 8, height))
    file = io.BytesIO()
    picture.convert(mode).save(file, "JPEG", quality=90, **options)
    return file.getvalue()


def turned(orientation: int) -> Image.Exif:
    exif = Image.Exif()
    exif[0x0112] = orientation
    return exif


# what is decoded


@settings(max_examples=40, deadline=None)
@given(width=st.integers(1, 400), height=st.integers(1, 400), edge=st.integers(1, 130))
def test_reduced_picture_keeps_the_requested_edge(width: int, height: int, edge: int) -> None:
    found = decode("image", jpeg(width, height), edge=edge)
    assert min(found.size) >= min(edge, width, height)
    assert ("reduced" in found.info) == (min(width, height) // edge >= 2)


@settings(max_examples=60, deadline=None)
@given(width=st.integers(30, 400), height=st.integers(30, 400), edge=st.integers(1, 90), more=st.integers(1, 90))
def test_picture_with_the_larger_edge_is_not_decoded_again(width: int, height: int, edge: int, more: int) -> None:
    data = jpeg(width, height)
    found, expected = decode("image", data, edge=edge), decode("image", data, edge=edge + more)
    if has_edge(found, edge + more):
        assert np.array_equal(np.asarray(found), np.asarray(expected))
    else:
        assert "reduced" in found.info
        assert min(found.size) <= edge + more


def test_plain_photo_and_crops_of_one_scale_are_decoded_once() -> None:
    """Which are two decodings where crops need another scale: resizing the larger picture would give other pixels."""
    one, half, quarter = (decode("image", jpeg(800, 800), edge=edge) for edge in (801, 230, 120))
    assert (one.size, half.size, quarter.size) == ((800, 800), (400, 400), (200, 200))
    assert has_edge(half, 399)
    assert not has_edge(half, 400)
    assert not has_edge(quarter, None)
    assert has_edge(one, None)
    assert not np.array_equal(np.asarray(half.reduce(2)), np.asarray(quarter))


@pytest.mark.parametrize("edge", [None, 241])
def test_small_picture_keeps_all_its_pixels(edge: int | None) -> None:
    found = decode("image", jpeg(), edge=edge)
    assert np.array_equal(np.asarray(found), np.asarray(Image.open(io.BytesIO(jpeg())).convert("RGB")))


@pytest.mark.parametrize("mode", ["RGB", "L", "CMYK"])
@pytest.mark.parametrize("options", [{}, {"progressive": True}, *({"exif": turned(number)} for number in (3, 6, 8))])
def test_reduced_picture_looks_like_the_whole_one(mode: str, options: dict[str, Any]) -> None:
    data = jpeg(mode=mode, **options)
    whole, reduced = decode("image", data), decode("image", data, edge=100)
    assert "reduced" in reduced.info
    assert reduced.mode == "RGB"
    small = [np.asarray(one.resize((40, 40), Image.Resampling.BICUBIC), np.float32) for one in (whole, reduced)]
    assert np.abs(small[0] - small[1]).mean() < 2


def test_truncated_jpeg_is_unreadable_at_any_size() -> None:
    for edge in (None, 60):
        with pytest.raises(OSError, match="truncated"):
            decode("image", jpeg()[:-2000], edge=edge)


def test_decompression_bomb_is_refused_by_its_full_size(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", WIDTH * HEIGHT // 3)
    with pytest.raises(ValueError, match="DecompressionBombError"):
        decode("image", jpeg(), edge=10)


def test_other_formats_are_decoded_in_full() -> None:
    file = io.BytesIO()
    Image.open(io.BytesIO(jpeg())).save(file, "PNG")
    assert decode("image", file.getvalue(), edge=10).size == (WIDTH, HEIGHT)


@given(st.integers(300, 3000), st.integers(300, 3000), st.integers(1, 99), st.binary(min_size=32, max_size=32))
def test_crops_of_reduced_pictures_keep_the_edge(width: int, height: int, number: int, content_hash: bytes) -> None:
    edge = min(width, height) * 3 // 5 - 2  # of photos that are just large enough
    assert edge_of_photo("flip", edge) == edge
    if edge_of_photo("crop-1", edge) <= min(width, height):
        left, top, right, bottom = crop_box(width, height, f"crop-{number}", content_hash)
        assert min(right - left, bottom - top) >= edge


# which encoders


@pytest.mark.parametrize(
    ("size", "edge"),
    [({"shortest_edge": 40}, 40), ({"height": 32, "width": 48}, 48), (None, None)],
)
def test_edge_is_that_of_the_resize(size: dict[str, int] | None, edge: int | None) -> None:
    quick = quick_pictures(BitImageProcessorPil(size=size, do_resize=size is not None, do_center_crop=False))
    assert quick is not None
    assert quick.edge == edge


def test_unknown_processor_decodes_in_full(tiny_model: Models) -> None:
    encoder = load_tiny("convnext", tiny_model("convnext"), decoding="scaled")
    assert encoder.decoded_edge() is None
    assert encoder.fingerprint == load_tiny("convnext", tiny_model("convnext")).fingerprint


def test_decoding_is_a_part_of_the_encoders_key(tiny_model: Models) -> None:
    full, scaled = (load_tiny("dinov2", tiny_model("dinov2"), decoding=how) for how in ("full", "scaled"))
    assert [one.partition(":")[0] for one in scaled.fingerprint.differences(full.fingerprint)] == ["decoding"]
    assert full.decoded_edge() is None
    assert scaled.decoded_edge() == 2 * scaled._quick.edge  # type: ignore[union-attr,operator]


# caches


@pytest.fixture
def config(tmp_path: Path, tiny_model: Models) -> ExtractConfig:
    folder = tmp_path / "photos" / "train"
    folder.mkdir(parents=True)
    for number in range(3):
        (folder / f"{number}.jpg").write_bytes(jpeg(seed=number, exif=turned(1 + 5 * (number % 2))))
    return ExtractConfig(
        data=str(tmp_path / "photos"),
        cache=str(tmp_path / "cache.zarr"),
        encoder={"image": str(tiny_model("dinov2"))},
        layers={"image": (3,)},
        storage="float32",
        device="cpu",
    )


def edges_seen(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Shorter edges of the pictures that encoders get from now on."""
    seen: list[int] = []
    prepare = FrozenEncoder.prepare_into

    def watching(self: FrozenEncoder, raw: Any, out: Any) -> None:
        seen.append(min(raw.size))
        prepare(self, raw, out)

    monkeypatch.setattr(FrozenEncoder, "prepare_into", watching)
    return seen


def states(cache: Cache, name: str = LAYER) -> np.ndarray:
    encoder = cache.encoder("image")
    return encoder.array(name).read_range(0, encoder.manifest.arrays[name].rows)


def test_new_cache_is_scaled_and_near_the_full_one(config: ExtractConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    seen = edges_seen(monkeypatch)
    scaled = open_cache(extract(config))
    assert max(seen) < HEIGHT
    full = open_cache(extract(replace(config, decoding="full", cache=config.cache + "-full")))
    assert set(seen[3:]) == {HEIGHT}
    assert scaled.encoder("image").key != full.encoder("image").key
    assert 0 < np.abs(states(scaled) - states(full)).mean() < 0.1 * states(full).std()


def test_extended_cache_keeps_its_decoding(config: ExtractConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    before = open_cache(extract(replace(config, decoding="full"))).encoder("image").key
    (Path(config.data) / "train" / "new.jpg").write_bytes(jpeg(seed=9))
    seen = edges_seen(monkeypatch)
    cache = open_cache(extract(config))
    assert cache.encoder("image").key == before
    assert seen
    assert set(seen) == {HEIGHT}
    extract(replace(config, decoding="scaled"))  # on request, beside it
    assert len(open_cache(config.cache).root.encoders) == 2


@pytest.mark.parametrize("decoding", ["full", "scaled"])
def test_inputs_of_a_search_are_decoded_as_the_cache(config: ExtractConfig, decoding: Any) -> None:
    cache = open_cache(extract(replace(config, decoding=decoding, views="crop=1")))
    manifest = cache.encoder("image").manifest
    recorded = config_from_json(manifest.history[-1]["config"])
    encoder = reload_encoder(manifest, replace(recorded, decoding=None), None, "--encoder")
    media = {item.hashes["image"]: item.media["image"] for item in read_items(config.data, Columns(), ())}
    names = [LAYER, array_of_view("crop-1", LAYER)]
    held = encode_in_memory(encoder, manifest, encode_options(recorded), cache.table, media, names)
    for name in names:
        assert np.array_equal(held.array(name).read_range(0, 3), states(cache, name))


def test_plain_photos_do_not_depend_on_other_views(config: ExtractConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    alone = states(open_cache(extract(config)))
    seen = edges_seen(monkeypatch)
    with_crops = open_cache(extract(replace(config, views="flip,crop=1", cache=config.cache + "-views")))
    assert np.array_equal(states(with_crops), alone)
    edge = with_crops.encoder("image").manifest.fingerprint.fields["processor"]["size"]["shortest_edge"]
    assert min(seen) >= 2 * edge
