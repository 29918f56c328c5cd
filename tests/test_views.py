"""Views of photos: encoded with one decoding, drawn in training, averaged in evaluation and in an index."""

from __future__ import annotations

import hashlib
import json
import shutil
from collections import Counter
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from extraction_cases import dying_behind, files_of, tiny_config
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image
from quick_runs import quick_train, report_of
from store_cases import verify
from synthetic_cache import make_cache

from saffe_cache.core.views import PLAIN, crop_box, parse_views, place_of, seen_as
from saffe_cache.extraction import loading
from saffe_cache.extraction.config import ExtractConfig, RepairConfig
from saffe_cache.extraction.extract import extract
from saffe_cache.extraction.repair import repair
from saffe_cache.fusion.layers import summarize
from saffe_cache.fusion.registry import FUSIONS
from saffe_cache.inference.config import IndexConfig
from saffe_cache.inference.indexing import index
from saffe_cache.inference.model import load_run
from saffe_cache.inference.search_index import SearchIndex
from saffe_cache.inputs.feature_loader import FeatureLoader, encode_gallery
from saffe_cache.inputs.pairs import training_pairs
from saffe_cache.store.config import ConvertConfig, ExportConfig, ImportConfig
from saffe_cache.store.exchange import convert_cache, export_hdf5, import_cache
from saffe_cache.store.reader import open_cache
from saffe_cache.training import loop as fitting
from saffe_cache.training.batches import TrainingData
from saffe_cache.training.config import TrainConfig
from saffe_cache.training.resolve import resolve_run
from saffe_cache.training.runs import open_run

ALL = ("flip", "crop-1", "crop-2")


@pytest.fixture(scope="module")
def config(tmp_path_factory: pytest.TempPathFactory, tiny_model: Callable[[str], Path]) -> ExtractConfig:
    """Of 14 photos in three views besides the plain one; `cache` is not extracted."""
    folder = tmp_path_factory.mktemp("views")
    config = replace(tiny_config(folder, tiny_model, train=8), views="flip,crop=2")
    return replace(config, encoder={"image": config.encoder["image"]}, layers={"image": (2, 3)})


@pytest.fixture(scope="module")
def whole(config: ExtractConfig) -> str:
    """Its cache, extracted at once. Not to be changed."""
    return extract(config)


# which views


def test_views_are_named_in_one_order() -> None:
    assert parse_views("crop=2,flip") == parse_views("flip,crop=2") == ALL
    assert parse_views("") == ()
    assert sorted(["crop-10", "crop-9", "flip", PLAIN], key=place_of) == [PLAIN, "flip", "crop-9", "crop-10"]
    for wrong in ("crop", "crop=0", "flip=2", "crop=2,crop=3", "mirror"):
        with pytest.raises(ValueError, match="--views"):
            parse_views(wrong)
    with pytest.raises(ValueError, match="later release"):
        place_of("rotation-1")


@given(st.integers(1, 3000), st.integers(1, 3000), st.integers(1, 99), st.binary(min_size=32, max_size=32))
def test_crops_lie_in_the_picture(width: int, height: int, number: int, content_hash: bytes) -> None:
    left, top, right, bottom = crop_box(width, height, f"crop-{number}", content_hash)
    assert 0 <= left < right <= width
    assert 0 <= top < bottom <= height


