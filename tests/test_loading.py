"""Loading encoders: what names a cache, what a repository may hold and prescribe, what is refused."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from huggingface_hub import _CACHED_NO_EXIST
from huggingface_hub.errors import LocalEntryNotFoundError
from PIL import Image
from safetensors.torch import load_file, save_file
from tiny_models import (
    CASES,
    NUM_LAYERS,
    WORDS,
    bert_tokenizer,
    image_processor,
    inputs_of,
    load_reference,
    load_tiny,
    run_reference,
)

from saffe_cache.encoders import loading
from saffe_cache.encoders.discovery import discover
from saffe_cache.encoders.encoder import load_encoder
from saffe_cache.encoders.loading import EncoderRequest
from saffe_cache.encoders.sentence_transformers import read_repository

Models = Callable[[str], Path]
every_family = pytest.mark.parametrize("name", CASES)


def copied(folder: Path, to: Path) -> Path:
    """A copy under the same name, which a test may change."""
    return Path(shutil.copytree(folder, to / folder.name))


def edit_weights(folder: Path, change: Callable[[dict[str, torch.Tensor]], object]) -> None:
    weights = load_file(folder / "model.safetensors")
    change(weights)
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})


# Fingerprint


@every_family
def test_key_is_the_same_at_every_load(name: str, tiny_model: Models, tmp_path: Path) -> None:
    """Also for a copy elsewhere, and whatever the random state: no weight is made up while loading."""
    keys = set()
    for seed, folder in enumerate([tiny_model(name), copied(tiny_model(name), tmp_path)]):
        torch.manual_seed(seed)
        keys.add(load_tiny(name, folder).fingerprint.key)
    assert len(keys) == 1
    assert keys.pop().startswith(f"{CASES[name].modality}-tiny-{name}-")


def test_key_ignores_what_does_not_change_the_output(tiny_model: Models) -> None:
    encoder = load_tiny("bert", tiny_model("bert"))
    key = encoder.fingerprint.key
    encoder.encode(inputs_of("bert", encoder))
    assert encoder.fingerprint.key == key
    for change in ({"layers": (0,)}, {"layers": None}, {"device": "cpu:0"}, {"pooled": False}):
        assert load_tiny("bert", tiny_model("bert"), **change).fingerprint.key == key


@pytest.mark.parametrize(
    ("name", "change", "fields"),
    [
        ("bert", {"prompt": "query: {}"}, {"prompt"}),
        ("bert", {"max_length": 8}, {"max_length"}),
        ("bert", {"dtype": "bfloat16"}, {"dtype", "weights_sha256"}),
        ("bert", {"attention": "eager"}, {"attention"}),
        ("vit", {"image_size": 48}, {"image_size", "processor"}),
        ("whisper", {"dtype": "float16"}, {"dtype", "weights_sha256"}),
    ],
)
def test_key_changes_with_what_changes_the_output(
    name: str, change: dict[str, Any], fields: set[str], tiny_model: Models
) -> None:
    before, after = (load_tiny(name, tiny_model(name), **options).fingerprint for options in ({}, change))
    assert before.key != after.key
    assert {line.split(":")[0] for line in before.differences(after)} == fields


def test_key_changes_with_weights_and_tokenizer(tiny_model: Models, tmp_path: Path) -> None:
    before = load_tiny("bert", tiny_model("bert")).fingerprint
    folder = copied(tiny_model("bert"), tmp_path)
    edit_weights(folder, lambda weights: weights["encoder.layer.1.output.dense.bias"][3].add_(1e-3))
    assert [line.split(":")[0] for line in before.differences(load_tiny("bert", folder).fingerprint)] == [
        "weights_sha256"
    ]
    folder = copied(tiny_model("bert"), tmp_path / "other")
    tokenizer = (folder / "tokenizer.json").read_text()
    (folder / "tokenizer.json").write_text(tokenizer.replace('"word7"', '"wort7"'))
    assert [line.split(":")[0] for line in before.differences(load_tiny("bert", folder).fingerprint)] == ["processor"]


# What a repository holds


@pytest.mark.parametrize(
    ("tower", "modality"), [("vision_model", "image"), ("text_model", "text")], ids=["vision", "text"]
)
def test_clip_tower_without_its_projection(tower: str, modality: Any, tiny_model: Models, tmp_path: Path) -> None:
    name = "clip-vision" if modality == "image" else "clip-text"
    folder = copied(tiny_model(name), tmp_path)
    load_reference(name, tiny_model(name)).get_submodule(tower).save_pretrained(folder)
    keys = set()
    for seed in range(2):
        torch.manual_seed(seed)
        encoder = load_tiny(name, folder)
        keys.add(encoder.fingerprint.key)
        assert set(encoder.vector_widths) == {"pooled"}
    assert len(keys) == 1, "the projection that is missing was made up, and entered the key"
    whole = load_tiny(name, tiny_model(name))
    encoded, expected = (one.encode(inputs_of(name, whole)) for one in (encoder, whole))
    assert set(encoded.vectors) == {"pooled"}
    np.testing.assert_allclose(encoded.vectors["pooled"], expected.vectors["pooled"], atol=1e-6)


@pytest.mark.parametrize(("mode", "pooling"), [("mean_tokens", "mean of tokens"), ("cls_token", "first token")])
@pytest.mark.parametrize("name", ["bert", "mpnet"])
def test_sentence_transformers_folder(name: str, mode: str, pooling: str, tiny_model: Models, tmp_path: Path) -> None:
    folder = sentence_transformers_folder(tiny_model(name), tmp_path, ["Transformer", "Pooling", "Normalize"], mode)
    (folder / "sentence_bert_config.json").write_text('{"max_seq_length": 9, "do_lower_case": false}')
    encoder = load_tiny(name, folder)
    assert encoder.max_length == 9
    assert load_tiny(name, folder, max_length=4).max_length == 4
    assert encoder.fingerprint.fields["pooling"] == pooling
    inputs = inputs_of(name, encoder)
    encoded = encoder.encode(inputs)
    assert encoded.lengths.max() == 9
    last = run_reference(name, load_reference(name, tiny_model(name)), inputs).last_hidden_state
    for row, length in enumerate(encoded.lengths):
        expected = last[row, 0] if mode == "cls_token" else last[row, :length].mean(0)
        np.testing.assert_allclose(encoded.vectors["pooled"][row], expected, atol=1e-5)


def sentence_transformers_folder(model: Path, to: Path, kinds: list[str], *modes: str) -> Path:
    folder = copied(model, to)
    modules = [
        {"idx": i, "path": f"{i}_{kind}" if i else "", "type": f"sentence_transformers.models.{kind}"}
        for i, kind in enumerate(kinds)
    ]
    (folder / "modules.json").write_text(json.dumps(modules))
    (folder / "1_Pooling").mkdir()
    known = ("cls_token", "mean_tokens", "max_tokens", "mean_sqrt_len_tokens")
    config: dict[str, Any] = {f"pooling_mode_{mode}": mode in modes for mode in known}
    (folder / "1_Pooling" / "config.json").write_text(json.dumps({"word_embedding_dimension": 32, **config}))
    return folder


@pytest.mark.parametrize("known_absent", [True, False])
def test_unreachable_hub_is_reported(
    known_absent: bool, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """Unless an earlier look at the hub found that the repository has no such file."""

    def out_of_reach(*_: Any, **__: Any) -> str:
        raise LocalEntryNotFoundError("offline")

    monkeypatch.setattr(loading, "hf_hub_download", out_of_reach)
    monkeypatch.setattr(loading, "try_to_load_from_cache", lambda *_, **__: _CACHED_NO_EXIST if known_absent else None)
    request = EncoderRequest(modality="text", model_id="nobody/nothing")
    assert read_repository(request).modules == ()
    for name in ("modules.json", "sentence_bert_config.json", "config_sentence_transformers.json"):
        assert (f"so it is assumed to have no {name}" in caplog.text) != known_absent


@pytest.mark.parametrize(
    ("kind", "size", "crop", "expected_size"),
    [
        ("BitImageProcessor", {"shortest_edge": 256}, 224, {"shortest_edge": 128}),
        ("CLIPImageProcessor", {"shortest_edge": 112}, 112, {"shortest_edge": 112}),
        ("ViTImageProcessor", {"height": 224, "width": 224}, None, {"height": 112, "width": 112}),
    ],
)
def test_image_size_keeps_the_ratio_of_resize_to_crop(
    kind: str, size: dict[str, int], crop: int | None, expected_size: dict[str, int], tiny_model: Models, tmp_path: Path
) -> None:
    folder = copied(tiny_model("dinov2"), tmp_path)
    image_processor(kind, size, crop)(folder)
    encoder = load_tiny("dinov2", folder, image_size=112)
    processor = encoder.fingerprint.fields["processor"]
    assert {name: value for name, value in processor["size"].items() if value} == expected_size
    smooth = np.indices((200, 300)).sum(0) / 500
    picture = np.stack([smooth, 1 - smooth, smooth**2], axis=-1)
    raw = (255 * picture).astype(np.uint8)
    edge = expected_size.get("shortest_edge")
    resized = Image.fromarray(raw).resize((edge * 3 // 2, edge) if edge else (112, 112), Image.Resampling.BICUBIC)
    left, top = (resized.width - 112) // 2, (resized.height - 112) // 2
    cropped = np.asarray(resized.crop((left, top, left + 112, top + 112))) / 255
    expected = (cropped - [0.5, 0.4, 0.3]) / [0.2, 0.3, 0.4]
    prepared = encoder.prepare(raw)["pixel_values"]
    assert prepared.shape == (1, 3, 112, 112)
    np.testing.assert_allclose(prepared[0].permute(1, 2, 0), expected, atol=0.03)


# Refusals


def test_pil_prepares_photos_also_beside_torchvision(tiny_model: Models, monkeypatch: pytest.MonkeyPatch) -> None:
    """Which transformers would prefer: pixels, speed and fingerprint would depend on what else is installed."""
    asked = []
    load = transformers.AutoImageProcessor.from_pretrained

    def spy(model_id: str, **options: Any) -> Any:
        asked.append(options.get("backend"))
        return load(model_id, **options)

    monkeypatch.setattr(transformers.AutoImageProcessor, "from_pretrained", spy)
    load_tiny("dinov2", tiny_model("dinov2"))
    assert asked == ["pil"]


def test_type_without_a_plain_model_is_refused(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text('{"model_type": "trocr"}')
    with pytest.raises(ValueError, match=r"type 'trocr', for which transformers .* has no plain model. Choose another"):
        load_encoder(EncoderRequest(modality="text", model_id=str(tmp_path)))


def test_quantised_checkpoint_is_refused(tiny_model: Models, tmp_path: Path) -> None:
    folder = copied(tiny_model("bert"), tmp_path)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"quantization_config": {"quant_method": "gptq"}}))
    with pytest.raises(ValueError, match=r"its weights are quantised, expected float32.*Use the checkpoint"):
        load_tiny("bert", folder)


def test_family_of_another_modality_is_refused(tiny_model: Models) -> None:
    with pytest.raises(ValueError, match=r"found a BertModel, which takes texts. Choose an image encoder"):
        load_encoder(EncoderRequest(modality="image", model_id=str(tiny_model("bert"))))


def test_model_of_photos_that_names_no_main_input_is_one() -> None:
    """OWL-ViT's tower of photos has the default name, `input_ids`, which it does not take."""
    sizes = {"hidden_size": 32, "num_attention_heads": 4, "num_hidden_layers": 1, "intermediate_size": 48}
    vision = {**sizes, "image_size": 32, "patch_size": 8}
    model = transformers.OwlViTModel(transformers.OwlViTConfig(text_config=sizes, vision_config=vision))
    assert discover(model, "image").layers == "vision_model.encoder.layers"


