"""Fusions for composed queries: each against its formula in plain torch, its limits, and the paper's size."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from drawn import close, unit, woken
from tiny_models import rand
from torch import nn
from torch.nn import functional

from saffe_cache.fusion.base import Blocks, Fusion, Pairing, Texts
from saffe_cache.fusion.composed.artemis import ArtemisFusion
from saffe_cache.fusion.composed.compose import ComposeFusion
from saffe_cache.fusion.layers import summarize
from saffe_cache.fusion.options import FusionShape
from saffe_cache.fusion.registry import FUSIONS

SUMMARY, SIZE, PHOTOS = 12, 6, 4
COMPOSED = ("compose", "sum", "tirg", "combiner", "artemis")
every_fusion = pytest.mark.parametrize("fusion", COMPOSED)


def make(fusion: str, size: int = SIZE, **changes: Any) -> Any:
    torch.manual_seed(1)
    layers = 2 if FUSIONS[fusion].reads == "tokens" else 1
    values: dict[str, Any] = {"num_layers": layers, "hidden_size": SUMMARY // 2, "num_tokens": 5, "pooled_text": False}
    values |= {"head": "attention", "text_hidden_size": size, "text_size": size, "maps_queries": False}
    return FUSIONS[fusion].make(FusionShape(fusion=fusion, **(values | changes)), Blocks()).eval()


VECTORS = 5 * rand(PHOTOS, SIZE, seed=9)
TEXTS = Texts.of_vectors(VECTORS)
GALLERY = unit(rand(7, SIZE, seed=4))


def states_of(model: Any) -> list[torch.Tensor]:
    """What the fusion reads of the photos: two layers of tokens, or their summaries."""
    if model.shape.entry.reads == "tokens":
        return [rand(PHOTOS, 5, SUMMARY // 2, seed=layer) for layer in range(2)]
    return [rand(PHOTOS, 1, model.shape.summary_size)]


def gallery_of(model: Any) -> torch.Tensor:
    return unit(rand(7, model(states_of(model)).shape[1], seed=4))


def photos_of(model: Any) -> torch.Tensor:
    """r of the photos, by their own path alone."""
    states = states_of(model)
    if isinstance(model, ComposeFusion):
        summary = (summarize(states, None, has_spread=True) - model.mean) / model.deviation
        pooled = [
            torch.softmax(normed @ queries, dim=1).transpose(1, 2).unsqueeze(2) @ normed.unsqueeze(1) @ values
            for normed, queries, values in zip(
                (functional.layer_norm(state, state.shape[-1:]) for state in states),
                model.head.pool_queries,
                model.head.pool_values,
                strict=True,
            )
        ]
        seen = torch.cat([*(one.flatten(1) for one in pooled), summary], dim=1)
        seen = functional.layer_norm(seen, seen.shape[-1:]) * model.head.norm.weight + model.head.norm.bias
        _, first, _, _, last = model.head.mlp
        return unit(layer(model.head.linear, summary) + layer(last, functional.gelu(layer(first, seen))))
    photos = states[0][:, 0]
    return unit(layer(model.photo_map, photos))


def layer(linear: nn.Linear, values: torch.Tensor) -> torch.Tensor:
    return values @ linear.weight.T + linear.bias


def mlp(parts: nn.Sequential, values: torch.Tensor) -> torch.Tensor:
    """Two linear maps with a GELU between them, without dropout."""
    _, first, _, _, last = parts
    inner = layer(first, values)  # type: ignore[arg-type]
    return layer(last, inner * 0.5 * (1 + torch.erf(inner / 2**0.5)))  # type: ignore[arg-type]


def num_added(fusion: str, size: int) -> int:
    """Parameters besides the frame's map of photos."""
    with torch.device("meta"):
        model: Fusion = make(fusion, size)
    return sum(one.numel() for name, one in model.named_parameters() if not name.startswith("photo_map"))


