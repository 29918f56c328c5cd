"""Extraction with tiny real models: right numbers, nothing twice, nothing lost."""

from __future__ import annotations

import errno
import json
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from extraction_cases import draw, dying_behind, files_of, make_captioned, tiny_config
from PIL import Image
from quick_runs import quick_train
from store_cases import verify

from saffe_cache.cli import extract_command, main
from saffe_cache.core.features import CacheError, Layout
from saffe_cache.encoders import running
from saffe_cache.encoders.encoder import FrozenEncoder
from saffe_cache.encoders.transfers import Encoded, Launched
from saffe_cache.extraction import planning
from saffe_cache.extraction.config import ExtractConfig
from saffe_cache.extraction.extract import extract
from saffe_cache.inputs.pairs import same_training_pairs
from saffe_cache.store.reader import open_cache
from saffe_cache.training.runs import open_run


@pytest.fixture
def config(tmp_path: Path, tiny_model: Callable[[str], Path]) -> ExtractConfig:
    return tiny_config(tmp_path, tiny_model)


@pytest.fixture
def data(config: ExtractConfig) -> Path:
    return Path(config.data)


def test_cached_states_are_the_models_own(config: ExtractConfig, data: Path) -> None:
    cache = open_cache(extract(config))
    image, text = cache.encoder("image"), cache.encoder("text")
    item = cache.table.ids.index("train/007.png")
    model = transformers.Dinov2Model.from_pretrained(config.encoder["image"]).eval()
    processor = transformers.AutoImageProcessor.from_pretrained(config.encoder["image"], backend="pil")
    with torch.inference_mode(), Image.open(data / "train" / "007.png") as photo:
        output = model(**processor(photo, return_tensors="pt"), output_hidden_states=True)
    row = cache.table.rows["image"][[item]]
    for layer in (2, 3):
        np.testing.assert_allclose(image.tokens(row, (layer,)).states[0], output.hidden_states[layer], atol=1e-5)
    np.testing.assert_allclose(image.vectors(row), output.last_hidden_state[:, 0], atol=1e-5)
    rows = cache.table.captions[item]
    tokenizer = transformers.AutoTokenizer.from_pretrained(config.encoder["text"])
    bert = transformers.BertModel.from_pretrained(config.encoder["text"], add_pooling_layer=False).eval()
    tokens = text.tokens(rows, (1,))
    assert tokens.mask is not None
    for position, row in enumerate(rows):
        caption = cache.table.inputs["text"].texts[row]  # type: ignore[index]
        with torch.inference_mode():
            states = bert(**tokenizer(caption, return_tensors="pt"), output_hidden_states=True).hidden_states[1][0]
        np.testing.assert_allclose(tokens.states[0][position][tokens.mask[position]], states, atol=1e-5)


def test_distinct_inputs_are_encoded_once(config: ExtractConfig, data: Path) -> None:
    (data / "train" / "copy.png").write_bytes((data / "train" / "000.png").read_bytes())
    with (data / "train" / "metadata.jsonl").open("a") as file:
        file.write("\n" + json.dumps({"file_name": "copy.png", "captions": ["the same for all"]}))
    table = open_cache(extract(config)).table
    assert len(table.inputs["image"]) == 26
    assert table.inputs["text"].texts.count("the same for all") == 1  # type: ignore[union-attr]
    rows = dict(zip(table.ids, table.rows["image"], strict=True))
    assert rows["train/copy.png"] == rows["train/000.png"]


@pytest.mark.parametrize(
    ("able", "dtype", "times"), [("amx_bf16", "auto", 2), ("amx_bf16", "float32", 0), ("avx2", "auto", 0)]
)
def test_fast_type_is_named_to_those_who_chose_none(
    config: ExtractConfig,
    caplog: pytest.LogCaptureFixture,
    monkeypatch: pytest.MonkeyPatch,
    able: str,
    dtype: Any,
    times: int,
) -> None:
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: {able: True}, raising=False)
    caplog.set_level("INFO")
    for _ in range(2):  # what is encoded stays in its type
        extract(replace(config, dtype=dtype, device="cpu"))
        assert caplog.text.count("--dtype bfloat16 encodes") == times


