"""Photo tokens that join a frozen language model at a layer, against transformers' own model."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from captioning_cases import GRID, PHOTO_TOKENS, captioned_cache, model_of, projector_of, source_of
from tiny_models import NUM_LAYERS, assert_rounded, rand

from saffe_cache.core.features import CacheError
from saffe_cache.studies.captioning.captions import caption_losses
from saffe_cache.studies.captioning.inserting import (
    Decoding,
    Projector,
    greedy_captions,
    photo_side,
    pool_photos,
    typical_size,
)

Models = Callable[[str], Path]
every_layer = pytest.mark.parametrize("layer", range(NUM_LAYERS))


@pytest.fixture(scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory, tiny_model: Models) -> str:
    return captioned_cache(tmp_path_factory.mktemp("captions"), tiny_model)


@pytest.fixture(scope="module")
def gpt2(tiny_model: Models) -> Any:
    return load_gpt2(tiny_model, attn_implementation="eager")


def load_gpt2(tiny_model: Models, **options: Any) -> Any:
    return transformers.GPT2LMHeadModel.from_pretrained(tiny_model("gpt2"), **options).eval()


@every_layer
@torch.no_grad()
def test_cached_states_are_those_computed_again(layer: int, cache: str) -> None:
    source, rows = source_of(cache, layer), np.array([0, 4, 7])
    ids, mask = source.token_ids(rows)
    again = model_of(cache, layer).text_states(ids, PHOTO_TOKENS)
    states = source.captions(rows).states
    real = mask[:, :-1]
    assert_rounded(states[real], again[:, :-1][real])


@every_layer
@torch.no_grad()
def test_without_photo_tokens_it_is_the_plain_model(layer: int, cache: str, gpt2: Any, tiny_model: Models) -> None:
    """Bit for bit, where transformers too takes torch's attention and GELU. By itself it writes GPT-2's GELU out, and
    its sums round otherwise: equal but for float32, and in float64 to 13 decimals."""
    source, model, rows = source_of(cache, layer), model_of(cache, layer), np.array([1, 5, 6])
    ids, mask = source.token_ids(rows)
    of_torch = load_gpt2(tiny_model, attn_implementation="sdpa", activation_function="gelu_pytorch_tanh")
    for photos in (None, torch.zeros(len(rows), 0, 32)):
        assert torch.equal(model.logits(model(model.text_states(ids, 0), photos))[mask], of_torch(ids).logits[mask])
    captions = source.captions(rows, plain=True)
    logits = model.logits(model(captions.states, None))
    assert_rounded(logits[captions.is_target], gpt2(ids).logits[:, :-1][captions.is_target])
    behind = gpt2(ids, position_ids=torch.arange(PHOTO_TOKENS, PHOTO_TOKENS + ids.shape[1])[None]).logits[:, :-1]
    captions = source.captions(rows)
    assert_rounded(model.logits(model(captions.states, None))[captions.is_target], behind[captions.is_target])
    assert int(captions.num_targets.sum()) == int(mask.sum()) - len(rows)
    model, written_out = model.double(), load_gpt2(tiny_model, attn_implementation="eager").double()
    logits = model.logits(model(model.text_states(ids, 0), None))[mask]
    torch.testing.assert_close(logits, written_out(ids).logits[mask], atol=1e-13, rtol=0)


@torch.no_grad()
def test_layer_0_is_prepending(cache: str, gpt2: Any) -> None:
    """Loss and scores, of transformers on `inputs_embeds`, photo tokens in front."""
    source, model, projector, rows = source_of(cache, 0), model_of(cache, 0), projector_of(), np.array([2, 8, 3])
    ids, mask = source.token_ids(rows)
    photos = projector(source.photo_tokens(np.array([0, 1, 2])))
    embedded = torch.cat([photos, gpt2.transformer.wte(ids)], dim=1)
    everywhere = torch.cat([torch.ones(len(rows), PHOTO_TOKENS), mask], dim=1)
    labels = torch.cat([torch.full((len(rows), PHOTO_TOKENS + 1), -100), ids[:, 1:].masked_fill(~mask[:, 1:], -100)], 1)
    output = gpt2(inputs_embeds=embedded, attention_mask=everywhere, labels=labels)
    captions = source.captions(rows)
    scores = model.logits(model(captions.states, photos))
    assert_rounded(scores[captions.is_target], output.logits[:, PHOTO_TOKENS:-1][captions.is_target])
    losses = caption_losses(model, captions, photos)
    assert_rounded(losses.sum() / captions.num_targets.sum(), output.loss)


@every_layer
@torch.no_grad()
def test_later_insertion_equals_layers_on_both_sequences(layer: int, cache: str, gpt2: Any) -> None:
    """By transformers' layers, one by one: the text alone below, with the photo's tokens in front from there on."""
    source, model, rows = source_of(cache, layer), model_of(cache, layer), np.array([2, 8])
    photos = projector_of()(source.photo_tokens(np.array([0, 1])))
    ids, _ = source.token_ids(rows)
    positions = torch.arange(PHOTO_TOKENS + ids.shape[1])
    places = gpt2.transformer.wpe(positions)
    hidden = gpt2.transformer.wte(ids) + places[PHOTO_TOKENS:]
    for number, block in enumerate(gpt2.transformer.h):
        if number == layer:
            hidden = torch.cat([photos + places[:PHOTO_TOKENS], hidden], dim=1)
        length = hidden.shape[1]
        blocked = torch.full((length, length), torch.finfo(torch.float32).min).triu(1)
        hidden = block(hidden, attention_mask=blocked[None, None])
        hidden = hidden[0] if isinstance(hidden, tuple) else hidden
    expected = gpt2.lm_head(gpt2.transformer.ln_f(hidden))[:, PHOTO_TOKENS:-1]
    captions = source.captions(rows)
    assert_rounded(model.logits(model(captions.states, photos))[captions.is_target], expected[captions.is_target])


@every_layer
@torch.no_grad()
def test_photos_change_scores_and_nothing_below_their_layer(layer: int, cache: str) -> None:
    """Not a bit of the keys that the layers below hold. This says nothing of a text in front of the photo, which there
    cannot be: from their layer on, photo tokens are the first."""
    source, model, rows = source_of(cache, layer), model_of(cache, layer), np.array([2, 8])
    photos = projector_of()(source.photo_tokens(np.array([0, 1])))
    seen: list[list[torch.Tensor]] = []
    for order in ((0, 1), (1, 0)):
        decoding = Decoding(model, photos[list(order)])
        scores = decoding.extend(source.token_ids(rows)[0][:, :3])
        held = [one for one in decoding.past[:layer] if one is not None]
        seen.append([*(keys for keys, _ in held), scores])
    assert len(seen[0]) == layer + 1
    for before, after in zip(seen[0][:-1], seen[1][:-1], strict=True):
        assert torch.equal(before, after)
    assert not torch.allclose(seen[0][-1], seen[1][-1], atol=1e-3)
    captions = source.captions(rows)
    joint = [model.logits(model(captions.states, photos[list(order)])) for order in ((0, 1), (1, 0))]
    assert not torch.allclose(joint[0], joint[1], atol=1e-3)


@every_layer
@torch.no_grad()
def test_greedy_captions_equal_those_without_a_key_value_cache(layer: int, cache: str) -> None:
    source, model = source_of(cache, layer), model_of(cache, layer)
    photos = projector_of()(source.photo_tokens(np.array([0, 1, 2, 3])))
    start, end, most = source.tokens.start, model.spec.end_token, 12
    found = greedy_captions(model, photos, start, most)
    for photo, caption in zip(photos, found, strict=True):
        ids = list(start)
        for _ in range(most):
            states = model.text_states(torch.tensor([ids]), PHOTO_TOKENS)
            ids.append(int(model.logits(model(states, photo[None]))[0, -1].argmax()))
            if ids[-1] == end:
                ids.pop()
                break
        assert caption == ids[len(start) :]
    decoding = Decoding(model, photos)
    decoding.extend(torch.full((4, 2), 3))
    decoding.extend(torch.full((4, 1), 5))
    lengths = [keys.shape[2] for keys, _ in filter(None, decoding.past)]
    assert lengths == [3] * layer + [3 + PHOTO_TOKENS] * (NUM_LAYERS - layer)


def test_gradients_reach_only_the_projector(cache: str) -> None:
    source, model, projector = source_of(cache, 1), model_of(cache, 1), projector_of()
    captions = source.captions(np.array([0, 1]))
    caption_losses(model, captions, projector(source.photo_tokens(np.array([0, 1])))).sum().backward()
    assert all(parameter.grad is not None and parameter.grad.any() for parameter in projector.parameters())
    assert not any(parameter.requires_grad for parameter in model.parameters())
    assert sum(parameter.numel() for parameter in projector.parameters()) == 32 * 32 + 3 * 32


def test_projected_tokens_begin_at_the_size_of_the_hidden_states() -> None:
    projected = Projector(24, 40, 7.5)(rand(6, 5, 24))
    torch.testing.assert_close(projected.square().mean(dim=-1).sqrt(), torch.full((6, 5), 7.5), atol=1e-2, rtol=0)
    states = torch.ones(2, 3, 4) * torch.tensor([[1.0, 2.0, 300.0], [3.0, 4.0, 900.0]])[..., None]
    mask = torch.tensor([[True, True, True], [True, True, False]])
    assert typical_size(states, mask) == 3.0  # of 1, 2, 3, 4 and 300


def test_fields_are_means_of_patches_behind_the_class_token() -> None:
    tokens = rand(2, 2 + 36, 3)  # a class token, a register, 6 x 6 patches
    pooled = pool_photos(tokens, 3)
    assert pooled.shape == (2, 10, 3)
    torch.testing.assert_close(pooled[:, 0], tokens[:, 0])
    for row in range(3):
        for column in range(3):
            numbers = [2 + 6 * (2 * row + i) + 2 * column + j for i in (0, 1) for j in (0, 1)]
            torch.testing.assert_close(pooled[:, 1 + 3 * row + column], tokens[:, numbers].mean(dim=1))
    assert [photo_side(number) for number in (50, 65, 197, 261)] == [7, 8, 14, 16]
    with pytest.raises(ValueError, match="photos of 64 tokens"):
        photo_side(64)


def test_places_that_do_not_fit_the_photo_are_refused(cache: str) -> None:
    with pytest.raises(CacheError, match=r"begin at position 5, expected 2: .*--position-offset 2"):
        source_of(cache, 1, grid=1)
    with pytest.raises(ValueError, match=r"--grid 9: the photos have 4 x 4 patches"):
        source_of(cache, 1, grid=9)
    with pytest.raises(CacheError, match=r"has no hidden_states/3"):
        source_of(cache, 3)
    assert source_of(cache, 1).num_photo_tokens == 1 + GRID**2