@every_fusion
@torch.no_grad()
def test_gallery_is_the_mapped_photo_of_unit_length(fusion: str) -> None:
    model = woken(make(fusion))
    close(model(states_of(model)), photos_of(model))
    close(model.encode_queries(VECTORS), model.encode_queries(VECTORS / 7))  # only the text's direction counts
    close(model.encode_queries(VECTORS).norm(dim=-1), torch.ones(PHOTOS))


@every_fusion
@torch.no_grad()
def test_null_text_is_a_query_by_the_photo_alone(fusion: str) -> None:
    """Whatever the null text's vector is, and whatever the other rows are."""
    model = woken(make(fusion))
    gallery = gallery_of(model)
    texts = TEXTS._replace(mask=torch.tensor([[True], [False], [True], [False]]))
    scores = model.similarities(model(states_of(model), None, texts), gallery)
    close(scores[[1, 3]], (photos_of(model) @ gallery.T)[[1, 3]])
    loud = texts._replace(vectors=torch.where(texts.is_text, VECTORS, 9.0))
    assert torch.equal(model(states_of(model), None, loud), model(states_of(model), None, texts))
    whole = model.similarities(model(states_of(model), None, TEXTS), gallery)
    close(scores[[0, 2]], whole[[0, 2]])
    assert (whole - scores)[[1, 3]].abs().max() > 0.01


@every_fusion
@torch.no_grad()
def test_query_depends_on_its_photo_and_text_alone(fusion: str) -> None:
    model = woken(make(fusion))
    pairing = Pairing(torch.tensor([0, 3, 3, 1, 0]), torch.tensor([2, 2, 1, 0, 0]))
    together = model(states_of(model), None, TEXTS, pairing)
    for row, (photo, text) in enumerate(zip(*pairing, strict=True)):
        one = Texts.of_vectors(VECTORS[text : text + 1] / 3)
        close(together[row], model([state[photo : photo + 1] for state in states_of(model)], None, one)[0])


@every_fusion
def test_gradient_reaches_every_parameter(fusion: str) -> None:
    model = make(fusion).train()
    scores = model.similarities(model(states_of(model), None, TEXTS), model(states_of(model)))
    (scores.square().sum() + model.encode_queries(VECTORS)[:, 0].sum()).backward()
    assert all(one.grad is not None and one.grad.isfinite().all() for one in model.parameters())


# sum


@torch.no_grad()
def test_sum_starts_as_the_mean_of_photo_and_text() -> None:
    model = make("sum")
    close(model(states_of(model), None, TEXTS), unit(photos_of(model) + unit(VECTORS)))
    woken(model)
    mapped = unit(VECTORS) @ model.text_linear.weight.T + model.text_linear.bias
    close(model(states_of(model), None, TEXTS), unit(photos_of(model) + mapped))
    close(model.encode_queries(VECTORS), unit(mapped))
    assert num_added("sum", 384) == 384 * 385


# TIRG


def normed(values: torch.Tensor, norm: nn.BatchNorm1d) -> torch.Tensor:
    """relu BN, with running means."""
    assert norm.running_mean is not None
    assert norm.running_var is not None
    return ((values - norm.running_mean) / (norm.running_var + 1e-5).sqrt() * norm.weight + norm.bias).clamp(min=0)


@torch.no_grad()
def test_tirg_is_a_gated_photo_and_a_residual() -> None:
    model = woken(make("tirg"))
    photos = SIZE**0.5 * photos_of(model)
    both = torch.cat([photos, SIZE**0.5 * unit(VECTORS)], dim=1)
    norm, _, last = model.gate
    gate = 1 / (1 + (-(normed(both, norm) @ last.weight.T + last.bias)).exp())
    norm, _, first, _, last = model.residual
    inner = (normed(both, norm) @ first.weight.T + first.bias).clamp(min=0)
    a1, a2 = model.weights
    close(model(states_of(model), None, TEXTS), unit(a1 * gate * photos + a2 * (inner @ last.weight.T + last.bias)))


