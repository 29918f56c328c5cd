"""A run on new inputs: the same vectors as in evaluation, without the cache; what it has no vectors for is refused."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
from PIL import Image
from quick_runs import quick_train, setting_of

import saffe_cache as sc
from saffe_cache.core.features import CacheError
from saffe_cache.core.items import Ragged
from saffe_cache.fusion.registry import FUSIONS
from saffe_cache.inference.model import load_run
from saffe_cache.inputs.feature_loader import encode_queries, encode_texts
from saffe_cache.inputs.pairs import class_vectors, select_pairs
from saffe_cache.retrieval.baselines import unit_rows
from saffe_cache.store.manifest import EncoderManifest
from saffe_cache.store.reader import open_cache
from saffe_cache.training.runs import BLOCKS, ENCODERS

Models = Callable[[str], Path]
COLOURS = ((220, 30, 30), (30, 200, 40), (30, 40, 220), (128, 128, 128))
COUNTS = {"train": 40, "test": 12}


def write_photos(folder: Path) -> Path:
    """Coloured noise with two captions each: the note that training may pair with it, and one that searches."""
    generator = np.random.default_rng(0)
    for split, count in COUNTS.items():
        (folder / split).mkdir(parents=True)
        lines = []
        for number in range(count):
            pixels = np.clip(
                np.array(COLOURS[number % len(COLOURS)]) + generator.normal(0, 40, (40, 48, 3)), 0, 255
            ).astype(np.uint8)
            Image.fromarray(pixels).save(folder / split / f"{number}.png")
            note, text = f"word{number % 4} word{9 + number % 31}", f"word{4 + number % 4} word{8 + number % 32}"
            lines.append(json.dumps({"file_name": f"{number}.png", "captions": [note, text]}))
        (folder / split / "metadata.jsonl").write_text("\n".join(lines))
    return folder


class World(NamedTuple):
    photos: Path
    cache: str


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory, tiny_model: Models) -> World:
    """Photos and their cache in float8, of all layers."""
    folder = tmp_path_factory.mktemp("inference")
    photos = write_photos(folder / "photos")
    cache = sc.extract(
        data=str(photos),
        cache=str(folder / "cache.zarr"),
        encoder={"image": str(tiny_model("dinov2")), "text": str(tiny_model("bert"))},
        layers={"image": (1, 2), "text": (1, 2)},
        device="cpu",
    )
    return World(photos, cache)


def trained(world: World, out: Path, fusion: str, **options: Any) -> str:
    layers = {} if FUSIONS[fusion].blocks != "paired" else {"layers": {"image": (1,), "text": (1,)}}
    steps = (
        dict.fromkeys(("epochs", "batch_size")) if FUSIONS[fusion].is_closed_form else {"epochs": 1, "batch_size": 16}
    )
    return quick_train(world.cache, out, fusion=fusion, **{**steps, **layers, **options})


def evaluated(world: World, run: str) -> tuple[tuple[str, ...], np.ndarray, np.ndarray]:
    """Ids and vectors of the test split as evaluation indexes them, and those of its queries."""
    spec = json.loads(Path(run, "config.json").read_text())["run"]
    paired = spec["gallery_text"] == "first_caption"
    setting, model = setting_of(world.cache, run, "captions", paired_texts=paired)
    rows = np.unique(setting.pairs.texts.values)
    if model.shape.entry.query_tokens:
        queries = encode_texts(model, setting.inputs, Ragged.from_rows(rows[:, None]))
    else:
        queries = encode_queries(model, setting.inputs.text.vectors(rows))
    return setting.pairs.ids, setting.gallery(model, setting.honest()), queries


def rows_of_pixels(picture: Image.Image) -> torch.Tensor:
    """[16, 48]"""
    return torch.from_numpy(np.asarray(picture.convert("RGB").resize((16, 16)), np.float32).reshape(16, 48) / 255)


@pytest.mark.parametrize(
    "fusion",
    [
        name if name in ("concat", "reuse") else pytest.param(name, marks=pytest.mark.slow)
        for name, entry in FUSIONS.items()
        if not entry.is_special
    ],
)
def test_vectors_are_those_of_evaluation(fusion: str, world: World, tmp_path: Path) -> None:
    """Of photos with a paired text where one enters; from another folder, while the cache is not opened."""
    pairs = (
        {"gallery_text": "first_caption", "mixup": 0.0}
        if FUSIONS[fusion].fuses_text and fusion not in ("two_tower", "fromage", "pang")
        else {}
    )
    run = trained(world, tmp_path / "run", fusion, **pairs)
    if fusion == "reference":
        torch.manual_seed(0)  # it draws random numbers
    ids, gallery, queries = evaluated(world, run)
    fam = load_run(shutil.move(run, tmp_path / "moved"), device="cpu")
    if fusion == "reference":
        torch.manual_seed(0)
    found = fam.embed_items(world.photos, splits=("test",))
    assert (found.problems, found.ids) == ({}, ids)
    np.testing.assert_allclose(found.vectors, gallery, atol=1e-5)
    texts = open_cache(world.cache).table.inputs["text"].texts
    assert texts is not None
    pairs_of = setting_texts(world)
    np.testing.assert_allclose(fam.embed_texts([texts[row] for row in pairs_of[bool(pairs)]]), queries, atol=1e-5)
    assert fam.size == gallery.shape[1] == queries.shape[1]


def setting_texts(world: World) -> dict[bool, np.ndarray]:
    """Rows of the texts that search, by whether the first caption is paired with the photo."""
    cache = open_cache(world.cache)
    encoders = cache.encoder("image"), cache.encoder("text")
    return {
        paired: np.unique(select_pairs(cache.table, *encoders, "test", "captions", first_paired=paired).texts.values)
        for paired in (False, True)
    }


@pytest.fixture(scope="module")
def alone(world: World, tmp_path_factory: pytest.TempPathFactory) -> str:
    return trained(world, tmp_path_factory.mktemp("alone") / "run", "reuse")


@pytest.fixture(scope="module")
def paired(world: World, tmp_path_factory: pytest.TempPathFactory) -> str:
    return trained(world, tmp_path_factory.mktemp("pairs") / "run", "reuse", gallery_text="first_caption")


def test_inputs_of_every_kind_have_the_same_vectors(world: World, alone: str) -> None:
    fam = load_run(alone, device="cpu")
    paths = [world.photos / "test" / f"{number}.png" for number in (3, 0)]
    pictures = [Image.open(path) for path in paths]
    expected = fam.embed_items(world.photos, splits=("test",)).vectors[[3, 0]]
    kinds: list[list[Any]] = [
        [*paths],
        [*map(str, paths)],
        pictures,
        [np.asarray(picture) for picture in pictures],
        [path.read_bytes() for path in paths],
    ]
    for kind in kinds:
        np.testing.assert_allclose(fam.embed_images(kind), expected, atol=1e-5)


def test_picture_with_an_orientation_is_turned_as_its_file_is(world: World, alone: str, tmp_path: Path) -> None:
    exif = Image.Exif()
    exif[0x0112] = 6
    Image.open(world.photos / "test" / "1.png").save(tmp_path / "turned.png", exif=exif)
    file, picture = load_run(alone, device="cpu").embed_images(
        [tmp_path / "turned.png", Image.open(tmp_path / "turned.png")]
    )
    np.testing.assert_allclose(picture, file, atol=1e-5)


def test_one_input_is_no_list(world: World, alone: str) -> None:
    fam, path = load_run(alone, device="cpu"), world.photos / "test" / "1.png"
    picture = Image.open(path)
    for one in (path, str(path), path.read_bytes(), picture, np.asarray(picture), iter([path])):
        with pytest.raises(ValueError, match=r"embed_images: found one .*, expected a list of inputs\. Pass \[input\]"):
            fam.embed_images(one)  # type: ignore[arg-type]


def test_one_input_twice_and_none(world: World, alone: str) -> None:
    fam = load_run(alone, device="cpu")
    path = world.photos / "test" / "1.png"
    first, second = fam.embed_images([path, path])
    assert np.array_equal(first, second)
    assert fam.embed_images([]).shape == fam.embed_texts([]).shape == (0, fam.size)


def test_pairs_of_a_photo_and_a_text(world: World, paired: str) -> None:
    fam = load_run(paired, device="cpu")
    items = fam.embed_items(world.photos, splits=("test",))
    photos = [world.photos / "test" / f"{number}.png" for number in range(COUNTS["test"])]
    notes = [item.captions[0] for item in items.items]
    np.testing.assert_allclose(fam.embed_pairs(photos, notes), items.vectors, atol=1e-5)
    other = fam.embed_pairs(photos[:1], ["word38 word39 word30"])
    assert np.abs(other - items.vectors[:1]).max() > 1e-3
    with pytest.raises(ValueError, match="2 inputs, 1 texts"):
        fam.embed_pairs(photos[:2], notes[:1])


def test_float32_is_close_to_the_storage_type(world: World, alone: str) -> None:
    paths = [world.photos / "test" / "0.png"]
    stored, exact = (load_run(alone, device="cpu", storage=kind) for kind in (None, "float32"))
    difference = np.abs(stored.embed_images(paths) - exact.embed_images(paths)).max()
    assert 1e-6 < difference < 0.05
    assert stored.fingerprint != exact.fingerprint


def test_fingerprint_is_of_the_weights_that_were_loaded(alone: str, tmp_path: Path) -> None:
    run = Path(shutil.copytree(alone, tmp_path / "run"))
    fam = load_run(run, device="cpu")
    (run / "model.safetensors").write_bytes(b"of a later training")
    assert fam.fingerprint == load_run(alone, device="cpu").fingerprint


def test_run_names_all_data_of_its_cache(world: World, tmp_path: Path, tiny_model: Models) -> None:
    more = tmp_path / "more photos"
    write_photos(more)
    for path in more.rglob("*.png"):
        Image.fromarray(255 - np.asarray(Image.open(path))).save(path.with_name(f"more-{path.name}"))
        path.unlink()
    for path in more.rglob("metadata.jsonl"):
        path.write_text(path.read_text().replace('"file_name": "', '"file_name": "more-'))
    cache = shutil.copytree(world.cache, tmp_path / "cache.zarr")
    encoder = {"image": str(tiny_model("dinov2")), "text": str(tiny_model("bert"))}
    sc.extract(
        data=str(more), cache=str(cache), encoder=encoder, layers={"image": (1, 2), "text": (1, 2)}, device="cpu"
    )
    run = quick_train(str(cache), tmp_path / "run", fusion="linear", epochs=1, batch_size=16)
    described = json.loads((Path(run) / ENCODERS).read_text())
    photos, texts = described.values()
    assert photos["extraction"]["data"] == "photos, more photos"
    assert texts["extraction"]["data"] == "photos"  # whose texts are all texts


@pytest.mark.parametrize("fusion", ["linear", "fromage"])
def test_vectors_of_classes_are_those_of_evaluation(fusion: str, tmp_path: Path, tiny_model: Models) -> None:
    for number in range(24):
        path = tmp_path / "photos" / ("train", "test")[number % 2] / f"kind_{number % 3}" / f"{number}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(np.full((40, 40, 3), number * 10, np.uint8)).save(path)
    cache = sc.extract(
        data=str(tmp_path / "photos"),
        cache=str(tmp_path / "cache.zarr"),
        encoder={"image": str(tiny_model("dinov2")), "text": str(tiny_model("bert"))},
        class_prompt=("a photo of a {}.", "one {}"),
        device="cpu",
    )
    run = quick_train(cache, tmp_path / "run", fusion=fusion, epochs=1)
    opened = open_cache(cache)
    setting, model = setting_of(cache, run, "classes")
    if fusion == "linear":
        expected = encode_queries(model, class_vectors(opened.table, opened.encoder("text")))
    else:
        with torch.inference_mode():
            units = [model.encode_texts(setting.inputs.queries(rows)).numpy() for rows in opened.table.class_texts]
        expected = unit_rows(np.stack([of_class.mean(axis=0) for of_class in units]))
    np.testing.assert_allclose(load_run(run, device="cpu").embed_classes(opened.table.class_names), expected, atol=1e-5)


@pytest.mark.parametrize("name", ["whisper", pytest.param("ast", marks=pytest.mark.slow)])
def test_sounds(name: str, tmp_path: Path, tiny_model: Models) -> None:
    soundfile = pytest.importorskip("soundfile")
    for number in range(16):
        path = tmp_path / "sounds" / ("train", "test")[number % 2] / f"{number}.wav"
        path.parent.mkdir(parents=True, exist_ok=True)
        sound = np.random.default_rng(number).normal(0, 0.1, 6000 + 4000 * (number % 5))
        soundfile.write(path, sound, 16_000, subtype="FLOAT")
        path.with_suffix(".txt").write_text(f"sound {number}")
    cache = sc.extract(
        data=str(tmp_path / "sounds"),
        cache=str(tmp_path / "cache.zarr"),
        encoder={"audio": str(tiny_model(name)), "text": str(tiny_model("bert"))},
        device="cpu",
    )
    run = quick_train(cache, tmp_path / "run", fusion="linear", epochs=1)
    setting, model = setting_of(cache, run, "captions")
    fam = load_run(run, device="cpu")
    found = fam.embed_items(tmp_path / "sounds", splits=("test",))
    assert found.ids == setting.pairs.ids
    np.testing.assert_allclose(found.vectors, setting.gallery(model, setting.honest()), atol=1e-5)
    one = tmp_path / "sounds" / "test" / "1.wav"
    own = {"array": soundfile.read(one, dtype="float32")[0], "sampling_rate": 16_000}
    np.testing.assert_allclose(fam.embed_audio([one, own]), found.vectors[[0, 0]], atol=1e-5)
    with pytest.raises(ValueError, match=r"embed_images: the run .* is of audio"):
        fam.embed_images([one])
    index = fam.index(tmp_path / "sounds", tmp_path / "sounds.index", splits=("test",))
    assert index.ids == found.ids
    np.testing.assert_allclose(index.vectors, found.vectors, atol=1e-5)
    scores = {hit.id: hit.score for hit in index.search(audio=one, k=8)}
    np.testing.assert_allclose([scores[name] for name in found.ids], found.vectors @ found.vectors[0], atol=1e-5)
    with pytest.raises(ValueError, match=r"found a photo to search by, but it is an index of sounds"):
        index.search(image=one)


# What is refused, and what is left out


def test_broken_photos_are_named(world: World, alone: str, tmp_path: Path) -> None:
    shutil.copytree(world.photos / "test", tmp_path / "some")
    (tmp_path / "some" / "5.png").write_bytes(b"no picture")
    (tmp_path / "some" / "metadata.jsonl").unlink()
    fam = load_run(alone, device="cpu")
    found = fam.embed_items(tmp_path / "some")
    assert len(found.ids) == COUNTS["test"] - 1
    assert [name.rpartition("/")[2] for name in found.problems] == ["5.png"]
    with pytest.raises(ValueError, match=r"embed_images: input 1: .*cannot identify"):
        fam.embed_images([tmp_path / "some" / "4.png", tmp_path / "some" / "5.png"])
    with pytest.raises(ValueError, match=r"embed_images: input 0: .*No such file"):
        fam.embed_images([tmp_path / "absent.png"])


def test_untrained_vectors_are_refused(world: World, alone: str, paired: str, tmp_path: Path) -> None:
    photo = [world.photos / "test" / "0.png"]
    with pytest.raises(ValueError, match="embed_pairs: the run was trained without paired texts"):
        load_run(alone, device="cpu").embed_pairs(photo, ["a note"])
    with pytest.raises(ValueError, match="embed_images: the run was trained on pairs alone"):
        load_run(paired, device="cpu").embed_images(photo)
    with pytest.raises(ValueError, match="embed_pairs: no text enters fusion linear"):
        load_run(trained(world, tmp_path / "run", "linear"), device="cpu").embed_pairs(photo, ["a note"])


def test_texts_that_are_none(alone: str) -> None:
    fam = load_run(alone, device="cpu")
    with pytest.raises(ValueError, match=r"Pass \[text\]"):
        fam.embed_texts("a dog")
    with pytest.raises(ValueError, match="found a generator, expected a list of texts"):
        fam.embed_texts(text for text in ("a dog",))  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=r"embed_classes: found one str, expected a list of inputs"):
        fam.embed_classes("dog")
    assert fam.embed_classes([]).shape == (0, fam.size)
    with pytest.raises(ValueError, match="text 1 is a int, expected str"):
        fam.embed_texts(["a dog", 3])  # type: ignore[list-item]


def test_another_encoder_is_refused(world: World, alone: str, tiny_model: Models, tmp_path: Path) -> None:
    moved = shutil.copytree(tiny_model("dinov2"), tmp_path / "moved_encoder")
    photo = [world.photos / "test" / "0.png"]
    expected = load_run(alone, device="cpu").embed_images(photo)
    elsewhere = load_run(alone, encoder={"image": str(moved)}, device="cpu")
    assert np.array_equal(elsewhere.embed_images(photo), expected)
    other = load_run(alone, encoder={"image": str(tiny_model("vit"))}, device="cpu")
    with pytest.raises(CacheError, match=r"tiny-vit is not the encoder of the run.*--encoder image=PLACE"):
        other.embed_images(photo)
    absent = load_run(alone, encoder={"image": str(tmp_path / "nothing")}, device="cpu")
    with pytest.raises(ValueError, match=r"nothing.*--encoder image=PLACE"):
        absent.embed_images(photo)
    with pytest.raises(ValueError, match="--encoder audio="):
        load_run(alone, encoder={"audio": "x"}, device="cpu")


def test_other_library_versions_are_told(
    world: World, alone: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    run = Path(shutil.copytree(alone, tmp_path / "run"))
    text = (run / ENCODERS).read_text()
    content = json.loads(text)
    key, one = next(iter(content.items()))
    one["manifest"]["fingerprint"]["library_versions"]["transformers"] = "4.0.0"
    config = json.loads((run / "config.json").read_text())
    new = EncoderManifest.from_json(one["manifest"], "here").key
    (run / ENCODERS).write_text(json.dumps({new if name == key else name: of for name, of in content.items()}))
    config["run"]["gallery_key"] = new
    (run / "config.json").write_text(json.dumps(config))
    photo = [world.photos / "test" / "0.png"]
    assert np.array_equal(load_run(run, device="cpu").embed_images(photo), load_run(alone).embed_images(photo))
    assert "vectors may differ by rounding" in caplog.text


@pytest.mark.parametrize("name", [ENCODERS, BLOCKS, "model.safetensors", "result.json", "config.json"])
@pytest.mark.parametrize("kind", ["absent", "empty", "half", "other"])
def test_damaged_runs_are_refused(name: str, kind: str, alone: str, tmp_path: Path) -> None:
    run = Path(shutil.copytree(alone, tmp_path / "run"))
    data = (run / name).read_bytes()
    (run / name).unlink()
    if kind != "absent":
        (run / name).write_bytes({"empty": b"", "half": data[: len(data) // 2], "other": b'{"a": {"b": 1}}'}[kind])
    with pytest.raises((ValueError, CacheError), match=str(run)):
        load_run(run, device="cpu")


def test_a_run_says_nothing_of_where_its_data_were(world: World, alone: str) -> None:
    content = json.loads(Path(alone, ENCODERS).read_text())
    assert str(world.photos) not in json.dumps(content)
    assert world.cache not in json.dumps(content)


def test_runs_that_do_not_exist(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=f"{tmp_path}/nothing"):
        load_run(tmp_path / "nothing")
    with pytest.raises(ValueError, match="--run someone/something: found no such folder, and no such repository"):
        load_run("someone/something")


def test_an_own_module_is_passed_again(world: World, tmp_path: Path, tiny_model: Models) -> None:
    def encoder(seed: int) -> sc.OwnEncoder:
        torch.manual_seed(seed)
        layers = torch.nn.Sequential(*[torch.nn.Linear(12, 12) for _ in range(2)])
        own = torch.nn.Sequential(torch.nn.Linear(48, 12), layers)
        return sc.OwnEncoder(model=own, layers="1", prepare=rows_of_pixels, name="own")

    cache = sc.extract(
        data=str(world.photos),
        cache=str(tmp_path / "cache.zarr"),
        encoder={"image": encoder(0), "text": str(tiny_model("bert"))},
        device="cpu",
    )
    run = quick_train(cache, tmp_path / "run", fusion="linear", epochs=1)
    setting, model = setting_of(cache, run, "captions")
    fam = load_run(run, encoder={"image": encoder(0)}, device="cpu")
    found = fam.embed_items(world.photos, splits=("test",)).vectors
    np.testing.assert_allclose(found, setting.gallery(model, setting.honest()), atol=1e-5)
    with pytest.raises(CacheError, match="own is not the encoder of the run"):
        load_run(run, encoder={"image": encoder(1)}, device="cpu").embed_images([world.photos / "test" / "0.png"])


@pytest.mark.slow
def test_onnx_file_maps_cached_states_to_the_same_vectors(world: World, tmp_path: Path) -> None:
    onnxruntime = pytest.importorskip("onnxruntime")
    pytest.importorskip("onnxscript")
    run = trained(world, tmp_path / "run", "linear")
    ids, gallery, _ = evaluated(world, run)
    fam = load_run(run, device="cpu")
    session = onnxruntime.InferenceSession(str(fam.to_onnx(tmp_path / "fam.onnx")))
    cache = open_cache(world.cache)
    rows = cache.table.rows["image"][[cache.table.ids.index(name) for name in ids]]
    tokens = cache.encoders[fam.spec.gallery_key].tokens(rows, fam.spec.gallery_layers)
    names = [f"hidden_states_{layer}" for layer in fam.spec.gallery_layers]
    states = {name: np.asarray(one, np.float32) for name, one in zip(names, tokens.states, strict=True)}
    np.testing.assert_allclose(session.run(["vectors"], states)[0], gallery, atol=1e-4)


def test_onnx_of_a_run_on_pairs_alone_is_refused(world: World, tmp_path: Path) -> None:
    fam = load_run(trained(world, tmp_path / "run", "concat", gallery_text="first_caption"), device="cpu")
    with pytest.raises(ValueError, match="to_onnx: the run was trained on pairs alone"):
        fam.to_onnx(tmp_path / "fam.onnx")