def test_language_model_with_learned_positions_is_refused() -> None:
    model = transformers.GPTNeoForCausalLM(
        transformers.GPTNeoConfig(hidden_size=32, num_layers=1, num_heads=4, attention_types=[[["global"], 1]])
    )
    with pytest.raises(ValueError, match="its positions are learned"):
        discover(model, "text", generates=True)


def test_image_size_of_a_longest_edge_is_refused(tiny_model: Models, tmp_path: Path) -> None:
    folder = copied(tiny_model("vit"), tmp_path)
    image_processor("SamImageProcessor", {"longest_edge": 32})(folder)
    with pytest.raises(ValueError, match=r"found --image-size 48, expected none: its SamImageProcessor.* Omit it"):
        load_tiny("vit", folder, image_size=48)


def test_longest_text_keeps_rotary_positions_of_one_speed(tmp_path: Path) -> None:
    sizes = {"hidden_size": 32, "num_attention_heads": 4, "num_hidden_layers": 1, "intermediate_size": 48}
    rope = {"rope_type": "longrope", "rope_theta": 10_000.0, "original_max_position_embeddings": 60}
    factors = {"short_factor": [1.0] * 4, "long_factor": [2.0 + i for i in range(4)]}
    config = transformers.Phi3Config(
        **sizes,
        vocab_size=len(WORDS) + 4,
        pad_token_id=0,
        max_position_embeddings=240,
        original_max_position_embeddings=60,
        rope_parameters=rope | factors,
    )
    transformers.Phi3Model(config).save_pretrained(tmp_path)
    bert_tokenizer(tmp_path)
    encoder = load_encoder(EncoderRequest(modality="text", model_id=str(tmp_path)))
    assert (encoder.max_length, encoder.padding) == (60, "longest")
    ids = encoder.tokenize(["word1", " ".join(WORDS * 3)])
    alone, beside = encoder.encode(encoder.pad(ids[:1])), encoder.encode(encoder.pad(ids))
    np.testing.assert_allclose(beside.states[1][0, : len(ids[0])], alone.states[1][0], atol=1e-5)


