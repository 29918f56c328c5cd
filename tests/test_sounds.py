"""Sounds of any length: windows over the whole sound, real tokens only, and what is stored of them."""

from __future__ import annotations

import io
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from extraction_cases import dying_behind, files_of
from store_cases import describe, verify
from tiny_models import NUM_LAYERS, SHAPE, assert_rounded, load_reference, randomize

from saffe_cache.core.features import CacheError
from saffe_cache.encoders.encoder import FrozenEncoder, load_encoder
from saffe_cache.encoders.loading import EncoderRequest
from saffe_cache.encoders.windows import Windows
from saffe_cache.extraction.config import ExtractConfig, RepairConfig
from saffe_cache.extraction.extract import extract
from saffe_cache.extraction.repair import repair
from saffe_cache.extraction.shared_plan import plan_work
from saffe_cache.fusion.known.insertion import inserted_tokens
from saffe_cache.fusion.layers import mean_weights
from saffe_cache.inputs.feature_loader import FeatureLoader, summaries
from saffe_cache.sources.decoding import count_samples, decode
from saffe_cache.store.reader import EncoderCache, open_cache
from saffe_cache.training.config import TrainConfig
from saffe_cache.training.resolve import resolve_run
from saffe_cache.training.train import train

soundfile = pytest.importorskip("soundfile")

Models = Callable[[str], Path]
RATE = 16_000
LENGTHS = (4_000, 16_000, 40_000, 16_000, 5_000, 33_000, 16_000, 4_000)
"""Samples of the sounds, of which Whisper's tiny model takes 16,000 at a time."""


def noise(num_samples: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).normal(0, 0.1, num_samples)


def write_sounds(folder: Path, lengths: tuple[int, ...] = LENGTHS, split: str = "train", first: int = 0) -> Path:
    for number, length in enumerate(lengths, start=first):
        path = folder / split / f"class{number % 2}" / f"{number}.wav"
        path.parent.mkdir(parents=True, exist_ok=True)
        soundfile.write(path, noise(length, number), RATE, subtype="FLOAT")
    return folder


