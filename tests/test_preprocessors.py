"""Models whose files are missing, incomplete or not their own: each is refused in one line that says what to do."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from tiny_models import CASES, TEXT_FAMILIES, bert_tokenizer, load_tiny
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import BertConfig, BertModel, ConvNextConfig, ConvNextModel, PreTrainedTokenizerFast

Models = Callable[[str], Path]
MEDIA_FAMILIES = [name for name in CASES if name not in TEXT_FAMILIES]


@pytest.fixture
def copied(tiny_model: Models, tmp_path: Path) -> Models:
    """A copy of a tiny model, which a test may change."""
    return lambda name: Path(shutil.copytree(tiny_model(name), tmp_path / name))


def refused(name: str, folder: Path, match: str) -> None:
    with pytest.raises(ValueError, match=match) as caught:
        load_tiny(name, folder)
    message = str(caught.value)
    assert message.startswith(f"{CASES[name].modality} encoder {folder}: ")
    assert "\n" not in message
    assert message.endswith(".")


# Tokenizers


@pytest.mark.parametrize("name", TEXT_FAMILIES)
def test_text_model_without_tokenizer_files_is_refused(name: str, copied: Models) -> None:
    folder = copied(name)
    for path in folder.glob("*token*"):
        path.unlink()
    refused(name, folder, r"its tokenizer has \d tokens, expected .* 4\d embeddings. Add the model's own tokenizer")


@pytest.mark.parametrize("num_words", [20, 60])
def test_tokenizer_of_another_size_is_refused(num_words: int, copied: Models, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = copied("bert")
    monkeypatch.setattr("tiny_models.WORDS", [f"word{i}" for i in range(num_words)])
    bert_tokenizer(folder)
    refused("bert", folder, rf"its tokenizer has {num_words + 4} tokens, expected those of the model's 44 embeddings")


def test_embeddings_padded_for_speed_are_accepted(copied: Models) -> None:
    folder = copied("bert")
    config = BertConfig.from_pretrained(folder)
    config.vocab_size = 50
    BertModel(config, add_pooling_layer=False).save_pretrained(folder)
    assert load_tiny("bert", folder).tokenize(["word0"]) == [[1, 4, 2]]


def test_padding_token_of_another_model_is_refused(copied: Models) -> None:
    folder = copied("roberta")
    bert_tokenizer(folder)
    refused("roberta", folder, r"its tokenizer pads with token 0, expected 1, from which the model counts positions")


@pytest.mark.parametrize(("alphabet", "is_known"), [("abcdefghijklmnoprstuvw", True), ("\u0e01\u0e02", False)])
def test_tokenizer_that_knows_no_words_is_refused(alphabet: str, is_known: bool, copied: Models) -> None:
    folder = copied("bert")
    words = ["[PAD]", "[UNK]", *alphabet, *(f"##{letter}" for letter in alphabet)]
    words += [f"word{i}" for i in range(1200 - len(words))]
    backend = Tokenizer(models.WordPiece({word: i for i, word in enumerate(words)}, unk_token="[UNK]"))
    backend.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    PreTrainedTokenizerFast(tokenizer_object=backend, pad_token="[PAD]", unk_token="[UNK]").save_pretrained(folder)
    config = BertConfig.from_pretrained(folder)
    config.vocab_size = len(words)
    BertModel(config, add_pooling_layer=False).save_pretrained(folder)
    if is_known:
        load_tiny("bert", folder)
    else:
        refused("bert", folder, r"its tokenizer knows 0 of \d+ tokens of a sentence, expected half or more")


# Processors


@pytest.mark.parametrize("name", MEDIA_FAMILIES)
def test_model_without_its_processor_file_is_refused(name: str, copied: Models) -> None:
    folder = copied(name)
    (folder / "preprocessor_config.json").unlink()
    refused(name, folder, r"its preprocessor_config.json cannot be loaded \(.*\)\. Add the model's own")


@pytest.mark.parametrize(
    ("name", "change", "match"),
    [
        ("vit", {"size": {"height": 24, "width": 24}}, r"shape \(3, 24, 24\), the model's config says \(3, 32, 32\)"),
        ("clip-vision", {"crop_size": {"height": 24, "width": 24}}, r"shape \(3, 24, 24\)"),
        ("vit-mae", {"size": None}, r"shape \(3, 224, 224\)"),
        ("dinov2", {"image_mean": [0.5], "image_std": [0.5]}, r"fails on a blank input"),
        ("dinov2", {"rescale_factor": 1.0}, r"up to 1\.27e\+03, expected .*rescale_factor, image_mean or image_std"),
        ("resnet", {"image_mean": [120, 120, 120], "image_std": [60, 60, 60]}, r"numbers 0\.0167 apart"),
        ("convnext", {"image_std": [0, 1, 1]}, r"rescale_factor, image_mean or image_std is wrong"),
        ("whisper", {"sampling_rate": 8_000}, r"expects sounds of 8000 Hz, the model 16000 Hz"),
        ("whisper", {"feature_size": 20}, r"shape \(20, 100\), the model's config says \(16, 100\)"),
        ("ast", {"num_mel_bins": 20}, r"shape \(32, 20\), the model's config says \(32, 16\)"),
        ("ast", {"max_length": 40}, r"shape \(40, 16\)"),
    ],
)
def test_processor_that_contradicts_the_model_is_refused(
    name: str, change: dict[str, Any], match: str, copied: Models
) -> None:
    folder = copied(name)
    path = folder / "preprocessor_config.json"
    settings = {**json.loads(path.read_text()), **change}
    path.write_text(json.dumps({key: value for key, value in settings.items() if value is not None}))
    refused(name, folder, match + r".*Use the model's own preprocessor_config.json")


def test_channels_other_than_the_models_are_refused(copied: Models) -> None:
    folder = copied("convnext")
    config = ConvNextConfig.from_pretrained(folder, num_channels=1)
    ConvNextModel(config).save_pretrained(folder)
    refused("convnext", folder, r"shape \(3, \d+, \d+\), the model's config says \(1, None, None\)")


# Files


POINTER = b"version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 90868376\n"


@pytest.mark.parametrize("file", ["model.safetensors", "config.json", "tokenizer.json"])
def test_git_lfs_pointer_is_refused_by_name(file: str, copied: Models) -> None:
    folder = copied("bert")
    (folder / file).write_bytes(POINTER)
    refused("bert", folder, rf"{file} is a pointer of Git LFS, .*Run git lfs pull in the model's folder")


@pytest.mark.parametrize("size", [0, 5, 1000, 20_000])
def test_incomplete_weights_are_refused_by_name(size: int, copied: Models) -> None:
    folder = copied("bert")
    weights = folder / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:size])
    refused("bert", folder, r"model.safetensors is damaged or incomplete \(.*\)\. Download it again")


def test_pickled_weights_are_refused_with_a_conversion(copied: Models) -> None:
    folder = copied("bert")
    torch.save(load_file(folder / "model.safetensors"), folder / "pytorch_model.bin")
    (folder / "model.safetensors").unlink()
    refused("bert", folder, r"found pytorch_model.bin, expected model.safetensors: .*save_pretrained\(FOLDER\)")


@pytest.mark.parametrize(
    ("file", "content", "match"),
    [
        ("config.json", '{"model_type": "bert", ', r"found no model \(.*Use a hub id or a folder with config.json"),
        ("config.json", '{"model_type": "bert", "vocab_size": 44, "hidden_size": 32}', r"its weights cannot be loaded"),
        ("tokenizer.json", '{"version": ', r"its tokenizer cannot be loaded \(.*Add the model's own"),
    ],
)
def test_other_loading_failures_are_one_line(file: str, content: str, match: str, copied: Models) -> None:
    folder = copied("bert")
    (folder / file).write_text(content)
    refused("bert", folder, match)


def test_missing_weights_are_refused_in_one_line(copied: Models) -> None:
    folder = copied("vit")
    (folder / "model.safetensors").unlink()
    refused("vit", folder, r"its weights cannot be loaded \(.*model.safetensors.*Download it again")
