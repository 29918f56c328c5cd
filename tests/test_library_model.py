"""Language models of any family in `saffe caption`: from the cache alone, the library's own numbers at every layer."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from captioning_cases import PHOTO_TOKENS, projector_of, source_of
from extraction_cases import tiny_config
from quick_runs import quick_train
from tiny_models import NUM_LAYERS, WORDS, gpt2_tokenizer, randomize

from saffe_cache.core.results import exit_status
from saffe_cache.encoders.encoder import load_encoder
from saffe_cache.encoders.loading import EncoderRequest
from saffe_cache.extraction.blocks import checked_blocks
from saffe_cache.extraction.extract import extract
from saffe_cache.store.reader import open_cache
from saffe_cache.studies.captioning.caption import caption
from saffe_cache.studies.captioning.config import CaptionConfig
from saffe_cache.studies.captioning.inserting import LibraryModel, greedy_captions
from saffe_cache.training.runs import open_run

SIZES: Mapping[str, Any] = {
    "vocab_size": len(WORDS) + 2,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": NUM_LAYERS,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "max_position_embeddings": 202,
    "bos_token_id": len(WORDS) + 1,
    "eos_token_id": len(WORDS) + 1,
    "pad_token_id": len(WORDS) + 1,
}
KINDS = {
    "Qwen3": {"tie_word_embeddings": False},
    "Gemma2": {"final_logit_softcapping": 5.0, "sliding_window": 4, "query_pre_attn_scalar": 8},
    "Gemma3Text": {"sliding_window": 4, "query_pre_attn_scalar": 8},
}
"""Weights of their own for the output, a cap on its scores, and windows of attention that are shorter than a text."""


def build(kind: str, folder: Path) -> Path:
    config = getattr(transformers, f"{kind}Config")(**{**SIZES, **KINDS[kind]})
    model = getattr(transformers, f"{kind.removesuffix('Text')}ForCausalLM")(config)
    randomize(model, seed=3)
    model.save_pretrained(folder)
    gpt2_tokenizer(folder)
    return folder


@pytest.fixture(scope="module", params=sorted(KINDS))
def model_folder(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build(request.param, tmp_path_factory.mktemp(request.param) / "model")


@pytest.fixture(scope="module")
def cache(model_folder: Path, tmp_path_factory: pytest.TempPathFactory, tiny_model: Callable[[str], Path]) -> str:
    config = tiny_config(tmp_path_factory.mktemp("data"), tiny_model, train=12)
    encoder = {"image": config.encoder["image"], "text": str(model_folder)}
    layers = {"image": (3,), "text": tuple(range(NUM_LAYERS))}
    found = replace(config, encoder=encoder, layers=layers, language_model=True, position_offset=PHOTO_TOKENS)
    return extract(found)


@pytest.fixture
def of_library(model_folder: Path) -> Any:
    return transformers.AutoModelForCausalLM.from_pretrained(model_folder).eval()


def inserted(of_library: Any, token_ids: torch.Tensor, photos: torch.Tensor, layer: int) -> torch.Tensor:
    """Scores of the text's next tokens, by the whole library model: the layers below see the text alone."""
    layers = of_library.base_model.layers
    first = photos.shape[1]
    positions = torch.arange(first, first + token_ids.shape[1])[None]
    states = []
    keep = layers[layer].register_forward_pre_hook(lambda _, args: states.append(args[0]))
    of_library(input_ids=token_ids, position_ids=positions)
    keep.remove()
    whole = torch.cat([photos, states[0]], dim=1)
    put = layers[layer].register_forward_pre_hook(lambda _, args: (whole, *args[1:]))
    scores = of_library(inputs_embeds=torch.zeros_like(whole)).logits
    put.remove()
    return scores[:, first:]  # type: ignore[no-any-return]


@pytest.mark.parametrize(
    "layer", [0, *(pytest.param(layer, marks=pytest.mark.slow) for layer in range(1, NUM_LAYERS - 1)), NUM_LAYERS - 1]
)
@torch.no_grad()
def test_scores_equal_the_librarys(layer: int, cache: str, of_library: Any) -> None:
    source = source_of(cache, layer)
    assert isinstance(source.model, LibraryModel)
    for row in (1, 5, 8):
        ids, _ = source.token_ids(torch.tensor([row]).numpy())
        photos = projector_of()(source.photo_tokens(torch.tensor([row % 3]).numpy()))
        captions = source.captions(torch.tensor([row]).numpy())
        mine = source.model.logits(source.model(captions.states, photos))
        torch.testing.assert_close(mine, inserted(of_library, ids, photos, layer)[:, :-1], atol=2e-5, rtol=1e-4)
        alone = source.model.logits(source.model(source.model.text_states(ids, 0), None))
        torch.testing.assert_close(alone, of_library(input_ids=ids).logits, atol=2e-5, rtol=1e-4)