@pytest.fixture(scope="session")
def hubert(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny model that takes sounds of any length: 320 samples make a token."""
    folder = tmp_path_factory.mktemp("models") / "tiny-hubert"
    config = transformers.HubertConfig(
        **SHAPE, conv_dim=(16,) * 7, num_conv_pos_embeddings=16, num_conv_pos_embedding_groups=4
    )
    model = transformers.HubertModel(config)
    randomize(model, seed=1)
    model.save_pretrained(folder)
    transformers.Wav2Vec2FeatureExtractor(return_attention_mask=False).save_pretrained(folder)
    return folder


@pytest.fixture
def config(tmp_path: Path, tiny_model: Models) -> ExtractConfig:
    return ExtractConfig(
        data=str(write_sounds(tmp_path / "sounds")),
        cache=str(tmp_path / "cache.zarr"),
        encoder={"audio": str(tiny_model("whisper")), "text": str(tiny_model("bert"))},
        layers={"audio": (1, NUM_LAYERS)},
        storage="float32",
        device="cpu",
    )


def audio(config: ExtractConfig) -> EncoderCache:
    return open_cache(extract(config)).encoder("audio")


def row_of(cache: str, name: str) -> int:
    table = open_cache(cache).table
    return int(table.rows["audio"][[Path(one).stem for one in table.ids].index(name)])


def states_of(encoder: EncoderCache, row: int, layer: int) -> torch.Tensor:
    return torch.from_numpy(encoder.tokens(np.array([row]), (layer,)).states[0][0])


# Windows


def test_windows_are_found(tiny_model: Models, hubert: Path) -> None:
    found = {
        name: load_encoder(EncoderRequest(modality="audio", model_id=str(folder))).windows
        for name, folder in (("whisper", tiny_model("whisper")), ("ast", tiny_model("ast")), ("hubert", hubert))
    }
    fixed = {"is_fixed": True, "shortest": 400}
    assert found == {
        "whisper": Windows(size=16_000, is_sequence=True, num_tokens=50, **fixed),
        "ast": Windows(size=31 * 160 + 400, is_sequence=False, is_stored_whole=True, num_tokens=17, **fixed),
        "hubert": Windows(size=480_000, is_fixed=False, is_sequence=True, shortest=400, step=320, margin=-80),
    }


@pytest.mark.parametrize(
    ("num_samples", "expected"),
    [(400, [400]), (1000, [1000]), (1399, [1000]), (1400, [1000, 400]), (3000, [1000] * 3)],
)
def test_sounds_are_cut_without_overlap(num_samples: int, expected: list[int]) -> None:
    windows = Windows(size=1000, is_fixed=True, is_sequence=True, shortest=400, num_tokens=50)
    cut = windows.cut(num_samples)
    assert list(map(len, cut)) == expected
    assert [one.start for one in cut] == [1000 * number for number in range(len(cut))]
    with pytest.raises(ValueError, match="the sound has 399 samples, expected 400 or more"):
        windows.cut(399)


@pytest.mark.parametrize("num_samples", [400, 719, 720, 1039, 1040, 5_000, 15_999, 16_000, 50_001])
def test_tokens_of_any_length_are_known_before(num_samples: int, hubert: Path) -> None:
    encoder = load_encoder(EncoderRequest(modality="audio", model_id=str(hubert)))
    assert encoder.windows is not None
    batch = encoder.prepare(noise(num_samples).astype(np.float32))
    assert encoder.encode(batch).states[NUM_LAYERS].shape[1] == encoder.windows.rows(num_samples)


@pytest.mark.parametrize("kind", ["WAV", "FLAC", "OGG", "MP3", "AIFF"])
@pytest.mark.parametrize("rate", [8_000, 11_025, 16_000, 22_050, 44_100, 48_000])
def test_header_tells_the_length_after_resampling(kind: str, rate: int) -> None:
    if kind == "MP3" and "MP3" not in soundfile.available_formats():
        pytest.skip("this libsndfile has no MP3")
    for num_samples in (rate, rate // 3 + 1, 7 * rate // 5 + 13):
        file = io.BytesIO()
        soundfile.write(file, noise(num_samples), rate, format=kind)
        data = file.getvalue()
        for target in (16_000, 48_000):
            assert count_samples(data, target) == len(decode("audio", data, target))


# What is stored


def test_short_sound_has_the_vector_of_its_own_frames(config: ExtractConfig, tiny_model: Models) -> None:
    """5,000 of 16,000 samples are 16 of Whisper's 50 tokens, of which the last is real for 200 samples."""
    encoder = audio(config)
    model, extractor = load_reference("whisper", tiny_model("whisper")), transformers.WhisperFeatureExtractor
    processor = extractor.from_pretrained(tiny_model("whisper"))
    inputs = processor([noise(5_000, 4).astype(np.float32)], sampling_rate=RATE, return_tensors="pt")
    with torch.no_grad():
        output = model.encoder(**inputs, output_hidden_states=True)
    row = row_of(config.cache, "4")
    assert_rounded(states_of(encoder, row, 1), output.hidden_states[1][0, :16])
    assert_rounded(torch.from_numpy(encoder.vectors(np.array([row]))[0]), output.last_hidden_state[0, :16].mean(dim=0))


def test_long_sound_is_the_mean_over_its_windows(config: ExtractConfig, tiny_model: Models) -> None:
    encoder = audio(config)
    model = load_reference("whisper", tiny_model("whisper"))
    processor = transformers.WhisperFeatureExtractor.from_pretrained(tiny_model("whisper"))
    sound, frames, states = noise(40_000, 2).astype(np.float32), [], []
    for first, real in ((0, 50), (16_000, 50), (32_000, 25)):
        window = sound[first : first + 16_000]
        inputs = processor([window], sampling_rate=RATE, return_tensors="pt")
        with torch.no_grad():
            output = model.encoder(**inputs, output_hidden_states=True)
        states.append(output.hidden_states[1][0, :real])
        frames.append(output.last_hidden_state[0, :real])
    row = row_of(config.cache, "2")
    assert_rounded(states_of(encoder, row, 1), torch.cat(states))
    assert_rounded(torch.from_numpy(encoder.vectors(np.array([row]))[0]), torch.cat(frames).mean(dim=0))


def test_windows_of_patches_are_stored_whole(config: ExtractConfig, tiny_model: Models) -> None:
    """AST has class tokens and patches of time and frequency; its vector is averaged by length."""
    encoder = audio(replace(config, encoder={**config.encoder, "audio": str(tiny_model("ast"))}))
    size = 31 * 160 + 400
    model = load_reference("ast", tiny_model("ast"))
    processor = transformers.ASTFeatureExtractor.from_pretrained(tiny_model("ast"))
    sound, total, states = noise(16_000, 1).astype(np.float32), torch.zeros(32), []
    for first in range(0, 16_000, size):
        window = sound[first : first + size]
        with torch.no_grad():
            output = model(**processor([window], sampling_rate=RATE, return_tensors="pt"), output_hidden_states=True)
        states.append(output.hidden_states[1][0])
        total += output.pooler_output[0] * len(window) / len(sound)
    row = row_of(config.cache, "1")
    assert len(states) == 3
    assert_rounded(states_of(encoder, row, 1), torch.cat(states))
    assert_rounded(torch.from_numpy(encoder.vectors(np.array([row]))[0]), total)
    tokens = encoder.tokens(np.array([row, row_of(config.cache, "0")]), (1,))
    assert tokens.mask is not None
    assert tokens.mask.sum(axis=1).tolist() == [3 * 17, 17]


@pytest.mark.parametrize("seconds", [30.0, 1.0])
def test_sounds_of_any_length_equal_the_model(seconds: float, config: ExtractConfig, hubert: Path) -> None:
    config = replace(config, encoder={**config.encoder, "audio": str(hubert)}, audio_seconds=seconds)
    encoder = audio(config)
    model = transformers.HubertModel.from_pretrained(hubert).eval()
    processor = transformers.Wav2Vec2FeatureExtractor.from_pretrained(hubert)
    for number, length in enumerate(LENGTHS):
        sound, states, frames = noise(length, number).astype(np.float32), [], []
        size = round(seconds * RATE)
        for first in range(0, length, size):
            inputs = processor([sound[first : first + size]], sampling_rate=RATE, return_tensors="pt")
            with torch.no_grad():
                output = model(**inputs, output_hidden_states=True)
            states.append(output.hidden_states[1][0])
            frames.append(output.last_hidden_state[0])
        row = row_of(config.cache, str(number))
        assert_rounded(states_of(encoder, row, 1), torch.cat(states))
        assert_rounded(torch.from_numpy(encoder.vectors(np.array([row]))[0]), torch.cat(frames).mean(dim=0))


@pytest.mark.parametrize("name", ["whisper", pytest.param("hubert", marks=pytest.mark.slow)])
def test_sound_is_the_same_alone_and_beside_longer_ones(
    name: str, config: ExtractConfig, tmp_path: Path, tiny_model: Models, hubert: Path
) -> None:
    folder = hubert if name == "hubert" else tiny_model(name)
    config = replace(config, encoder={**config.encoder, "audio": str(folder)})
    alone = replace(config, data=str(write_sounds(tmp_path / "one", LENGTHS[:1])), cache=str(tmp_path / "one.zarr"))
    many, one = audio(config), audio(alone)
    assert_rounded(states_of(many, row_of(config.cache, "0"), 1), states_of(one, 0, 1))


@pytest.mark.parametrize(("name", "size", "real"), [("whisper", 16_000, [50, 50, 25]), ("hubert", 32_000, [99, 24])])
def test_selected_tokens_are_those_of_each_window(
    name: str, size: int, real: list[int], config: ExtractConfig, tiny_model: Models, hubert: Path, tmp_path: Path
) -> None:
    folder = hubert if name == "hubert" else tiny_model(name)
    config = replace(config, encoder={**config.encoder, "audio": str(folder)}, audio_seconds=2.0)
    whole, means = audio(config), audio(replace(config, cache=str(tmp_path / "means.zarr"), tokens={"audio": "mean"}))
    row = row_of(config.cache, "2")
    parts = states_of(whole, row, 1).split(real)
    assert len(parts) == -(-40_000 // size)
    assert_rounded(states_of(means, row, 1), torch.stack([part.mean(dim=0) for part in parts]))
    assert np.array_equal(means.vectors(np.array([row])), whole.vectors(np.array([row])))


def test_largest_tokens_of_windows_are_refused(config: ExtractConfig) -> None:
    with pytest.raises(ValueError, match="--tokens audio=top=3: sounds have windows of any number of tokens"):
        extract(replace(config, tokens={"audio": "top=3"}))


def test_other_windows_are_another_encoder(hubert: Path) -> None:
    request = EncoderRequest(modality="audio", model_id=str(hubert))
    whole, cut = (load_encoder(one).fingerprint for one in (request, replace(request, audio_seconds=2.0)))
    assert whole.fields["audio_windows"] == {"samples": 480_000, "hop": 480_000, "stored": "real tokens"}
    assert cut.fields["audio_windows"] == {"samples": 32_000, "hop": 32_000, "stored": "real tokens"}
    assert whole.key != cut.key


def test_texts_and_photos_have_no_windows_in_their_keys(tiny_model: Models) -> None:
    for modality, name in (("image", "dinov2"), ("text", "bert")):
        encoder = load_encoder(EncoderRequest(modality=modality, model_id=str(tiny_model(name))))  # type: ignore[arg-type]
        assert encoder.windows is None
        assert "audio_windows" not in encoder.fingerprint.fields


# Interruptions, growth, broken files


@pytest.mark.slow
def test_resumed_extraction_equals_an_uninterrupted_one(config: ExtractConfig, tmp_path: Path) -> None:
    config = replace(config, data=str(write_sounds(tmp_path / "many", LENGTHS * 9)), shard_mb=0, batch_size=4)
    whole = replace(config, cache=str(tmp_path / "whole.zarr"))
    expected = files_of(extract(whole))
    for launches in (9, 22):
        with dying_behind(launches):
            extract(config)
    assert files_of(extract(config)) == expected
    assert verify(config.cache)[1] == []


def test_sounds_extracted_by_workers_equal_one_process(config: ExtractConfig, tmp_path: Path, hubert: Path) -> None:
    lengths = tuple(800 + 331 * (number % 13) for number in range(200))
    data = write_sounds(tmp_path / "many", lengths)
    alone = replace(config, data=str(data), encoder={"audio": str(hubert)}, shard_mb=0)
    extract(alone)
    shared = replace(alone, cache=str(tmp_path / "shared.zarr"), rank=1, world_size=2)
    plan = plan_work(shared, num_workers=2)
    assert plan is not None
    assert len(plan.pieces) > 1
    extract(shared)
    assert files_of(shared.cache) == files_of(alone.cache)


def test_sounds_decoded_in_processes_are_the_same(config: ExtractConfig, tmp_path: Path) -> None:
    expected = files_of(extract(config))
    config = replace(config, cache=str(tmp_path / "forked.zarr"), decode_in="processes", workers=2)
    assert files_of(extract(config)) == expected


@pytest.mark.slow
def test_rows_do_not_move_when_a_file_is_gone_at_resumption(config: ExtractConfig, tmp_path: Path) -> None:
    data = write_sounds(tmp_path / "many", LENGTHS * 9)
    config = replace(config, data=str(data), shard_mb=0, batch_size=4, max_invalid=0.5)
    with dying_behind(22):
        extract(config)
    gone = sorted(data.rglob("*.wav"))[-1]
    whole = replace(config, cache=str(tmp_path / "whole.zarr"))
    expected = audio(whole)
    gone.unlink()
    found = audio(config)
    assert np.array_equal(found.offsets, expected.offsets)
    rows = np.array([row for row in range(len(LENGTHS) * 9) if row not in found.manifest.invalid])
    assert len(rows) == len(LENGTHS) * 9 - 1
    assert np.array_equal(found.tokens(rows, (1,)).states[0], expected.tokens(rows, (1,)).states[0])


def test_added_sounds_leave_earlier_ones_as_they_are(config: ExtractConfig, tmp_path: Path) -> None:
    before = audio(config)
    rows = np.arange(len(LENGTHS))
    states, offsets = before.tokens(rows, (1,)).states[0], before.offsets
    other = write_sounds(tmp_path / "other", (7_000, 50_000), "dev", first=20)
    after = audio(replace(config, data=str(other)))
    assert after.offsets.tolist()[: len(offsets)] == offsets.tolist()
    assert np.diff(after.offsets)[-2:].tolist() == [22, 157]
    found = after.tokens(rows, (1,)).states[0]
    assert np.array_equal(found[:, : states.shape[1]], states)


def test_added_layers_equal_those_extracted_at_once(config: ExtractConfig, tmp_path: Path) -> None:
    extract(replace(config, layers={"audio": (1,)}))
    found = files_of(extract(config))
    assert found == files_of(extract(replace(config, cache=str(tmp_path / "at-once.zarr"))))


def test_broken_sounds_are_invalid_by_name(config: ExtractConfig, tmp_path: Path) -> None:
    file = io.BytesIO()
    soundfile.write(file, noise(20_000), RATE, format="FLAC")
    folder = Path(config.data) / "train" / "class0"
    (folder / "truncated.flac").write_bytes(file.getvalue()[:-9_000])
    (folder / "garbage.wav").write_bytes(b"RIFF and no more")
    soundfile.write(folder / "short.wav", noise(399), RATE)
    with pytest.raises(CacheError, match=r"inputs are unreadable.*class0/"):
        extract(config)
    encoder = audio(replace(config, max_invalid=0.5))
    reasons = {Path(name).name: encoder.manifest.invalid[row_of(config.cache, Path(name).stem)]
               for name in ("truncated.flac", "garbage.wav", "short.wav")}  # fmt: skip
    assert len(encoder.manifest.invalid) == 3
    assert "Error" in reasons["truncated.flac"]
    assert reasons["short.wav"].endswith("399 samples, expected 400 or more, one window of a spectrum")
    usable = np.flatnonzero(encoder.usable(np.arange(len(LENGTHS) + 3)))
    assert np.isfinite(encoder.tokens(usable, (1,)).states[0]).all()
    assert np.isnan(encoder.tokens(np.array(sorted(encoder.manifest.invalid)), (1,)).states[0]).any()


def test_sound_that_is_shorter_than_its_header_says_is_invalid(
    config: ExtractConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    honest = count_samples
    monkeypatch.setattr(
        "saffe_cache.extraction.planning.count_samples",
        lambda data, rate: honest(data, rate) + (5_000 if len(data) > 150_000 else 0),
    )
    encoder = audio(replace(config, max_invalid=0.5))
    assert list(encoder.manifest.invalid.values()) == [
        "ValueError: the sound has 40000 samples, which make 125 rows of hidden states; by its header, it has 141"
    ]


@pytest.mark.parametrize(
    "name", ["hubert", *(pytest.param(name, marks=pytest.mark.slow) for name in ("whisper", "ast"))]
)
def test_damaged_sounds_are_repaired(name: str, config: ExtractConfig, tiny_model: Models, hubert: Path) -> None:
    folder = hubert if name == "hubert" else tiny_model(name)
    extract(replace(config, encoder={**config.encoder, "audio": str(folder)}, storage="float8"))
    expected = files_of(config.cache)
    shards = [path for path in Path(config.cache).glob("encoders/audio-*/**/c/*") if "blocks" not in str(path)]
    files = [path for shard in shards for path in ([shard] if shard.is_file() else shard.rglob("*")) if path.is_file()]
    assert len(files) == 4
    for path in files:
        data = bytearray(path.read_bytes())
        data[5] ^= 1
        path.write_bytes(data)
    report = repair(RepairConfig(cache=config.cache))
    assert len(report.restored) == 4
    assert not report.left
    assert files_of(config.cache) == expected


def test_plan_counts_tokens_without_encoding(config: ExtractConfig, capsys: pytest.CaptureFixture[str]) -> None:
    extract(replace(config, plan=True))
    assert not Path(config.cache).exists()
    rows = sum(-(-length // 320) for length in LENGTHS)
    assert f"hidden_states/1: {rows} x 32 float32" in capsys.readouterr().out
    assert f"hidden_states/1: {rows} x 32 float32" in describe(extract(config))


# Blocks


def stored_blocks(config: ExtractConfig, lengths: tuple[int, ...], folder: Path) -> Mapping[int, str]:
    """Reasons why blocks cannot be used."""
    name = "-".join(map(str, lengths))
    data, cache = write_sounds(folder / name, lengths), str(folder / f"{name}.zarr")
    return audio(replace(config, data=str(data), cache=cache)).manifest.unusable_blocks


@pytest.mark.slow
def test_blocks_are_used_only_where_they_see_what_the_model_saw(config: ExtractConfig, tmp_path: Path) -> None:
    assert stored_blocks(config, (16_000, 16_000), tmp_path) == {}
    assert "shorter than its window, whose padding" in stored_blocks(config, (16_000, 9_000), tmp_path)[1]
    assert "of several windows, each of which" in stored_blocks(config, (16_000, 32_000), tmp_path)[1]


def test_blocks_are_checked_again_when_shorter_sounds_come(config: ExtractConfig, tmp_path: Path) -> None:
    data = write_sounds(tmp_path / "grows", (16_000, 16_000))
    config = replace(config, data=str(data))
    assert audio(config).block(1).tensors
    write_sounds(data, (9_000,), first=5)
    with pytest.raises(CacheError, match=r"block 1 of .* cannot be used: differs by .* shorter than its window"):
        audio(config).block(1)


def test_blocks_of_sounds_of_one_length_are_exact(config: ExtractConfig, tmp_path: Path, hubert: Path) -> None:
    config = replace(config, encoder={**config.encoder, "audio": str(hubert)})
    assert stored_blocks(config, (9_000, 9_000), tmp_path) == {}
    assert "of sounds of several lengths, which are padded" in stored_blocks(config, (16_000, 9_000), tmp_path)[1]
    assert stored_blocks(replace(config, audio_seconds=1.0), (16_000, 40_000), tmp_path).keys() == {1}


# Training


@pytest.fixture(scope="module")
def trained_on(tmp_path_factory: pytest.TempPathFactory, tiny_model: Models) -> Callable[[str, int], str]:
    """A cache of 40 sounds of a model; of several lengths, or of one."""

    def make(name: str, length: int = 0) -> str:
        folder = tmp_path_factory.mktemp(f"{name}{length}")
        lengths = (length,) * 40 if length else LENGTHS * 5
        encoders = {"audio": str(tiny_model(name)), "text": str(tiny_model("gpt2"))}
        return extract(
            ExtractConfig(
                data=str(write_sounds(folder / "sounds", lengths)),
                cache=str(folder / "cache.zarr"),
                encoder=encoders,
                layers={"audio": (2, 3), "text": (1, 2, 3)},
                device="cpu",
            )
        )

    return make


def config_for(cache: str, folder: Path, **more: Any) -> TrainConfig:
    return TrainConfig(**{"cache": cache, "out": str(folder), "epochs": 1, "control_epochs": 0, "device": "cpu"} | more)


@pytest.mark.parametrize("name", ["whisper", pytest.param("ast", marks=pytest.mark.slow)])
def test_fusions_train_on_sounds_of_several_lengths(name: str, trained_on: Callable[..., str], tmp_path: Path) -> None:
    cache = trained_on(name)
    for fusion in ("linear", "limber", "flamingo"):
        train(config_for(cache, tmp_path / fusion, fusion=fusion))
    with pytest.raises(ValueError, match=r"flatten.*sounds differ in length"):
        train(config_for(cache, tmp_path / "flat", fusion="linear", head="flatten"))


def test_sounds_of_one_length_may_be_flattened_and_continued(trained_on: Callable[..., str], tmp_path: Path) -> None:
    cache = trained_on("whisper", 16_000)
    train(config_for(cache, tmp_path / "flat", fusion="linear", head="flatten"))
    train(config_for(cache, tmp_path / "reuse", fusion="reuse"))


def test_sounds_vectors_do_not_depend_on_their_batch(trained_on: Callable[..., str], tmp_path: Path) -> None:
    cache = open_cache(trained_on("ast"))
    spec = resolve_run(config_for(str(cache.storage.root), tmp_path / "run", fusion="limber"), cache)
    inputs = FeatureLoader(cache, spec)
    rows = np.arange(8)
    states, mask = inputs.photos(rows)
    assert mask is not None
    for row in rows:
        own, own_mask = inputs.photos(rows[row : row + 1])
        assert own_mask is not None
        together, alone = (inserted_tokens(one[-1], seen)[0] for one, seen in ((states, mask), (own, own_mask)))
        assert_rounded(alone[0], together[row])


def test_padded_sounds_insert_the_tokens_of_each_alone() -> None:
    state = torch.randn(3, 40, 6, generator=torch.Generator().manual_seed(0))
    lengths = torch.tensor([40, 17, 9])
    mask = torch.arange(40) < lengths[:, None]
    found, seen = inserted_tokens(state, mask, has_class_token=False)
    assert found.shape == (3, 16, 6)
    assert seen.sum(dim=1).tolist() == [16, 16, 9]
    for row, length in enumerate(lengths.tolist()):
        alone, _ = inserted_tokens(state[row : row + 1, :length], None, has_class_token=False)
        assert_rounded(found[row, seen[row]], alone[0])


def test_summaries_skip_padding(trained_on: Callable[..., str]) -> None:
    encoder = open_cache(trained_on("whisper")).encoder("audio")
    assert encoder.manifest.class_tokens == 0
    found = torch.from_numpy(summaries(encoder, np.arange(8), (3,)))
    for row in range(8):
        state = torch.from_numpy(encoder.tokens(np.array([row]), (3,)).states[0]).float()
        normed = torch.nn.functional.layer_norm(state, state.shape[-1:])
        assert_rounded(found[row], (normed * mean_weights(state, None).transpose(1, 2)).sum(dim=1)[0])


def test_encoder_is_asked_for_windows_of_one_length(config: ExtractConfig, hubert: Path, monkeypatch: Any) -> None:
    """Each batch holds equally long windows, within the budget."""
    shapes: list[tuple[int, ...]] = []
    launch = FrozenEncoder.launch

    def seen(self: FrozenEncoder, inputs: Mapping[str, torch.Tensor]) -> Any:
        if "input_values" in inputs:
            shapes.append(tuple(inputs["input_values"].shape))
        return launch(self, inputs)

    monkeypatch.setattr(FrozenEncoder, "launch", seen)
    extract(replace(config, encoder={**config.encoder, "audio": str(hubert)}, batch_size=2))
    assert shapes == [(2, 4_000), (1, 5_000), (2, 16_000), (1, 16_000), (1, 33_000), (1, 40_000)]
