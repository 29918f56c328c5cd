"""Runs that fuse several media of an item: joined encoders, training, evaluation, and new items."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import soundfile
import torch
from data_forms import png
from quick_runs import quick_train, report_of, setting_of, value
from report_cases import make_page
from several_cache import TOKENS, WIDTHS, make_several_cache

import saffe_cache as sc
from saffe_cache.core.features import CacheError
from saffe_cache.core.items import Item
from saffe_cache.core.ranks import Share
from saffe_cache.evaluation.config import EvaluateConfig
from saffe_cache.evaluation.evaluate import evaluate
from saffe_cache.fusion.media import drop_media, present_media
from saffe_cache.fusion.options import FusionShape, MediumShape
from saffe_cache.fusion.registry import FUSIONS
from saffe_cache.inference.model import load_run
from saffe_cache.inference.serving import ServedIndex
from saffe_cache.inputs.feature_loader import FeatureLoader, summaries
from saffe_cache.inputs.pairs import own_pairs, select_pairs, training_pairs
from saffe_cache.store.held import HeldCache
from saffe_cache.store.joined import JoinedEncoder, join_media
from saffe_cache.store.reader import Cache, open_cache
from saffe_cache.store.table import TableBuilder
from saffe_cache.training.config import TrainConfig
from saffe_cache.training.resolve import resolve_run
from saffe_cache.training.runs import open_run

OF_MEDIA = [name for name, entry in FUSIONS.items() if entry.for_media]
BOTH = "image+audio"


def joined(cache: Cache) -> tuple[Cache, JoinedEncoder]:
    view = join_media(cache, {name: cache.encoder(name).key for name in TOKENS})
    encoder = next(one for one in view.encoders.values() if isinstance(one, JoinedEncoder))
    return view, encoder


@pytest.fixture(scope="module")
def captioned(tmp_path_factory: pytest.TempPathFactory) -> str:
    folder = tmp_path_factory.mktemp("captioned")
    return make_several_cache(folder / "several.zarr", {"train": 120, "dev": 30, "test": 60}, lacks=6)


@pytest.fixture(scope="module")
def classified(tmp_path_factory: pytest.TempPathFactory) -> str:
    folder = tmp_path_factory.mktemp("classified")
    return make_several_cache(folder / "several.zarr", {"train": 320, "dev": 60, "test": 120}, classes=6, lacks=20)


def test_joined_tokens_are_those_of_the_media(captioned: str) -> None:
    view, encoder = joined(open_cache(captioned))
    rows = view.table.rows["media"]
    assert (rows >= 0).all()  # no item lacks both
    layers = tuple(encoder.layer(name, layer) for name in TOKENS for layer in (3, 2))
    found = encoder.tokens(rows, layers)
    assert found.mask is not None
    start = 0
    for place, (name, count) in enumerate(TOKENS.items()):
        own, member = view.table.rows[name], view.encoder(name)
        has = own >= 0
        expected = member.tokens(own[has], (3, 2))
        mask = found.mask[:, start : start + count]
        assert (mask.all(axis=1) == has).all()
        assert not mask[~has].any()
        for state, wanted in zip(found.states[2 * place : 2 * place + 2], expected.states, strict=True):
            assert state.shape[1:] == (count, WIDTHS[name])
            np.testing.assert_array_equal(state[has], wanted)
            assert not state[~has].any()
        start += count


def test_loaded_media_are_the_joined_tokens(captioned: str) -> None:
    cache = open_cache(captioned)
    spec = resolve_run(TrainConfig(cache=captioned, out="", gallery=BOTH, layers={"image": (3,)}), cache)
    view, encoder = joined(cache)
    rows = np.array([7, 0, 3, 1, 100])
    expected = encoder.tokens(rows, spec.gallery_layers)
    for residency in ("mapped", "memory"):
        states, mask = FeatureLoader(view, spec, residency=residency).photos(rows)  # type: ignore[arg-type]
        np.testing.assert_array_equal(mask, expected.mask)
        for found, wanted in zip(states, expected.states, strict=True):
            np.testing.assert_allclose(found, wanted)
    assert [(one.name, one.num_layers, one.hidden_size) for one in spec.shape.media] == [
        ("image", 1, WIDTHS["image"]),
        ("audio", 2, WIDTHS["audio"]),
    ]
    without_sound = np.flatnonzero(encoder.parts[:, 1] < 0)[:1]
    assert not np.any(encoder.tokens(without_sound, spec.gallery_layers[1:]).states)
    of_all = summaries(encoder, rows, spec.gallery_layers)
    assert of_all.shape == (5, spec.shape.summary_size)
    np.testing.assert_allclose(of_all, FeatureLoader(view, spec).summaries(rows), atol=1e-5)


def table_of(*items: tuple[str, dict[Any, str]]) -> Cache:
    """A table of items by split, each with media by their contents."""
    builder = TableBuilder(None, ())
    for number, (split, media) in enumerate(items):
        hashes = {name: hashlib.sha256(f"{name} {content}".encode()).digest() for name, content in media.items()}
        builder.add(Item(id=str(number), split=split, hashes=hashes, captions=(f"text {number}",)))
    return HeldCache(builder.build(), {})


def test_items_that_share_a_medium_are_in_one_split(captioned: str) -> None:
    cache = open_cache(captioned)
    made = table_of(
        ("train", {"image": "a", "audio": "b"}),
        ("train", {"image": "c", "audio": "d"}),
        ("train", {"image": "e"}),
        ("train", {"image": "e"}),
        ("test", {"image": "a", "audio": "x"}),
        ("test", {"audio": "y"}),
    )
    encoders = {one.key: one for one in (cache.encoder("image"), cache.encoder("audio"), cache.encoder("text"))}
    view, encoder = joined(HeldCache(made.table, encoders))
    rows = view.table.rows["media"]
    assert rows[2] == rows[3]
    assert len(np.unique(rows)) == len(encoder.parts) == 5
    pairs = select_pairs(view.table, encoder, cache.encoder("text"), "train", "captions")
    assert len(pairs) == 3
    own = own_pairs(view.table, "media", "train", pairs)
    assert [int(row) for row in own.rows] == [rows[1], rows[2]]


def shape_of(fusion: str) -> FusionShape:
    media = tuple(MediumShape(name=name, num_layers=2, hidden_size=WIDTHS[name]) for name in TOKENS)
    sizes: dict[str, Any] = {"num_layers": 4, "hidden_size": 20, "num_tokens": 0, "text_hidden_size": 8, "text_size": 8}
    return FusionShape(fusion=fusion, head="attention", media=media, **sizes)


def test_dropped_media_leave_one_of_each_item() -> None:
    shape, count = shape_of("media_sum"), 600
    states = [torch.randn(count, TOKENS[name], WIDTHS[name]) for name in TOKENS for _ in range(2)]
    mask = torch.ones(count, sum(TOKENS.values()), dtype=torch.bool)
    mask[:100, : TOKENS["image"]] = False
    torch.manual_seed(0)
    left = present_media(shape, states, drop_media(shape, states, mask, 0.5, Share.of(count)))
    assert left.any(dim=1).all()
    assert not left[:100, 0].any()
    assert left[:100, 1].all()
    assert 0.55 < left[100:].float().mean() < 0.7  # both, or one of them, is left: 5/8


@pytest.mark.parametrize("fusion", OF_MEDIA)
def test_a_masked_medium_is_a_missing_one(fusion: str, captioned: str) -> None:
    torch.manual_seed(0)
    cache = open_cache(captioned)
    view, encoder = joined(cache)
    spec = resolve_run(TrainConfig(cache=captioned, out="", gallery=BOTH, fusion=fusion), cache)
    model = spec.shape.entry.make(spec.shape, None).eval()
    has_both = np.flatnonzero((encoder.parts >= 0).all(axis=1))[:9]
    parts = encoder.parts[has_both]
    loader = FeatureLoader(view, spec)
    with torch.no_grad():
        absent = model(*loader.media(np.where([True, False], parts, -1)))
        states, mask = loader.media(parts)
        assert mask is not None
        whole = model(states, mask)
        mask[:, TOKENS["image"] :] = False
        hidden = model(states, mask)
        view.encoders = {**view.encoders, encoder.key: encoder.showing(["image"])}
        shown = model(*FeatureLoader(view, spec).photos(has_both))
    torch.testing.assert_close(hidden, absent)
    torch.testing.assert_close(shown, absent)
    assert (whole - absent).abs().max() > 1e-3
    torch.testing.assert_close(whole.norm(dim=1), torch.ones(9))


def test_a_shuffled_medium_is_that_of_another_item(captioned: str) -> None:
    _, encoder = joined(open_cache(captioned))
    rows = np.flatnonzero((encoder.parts >= 0).all(axis=1))
    moved = encoder.shuffled("audio", rows, seed=1).parts
    others = np.setdiff1d(np.arange(len(moved)), rows)
    np.testing.assert_array_equal(moved[:, 0], encoder.parts[:, 0])
    np.testing.assert_array_equal(moved[others], encoder.parts[others])
    assert (moved[rows, 1] != encoder.parts[rows, 1]).all()
    assert sorted(moved[rows, 1]) == sorted(encoder.parts[rows, 1])


def digests(cache: str) -> dict[str, str]:
    return {str(path): hashlib.sha256(path.read_bytes()).hexdigest() for path in Path(cache).rglob("*.*")}


def test_fused_classes_find_more_than_each_medium(classified: str, tmp_path: Path) -> None:
    before = digests(classified)
    options: dict[str, Any] = {"gallery": BOTH, "fusion": "auto", "epochs": 8}
    run = quick_train(classified, tmp_path / "run", **options)
    report = report_of(classified, run)
    assert digests(classified) == before
    assert (report["status"], report["failures"], report["run"]["shape"]["fusion"]) == (0, [], "media_sum")
    assert report["media_items"] == 120 - 12
    names = ["image + audio", "image", "audio", "image of another item", "audio of another item"]
    assert list(report["media"]) == names
    found = {name: of["map"]["value"] for name, of in report["media"].items()}
    assert found["image + audio"] > max(found["image"], found["audio"]) + 0.05
    assert found["image"] > 0.3
    for medium in ("image", "audio"):
        assert value(report, "map", f"{medium}_shuffled") == found[f"{medium} of another item"]
    assert "The 108 items that have all media, by the media that are shown." in report["text"]


def test_fused_captions_are_evaluated_with_baselines(captioned: str, tmp_path: Path) -> None:
    run = quick_train(captioned, tmp_path / "run", gallery=BOTH, fusion="media_concat", epochs=10)
    report = report_of(captioned, run, baselines="linear")
    assert (report["protocol"], report["num_photos"]) == ("caption", 60)
    assert report["systems"].keys() == {"fam", "ridge"}
    assert value(report, "mrr") > 2 * report["systems"]["fam"]["mrr"]["chance"]
    setting, model = setting_of(captioned, run, "captions")
    assert len(setting.gallery(model, setting.honest())) == 60
    alone = Path(
        evaluate(
            EvaluateConfig(cache=captioned, system="ridge", gallery=BOTH, out=str(tmp_path / "alone"), device="cpu")
        )
    )
    own = json.loads((alone / "result.json").read_text())["systems"]["ridge"]["mrr"]["value"]
    assert own == pytest.approx(report["systems"]["ridge"]["mrr"]["value"])
    with pytest.raises(ValueError, match=r"not learned to fuse texts. Choose --protocol caption"):
        report_of(captioned, run, protocol="metadata")
    with pytest.raises(ValueError, match=r"it fuses image and audio of each item, expected a run of one medium"):
        open_run(run, open_cache(captioned))


def test_complete_items_have_the_scores_of_the_run(tmp_path: Path) -> None:
    cache = make_several_cache(tmp_path / "several.zarr", {"train": 60, "dev": 20, "test": 30})
    run = quick_train(cache, tmp_path / "run", gallery=BOTH, fusion="media_sum", epochs=1)
    report = report_of(cache, run)
    assert report["media_items"] == report["num_photos"] == 30
    assert report["media"]["image + audio"] == report["systems"]["fam"] != report["media"]["image"]


def test_bank_of_a_correction_keeps_all_media(captioned: str, tmp_path: Path) -> None:
    run = quick_train(captioned, tmp_path / "run", gallery=BOTH, fusion="media_sum", epochs=1)
    report = report_of(captioned, run, search_correction="nnn")  # some items of the bank have one medium alone
    assert report["media"].keys() >= {"image + audio", "image", "audio"}


def test_media_are_regrouped_within_their_class(classified: str) -> None:
    cache = open_cache(classified)
    spec = resolve_run(TrainConfig(cache=classified, out="", gallery=BOTH), cache)
    assert (spec.regroup, spec.modality_dropout, spec.objective) == (True, 0.3, {"info_nce": 1.0, "media_alone": 1.0})
    one = resolve_run(TrainConfig(cache=classified, out="", gallery="image"), cache)
    assert (one.regroup, one.modality_dropout, one.media) == (None, None, {})


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"gallery": "image+image"}, r"--gallery: found image\+image, expected auto or image or"),
        ({"gallery": "image+smell"}, r"--gallery: found image\+smell"),
        ({"gallery": "audio+image"}, r"--gallery: found audio\+image"),
        ({"gallery": "image+video"}, r"holds no video encoder"),
        ({"gallery": BOTH, "fusion": "linear"}, r"--fusion: found linear with --gallery image\+audio, expected media"),
        ({"gallery": BOTH, "fusion": "ridge"}, r"--fusion: found ridge with --gallery image\+audio"),
        ({"gallery": BOTH, "pairs": "composed"}, r"--pairs: found composed with --gallery"),
        ({"gallery": BOTH, "gallery_text": "first_caption"}, r"--gallery-text: found first_caption with --gallery"),
        ({"gallery": BOTH, "mixup": 0.4}, r"--mixup: found 0.4 with --gallery image\+audio"),
        ({"gallery": BOTH, "modality_dropout": 1.0}, r"--modality-dropout: found 1.0, expected a fraction"),
        ({"gallery": BOTH, "head": "mean"}, r"--head: found mean, expected nothing: media_sum has no such option"),
        ({"gallery": "image", "fusion": "media_sum"}, r"--fusion: found media_sum with one medium"),
        ({"gallery": "image", "modality_dropout": 0.3}, r"--modality-dropout: found 0.3 with one medium"),
        ({"gallery": "image", "objective": {"media_alone": 1.0}}, r"--objective: found media_alone with one medium"),
    ],
)  # fmt: skip
def test_what_several_media_exclude(options: dict[str, Any], message: str, captioned: str) -> None:
    with pytest.raises((ValueError, CacheError), match=message):
        resolve_run(TrainConfig(cache=captioned, out="", **options), open_cache(captioned))


def test_items_without_any_medium_are_refused(captioned: str) -> None:
    cache = open_cache(captioned)
    cache.table = replace(cache.table, rows={name: np.full(len(cache.table), -1) for name in cache.table.rows})
    spec = resolve_run(TrainConfig(cache=captioned, out="", gallery=BOTH), cache)
    view, _ = joined(cache)
    with pytest.raises(ValueError, match=r"split 'train': none of its 120 items has a readable input"):
        training_pairs(spec, view)


def test_an_unfinished_medium_is_not_a_missing_one(captioned: str) -> None:
    cache = open_cache(captioned)
    sounds = cache.encoder("audio")
    sounds.manifest = replace(sounds.manifest, finished_rows=40)
    with pytest.raises(CacheError, match=r"holds 40 of 175 inputs: its extraction is unfinished. Run saffe extract"):
        resolve_run(TrainConfig(cache=captioned, out="", gallery=BOTH), cache)


def write_items(folder: Path, split: str, count: int) -> None:
    """Photos and sounds, of which every third lacks one."""
    rows = []
    for number in range(count):
        row = {"caption": f"word{number}"}
        (folder / split).mkdir(parents=True, exist_ok=True)
        if number % 3 != 1:
            (folder / split / f"{number}.png").write_bytes(png(number))
            row["image"] = f"{number}.png"
        if number % 3 != 2:
            sound = np.sin(np.arange(4000 + 800 * number) * (0.1 + number / 40))
            soundfile.write(folder / split / f"{number}.wav", sound, 8000)
            row["audio"] = f"{number}.wav"
        rows.append(row)
    (folder / split / "metadata.jsonl").write_text("\n".join(map(json.dumps, rows)))


def make_films(folder: Path, tiny_model: Callable[[str], Path]) -> tuple[Path, str, str]:
    """Items of a photo and a sound, of which some lack one: their folder, a cache of it and a run."""
    data = folder / "films"
    for split, count in (("train", 12), ("test", 6)):
        write_items(data, split, count)
    encoders = {
        "image": str(tiny_model("dinov2")),
        "audio": str(tiny_model("whisper")),
        "text": str(tiny_model("bert")),
    }
    cache = sc.extract(data=str(data), cache=str(folder / "cache.zarr"), encoder=encoders, device="cpu")
    run = quick_train(cache, folder / "run", gallery=BOTH, fusion="media_union", epochs=1, validation_fraction=0.3)
    return data, cache, run


def test_the_page_of_a_run_shows_photos_and_plays_sounds(tmp_path: Path, tiny_model: Callable[[str], Path]) -> None:
    _, cache, run = make_films(tmp_path, tiny_model)
    page = make_page([report_of(cache, run)["out"]], tmp_path / "page")
    assert len(set(re.findall(r'class="photo (photo-\d+)"', page))) == 4
    assert set(re.findall(r'<audio [^>]*aria-label="[^:"]*: ([^,"]+),', page)) == {"test/1.wav", "test/4.wav"}
    assert "The first items that the FAM and baselines find" in page
    assert "6 items, 6 queries" in page


def test_new_items_have_the_vectors_of_the_cache(tmp_path: Path, tiny_model: Callable[[str], Path]) -> None:
    data, cache, run = make_films(tmp_path, tiny_model)
    setting, model = setting_of(cache, run, "captions")
    expected = setting.gallery(model, setting.honest())
    fam = load_run(run, device="cpu")
    found = fam.embed_items(data, splits=("test",))
    assert found.ids == setting.pairs.ids
    assert not found.problems
    np.testing.assert_allclose(found.vectors, expected, atol=1e-5)
    photo, sound = data / "test" / "0.png", data / "test" / "0.wav"
    np.testing.assert_allclose(fam.embed_media([{"image": photo, "audio": sound}]), expected[:1], atol=1e-5)
    lacking = fam.embed_images([data / "test" / "2.png"])
    np.testing.assert_allclose(lacking, expected[2:3], atol=1e-5)
    np.testing.assert_allclose(fam.embed_audio([data / "test" / "1.wav"]), expected[1:2], atol=1e-5)
    for unknown in ({"smell": photo}, {"image": photo, "video": photo}):
        with pytest.raises(
            ValueError, match=rf"found the keys {', '.join(unknown)}, expected a mapping from image or au"
        ):
            fam.embed_media([unknown])  # type: ignore[list-item]
    index = fam.index(data, tmp_path / "films.index", splits=("test",))
    assert index.ids == found.ids
    np.testing.assert_allclose(index.vectors, expected, atol=1e-5)
    (best, *_) = index.search(image=photo, audio=sound)
    assert (best.id, round(best.score, 4)) == (found.ids[0], 1.0)
    assert index.search("word0")
    with pytest.raises(ValueError, match="no text enters a fusion of several media"):
        index.search("word0", image=photo)
    broken = tmp_path / "broken.wav"
    broken.write_bytes(b"no sound")
    with pytest.raises(ValueError, match=r"The query: its sound: .*libsndfile.* Give a file that can be read"):
        index.search(image=photo, audio=broken)
    served = ServedIndex(index)
    assert (served.about["noun"], served.about["takes"]) == ("item", ("image", "audio"))
    assert served.about["about"].startswith("6 items of photos and sounds, searched by a media_union fusion")
    shown = [(served.medium_of(name), served.file(name)) for name in found.ids[:2]]
    assert shown == [("image", photo.read_bytes()), ("audio", (data / "test" / "1.wav").read_bytes())]
    again = fam.index(data, tmp_path / "films.index", splits=("test",))
    assert again.manifest.generation == index.manifest.generation
    (data / "test" / "0.wav").write_bytes(b"no sound")
    broken = fam.embed_items(data, splits=("test",))
    assert broken.ids == found.ids
    np.testing.assert_allclose(broken.vectors[0], fam.embed_images([photo])[0], atol=1e-5)