@torch.no_grad()
def test_tirg_with_open_gate_and_no_residual_is_a1_r() -> None:
    model = woken(make("tirg"))
    model.weights.copy_(torch.tensor([1.7, 0.0]))
    model.gate[-1].bias.fill_(1e3)
    photos = photos_of(model)
    close(model.compose(photos, unit(VECTORS)), 1.7 * SIZE**0.5 * photos)
    close(model(states_of(model), None, TEXTS), photos)


@torch.no_grad()
def test_tirg_follows_the_batch_in_training_alone() -> None:
    model, photos = make("tirg", dropout=0.0), photos_of(make("tirg"))
    first = model.compose(photos, unit(VECTORS))
    close(model.compose(photos[:2], unit(VECTORS)[:2]), first[:2])
    model.train()
    assert (model.compose(photos[:2], unit(VECTORS)[:2]) - model.compose(photos, unit(VECTORS))[:2]).abs().max() > 0.01


def test_tirg_has_2_1_million_parameters_as_published() -> None:
    """8 k² + 12 k + 2 at k = 512: gate, residual, two batch norms and two weights."""
    assert num_added("tirg", 512) == 8 * 512**2 + 12 * 512 + 2 == 2_103_298


# Combiner


@torch.no_grad()
def test_combiner_is_a_share_of_both_and_a_vector() -> None:
    model = woken(make("combiner"))
    photos, texts = SIZE**0.5 * photos_of(model), SIZE**0.5 * unit(VECTORS)

    both = torch.cat(
        [layer(model.of_text[0], texts).clamp(min=0), layer(model.of_photo[0], photos).clamp(min=0)], dim=1
    )
    vector = layer(model.vector[-1], layer(model.vector[0], both).clamp(min=0))
    share = 1 / (1 + (-layer(model.share[-1], layer(model.share[0], both).clamp(min=0))).exp())
    assert share.shape == (PHOTOS, 1)
    close(model(states_of(model), None, TEXTS), unit(vector + share * texts + (1 - share) * photos))


@torch.no_grad()
def test_combiner_without_vector_at_half_share_is_the_sum() -> None:
    model = woken(make("combiner"))
    for last in (model.vector[-1], model.share[-1]):
        nn.init.zeros_(last.weight)
        nn.init.zeros_(last.bias)
    close(model(states_of(model), None, TEXTS), unit((photos_of(model) + unit(VECTORS)) / 2))
    nn.init.constant_(model.share[-1].bias, 50.0)
    close(model(states_of(model), None, TEXTS), unit(VECTORS))


def test_combiner_has_59_million_parameters_as_published() -> None:
    assert num_added("combiner", 640) == 144 * 640**2 + 33 * 640 + 1 == 59_003_521


# ARTEMIS


def direct(model: ArtemisFusion, photos: torch.Tensor, texts: torch.Tensor, gallery: torch.Tensor) -> torch.Tensor:
    """The paper's score of each query with each photo, one by one."""
    scores = torch.zeros(len(photos), len(gallery))
    for row, (r, m) in enumerate(zip(photos, texts, strict=True)):
        explicit, implicit = (
            torch.softmax(last(first(m).clamp(min=0)), dim=0)
            for first, _, last in (model.explicit, model.implicit)  # type: ignore[misc]
        )
        for column, t in enumerate(gallery):
            scores[row, column] = unit(model.text_linear(m)) @ unit(explicit * t)
            scores[row, column] += unit(implicit * r) @ unit(implicit * t)
    return scores


@torch.no_grad()
def test_artemis_two_products_equal_the_direct_score() -> None:
    model = woken(make("artemis"))
    for last in (model.explicit[-1], model.implicit[-1]):
        last.weight.mul_(8)  # attention far from uniform
    found = model.similarities(model(states_of(model), None, TEXTS), GALLERY)
    close(found, direct(model, photos_of(model), unit(VECTORS), GALLERY))
    assert model(states_of(model), None, TEXTS).shape == (PHOTOS, 4 * SIZE)


