"""A causal language model in a cache: its tokens and positions, and all that generating takes, there and back."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
import transformers
from extraction_cases import files_of, tiny_config
from store_cases import convert, describe, export_hdf5, import_hdf5, verify
from tiny_models import NUM_LAYERS, WORDS, load_tiny

from saffe_cache.core.features import CacheError
from saffe_cache.encoders.causal_tokens import CausalTokens
from saffe_cache.extraction.config import RepairConfig
from saffe_cache.extraction.extract import extract
from saffe_cache.extraction.repair import repair
from saffe_cache.fusion.block import EncoderBlock
from saffe_cache.store.reader import EncoderCache, open_cache

Models = Callable[[str], Path]
END = len(WORDS) + 1
OFFSET = 5


def text_encoder(cache: str) -> EncoderCache:
    return open_cache(cache).encoder("text", "gpt2")


@pytest.fixture(scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory, tiny_model: Models) -> str:
    config = tiny_config(tmp_path_factory.mktemp("language"), tiny_model, train=4)
    gpt2 = {"image": config.encoder["image"], "text": str(tiny_model("gpt2"))}
    return extract(replace(config, encoder=gpt2, layers={"image": (3,), "text": (1,)}, position_offset=OFFSET))


def test_states_are_the_models_own_at_offset_positions(cache: str, tiny_model: Models) -> None:
    encoder = text_encoder(cache)
    texts = open_cache(cache).table.inputs["text"].texts
    assert texts is not None
    tokenizer = transformers.AutoTokenizer.from_pretrained(tiny_model("gpt2"))
    model = transformers.GPT2LMHeadModel.from_pretrained(tiny_model("gpt2"), attn_implementation="eager").eval()
    for row in (0, 3):
        ids = torch.tensor([[END, *tokenizer(texts[row])["input_ids"], END]])
        positions = torch.arange(OFFSET, OFFSET + ids.shape[1])[None]
        with torch.no_grad():
            output = model(ids, position_ids=positions, output_hidden_states=True)
        found = encoder.tokens(np.array([row]), (1,)).states[0][0]
        np.testing.assert_allclose(found, output.hidden_states[1][0], atol=1e-5)
    assert encoder.manifest.fingerprint.fields["position_offset"] == OFFSET


def test_another_offset_is_another_encoder(tiny_model: Models) -> None:
    keys = {load_tiny("gpt2", tiny_model("gpt2"), position_offset=offset).fingerprint.key for offset in (0, 1, 2)}
    assert len(keys) == 3


def test_texts_begin_with_the_prompt_end_and_come_back(tiny_model: Models) -> None:
    encoder = load_tiny("gpt2", tiny_model("gpt2"), prompt="word7 word8 {}", max_length=6)
    assert encoder.tokenize(["word1 word2", "word1 word2 word3 word4"]) == [
        [END, 7, 8, 1, 2, END],
        [END, 7, 8, 1, 2, END],
    ]
    weights = encoder.language_model
    assert weights is not None
    tokens = CausalTokens(weights.tokenizer, weights.spec)
    assert tokens.start == [END, 7, 8]
    assert tokens.decode([END, 1, 2, END, 3]) == "word1 word2"
    assert tokens.decode([4, 5]) == "word4 word5"


def test_the_cache_holds_all_that_generating_takes(cache: str, tiny_model: Models) -> None:
    """Of a cache with one layer's hidden states: logits from its blocks and embeddings, against the model's."""
    encoder = text_encoder(cache)
    weights = encoder.language_model()
    assert encoder.block_layers == list(range(NUM_LAYERS))
    model = transformers.GPT2LMHeadModel.from_pretrained(tiny_model("gpt2")).eval()
    ids = torch.tensor([[END, 3, 1, 4]])
    embedding, positions = (torch.tensor(weights.tensors[f"{name}_embedding"]) for name in ("token", "position"))
    hidden = embedding[ids] + positions[: ids.shape[1]]
    for layer in encoder.block_layers:
        hidden = EncoderBlock(encoder.block(layer))(hidden)
    norm = [torch.tensor(weights.tensors[f"final_norm_{part}"]) for part in ("weight", "bias")]
    hidden = torch.nn.functional.layer_norm(hidden, (32,), norm[0], norm[1], weights.spec.layer_norm_eps)
    assert "head_weight" not in weights.tensors
    with torch.no_grad():
        torch.testing.assert_close(hidden @ embedding.T, model(ids).logits, atol=1e-4, rtol=1e-4)


@pytest.mark.slow
def test_it_is_exchanged_converted_verified_and_repaired(cache: str, tmp_path: Path) -> None:
    copies = [
        import_hdf5(export_hdf5(cache, tmp_path / "cache.h5"), tmp_path / "imported.zarr"),
        convert(cache, tmp_path / "converted.zarr", storage="float16"),
    ]
    whole = files_of(cache, "encoders")
    weights = {name: data for name, data in whole.items() if "/language_model/" in name or "/blocks/" in name}
    assert any(name.endswith("language_model/tokenizer/c/0") for name in weights)
    for copy in copies:
        assert weights.items() <= files_of(copy, "encoders").items()
        assert text_encoder(copy).language_model().spec == text_encoder(cache).language_model().spec
    assert "a language model: texts start at position 5, all blocks kept" in describe(cache)
    lost = next(name for name in weights if "position_embedding/c" in name)
    (Path(cache) / lost).write_bytes(b"\0" * len(weights[lost]))
    (block,) = (Path(cache) / "encoders").glob("*gpt2*/blocks/2/query_weight/c/0/0")
    block.unlink()
    assert len(verify(cache)[1]) == 2
    with pytest.raises(CacheError, match="position_embedding differ from the checksums"):
        text_encoder(cache).language_model()
    assert len(repair(RepairConfig(cache=cache, device="cpu")).restored) == 2
    assert files_of(cache, "encoders") == whole


def test_other_text_encoders_are_none(tmp_path: Path, tiny_model: Models) -> None:
    encoder = open_cache(extract(tiny_config(tmp_path, tiny_model, train=2))).encoder("text")
    with pytest.raises(CacheError, match=r"is no language model\. Add one"):
        encoder.language_model()
    assert not encoder.manifest.is_language_model
    with pytest.raises(ValueError, match="--position-offset 2, expected 0"):
        load_tiny("bert", tiny_model("bert"), position_offset=2)


def test_unsupported_model_or_too_long_prompt_is_refused(tmp_path: Path, tiny_model: Models) -> None:
    with pytest.raises(ValueError, match="2 tokens remain for a text after --position-offset 200"):
        load_tiny("gpt2", tiny_model("gpt2"), position_offset=200).tokenize(["word1"])
    for path in tiny_model("gpt2").iterdir():
        (tmp_path / path.name).write_bytes(path.read_bytes())
    settings = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(settings | {"scale_attn_by_inverse_layer_idx": True}))
    with pytest.raises(ValueError, match="scale_attn_by_inverse_layer_idx True, expected False"):
        load_tiny("gpt2", tmp_path)