def test_running_again_writes_nothing_and_says_so(config: ExtractConfig, caplog: pytest.LogCaptureFixture) -> None:
    extract(config)
    before = {path: path.stat().st_mtime_ns for path in Path(config.cache).rglob("zarr.json")}
    caplog.set_level("INFO")
    extract(config)
    assert before == {path: path.stat().st_mtime_ns for path in Path(config.cache).rglob("zarr.json")}
    assert caplog.text.count("nothing to do") == 2


def test_new_layer_writes_only_itself(config: ExtractConfig) -> None:
    extract(config)
    old = files_of(config.cache)
    extract(replace(config, layers={"image": (0, 2), "text": (1, 3)}))
    new = files_of(config.cache)
    assert {name: new[name] for name in old} == old
    added = {name.split("/")[2] + "/" + name.split("/")[3] for name in new.keys() - old.keys()}
    assert added == {"hidden_states/0", "blocks/0"}
    cache = open_cache(config.cache)
    assert cache.encoder("image").manifest.layers == [0, 2, 3]
    assert cache.encoder("image").block(0).spec.norm_first


def test_new_layer_runs_no_deeper_than_it_needs(config: ExtractConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    extract(config)
    chosen = []
    select = FrozenEncoder.select

    def spy(self: FrozenEncoder, layers: list[int], *, vectors: bool, **options: Any) -> None:
        chosen.append((list(layers), vectors))
        select(self, layers, vectors=vectors, **options)

    monkeypatch.setattr(FrozenEncoder, "select", spy)
    extract(replace(config, layers={"image": (1,), "text": (1, 3)}))
    assert chosen == [([1], False)]


def test_new_items_extend_every_cached_layer(config: ExtractConfig, data: Path) -> None:
    """Also over a shard that is not full, and also layers that this call does not name."""
    extract(replace(config, splits=("train",)))
    extract(replace(config, layers={"image": (0,), "text": (1,)}))
    cache = open_cache(config.cache)
    fresh = open_cache(
        extract(replace(config, cache=config.cache + ".fresh", layers={"image": (0, 2, 3), "text": (1, 3)}))
    )
    assert verify(config.cache)[1] == []
    for item_id in ("train/003.png", "dev/004.png"):
        states = []
        for one in (cache, fresh):
            row = one.table.rows["image"][[one.table.ids.index(item_id)]]
            states.append(one.encoder("image").tokens(row, (0, 2, 3)).states)
        np.testing.assert_allclose(states[0], states[1], atol=1e-5)


def test_remains_of_an_old_table_are_removed(config: ExtractConfig) -> None:
    """It came behind the new root; nothing else is to be done."""
    extract(config)
    make_captioned(Path(config.data), {"test": 3})
    extract(config)
    tables = Path(config.cache) / "tables"
    (tables / "1" / "splits").mkdir(parents=True)
    (tables / "1" / "splits" / "zarr.json").write_text("{}")
    extract(config)
    assert sorted(path.name for path in tables.iterdir()) == [*open_cache(config.cache).root.tables, "zarr.json"]


def test_second_encoder_is_added_to_the_first(config: ExtractConfig, tiny_model: Callable[[str], Path]) -> None:
    extract(config)
    old = files_of(config.cache)
    extract(replace(config, encoder={"image": str(tiny_model("vit"))}, layers={}))
    new = files_of(config.cache)
    assert {name: new[name] for name in old} == old
    cache = open_cache(config.cache)
    with pytest.raises(CacheError, match="2 image encoders"):
        cache.encoder("image")
    assert cache.encoder("image", "tiny-vit").manifest.layers == [2, 3]


@pytest.mark.parametrize("dies_at", [3, *(pytest.param(number, marks=pytest.mark.slow) for number in (0, 1, 6))])
def test_interrupted_extraction_resumes_to_the_same_bytes(config: ExtractConfig, dies_at: int) -> None:
    small = replace(config, shard_mb=0)
    whole = extract(replace(small, cache=config.cache + ".whole"))
    with dying_behind(dies_at + 1):  # the first one learns the number of tokens
        extract(small)
    assert files_of(extract(small)) == files_of(whole)


@pytest.mark.slow
def test_sigkill_loses_at_most_the_open_shard(config: ExtractConfig, tmp_path: Path) -> None:
    """A real process, killed as soon as something is committed; one batch a shard."""
    data = make_captioned(tmp_path / "many", {"train": 200})
    small = replace(config, data=str(data), shard_mb=0)
    arguments = [
        *("--data", str(data), "--cache", small.cache, "--storage", "float32", "--batch-size", "4", "--shard-mb", "0"),
        *(part for m, model in small.encoder.items() for part in ("--encoder", f"{m}={model}")),
        *("--layers", "image=2,3", "--layers", "text=1,3", "--device", "cpu"),
    ]
    code = (
        "import sys, torch; torch.set_num_threads(1); from saffe_cache.cli import extract_command as c; sys.exit(c())"
    )
    arrays = Path(small.cache) / "encoders"
    for _ in range(2):
        process = subprocess.Popen(
            [sys.executable, "-c", code, *arguments], stderr=subprocess.DEVNULL, stdout=subprocess.DEVNULL
        )
        before = len(list(arrays.rglob("c/*")))
        while process.poll() is None and len(list(arrays.rglob("c/*"))) < before + 10:
            time.sleep(0.01)
        process.kill()
        assert process.wait() == -signal.SIGKILL, "it ended before it could be killed: give it more photos"
    torch.set_num_threads(1)
    resumed = files_of(extract(small))
    assert resumed == files_of(extract(replace(small, cache=small.cache + ".whole")))
    assert not list(Path(small.cache).rglob("*.partial"))


@pytest.mark.parametrize("place", ["saffe_cache.extraction.loading.decode", "saffe_cache.sources.items.MediaFile.read"])
def test_lack_of_file_handles_marks_no_photo_unreadable(
    config: ExtractConfig, place: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Neither where photos are hashed nor where they are decoded; the next extraction is an undisturbed one."""

    def lacking(*_: object) -> None:
        raise OSError(errno.EMFILE, "Too many open files")

    with monkeypatch.context() as patched:
        patched.setattr(place, lacking)
        with pytest.raises(OSError, match="Too many open files"):
            extract(config)
    cache = open_cache(extract(config))
    assert not any(cache.table.problems)
    assert not cache.encoder("image").manifest.invalid


def test_unreadable_items_are_recorded_counted_and_limited(config: ExtractConfig, data: Path) -> None:
    whole = (data / "train" / "003.png").read_bytes()
    (data / "train" / "003.png").write_bytes(whole[: len(whole) // 2])
    (data / "train" / "004.png").unlink()
    with pytest.raises(CacheError, match=r"1 of 26 items are unreadable.*train/004\.png: unreadable image"):
        extract(config)
    with pytest.raises(CacheError, match=r"1 of 25 inputs are unreadable.*--max-invalid 0\.039"):
        extract(replace(config, max_invalid=0.039))
    cache = open_cache(extract(replace(config, max_invalid=0.1)))
    image = cache.encoder("image")
    assert "unreadable image: No such file" in cache.table.problems[cache.table.ids.index("train/004.png")]
    row = cache.table.rows["image"][[cache.table.ids.index("train/003.png")]]
    assert list(image.manifest.invalid) == row.tolist()
    assert not image.usable(row)[0]
    assert np.isnan(image.vectors(row)).all()
    assert image.usable(cache.table.rows["image"]).sum() == 24


def test_corrected_item_is_encoded(config: ExtractConfig, data: Path) -> None:
    photo = data / "dev" / "002.png"
    content = photo.read_bytes()
    photo.unlink()
    extract(replace(config, max_invalid=0.1))
    photo.write_bytes(content)
    cache = open_cache(extract(config))
    item = cache.table.ids.index("dev/002.png")
    assert cache.table.problems[item] == ""
    assert cache.encoder("image").usable(cache.table.rows["image"][[item]])[0]


def test_broken_photo_can_be_corrected_or_omitted(config: ExtractConfig, data: Path) -> None:
    """After a run that stopped over --max-invalid, and after one that went through."""
    photo = data / "train" / "003.png"
    content = photo.read_bytes()
    photo.write_bytes(content[: len(content) // 2])
    with pytest.raises(CacheError, match="1 of 26 inputs are unreadable"):
        extract(config)
    extract(replace(config, max_invalid=0.1))
    photo.write_bytes(content)
    cache = open_cache(extract(config))
    image = cache.encoder("image")
    row = cache.table.rows["image"][[cache.table.ids.index("train/003.png")]]
    assert row.tolist() == [26]
    assert image.usable(row)[0]
    assert np.isfinite(image.vectors(row)).all()


def test_deleted_photo_is_noted_when_a_layer_is_added(config: ExtractConfig, data: Path) -> None:
    extract(config)
    (data / "train" / "003.png").unlink()
    lines = (data / "train" / "metadata.jsonl").read_text().splitlines()
    (data / "train" / "metadata.jsonl").write_text("\n".join(line for line in lines if "003.png" not in line))
    more = replace(config, layers={"image": (1,), "text": (1, 3)})
    with pytest.raises(CacheError, match="1 of its image inputs are not in --data"):
        extract(more)
    cache = open_cache(extract(replace(more, max_invalid=0.1)))
    assert list(cache.encoder("image").manifest.invalid.values()) == ["not among --data"]


def test_refused_extraction_leaves_no_encoder_behind(config: ExtractConfig, tmp_path: Path) -> None:
    extract(config)
    other = make_captioned(tmp_path / "other", {"another": 3})
    with pytest.raises(CacheError, match="are not in --data"):
        extract(replace(config, data=str(other), image_size=28))
    assert len(open_cache(config.cache).encoders) == 2


def test_class_prompt_of_a_cache_is_fixed(config: ExtractConfig, tmp_path: Path) -> None:
    for number in range(4):
        draw(tmp_path / "classes" / "train" / f"class{number % 2}" / f"{number}.png", number)
    classes = replace(config, data=str(tmp_path / "classes"))
    extract(classes)
    with pytest.raises(CacheError, match=r"the cache has \['a photo of a class0.'\], found \['one class0'\]"):
        extract(replace(classes, class_prompt=("one {}",)))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"class_prompt": ("a photo",)}, "expected exactly one {} for the text"),
        ({"prompt": "{x}"}, "expected exactly one {} for the text"),
        ({"batch_size": 0}, "--batch-size: found 0, expected a number above 0"),
        ({"max_invalid": 7.0}, "expected a fraction from 0 to 1"),
        ({"layers": {"audio": (1,)}}, "expected modalities that --encoder names"),
        ({"max_items": {"tran": 5}}, "no items in split tran; its splits are dev, train"),
        ({"device": "gpu"}, "--device gpu: torch cannot use it"),
    ],
)
def test_wrong_options_are_named(config: ExtractConfig, changes: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        extract(replace(config, **changes))  # type: ignore[arg-type]


def test_changed_content_is_refused(config: ExtractConfig, data: Path) -> None:
    extract(config)
    draw(data / "train" / "005.png", 999)
    with pytest.raises(CacheError, match=r"1 items have changed since.*'train/005\.png' \(file\).*--changed"):
        extract(config)


def test_changed_photo_is_encoded_as_a_new_one_on_request(
    config: ExtractConfig, data: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """The old one keeps its row, which no item points to; whoever was trained on it is told."""
    run = quick_train(extract(config), tmp_path / "run", epochs=1, fusion="linear", validation="dev")
    before = open_cache(config.cache)
    draw(data / "train" / "005.png", 999)
    cache = open_cache(extract(replace(config, changed="reencode")))
    assert "1 items have changed and are encoded again, for instance train/005.png (file)" in caplog.text
    item = cache.table.ids.index("train/005.png")
    assert cache.table.ids == before.table.ids
    assert np.flatnonzero(cache.table.rows["image"] != before.table.rows["image"]).tolist() == [item]
    assert cache.table.rows["image"][item] == len(before.table.inputs["image"])
    image = cache.encoder("image")
    assert image.usable(cache.table.rows["image"]).all()
    fresh = open_cache(extract(replace(config, cache=config.cache + ".fresh")))
    vectors = [one.encoder("image").vectors(one.table.rows["image"]) for one in (cache, fresh)]
    np.testing.assert_allclose(*vectors, atol=1e-5)
    with pytest.raises(ValueError, match="trained on other items or texts"):
        same_training_pairs(open_run(run, cache)[0], cache, run)
    assert extract(config) == config.cache


def alter(monkeypatch: pytest.MonkeyPatch, change: Callable[[str, Encoded], None]) -> None:
    """Let `change` write to what an encoder of a modality gives for each batch."""
    launch = FrozenEncoder.launch

    def altered(self: FrozenEncoder, inputs: dict[str, torch.Tensor]) -> Launched:
        encoded = launch(self, inputs).encoded()
        change(self.request.modality, encoded)
        states = {i: torch.from_numpy(values) for i, values in encoded.states.items()}
        vectors = {name: torch.from_numpy(values) for name, values in encoded.vectors.items()}
        return Launched(states, vectors, encoded.lengths, None)

    monkeypatch.setattr(FrozenEncoder, "launch", altered)


def test_overflow_names_layer_and_input(config: ExtractConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    def loud(modality: str, encoded: Encoded) -> None:
        if modality == "image" and len(encoded.lengths) > 2:
            encoded.states[3][2] *= 1e6

    alter(monkeypatch, loud)
    with pytest.raises(CacheError, match=r"hidden_states/3 of input 2: magnitude .* exceeds float16's 65504"):
        extract(replace(config, storage="float16"))
    loudest = open_cache(extract(replace(config, storage="bfloat16", cache=config.cache + ".bf16")))
    assert loudest.encoder("image").statistics("hidden_states/3").max_magnitude > 65504


def test_non_finite_states_make_the_input_invalid(config: ExtractConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(modality: str, encoded: Encoded) -> None:
        if modality == "text":
            encoded.states[1][0, 0, 0] = np.inf

    alter(monkeypatch, broken)
    cache = open_cache(extract(replace(config, max_invalid=0.5)))
    assert list(cache.encoder("text").manifest.invalid.values()) == ["hidden_states/1 is not finite"]


@pytest.mark.parametrize(
    ("storage", "error"),
    [
        pytest.param("float16", 2**-11, marks=pytest.mark.slow),
        pytest.param("bfloat16", 2**-8, marks=pytest.mark.slow),
        ("int8", 1 / 254),
        ("float8", 2**-4),
    ],
)
def test_every_storage_type_holds_the_hidden_states(config: ExtractConfig, storage: str, error: float) -> None:
    """Photos and texts, against float32; errors are relative to the token's largest number."""
    exact = open_cache(extract(config))
    rough = open_cache(extract(replace(config, storage=storage, cache=f"{config.cache}.{storage}")))
    for modality, layer in (("image", 3), ("text", 1)):
        rows = np.array([3, 0, 2])
        expected = exact.encoder(modality).tokens(rows, (layer,))
        found = rough.encoder(modality).tokens(rows, (layer,))
        largest = np.abs(expected.states[0]).max(axis=-1, keepdims=True)
        assert (np.abs(found.states[0].astype(np.float32) - expected.states[0]) <= 1.01 * error * largest).all()
        np.testing.assert_array_equal(found.mask, expected.mask)


@pytest.mark.parametrize(
    "storage",
    ["float8", *(pytest.param(name, marks=pytest.mark.slow) for name in ("float32", "float16", "bfloat16", "int8"))],
)
def test_device_stores_the_bytes_of_the_cpu(
    config: ExtractConfig, monkeypatch: pytest.MonkeyPatch, storage: str
) -> None:
    """Converted where the encoder runs, of a bfloat16 pass as on a GPU, or after the copy back. Photos and texts."""
    config = replace(config, storage=storage, dtype="bfloat16")
    expected = extract(config)
    converted = []
    monkeypatch.setattr(FrozenEncoder, "converts", True)
    launch = FrozenEncoder.launch

    def spy(self: FrozenEncoder, inputs: dict[str, torch.Tensor]) -> Launched:
        launched = launch(self, inputs)
        converted.extend(launched.encoded().converted)
        assert launched.num_bytes > 0
        return launched

    monkeypatch.setattr(FrozenEncoder, "launch", spy)
    found = extract(replace(config, cache=config.cache + ".device"))
    assert set(converted) == (set() if storage == "float32" else {1, 2, 3})
    assert files_of(found) == files_of(expected)


def test_overflow_on_the_device_names_the_input(config: ExtractConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(FrozenEncoder, "converts", True)
    tokens_of = running.tokens_of

    def loud(state: torch.Tensor, layout: Layout, inputs: Mapping[str, torch.Tensor]) -> torch.Tensor:
        state = tokens_of(state, layout, inputs).clone()
        if "pixel_values" in inputs and len(state) > 2:
            state[2] *= 1e6
            state[0, 1, 1] = torch.nan
        return state

    monkeypatch.setattr(running, "tokens_of", loud)
    with pytest.raises(CacheError, match=r"hidden_states/2 of input 2: magnitude .* exceeds float16's 65504"):
        extract(replace(config, storage="float16", max_invalid=0.9))
    cache = open_cache(extract(replace(config, storage="float8", cache=config.cache + ".f8", max_invalid=0.9)))
    invalid = cache.encoder("image").manifest.invalid
    assert invalid[0] == "hidden_states/2 is not finite"
    assert 2 not in invalid


def test_bfloat16_pass_stores_what_float32_does_but_for_rounding(config: ExtractConfig) -> None:
    """As on a GPU, where it is the default; errors are relative to the token's length."""
    exact = open_cache(extract(config))
    rough = open_cache(extract(replace(config, dtype="bfloat16", cache=config.cache + ".bfloat16")))
    for modality, layer in (("image", 3), ("text", 3)):
        rows = np.arange(20)
        expected, found = (cache.encoder(modality).tokens(rows, (layer,)).states[0] for cache in (exact, rough))
        error = np.linalg.norm(found - expected, axis=-1) / np.maximum(np.linalg.norm(expected, axis=-1), 1e-9)
        assert 0 < error.max() < 0.1
        vectors = [cache.encoder(modality).vectors(rows) for cache in (exact, rough)]
        assert (np.linalg.norm(vectors[1] - vectors[0], axis=-1) < 0.1 * np.linalg.norm(vectors[0], axis=-1)).all()


def test_storage_of_an_array_is_fixed(config: ExtractConfig) -> None:
    extract(config)
    with pytest.raises(CacheError, match=r"stored as float32, requested: float16\. Use --storage float32"):
        extract(replace(config, storage="float16"))


def test_storage_defaults_to_that_of_other_layers_or_float8(config: ExtractConfig) -> None:
    one_layer = replace(config, layers={"image": (1,)}, encoder={"image": config.encoder["image"]})
    for asked, expected in ((None, "float8"), ("bfloat16", "bfloat16")):
        path = extract(replace(one_layer, storage=asked, cache=f"{config.cache}.{asked}"))
        extract(replace(one_layer, storage=None, layers={"image": (2,)}, cache=path))
        image = open_cache(path).encoder("image")
        assert [image.array(f"hidden_states/{layer}").spec.dtype for layer in (1, 2)] == [expected, expected]


def test_data_of_another_source_in_the_cache_are_requested(config: ExtractConfig, tmp_path: Path) -> None:
    extract(config)
    other = make_captioned(tmp_path / "other", {"another": 3})
    with pytest.raises(CacheError, match=r"26 of its image inputs are not in --data"):
        extract(replace(config, data=str(other), layers={"image": (1,), "text": (1,)}))


def test_plan_estimates_lengths_from_some_texts(
    config: ExtractConfig, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The estimate differs from the truth by as much as the sample does; an extraction itself tokenizes all texts."""

    def token_rows() -> int:
        extract(replace(config, plan=True))
        printed = capsys.readouterr().out
        assert ("estimated from" in printed) == (planning._PLANNED_TEXTS < 20)
        return int(re.findall(r"text-tiny-bert[^:]*:.*?hidden_states/\d+: (\d+) x", printed, re.DOTALL)[0])

    whole = token_rows()
    monkeypatch.setattr(planning, "_PLANNED_TEXTS", 15)
    assert 0.8 * whole < token_rows() < 1.25 * whole
    extract(config)
    assert len(open_cache(config.cache).encoder("text").array("hidden_states/1")) == whole


def test_plan_writes_nothing(config: ExtractConfig, capsys: pytest.CaptureFixture[str]) -> None:
    extract(replace(config, plan=True))
    assert not Path(config.cache).exists()
    printed = capsys.readouterr().out
    assert "26 items" in printed
    assert "26 of 26 distinct inputs" in printed
    assert re.search(r"hidden_states/2: 26 x \d+ x 32 float32, \d", printed)


def test_class_folders_and_a_fixed_choice_of_items(tmp_path: Path, config: ExtractConfig) -> None:
    for number in range(30):
        draw(tmp_path / "classes" / "train" / f"class_{number % 3}" / f"{number}.png", number)
    chosen = replace(config, data=str(tmp_path / "classes"), max_items={"train": 12}, class_prompt=("a {}", "one {}"))
    table = open_cache(extract(chosen)).table
    assert len(table) == 12
    assert set(table.class_names) == {"class_0", "class_1", "class_2"}
    texts = table.inputs["text"].texts
    assert texts is not None
    assert {texts[row] for row in table.class_texts[0]} == {
        f"{article} {table.class_names[0].replace('_', ' ')}" for article in ("a", "one")
    }
    again = open_cache(extract(replace(chosen, cache=config.cache + ".2", max_items={"train": 20}))).table
    assert set(table.ids) < set(again.ids)


def test_sounds_with_classes(tmp_path: Path, config: ExtractConfig, tiny_model: Callable[[str], Path]) -> None:
    import soundfile

    for number in range(6):
        path = tmp_path / "sounds" / "train" / f"class{number % 2}" / f"{number}.wav"
        path.parent.mkdir(parents=True, exist_ok=True)
        soundfile.write(path, np.sin(np.arange(4000) * (0.1 + number / 10)), 8000)
    encoders = {"audio": str(tiny_model("whisper")), "text": str(tiny_model("bert"))}
    cache = open_cache(extract(replace(config, data=str(tmp_path / "sounds"), encoder=encoders, layers={})))
    assert cache.encoder("audio").manifest.layers == [2, 3]
    assert cache.encoder("audio").usable(cache.table.rows["audio"]).all()


def test_commands_end_with_the_path_and_explain_errors(
    config: ExtractConfig, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    arguments = ["--data", config.data, "--cache", config.cache, "--encoder", f"image={config.encoder['image']}"]
    assert extract_command([*arguments, "--device", "cpu"]) == 0
    assert capsys.readouterr().out.splitlines()[-1] == config.cache
    assert main(["cache", "verify", config.cache]) == 0
    assert "0 damaged" in capsys.readouterr().out
    assert main(["cache", "inspect", config.cache]) == 0
    assert re.search(r"hidden_states/3: 26 x \d+ x 32 float8, 1 shards", capsys.readouterr().out)
    shard = next(path for path in Path(config.cache).rglob("c/0/0/0"))
    shard.write_bytes(shard.read_bytes()[:-100])
    assert main(["cache", "verify", config.cache]) == 1
    assert "truncated" in capsys.readouterr().out
    assert extract_command(["--data", str(tmp_path / "none"), "--cache", "x", "--encoder", "image=y"]) == 1
    assert "found no dataset" in capsys.readouterr().err
