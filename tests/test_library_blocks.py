"""Blocks that transformers' own code rebuilds: checked against the model, and again when they are loaded."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from tiny_models import NUM_LAYERS, TEXTS, WORDS, bert_tokenizer, image_processor, randomize

from saffe_cache.core.features import BlockWeights, CacheError, LibraryBlockSpec
from saffe_cache.core.tensors import relative_difference
from saffe_cache.encoders.encoder import FrozenEncoder, load_encoder
from saffe_cache.encoders.loading import EncoderRequest
from saffe_cache.extraction.blocks import checked_blocks
from saffe_cache.fusion.library_block import make_block

SIZES = {
    "vocab_size": len(WORDS) + 4,
    "hidden_size": 32,
    "num_attention_heads": 4,
    "num_hidden_layers": NUM_LAYERS,
    "intermediate_size": 48,
    "max_position_embeddings": 202,
    "pad_token_id": 0,
}


def text_encoder(kind: str, folder: Path, request: dict[str, Any] | None = None, **config: Any) -> FrozenEncoder:
    model = getattr(transformers, f"{kind}Model")(getattr(transformers, f"{kind}Config")(**SIZES | config))
    randomize(model, seed=1)
    model.save_pretrained(folder)
    bert_tokenizer(folder)
    layers = tuple(range(NUM_LAYERS + 1))
    return load_encoder(EncoderRequest(modality="text", model_id=str(folder), layers=layers, **request or {}))


def padded_states(encoder: FrozenEncoder) -> tuple[list[torch.Tensor], torch.Tensor]:
    """Hidden states of texts that were encoded alone, padded with zeros as a fusion receives them."""
    alone = [encoder.encode(encoder.pad([ids])) for ids in encoder.tokenize(TEXTS)]
    lengths = torch.tensor([int(one.lengths[0]) for one in alone])
    states = []
    for layer in range(NUM_LAYERS + 1):
        rows = [torch.tensor(one.states[layer][0]) for one in alone]
        states.append(torch.nn.utils.rnn.pad_sequence(rows, batch_first=True))
    return states, torch.arange(int(lengths.max())) < lengths[:, None]


def assert_blocks_are_the_models(encoder: FrozenEncoder, tolerance: float = 1e-3) -> dict[int, str]:
    usable, unusable = checked_blocks(encoder, range(NUM_LAYERS))
    states, mask = padded_states(encoder)
    for layer, block in usable.items():
        with torch.no_grad():
            found = make_block(block)(states[layer], mask)
        assert relative_difference(found, states[layer + 1], mask) <= tolerance
    return unusable


@pytest.mark.parametrize("kind", ["FNet", "ConvBert", "ModernBert"])
def test_blocks_of_padded_texts_are_the_models(kind: str, tmp_path: Path) -> None:
    """FNet and ConvBERT mix in padding: their blocks run texts of each length apart."""
    assert assert_blocks_are_the_models(text_encoder(kind, tmp_path)) == {}


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_blocks_of_a_model_in_half_precision_are_loaded(dtype: str, tmp_path: Path) -> None:
    encoder = text_encoder("ModernBert", tmp_path, {"dtype": dtype})
    assert assert_blocks_are_the_models(encoder, tolerance=0.1) == {}


def test_blocks_of_pictures_of_another_size_are_rebuilt(tmp_path: Path) -> None:
    """The model interpolates its positions; so must the one that gives a block what it takes."""
    sizes = {name: size for name, size in SIZES.items() if name not in ("vocab_size", "pad_token_id")}
    model = transformers.ViTMSNModel(transformers.ViTMSNConfig(**sizes, image_size=32, patch_size=8))
    randomize(model, seed=1)
    model.save_pretrained(tmp_path)
    image_processor("ViTImageProcessor", {"height": 32, "width": 32})(tmp_path)
    encoder = load_encoder(EncoderRequest(modality="image", model_id=str(tmp_path), image_size=48))
    usable, unusable = checked_blocks(encoder, range(NUM_LAYERS))
    assert ([*usable], unusable) == ([*range(NUM_LAYERS)], {})


def test_own_vector_of_a_model_that_returns_nothing_else(tmp_path: Path) -> None:
    model = transformers.DPRQuestionEncoder(transformers.DPRConfig(**SIZES))
    randomize(model, seed=1)
    model.save_pretrained(tmp_path)
    bert_tokenizer(tmp_path)
    encoder = load_encoder(EncoderRequest(modality="text", model_id=str(tmp_path)))
    inputs = encoder.pad(encoder.tokenize(TEXTS))
    with torch.no_grad():
        expected = model.eval()(**inputs).pooler_output
    np.testing.assert_allclose(encoder.encode(inputs).vectors["pooled"], expected, atol=1e-5)


@pytest.fixture(scope="module")
def block(tmp_path_factory: pytest.TempPathFactory) -> BlockWeights:
    encoder = text_encoder("ModernBert", tmp_path_factory.mktemp("model"))
    return checked_blocks(encoder, [1])[0][1]


CHANGES: dict[str, dict[str, Any]] = {
    "no module of transformers": {"model_class": "os:system"},
    "no model": {"model_class": "transformers.models.bert.modeling_bert:logger"},
    "cannot rebuild": {"model_class": "transformers.models.bert.modeling_bert:BertModel"},
    "size mismatch": {"config": {"hidden_size": 64}},
    "index out of range": {"index": 7},
    "input_ids or inputs_embeds": {"input_name": "pixels"},
    "expected input with shape": {"input_shape": (64,)},
    "the size": {"is_time_first": True},
    "differs by": {"config": {"hidden_activation": "relu"}},
}


@pytest.mark.parametrize("message", CHANGES)
def test_a_block_whose_spec_was_changed_is_refused(message: str, block: BlockWeights) -> None:
    assert isinstance(block.spec, LibraryBlockSpec)
    changes = CHANGES[message]
    if "config" in changes:
        changes = {"config": {**block.spec.config, **changes["config"]}}
    with pytest.raises(CacheError, match=message) as caught:
        make_block(BlockWeights(replace(block.spec, **changes), block.tensors))
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("name", ["check.output", "check.lengths", "attn.Wo.weight"])
def test_a_block_that_lacks_a_tensor_is_refused(name: str, block: BlockWeights) -> None:
    tensors = {key: value for key, value in block.tensors.items() if key != name}
    with pytest.raises(CacheError, match=name):
        make_block(BlockWeights(block.spec, tensors))


def test_a_block_does_not_name_the_folder_of_its_model(block: BlockWeights) -> None:
    assert isinstance(block.spec, LibraryBlockSpec)
    assert "_name_or_path" not in block.spec.config