def test_absent_model_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"found no model .* Use a hub id or a folder"):
        load_encoder(EncoderRequest(modality="text", model_id=str(tmp_path / "nothing")))


def test_layer_out_of_range_is_refused(tiny_model: Models) -> None:
    with pytest.raises(ValueError, match=r"no hidden_states\[4\]; it has 0 \(embeddings\) to 3 .*--layers text="):
        load_tiny("bert", tiny_model("bert"), layers=(1, 4))
    encoder = load_tiny("bert", tiny_model("bert"), layers=None)
    assert encoder.layers == (NUM_LAYERS - 1, NUM_LAYERS)
    with pytest.raises(ValueError, match=r"no hidden_states\[-1\]"):
        encoder.select((-1,), vectors=True)


@every_family
def test_checkpoint_that_lacks_a_weight_is_refused(name: str, tiny_model: Models, tmp_path: Path) -> None:
    folder = copied(tiny_model(name), tmp_path)

    def lose_one_of_layer_1(weights: dict[str, torch.Tensor]) -> None:
        in_layer = [key for key in sorted(weights) if re.search(r"(layers?|h)\.1\.", key) and CASES[name].core in key]
        del weights[in_layer[0]]

    edit_weights(folder, lose_one_of_layer_1)
    with pytest.raises(ValueError, match=r"its checkpoint lacks .*(layer|h).*1\.[A-Za-z_.0-9]+\. Use a checkpoint"):
        load_tiny(name, folder)