@torch.no_grad()
def test_greedy_captions_repeat_the_librarys_likeliest_token(cache: str, of_library: Any) -> None:
    source = source_of(cache, 1)
    photos = projector_of()(source.photo_tokens(torch.arange(2).numpy()))
    found = greedy_captions(source.model, photos, source.tokens.start, 5)
    for row, tokens in enumerate(found):
        ids = torch.tensor([source.tokens.start])
        for token in tokens:
            assert int(inserted(of_library, ids, photos[row : row + 1], 1)[0, -1].argmax()) == token
            ids = torch.cat([ids, torch.tensor([[token]])], dim=1)


def test_only_the_projector_gets_gradients(cache: str) -> None:
    source, projector = source_of(cache, 1), projector_of()
    captions = source.captions(torch.arange(3).numpy())
    photos = projector(source.photo_tokens(torch.arange(3).numpy()))
    source.model.logits(source.model(captions.states, photos)).sum().backward()
    assert all(parameter.grad is not None and parameter.grad.abs().sum() > 0 for parameter in projector.parameters())
    assert not any(parameter.requires_grad for parameter in source.model.parameters())


@pytest.mark.slow
def test_captions_are_trained_and_reported(cache: str, tmp_path: Path) -> None:
    quick = {"split": "dev", "others": 2, "max_tokens": 8, "epochs": 1, "batch_size": 4}
    config = CaptionConfig(cache=cache, out=str(tmp_path / "out"), layer=1, grid=2, device="cpu", **quick)
    assert exit_status(caption(config)) in (0, 3)
    assert (tmp_path / "out" / "report.txt").exists()


def test_attention_is_as_in_the_extraction(model_folder: Path) -> None:
    request = EncoderRequest(modality="text", model_id=str(model_folder), language_model=True, attention="eager")
    encoder = load_encoder(request)
    weights, (blocks, _) = encoder.language_model, checked_blocks(encoder, encoder.block_layers)
    assert weights is not None
    assert LibraryModel(weights, list(blocks.values()), 1).model.config._attn_implementation == "eager"


@pytest.mark.parametrize("fusion", ["limber", "reuse"])
def test_fusions_take_cached_layers_of_a_language_model(
    fusion: str, tmp_path: Path, tiny_model: Callable[[str], Path]
) -> None:
    """Which has blocks of all layers, also of those without cached states."""
    config = tiny_config(tmp_path, tiny_model)
    encoder = {"image": config.encoder["image"], "text": str(tiny_model("gpt2"))}
    cache = extract(replace(config, encoder=encoder, layers={"image": (2, 3), "text": (2, 3)}))
    run = quick_train(cache, tmp_path / "run", fusion=fusion, gallery_text="first_caption", epochs=1)
    assert open_run(run, open_cache(cache))[0].text_layers == (2,)


def test_learned_positions_are_refused(tmp_path: Path) -> None:
    sizes = {"hidden_size": 16, "ffn_dim": 8, "num_hidden_layers": 2, "num_attention_heads": 2}
    config = transformers.OPTConfig(vocab_size=42, **sizes)
    transformers.OPTForCausalLM(config).save_pretrained(tmp_path)
    gpt2_tokenizer(tmp_path)
    with pytest.raises(ValueError, match=r"its positions are learned; photos would have none"):
        load_encoder(EncoderRequest(modality="text", model_id=str(tmp_path), language_model=True))


def test_other_models_are_no_language_models(tiny_model: Callable[[str], Path]) -> None:
    with pytest.raises(ValueError, match=r"a bert is no causal language model. Omit --language-model"):
        load_encoder(EncoderRequest(modality="text", model_id=str(tiny_model("bert")), language_model=True))


@torch.no_grad()
def test_scores_of_a_model_without_attention(tmp_path: Path) -> None:
    """Mamba's output has no keys and values, but states that it reads from what the layers return."""
    sizes = {name: SIZES[name] for name in ("vocab_size", "hidden_size", "num_hidden_layers")}
    of_library = transformers.MambaForCausalLM(transformers.MambaConfig(**sizes, state_size=4)).eval()
    randomize(of_library, seed=3)
    of_library.save_pretrained(tmp_path)
    gpt2_tokenizer(tmp_path)
    encoder = load_encoder(EncoderRequest(modality="text", model_id=str(tmp_path), language_model=True))
    blocks, _ = checked_blocks(encoder, range(NUM_LAYERS))
    assert encoder.language_model is not None
    model = LibraryModel(encoder.language_model, [blocks[layer] for layer in range(NUM_LAYERS)], 1)
    ids = torch.tensor([[3, 7, 9, 11, 20, 4]])
    found = model.logits(model(model.text_states(ids, 0), None))
    torch.testing.assert_close(found, of_library(input_ids=ids).logits, atol=2e-5, rtol=1e-4)
