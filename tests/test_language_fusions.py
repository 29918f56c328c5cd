"""Fusions from papers on language models, on caches of text encoders and causal language models.

[RET] of FROMAGe is held against transformers' own forward pass with one more token; Pang's block against the layer
itself, called without mask and positions.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
from extraction_cases import make_captioned
from quick_runs import quick_train, report_of, setting_of
from test_library_blocks import text_encoder
from test_library_model import build
from tiny_models import NUM_LAYERS, load_reference, load_tiny, rand
from torch.nn import functional
from transformers import AutoModelForCausalLM

import saffe_cache as sc
from saffe_cache.core.features import BlockWeights
from saffe_cache.core.items import Ragged
from saffe_cache.encoders.encoder import load_encoder
from saffe_cache.encoders.loading import EncoderRequest
from saffe_cache.extraction.blocks import checked_blocks
from saffe_cache.fusion.base import Blocks, Texts
from saffe_cache.fusion.known.pang import without_order
from saffe_cache.fusion.layers import summarize
from saffe_cache.fusion.options import FusionShape
from saffe_cache.fusion.registry import FUSIONS
from saffe_cache.inference.model import load_run
from saffe_cache.inputs.feature_loader import FeatureLoader, encode_texts
from saffe_cache.store.reader import open_cache
from saffe_cache.training.config import TrainConfig
from saffe_cache.training.resolve import resolve_run
from saffe_cache.training.runs import keep_encoders, kept_encoders
from saffe_cache.training.train import same_batches

Models = Callable[[str], Path]
KINDS = ("bert", "mpnet", "gpt2", "Qwen3", "Gemma3Text")
"""Learned, relative and rotary positions; both directions, causal, and causal in windows of 4 tokens."""
LENGTHS = (5, 3, 6)


class Encoder(NamedTuple):
    """A text encoder: transformers' model of it, its layers, and its blocks as a cache holds them."""

    model: Any
    layers: Sequence[Any]
    blocks: Sequence[BlockWeights]
    embeddings: Any

    def states(self, ids: torch.Tensor) -> tuple[torch.Tensor, ...]:
        """Hidden states of one text, the inputs of all layers."""
        found: list[torch.Tensor] = []
        handles = [one.register_forward_pre_hook(lambda _, given: found.append(given[0])) for one in self.layers]
        self.model(input_ids=ids[None])
        for handle in handles:
            handle.remove()
        return tuple(found)

    def last(self, joint: torch.Tensor, layer: int, **inputs: Any) -> torch.Tensor:
        """Output of the last layer, if the input of layer `layer` is `joint` [1, tokens, e]."""
        found: list[Any] = []
        entering = self.layers[layer].register_forward_pre_hook(lambda _, given: (joint, *given[1:]))
        leaving = self.layers[-1].register_forward_hook(lambda _module, _given, output: found.append(output))
        self.model(**(inputs or {"inputs_embeds": torch.zeros_like(joint)}))
        entering.remove()
        leaving.remove()
        return found[0][0] if isinstance(found[0], tuple) else found[0]  # type: ignore[no-any-return]


@pytest.fixture(scope="module")
def encoders(tiny_model: Models, tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Encoder]:
    @cache
    def make(kind: str) -> Encoder:
        if kind in ("bert", "mpnet", "gpt2"):
            model = load_reference(kind, tiny_model(kind))
            blocks = load_tiny(kind, tiny_model(kind)).blocks
            layers = model.h if kind == "gpt2" else model.encoder.layer
        else:
            folder = build(kind, tmp_path_factory.mktemp(kind) / "model")
            model = AutoModelForCausalLM.from_pretrained(folder, attn_implementation="eager").eval().base_model
            loaded = load_encoder(EncoderRequest(modality="text", model_id=str(folder), language_model=True))
            blocks, layers = checked_blocks(loaded, range(NUM_LAYERS))[0], model.layers
        return Encoder(model, layers, [blocks[i] for i in range(NUM_LAYERS)], model.get_input_embeddings())

    return make