@torch.no_grad()
def test_artemis_with_uniform_attention_adds_two_cosines() -> None:
    model = woken(make("artemis"))
    for last in (model.explicit[-1], model.implicit[-1]):
        nn.init.zeros_(last.weight)
        nn.init.constant_(last.bias, 0.7)
    expected = (model.encode_queries(VECTORS) + photos_of(model)) @ GALLERY.T
    close(model.similarities(model(states_of(model), None, TEXTS), GALLERY), expected)


@torch.no_grad()
def test_artemis_photo_or_text_alone_searches_by_cosine() -> None:
    model = woken(make("artemis"))
    for queries in (model(states_of(model)), model.encode_queries(VECTORS)):
        close(model.similarities(queries, GALLERY), queries @ GALLERY.T)


def test_artemis_has_1_3_million_parameters_as_published() -> None:
    assert num_added("artemis", 512) == 5 * (512**2 + 512) == 1_313_280


# ours


@torch.no_grad()
def test_compose_is_a_gated_photo_a_text_and_a_residual() -> None:
    model = woken(make("compose"))
    photos, texts = photos_of(model), unit(VECTORS)
    both = torch.cat(
        [
            functional.layer_norm(values, values.shape[-1:]) * norm.weight + norm.bias
            for values, norm in ((photos, model.photo_norm), (texts, model.text_norm))
        ],
        dim=1,
    )
    kept = layer(model.kept, photos) * 2 / (1 + (-mlp(model.gate, both)).exp())
    wanted = unit(layer(model.text_linear, texts) + mlp(model.text_mlp, SIZE**0.5 * texts))
    expected = model.photo_weight * kept + model.text_weight * wanted + mlp(model.residual, both) / 16
    close(model(states_of(model), None, TEXTS), unit(expected))


@torch.no_grad()
def test_compose_starts_as_late_fusion() -> None:
    model = make("compose")
    wanted = unit(layer(model.text_linear, unit(VECTORS)) + mlp(model.text_mlp, SIZE**0.5 * unit(VECTORS)))
    close(model(states_of(model), None, TEXTS), unit(photos_of(model) + wanted))


@torch.no_grad()
def test_compose_standardises_summaries_by_the_training_photos() -> None:
    model, photos = make("compose"), 3 + 2 * rand(40, 3 * SUMMARY, seed=2)
    model.prepare(photos.numpy())
    seen = (photos - model.mean) / model.deviation
    close(seen.mean(dim=0), torch.zeros(3 * SUMMARY))
    torch.testing.assert_close(seen.std(dim=0, correction=0), torch.ones(3 * SUMMARY), atol=2e-3, rtol=0)
    again = make("compose")
    again.load_state_dict(model.state_dict())
    close(again(states_of(again)), photos_of(model))


@torch.no_grad()
def test_compose_ignores_padding_and_order_of_patches() -> None:
    model = woken(make("compose"))
    states = [state[:, [0, 3, 1, 4, 2]] for state in states_of(model)]
    close(model(states), photos_of(model))
    padded = [functional.pad(state, (0, 0, 0, 2), value=9.0) for state in states]
    mask = torch.tensor([[True] * 5 + [False] * 2] * PHOTOS)
    close(model(padded, mask), photos_of(model))


@torch.no_grad()
def test_spread_is_the_deviation_over_tokens_that_count() -> None:
    states = [rand(2, 5, 6), rand(2, 5, 6, seed=1)]
    mask = torch.tensor([[True] * 5, [True] * 3 + [False] * 2])
    found = summarize(states, mask, has_spread=True).view(2, 2, 3, 6)
    close(found[:, :, :2].flatten(1), summarize(states, mask))
    for row, count in enumerate((5, 3)):
        for number, state in enumerate(states):
            tokens = functional.layer_norm(state[row, 1:count], (6,))
            close(found[row, number, 2], tokens.std(dim=0, correction=0))
    flat = summarize(states, None, has_class_token=False, has_spread=True).view(2, 2, 2, 6)
    close(flat[0, 1, 1], functional.layer_norm(states[1][0], (6,)).std(dim=0, correction=0))