def test_crops_cover_half_of_the_picture_or_more() -> None:
    boxes = [crop_box(500, 400, f"crop-{i % 50 + 1}", hashlib.sha256(bytes([i // 50])).digest()) for i in range(2000)]
    wide = np.array([right - left for left, _, right, _ in boxes])
    high = np.array([bottom - top for _, top, _, bottom in boxes])
    area, ratio = wide * high / 200_000, wide / high
    assert area.min() > 0.495
    assert area.max() < 1.005
    assert 0.65 < area.mean() < 0.7  # less than 0.75: large crops fit less often
    assert ratio.min() > 0.74
    assert ratio.max() < 1.35
    assert len(set(boxes)) > 1900
    assert boxes[0] == (167, 21, 490, 388)  # caches hold what this makes of a photo


def test_a_very_long_picture_is_cropped_in_its_middle() -> None:
    assert crop_box(900, 30, "crop-1", bytes(32)) == (430, 0, 470, 30)
    assert crop_box(30, 900, "crop-1", bytes(32)) == (0, 430, 30, 470)


# extraction


def test_views_are_the_encodings_of_changed_pictures(config: ExtractConfig, whole: str, tmp_path: Path) -> None:
    cache = open_cache(whole)
    for view in ALL:
        other = replace(config, views=None, data=str(tmp_path / view), cache=str(tmp_path / f"{view}.zarr"))
        shutil.copytree(config.data, other.data)
        for path in Path(config.data).rglob("*.png"):
            with Image.open(path) as picture:
                changed = seen_as(picture.convert("RGB"), view, hashlib.sha256(path.read_bytes()).digest())
                changed.save(Path(other.data) / path.relative_to(config.data))
        expected = open_cache(extract(other))
        assert list(cache.table.ids) == list(expected.table.ids)
        rows, theirs = cache.table.rows["image"], expected.table.rows["image"]
        for name in ("hidden_states/2", "hidden_states/3", "pooled"):
            found = cache.encoder("image").array(f"views/{view}/{name}").read(rows)
            np.testing.assert_array_equal(found, expected.encoder("image").array(name).read(theirs))


def test_a_mirrored_picture_is_mirrored() -> None:
    pixels = np.arange(24, dtype=np.uint8).reshape(2, 4, 3)
    np.testing.assert_array_equal(np.asarray(seen_as(Image.fromarray(pixels), "flip", b"")), pixels[:, ::-1])


def test_each_photo_is_decoded_once(config: ExtractConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    decoded: Counter[bytes] = Counter()
    decode = loading.decode

    def counted(modality: Any, data: bytes, *rest: Any) -> Any:
        decoded[data] += 1
        return decode(modality, data, *rest)

    monkeypatch.setattr(loading, "decode", counted)
    extract(replace(config, cache=str(tmp_path / "cache.zarr")))
    assert len(decoded) == 14
    assert set(decoded.values()) == {1}


def test_plain_photos_are_the_same_beside_views(config: ExtractConfig, whole: str, tmp_path: Path) -> None:
    """The plain photos are the same byte for byte, and each view takes as many bytes."""
    plain = files_of(extract(replace(config, views=None, cache=str(tmp_path / "plain.zarr"))))
    found = files_of(whole)
    assert {name: found[name] for name in plain} == plain
    shards, all_shards = ([one for name, one in files.items() if "/c/" in name] for files in (plain, found))
    assert sum(map(len, all_shards)) <= 4.05 * sum(map(len, shards))


def test_an_interrupted_extraction_of_views_is_resumed(config: ExtractConfig, whole: str, tmp_path: Path) -> None:
    resumed = replace(config, cache=str(tmp_path / "resumed.zarr"), decode_in="processes")
    for launches in (3, 10):
        with dying_behind(launches):
            extract(resumed)
    assert files_of(extract(resumed)) == files_of(whole)
    verify(resumed.cache)


def test_two_ranks_write_the_same_views(config: ExtractConfig, whole: str, tmp_path: Path) -> None:
    ranks = [replace(config, cache=str(tmp_path / "ranks.zarr"), rank=rank, world_size=2) for rank in (0, 1)]
    with ThreadPoolExecutor(2) as pool:
        list(pool.map(extract, ranks))
    assert files_of(ranks[0].cache, "encoders") == files_of(whole, "encoders")


def test_views_are_added_later_as_layers_are(config: ExtractConfig, whole: str, tmp_path: Path) -> None:
    cache = str(tmp_path / "later.zarr")
    for views in (None, "crop=1", "flip,crop=2"):
        extract(replace(config, cache=cache, views=views))
    assert files_of(cache) == files_of(whole)


def test_new_photos_get_the_views_of_the_cache(config: ExtractConfig, tmp_path: Path) -> None:
    cache = str(tmp_path / "grown.zarr")
    extract(replace(config, cache=cache, splits=("train",)))
    extract(replace(config, cache=cache, views=None))
    image = open_cache(cache).encoder("image")
    assert image.views((2, 3)) == ALL
    assert {len(image.array(name)) for name in image.manifest.arrays} == {14}
    key = f"encoders/{image.key}/views/crop-2/hidden_states/3"
    shard = next((Path(cache) / key / "c").rglob("0/0/0"))
    before = files_of(cache)
    shard.write_bytes(bytes(shard.stat().st_size))
    assert repair(RepairConfig(cache=cache)).exit_status == 0
    assert files_of(cache) == before


def test_views_are_exported_and_converted(whole: str, tmp_path: Path) -> None:
    file = export_hdf5(ExportConfig(cache=whole, file=str(tmp_path / "cache.h5")))
    back = import_cache(ImportConfig(file=file, cache=str(tmp_path / "back.zarr")))
    assert files_of(back, "encoders") == files_of(whole, "encoders")
    converted = convert_cache(ConvertConfig(cache=whole, new=str(tmp_path / "half.zarr"), storage="float16"))
    arrays = open_cache(converted).encoder("image").manifest.arrays
    assert {one.spec.dtype for name, one in arrays.items() if "hidden_states" in name} == {"float16"}
    assert len(arrays) == 12


def test_views_without_an_encoder_of_photos_are_refused(config: ExtractConfig) -> None:
    with pytest.raises(ValueError, match=r"--views.*expected an --encoder image"):
        replace(config, encoder={"audio": "x"}, layers={})


# training and evaluation


@pytest.fixture(scope="module")
def synthetic(tmp_path_factory: pytest.TempPathFactory) -> str:
    return make_cache(tmp_path_factory.mktemp("synthetic") / "c.zarr", {"train": 96, "test": 30}, views=ALL)


@pytest.mark.slow
def test_run_of_views_embeds_new_texts_too(tmp_path: Path, tiny_model: Callable[[str], Path]) -> None:
    """Both encoders were run by one command, of whose options each needs its own."""
    config = replace(tiny_config(tmp_path, tiny_model), views="flip")
    run = quick_train(extract(config), tmp_path / "run", fusion="linear")
    fam = load_run(run, device="cpu", index_views="mean")
    assert fam.embed_texts(["a red ball"]).shape == (1, fam.size)
    [photo] = list(Path(config.data, "dev").glob("*.png"))[:1]
    assert fam.embed_images([str(photo)]).shape == (1, fam.size)


def test_photos_are_read_in_their_views(synthetic: str) -> None:
    cache = open_cache(synthetic)
    spec = resolve_run(TrainConfig(cache=synthetic, out="", layers={"image": (2,)}), cache)
    assert spec.views == ALL
    rows, views = np.array([5, 3, 5, 0, 90]), np.array([2, 0, 0, 3, 1])
    for residency in ("mapped", "memory", "streamed"):
        inputs = FeatureLoader(cache, spec, residency=residency)  # type: ignore[arg-type]
        (plain,), (found,) = inputs.photos(rows)[0], inputs.photos(rows, views)[0]
        torch.testing.assert_close(found, plain * (1 + torch.from_numpy(views)[:, None, None] / 10).float())


def test_summaries_are_of_the_views(synthetic: str, monkeypatch: pytest.MonkeyPatch) -> None:
    cache = open_cache(synthetic)
    spec = resolve_run(TrainConfig(cache=synthetic, out="", fusion="linear"), cache)
    rows, views = np.array([5, 3, 5, 0, 90]), np.array([2, 0, 0, 3, 1])
    tokens = FeatureLoader(cache, spec).photos(rows, views)
    expected = summarize(*tokens, has_class_token=spec.shape.has_class_token)
    monkeypatch.setitem(FUSIONS, "linear", replace(FUSIONS["linear"], reads="summary"))
    for residency in ("mapped", "memory"):
        inputs = FeatureLoader(cache, spec, residency=residency)  # type: ignore[arg-type]
        inputs.keep_summaries(np.arange(100))
        torch.testing.assert_close(inputs.photos(rows, views)[0][0][:, 0], expected)
        torch.testing.assert_close(inputs.photos(rows[1:3])[0][0][:, 0], expected[1:3])


def test_training_draws_all_views_by_seed_and_step(synthetic: str) -> None:
    drawn: Counter[tuple[int, int]] = Counter()
    cache = open_cache(synthetic)
    spec = resolve_run(TrainConfig(cache=synthetic, out=""), cache)
    training, validation, _ = training_pairs(spec, cache)

    def batches(first: int, stop: int) -> list[torch.Tensor]:
        data = TrainingData(FeatureLoader(cache, spec), training, validation, 8, 0)
        return [batch.states[0] for batch in data.batches(first, stop)]

    steps = TrainingData(FeatureLoader(cache, spec), training, validation, 8, 0).steps_per_epoch
    found = batches(0, 3 * steps)
    torch.testing.assert_close(batches(steps + 1, 2 * steps), found[steps + 1 : 2 * steps], rtol=0, atol=0)
    every = np.arange(len(cache.table))
    states = FeatureLoader(cache, spec).photos(every)[0][0][:, 0, 0]
    for state in torch.cat(found)[:, 0, 0]:
        ratios = (state / states).numpy()
        place, view = next((i, v) for v in range(4) for i in np.flatnonzero(np.isclose(ratios, 1 + v / 10, atol=1e-6)))
        drawn[int(place), view] += 1
    of_views = Counter(view for place, view in drawn.elements())
    assert sorted(of_views) == [0, 1, 2, 3]
    assert min(of_views.values()) > len(found) * 8 / 4 * 0.7
    plain = replace(spec, views=())
    data = TrainingData(FeatureLoader(cache, plain), training, validation, 8, 0)
    assert all(torch.isin(batch.states[0][:, 0, 0], states).all() for batch in data.batches(0, 2))


def test_a_resumed_training_draws_the_same_views(
    synthetic: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    options: dict[str, Any] = {"epochs": 2, "batch_size": 16, "control_epochs": 0}
    quick_train(synthetic, tmp_path / "whole", **options)
    step, count = fitting._step, 0

    def dying(*given: Any) -> float:
        nonlocal count
        count += 1
        if count > 7:
            raise KeyboardInterrupt
        return step(*given)

    with monkeypatch.context() as patch:
        patch.setattr(fitting, "_step", dying)
        with pytest.raises(KeyboardInterrupt):
            quick_train(synthetic, tmp_path / "killed", checkpoint_seconds=0.0, **options)
    quick_train(synthetic, tmp_path / "killed", checkpoint_seconds=0.0, **options)
    quick_train(synthetic, tmp_path / "plain", train_views="plain", **options)
    whole, killed = ((tmp_path / name / "model.safetensors").read_bytes() for name in ("whole", "killed"))
    assert whole == killed
    losses = [
        [json.loads(line)["loss"] for line in (tmp_path / name / "log.jsonl").open()]
        for name in ("whole", "killed", "plain")
    ]
    assert losses[0] == losses[1] != losses[2]


def test_the_mean_of_the_views_is_searched(synthetic: str, tmp_path: Path) -> None:
    run = quick_train(synthetic, tmp_path / "run", epochs=1, control_epochs=0)
    cache, (spec, model, _) = open_cache(synthetic), open_run(run, open_cache(synthetic))
    rows = np.arange(20)
    views = [encode_gallery(model, FeatureLoader(cache, spec, index_views=(view,)), rows) for view in (PLAIN, *ALL)]
    expected = np.mean(views, axis=0)
    found = encode_gallery(model, FeatureLoader(cache, spec, index_views=(PLAIN, *ALL)), rows)
    np.testing.assert_allclose(found, expected / np.linalg.norm(expected, axis=1, keepdims=True), atol=1e-6)
    np.testing.assert_array_equal(encode_gallery(model, FeatureLoader(cache, spec), rows), views[0])
    assert np.abs(views[0] - views[3]).max() > 1e-3
    mean, plain = (report_of(synthetic, run, index_views=views) for views in ("mean", "plain"))
    assert mean["out"].endswith("-views")
    assert mean["systems"]["fam"] != plain["systems"]["fam"]
    assert mean["systems"].keys() == plain["systems"].keys()


def test_a_mean_without_views_is_refused(tmp_path: Path) -> None:
    cache = make_cache(tmp_path / "c.zarr", {"train": 60, "test": 20})
    run = quick_train(cache, tmp_path / "run", epochs=0, control_epochs=0)
    with pytest.raises(ValueError, match=r"--index-views: found mean, and no views.*saffe extract --views"):
        report_of(cache, run, index_views="mean")


# new photos


def test_new_photos_are_indexed_by_the_mean_of_their_views(
    config: ExtractConfig, tmp_path: Path, tiny_model: Callable[[str], Path]
) -> None:
    both = replace(config, encoder={**config.encoder, "text": str(tiny_model("bert"))}, storage="float8")
    cache = extract(replace(both, cache=str(tmp_path / "both.zarr")))
    run = quick_train(cache, tmp_path / "run", epochs=0, control_epochs=0, batch_size=4)
    opened = open_cache(cache)
    spec, model, _ = open_run(run, opened)
    table = opened.table
    rows = table.rows["image"][table.in_split("dev")]
    expected = encode_gallery(model, FeatureLoader(opened, spec, index_views=(PLAIN, *ALL)), rows)
    fam = load_run(run, device="cpu", index_views="mean")
    found = fam.embed_items(config.data, splits=("dev",))
    np.testing.assert_allclose(found.vectors, expected, atol=1e-5)
    assert fam.fingerprint != load_run(run, device="cpu").fingerprint
    made = fam.index(config.data, tmp_path / "index", splits=("dev",))
    assert SearchIndex.open(tmp_path / "index").fusion.index_views == "mean"
    hits = made.search(image=str(Path(config.data) / "dev" / "003.png"), k=1)
    assert hits[0].id == "dev/003.png"
    assert hits[0].score > 0.9999
    with pytest.raises(ValueError, match="--index-views"):
        index(IndexConfig(data=config.data, run=run, out=str(tmp_path / "index"), splits=("dev",), device="cpu"))
