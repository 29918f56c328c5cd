"""Films and animated pictures: sampled frames, processors without torchvision, extraction, training and search."""

from __future__ import annotations

import io
import json
import os
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pytest
import zoo_runs
from films import film, noise
from PIL import Image
from transformers.video_utils import VideoMetadata, default_sample_indices_fn

import saffe_cache as sc
from saffe_cache.encoders.encoder import load_encoder
from saffe_cache.encoders.loading import EncoderRequest
from saffe_cache.sources.clips import decode_clip
from saffe_cache.sources.decoding import modality_of_content, thumbnail
from saffe_cache.sources.items import Columns, SourceItem
from saffe_cache.sources.registry import read_items

TORCHVISION = Path(sys.prefix) / "timm"
"""Where `make` installs torchvision, apart from the other packages."""


def numbered(num_frames: int) -> np.ndarray:
    """Frames whose grey is three times their number."""
    return np.stack([np.full((16, 24, 3), 3 * number, np.uint8) for number in range(num_frames)])


def animation(frames: np.ndarray, kind: str) -> bytes:
    file = io.BytesIO()
    first, *rest = map(Image.fromarray, frames)
    first.save(file, kind, save_all=True, append_images=rest, lossless=True)
    return file.getvalue()


# Frames


@pytest.mark.parametrize("total", [1, 3, 8, 9, 30, 63])
@pytest.mark.parametrize("num_frames", [1, 4, 8, 16])
def test_frames_are_those_that_transformers_samples(total: int, num_frames: int) -> None:
    found = decode_clip(film(numbered(total)), num_frames)
    metadata = VideoMetadata(total_num_frames=total)
    expected = default_sample_indices_fn(metadata, num_frames=num_frames) if num_frames <= total else None
    if expected is None:  # which transformers refuses
        expected = [number * total // num_frames for number in range(num_frames)]
    assert found.shape == (num_frames, 16, 24, 3)
    assert (found[:, 0, 0, 0] // 3).tolist() == list(expected)


@pytest.mark.parametrize(
    ("kind", "codec"),
    [("mp4", "mpeg4"), ("mov", "libx264"), ("avi", "mpeg4"), ("webm", "libvpx"), ("mpeg", "mpeg2video")],
)
def test_usual_kinds_of_films_are_read(kind: str, codec: str) -> None:
    gradual = np.repeat(np.repeat(numbered(24) * 2, 4, axis=1), 4, axis=2)
    data = film(gradual, kind, codec)
    assert modality_of_content(data) == "video"
    found = decode_clip(data, 6)
    assert np.abs(found.mean(axis=(1, 2, 3)) - gradual[::4].mean(axis=(1, 2, 3))).max() < 8


@pytest.mark.parametrize("kind", ["GIF", "PNG", "WEBP"])
def test_animated_pictures_are_clips(kind: str) -> None:
    frames = numbered(9)
    np.testing.assert_array_equal(decode_clip(animation(frames, kind), 3), frames[::3])


def test_film_of_a_turned_camera_is_upright() -> None:
    """The matrix of a track in an MP4 file says how to turn its pictures."""
    wide = np.zeros((4, 32, 64, 3), np.uint8)
    wide[:, :, :32] = 255
    data = film(wide, "mp4", "libx264")
    place = data.index(b"tkhd") + 44
    assert data[place : place + 4] == bytes([0, 1, 0, 0])
    one, minus = (1 << 16).to_bytes(4, "big"), (-1 << 16).to_bytes(4, "big", signed=True)
    quarter = bytes(4) + one + bytes(4) + minus + bytes(4)
    turned = decode_clip(data[:place] + quarter + data[place + 20 :], 2)
    assert turned.shape == (2, 64, 32, 3)
    assert turned[0, :24].mean() > 200  # clockwise: what was left is on top
    assert turned[0, -24:].mean() < 50


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (b"", "cannot identify"),
        (b"#EXTM3U\nfile:///etc/passwd\n", "cannot identify"),
        (film(noise(4, 0))[:300], "Error|no frames"),
        (animation(numbered(1), "PNG"), "a single picture, expected a film"),
    ],
)
def test_unreadable_clip_is_refused(data: bytes, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        decode_clip(data, 4)


def test_end_of_a_cut_film_is_not_needed() -> None:
    """The frames are those of the part that is there."""
    whole = film(noise(12, 0))
    found = decode_clip(whole[: len(whole) * 3 // 4], 4)
    np.testing.assert_array_equal(found[0], noise(12, 0)[0])
    assert len(found) == 4


def test_missing_package_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    data = film(noise(2, 0))
    monkeypatch.setitem(sys.modules, "av", None)
    with pytest.raises(ImportError, match=r"Reading videos needs the package av: pip install 'saffe-cache\[video\]'"):
        decode_clip(data, 2)


def test_thumbnail_is_the_middle_frame() -> None:
    with Image.open(io.BytesIO(thumbnail(film(numbered(30)), 12, "video"))) as picture:
        assert picture.size == (12, 8)
        assert abs(np.asarray(picture).mean() - 30) < 3


# Processors

COMPARE = """
import json, sys
from pathlib import Path
import zoo_timm
zoo_timm.declare_operators()
import numpy as np, torch, transformers
from saffe_cache.encoders.videos import load_video_processor
shapes = ((120, 160), (333, 250), (90, 90), (256, 256))
for settings in json.loads(sys.argv[2]):
    (Path(sys.argv[1]) / "preprocessor_config.json").write_text(json.dumps(settings))
    theirs, ours = transformers.AutoVideoProcessor.from_pretrained(sys.argv[1]), load_video_processor(sys.argv[1])
    assert theirs.to_dict() == ours.to_dict()
    for height, width in shapes:
        clip = np.random.default_rng(height).integers(0, 256, (3, height, width, 3), dtype=np.uint8)
        found, expected = (
            one(videos=[clip], do_sample_frames=False, return_tensors="pt") for one in (ours, theirs)
        )
        assert found.keys() == expected.keys()
        assert all(torch.equal(found[name], expected[name]) for name in expected), (settings, height, width)
    print(type(theirs).__name__)
"""
STEPS = {"do_resize": True, "do_center_crop": True, "resample": 2, "image_mean": [0.485, 0.456, 0.406]}
SQUARE = {"size": {"shortest_edge": 224}, "crop_size": {"height": 224, "width": 224}, **STEPS}


@pytest.mark.slow
@pytest.mark.skipif(not (TORCHVISION / "torchvision").is_dir(), reason=f"torchvision is not installed in {TORCHVISION}")
def test_processors_equal_those_with_torchvision(tmp_path: Path) -> None:
    settings = [
        {"video_processor_type": "VJEPA2VideoProcessor", "crop_size": 224, **STEPS},
        {"image_processor_type": "VideoMAEImageProcessor", **SQUARE},
        {"image_processor_type": "VideoMAEImageProcessor", **SQUARE, "resample": 3},
        {"feature_extractor_type": "VideoMAEFeatureExtractor", **SQUARE, "size": 224},
        {"video_processor_type": "TimesformerVideoProcessor", **SQUARE, "size": {"height": 100, "width": 200}},
        {"image_processor_type": "VivitImageProcessor", **SQUARE, "rescale_factor": 1 / 127.5, "offset": True},
    ]
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "videomae"}))
    places = [str(Path(__file__).parent), *sys.path, str(TORCHVISION)]
    shown = subprocess.run(
        [sys.executable, "-c", COMPARE, str(tmp_path), json.dumps(settings)],
        capture_output=True,
        text=True,
        env={**os.environ, "PYTHONPATH": os.pathsep.join(places)},
    )
    names = ["VJEPA2", "VideoMAE", "VideoMAE", "VideoMAE", "Timesformer", "Vivit"]
    assert shown.stdout.split() == [f"{name}VideoProcessor" for name in names], shown.stderr[-2000:]