def make(fusion: str, blocks: Sequence[BlockWeights], **changes: Any) -> Any:
    """Away from its start."""
    values: dict[str, Any] = {"head": "attention", "num_layers": 1, "hidden_size": 32, "num_tokens": 10}
    values |= {"text_hidden_size": 32, "text_size": 32, "pooled_text": False, "num_blocks": len(blocks)}
    torch.manual_seed(0)
    model = FUSIONS[fusion].make(FusionShape(fusion=fusion, **values, **changes), Blocks((), blocks)).eval()
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter += 0.2 * torch.randn(parameter.shape, generator=generator)
    return model


def draw_ids() -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(5)
    return [torch.randint(4, 30, (length,), generator=generator) for length in LENGTHS]


def padded(states: Sequence[torch.Tensor], padding: float = 0.0) -> Texts:
    """Texts of [1, tokens, e] states, whose own vectors are not numbers: nothing may read them."""
    rows = torch.nn.utils.rnn.pad_sequence([one[0] for one in states], batch_first=True, padding_value=padding)
    mask = torch.arange(rows.shape[1]) < torch.tensor([one.shape[1] for one in states])[:, None]
    return Texts((rows,), mask, torch.full((len(rows), 32), torch.nan))


# FROMAGe


@pytest.mark.parametrize("layer", range(NUM_LAYERS))
@pytest.mark.parametrize("kind", KINDS)
@torch.no_grad()
def test_ret_is_one_more_token_from_its_layer_on(kind: str, layer: int, encoders: Callable[[str], Encoder]) -> None:
    """Each text alone in transformers; here in one batch, with large numbers in the padding."""
    encoder = encoders(kind)
    fusion = make("fromage", encoder.blocks[layer:])
    states = [encoder.states(ids)[layer] for ids in draw_ids()]
    last = [encoder.last(torch.cat([one, fusion.ret[None, None]], dim=1), layer)[0, -1] for one in states]
    expected = functional.layer_norm(torch.stack(last), (32,))
    texts = padded(states, padding=1e3)
    found = fusion.last_state(texts)
    torch.testing.assert_close(found, expected, atol=2e-4, rtol=1e-4)
    assert (found[0] - found[1]).abs().max() > 0.05, "the text is not seen"
    alone = torch.cat([fusion.encode_texts(padded([one])) for one in states])
    torch.testing.assert_close(fusion.encode_texts(texts), alone, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("kind", ["Qwen3", "gpt2"])
@torch.no_grad()
def test_at_layer_0_ret_is_an_embedding_behind_the_text(kind: str, encoders: Callable[[str], Encoder]) -> None:
    """GPT-2 adds a position to it, which the learned vector here includes."""
    encoder, [ids, *_] = encoders(kind), draw_ids()
    fusion, given = make("fromage", encoder.blocks), encoder.embeddings(ids)
    ret, norm = fusion.ret, encoder.model.norm if kind == "Qwen3" else encoder.model.ln_f
    if kind == "gpt2":
        ret, norm.eps = ret - encoder.model.wpe.weight[len(ids)], 1e-5
    output = encoder.model(inputs_embeds=torch.cat([given, ret[None]])[None]).last_hidden_state[:, -1]
    without_gain = (output - getattr(norm, "bias", 0)) / norm.weight
    state = fusion.last_state(padded([encoder.states(ids)[0]]))
    torch.testing.assert_close(state, functional.layer_norm(without_gain, (32,)), atol=1e-4, rtol=1e-4)


@torch.no_grad()
def test_behind_the_last_block_ret_knows_nothing_of_the_text() -> None:
    fusion = make("fromage", ())
    vectors = fusion.encode_texts(padded([rand(1, 4, 32), rand(1, 2, 32, seed=2)]))
    expected = fusion.of_text(functional.layer_norm(fusion.ret, (32,)))
    torch.testing.assert_close(vectors, functional.normalize(expected, dim=-1).expand(2, -1))


@torch.no_grad()
def test_fromages_photo_is_its_summary_mapped_linearly(tiny_model: Models) -> None:
    fusion, photo = make("fromage", ()), rand(3, 10, 32)
    expected = functional.normalize(fusion.of_photo(summarize([photo], None)), dim=-1)
    torch.testing.assert_close(fusion([photo]), expected)
    with pytest.raises(ValueError, match="found the text encoder's own vectors, expected tokens"):
        fusion.encode_queries(rand(3, 32))


# Pang et al.


@pytest.mark.parametrize("kind", ["bert", "mpnet", "gpt2", "Qwen3", "Gemma3Text"])
@torch.no_grad()
def test_pang_is_the_models_layer_without_order(kind: str, encoders: Callable[[str], Encoder]) -> None:
    encoder, photo = encoders(kind), rand(3, 10, 32)
    fusion = make("pang", encoder.blocks[1:2])
    entered = fusion.enter(functional.layer_norm(photo, (32,)))
    given: dict[str, Any] = {}
    if kind in ("Qwen3", "Gemma3Text"):
        given = {"position_embeddings": (torch.ones(1, 10, 8), torch.zeros(1, 10, 8)), "attention_mask": None}
    expected = encoder.layers[1](entered, **given)
    expected = expected[0] if isinstance(expected, tuple) else expected
    scale = (expected.square().mean(dim=-1, keepdim=True) + 1e-6).rsqrt()
    seen = summarize([fusion.leave(expected * scale)], None)
    whole = functional.normalize(fusion.linear(summarize([photo], None)) + fusion.out(seen), dim=-1)
    torch.testing.assert_close(fusion([photo]), whole, atol=1e-4, rtol=1e-4)
    shuffled = photo[:, [0, 3, 1, 2, 9, 5, 4, 8, 7, 6]]
    torch.testing.assert_close(fusion([shuffled]), whole, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("kind", ["bert", "Qwen3"])
@torch.no_grad()
def test_padded_photo_tokens_do_not_pass_pangs_block(kind: str, encoders: Callable[[str], Encoder]) -> None:
    fusion, photo = make("pang", encoders(kind).blocks[1:2]), rand(2, 10, 32)
    mask = torch.tensor([[True] * 10, [True] * 6 + [False] * 4])
    loud = torch.where(mask[..., None], photo, 1e3 * rand(2, 10, 32, seed=4))
    torch.testing.assert_close(fusion([loud], mask)[1:], fusion([photo[1:, :6]]), atol=1e-4, rtol=1e-4)


@torch.no_grad()
def test_pang_with_zero_maps_is_the_plain_head(encoders: Callable[[str], Encoder]) -> None:
    fusion, photo = make("pang", encoders("bert").blocks[1:2]), rand(3, 10, 32)
    plain = functional.normalize(fusion.linear(summarize([photo], None)), dim=-1)
    assert (fusion([photo]) - plain).abs().max() > 0.01
    fusion.leave.weight.zero_()
    fusion.out.bias.zero_()
    torch.testing.assert_close(fusion([photo]), plain)


def test_pang_refuses_a_block_that_needs_positions(tmp_path: Path) -> None:
    block = checked_blocks(text_encoder("FNet", tmp_path), [1])[0][1]
    with pytest.raises(ValueError, match=r"--fusion pang: the layers of .*FNetModel place each token"):
        without_order(block)


# In a training


@pytest.fixture(scope="module")
def photos(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_captioned(tmp_path_factory.mktemp("photos"), {"train": 40, "test": 10})


@pytest.fixture(scope="module")
def gpt2_cache(photos: Path, tiny_model: Models) -> str:
    """Of a language model, with the tokens of layer 1 and all blocks."""
    return sc.extract(
        data=str(photos),
        cache=str(photos.parent / f"{photos.name}.zarr"),
        encoder={"image": str(tiny_model("dinov2")), "text": str(tiny_model("gpt2"))},
        layers={"image": (3,), "text": (1,)},
        storage="float32",
        device="cpu",
    )


@pytest.mark.parametrize("fusion", ["frozen", "fromage", "pang"])
def test_trains_is_evaluated_and_searches(fusion: str, gpt2_cache: str, photos: Path, tmp_path: Path) -> None:
    """Texts that are encoded anew get the vectors of the cached ones."""
    run = quick_train(gpt2_cache, tmp_path / "run", fusion=fusion, epochs=2, batch_size=16)
    report = report_of(gpt2_cache, run, protocol="caption")
    assert 0 < report["systems"]["fam"]["mrr"]["value"] <= 1
    assert "queries_constant" in report["control_scores"]
    fam = load_run(run, device="cpu")
    setting, model = setting_of(gpt2_cache, run, "captions")
    rows = setting.pairs.texts.values[:5]
    texts = open_cache(gpt2_cache).table.inputs["text"].texts
    assert texts is not None
    if FUSIONS[fusion].query_tokens:
        expected = encode_texts(model, setting.inputs, Ragged.from_rows(rows[:, None]))
        np.testing.assert_allclose(fam.embed_texts([texts[row] for row in rows]), expected, atol=1e-5)
    found = fam.index(str(photos), tmp_path / "index", splits=("test",)).search(texts[rows[0]], k=3)
    scores = setting.gallery(model, setting.honest()) @ fam.embed_texts([texts[rows[0]]])[0]
    assert [hit.id for hit in found] == [setting.pairs.ids[place] for place in np.argsort(-scores)[:3]]
    assert fam.size == (256 if fusion == "fromage" else 32)


def test_pang_reads_one_block_and_no_text_token(gpt2_cache: str, tmp_path: Path) -> None:
    """By default the last block, whose layer's tokens are not even cached."""
    opened = open_cache(gpt2_cache)
    spec = resolve_run(TrainConfig(cache=gpt2_cache, out="unused", fusion="pang"), opened)
    assert (spec.text_layers, spec.token_layers, spec.shape.num_blocks) == ((2,), (), 1)
    assert FeatureLoader(opened, spec).texts(np.arange(3)).states == ()
    keep_encoders(tmp_path, spec, opened)
    (tmp_path / "config.json").write_text('{"run": {"shape": {"num_tokens": 0}}}')
    kept = kept_encoders(tmp_path)[0].encoders[spec.text_key]
    assert kept.block(2).tensors.keys() == opened.encoders[spec.text_key].block(2).tensors.keys()


def test_tokens_of_unpaired_texts_are_read_too(gpt2_cache: str, tmp_path: Path) -> None:
    options: dict[str, Any] = {"unpaired": "test", "objective": {"info_nce": 1.0, "structure": 1.0}}
    run = quick_train(gpt2_cache, tmp_path / "run", fusion="fromage", epochs=1, batch_size=16, **options)
    lines = [json.loads(line) for line in Path(run, "log.jsonl").read_text().splitlines()]
    assert np.isfinite(lines[-1]["loss"])


def test_runs_that_read_texts_differently_share_no_batches(gpt2_cache: str) -> None:
    """Frozen's are paired with photos alone, FROMAGe's search; Pang's and late fusion's are vectors."""
    opened, found = open_cache(gpt2_cache), {}
    for fusion in ("frozen", "fromage", "pang", "late"):
        config = TrainConfig(cache=gpt2_cache, out="unused", fusion=fusion, batch_size=16).resolved()
        found[fusion] = same_batches(config, resolve_run(config, opened))
    assert len(set(found.values())) == 3
    assert found["pang"] == found["late"]


def test_a_query_of_several_texts_is_the_mean_of_their_vectors(gpt2_cache: str) -> None:
    opened = open_cache(gpt2_cache)
    spec = resolve_run(TrainConfig(cache=gpt2_cache, out="unused", fusion="fromage"), opened)
    text = opened.encoders[spec.text_key]
    model, inputs = make("fromage", [text.block(1), text.block(2)]), FeatureLoader(opened, spec)
    [one, two, three] = encode_texts(model, inputs, Ragged.from_rows([[4], [2], [7]]))
    found = encode_texts(model, inputs, Ragged.from_rows([[7, 2, 4], [2]]))
    mean = one + two + three
    np.testing.assert_allclose(found, [mean / np.linalg.norm(mean), two], atol=1e-6)