# Encoders and runs


@pytest.fixture(scope="module")
def bench(tmp_path_factory: pytest.TempPathFactory) -> zoo_runs.Bench:
    made = zoo_runs.Bench(tmp_path_factory.mktemp("videos"))
    made._make("films", "mkv")
    return made


def films_of(bench: zoo_runs.Bench, **changes: Any) -> sc.ExtractConfig:
    encoders = {"video": str(bench.checkpoint("vjepa2")), "text": str(bench.checkpoint("bert"))}
    data = {"data": str(bench.work / "films"), "encoder": encoders, "storage": "float32", "device": "cpu"}
    return sc.ExtractConfig(**data | changes)


def test_number_of_frames_may_be_chosen(bench: zoo_runs.Bench) -> None:
    model = str(bench.checkpoint("vjepa2"))
    usual, more = (
        load_encoder(EncoderRequest(modality="video", model_id=model, video_frames=frames)) for frames in (None, 8)
    )
    assert (usual.num_frames, more.num_frames) == (4, 8)
    assert usual.fingerprint.key != more.fingerprint.key
    found, twice = (one.encode(one.prepare(noise(one.num_frames or 0, 0))) for one in (usual, more))
    layer = usual.num_layers
    assert 2 * found.states[layer].shape[1] == twice.states[layer].shape[1]


def test_learned_positions_take_no_other_number_of_frames(bench: zoo_runs.Bench) -> None:
    with pytest.raises(ValueError, match="does not run on its own preprocessed inputs"):
        load_encoder(EncoderRequest(modality="video", model_id=str(bench.checkpoint("videomae")), video_frames=6))


def test_unknown_processor_is_refused(bench: zoo_runs.Bench, tmp_path: Path) -> None:
    folder = tmp_path / "model"
    folder.mkdir()
    for file in bench.checkpoint("vjepa2").iterdir():
        (folder / file.name).write_bytes(file.read_bytes())
    settings = json.loads((folder / "video_preprocessor_config.json").read_text())
    settings["video_processor_type"] = "Qwen2VLVideoProcessor"
    (folder / "video_preprocessor_config.json").write_text(json.dumps(settings))
    with pytest.raises(ValueError, match="found Qwen2VLVideoProcessor, expected one of VJEPA2VideoProcessor"):
        load_encoder(EncoderRequest(modality="video", model_id=str(folder)))


def test_run_on_films_searches_and_embeds_new_ones(bench: zoo_runs.Bench, tmp_path: Path) -> None:
    cache = sc.extract(films_of(bench, cache=str(tmp_path / "films.zarr")))
    run = str(tmp_path / "run")
    options: dict[str, Any] = {"epochs": 1, "control_epochs": 0, "device": "cpu"}
    sc.train(sc.TrainConfig(cache=cache, out=run, fusion="linear", layers={"video": (3,)}, **options))
    result = json.loads(
        (
            Path(sc.evaluate(sc.EvaluateConfig(cache=cache, run=run, baselines="none", device="cpu"))) / "result.json"
        ).read_text()
    )
    assert result["verb"] == "evaluate"
    fusion = sc.load_run(run, device="cpu")
    assert fusion.modality == "video"
    paths = sorted((bench.work / "films" / "test").glob("*.mkv"))
    vectors = fusion.embed_videos(paths)
    np.testing.assert_allclose(
        vectors, fusion.embed_items(str(bench.work / "films"), splits=("test",)).vectors, atol=1e-6
    )
    np.testing.assert_allclose(np.linalg.norm(vectors, axis=1), 1, atol=1e-5)
    index = fusion.index(str(bench.work / "films"), str(tmp_path / "index"))
    hits = index.search(video=paths[0], k=3)
    assert hits[0].id == f"test/{paths[0].name}"
    assert len(index.search("a dog", k=3)) == 3
    with pytest.raises(ValueError, match=r"embed_images: the run .* is of video"):
        fusion.embed_images(paths)


def test_unreadable_film_is_left_out_and_named(bench: zoo_runs.Bench, tmp_path: Path) -> None:
    folder = tmp_path / "data" / "train" / "cat"
    folder.mkdir(parents=True)
    for number in range(3):
        (folder / f"{number}.mkv").write_bytes(film(noise(5, number)))
    (folder / "2.mkv").write_bytes(film(noise(5, 2))[:300])
    cache = sc.open_cache(
        sc.extract(films_of(bench, data=str(tmp_path / "data"), cache=str(tmp_path / "c.zarr"), max_invalid=0.5))
    )
    (reason,) = cache.encoder("video").manifest.invalid.values()
    assert "Error" in reason
    assert cache.table.rows["video"].tolist() == [0, 1, 2]


# Data


def modalities(items: Sequence[SourceItem]) -> list[list[str]]:
    return [sorted(item.hashes) for item in items]


def test_films_are_found_in_every_form(tmp_path: Path) -> None:
    data = [film(noise(3, number)) for number in range(2)]
    samples = tmp_path / "samples" / "train"
    samples.mkdir(parents=True)
    for number, content in enumerate(data):
        (samples / f"{number}.mp4").write_bytes(content)
        (samples / f"{number}.txt").write_text(f"film {number}")
    (tmp_path / "table.csv").write_text("video,caption\nsamples/train/0.mp4,a\nsamples/train/1.mp4,b\n")
    paths = [str(samples / f"{number}.mp4") for number in range(2)]
    stored = datasets.Dataset.from_dict({"video": paths, "caption": ["a", "b"]}).cast_column("video", datasets.Video())
    rows = [{"video": path, "caption": "a"} for path in paths]
    forms: list[Any] = [str(tmp_path / "samples"), str(tmp_path / "table.csv"), stored, rows]
    for form in forms:
        items = read_items(form, Columns(), ())
        assert modalities(items) == [["video"]] * 2, form
        assert [item.media["video"].read() for item in items] == data
        assert all(item.captions and not item.problem for item in items)


def test_animated_pictures_are_videos_where_asked(tmp_path: Path) -> None:
    folder = tmp_path / "train"
    folder.mkdir()
    (folder / "0.gif").write_bytes(animation(numbered(4), "GIF"))
    (folder / "0.txt").write_text("numbers")
    assert modalities(read_items(str(tmp_path), Columns(), ())) == [["image"]]
    assert modalities(read_items(str(tmp_path), Columns(video="gif"), ())) == [["video"]]


def test_cache_without_videos_has_no_column_for_them(bench: zoo_runs.Bench, tmp_path: Path) -> None:
    config = films_of(bench, data=str(bench.work / "photos"), cache=str(tmp_path / "photos.zarr"))
    cache = sc.extract(replace(config, encoder={"image": str(bench.checkpoint("vit")), "text": config.encoder["text"]}))
    assert not list(Path(cache).rglob("rows/video"))
    assert (sc.open_cache(cache).table.rows["video"] == -1).all()
