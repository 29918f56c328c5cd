"""Fusions for composed queries: each against its formula in plain torch, its limits, and the paper's size."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from tiny_models import rand
from torch import nn
from torch.nn import functional

from saffe_cache.fusion.base import Blocks, Fusion, Pairing, Texts
from saffe_cache.fusion.composed.artemis import ArtemisFusion
from saffe_cache.fusion.options import FusionShape
from saffe_cache.fusion.registry import FUSIONS

SUMMARY, SIZE, PHOTOS = 12, 6, 4
COMPOSED = ("sum", "tirg", "combiner", "artemis")
every_fusion = pytest.mark.parametrize("fusion", COMPOSED)


def make(fusion: str, size: int = SIZE, **changes: Any) -> Any:
    torch.manual_seed(1)
    values: dict[str, Any] = {"num_layers": 1, "hidden_size": SUMMARY // 2, "num_tokens": 5, "pooled_text": False}
    values |= {"head": "attention", "text_hidden_size": size, "text_size": size, "maps_queries": False}
    return FUSIONS[fusion].make(FusionShape(fusion=fusion, **(values | changes)), Blocks()).eval()


@torch.no_grad()
def woken(module: nn.Module) -> Any:
    """Away from its start, with running means that are not 0 and 1."""
    generator = torch.Generator().manual_seed(3)
    for parameter in module.parameters():
        parameter += 0.3 * torch.randn(parameter.shape, generator=generator)
    for one in module.modules():
        if isinstance(one, nn.BatchNorm1d):
            one.running_mean.normal_(generator=generator)  # type: ignore[union-attr]
            one.running_var.uniform_(0.5, 2, generator=generator)  # type: ignore[union-attr]
    return module


def unit(vectors: torch.Tensor) -> torch.Tensor:
    return functional.normalize(vectors, dim=-1)


def close(actual: torch.Tensor, expected: torch.Tensor) -> None:
    torch.testing.assert_close(actual, expected, atol=1e-5, rtol=1e-5)


STATES = [rand(PHOTOS, 1, SUMMARY)]
VECTORS = 5 * rand(PHOTOS, SIZE, seed=9)
TEXTS = Texts.of_vectors(VECTORS)
GALLERY = unit(rand(7, SIZE, seed=4))


def photos_of(model: Any) -> torch.Tensor:
    """r of the photos, by the linear map alone."""
    return unit(STATES[0][:, 0] @ model.photo_map.weight.T + model.photo_map.bias)


def num_added(fusion: str, size: int) -> int:
    """Parameters besides the frame's map of photos."""
    with torch.device("meta"):
        model: Fusion = make(fusion, size)
    return sum(one.numel() for name, one in model.named_parameters() if not name.startswith("photo_map"))


@every_fusion
@torch.no_grad()
def test_gallery_is_the_mapped_photo_of_unit_length(fusion: str) -> None:
    model = woken(make(fusion))
    close(model(STATES), photos_of(model))
    close(model.encode_queries(VECTORS), model.encode_queries(VECTORS / 7))  # only the text's direction counts
    close(model.encode_queries(VECTORS).norm(dim=-1), torch.ones(PHOTOS))


@every_fusion
@torch.no_grad()
def test_null_text_is_a_query_by_the_photo_alone(fusion: str) -> None:
    """Whatever the null text's vector is, and whatever the other rows are."""
    model = woken(make(fusion))
    texts = TEXTS._replace(mask=torch.tensor([[True], [False], [True], [False]]))
    scores = model.similarities(model(STATES, None, texts), GALLERY)
    close(scores[[1, 3]], (photos_of(model) @ GALLERY.T)[[1, 3]])
    loud = texts._replace(vectors=torch.where(texts.is_text, VECTORS, 9.0))
    assert torch.equal(model(STATES, None, loud), model(STATES, None, texts))
    whole = model.similarities(model(STATES, None, TEXTS), GALLERY)
    close(scores[[0, 2]], whole[[0, 2]])
    assert (whole - scores)[[1, 3]].abs().max() > 0.01


@every_fusion
@torch.no_grad()
def test_query_depends_on_its_photo_and_text_alone(fusion: str) -> None:
    model = woken(make(fusion))
    pairing = Pairing(torch.tensor([0, 3, 3, 1, 0]), torch.tensor([2, 2, 1, 0, 0]))
    together = model(STATES, None, TEXTS, pairing)
    for row, (photo, text) in enumerate(zip(*pairing, strict=True)):
        one = Texts.of_vectors(VECTORS[text : text + 1] / 3)
        close(together[row], model([STATES[0][photo : photo + 1]], None, one)[0])


@every_fusion
def test_gradient_reaches_every_parameter(fusion: str) -> None:
    model = make(fusion).train()
    model.similarities(model(STATES, None, TEXTS), model(STATES)).square().sum().backward()
    assert all(one.grad is not None and one.grad.isfinite().all() for one in model.parameters())


# sum


@torch.no_grad()
def test_sum_starts_as_the_mean_of_photo_and_text() -> None:
    model = make("sum")
    close(model(STATES, None, TEXTS), unit(photos_of(model) + unit(VECTORS)))
    woken(model)
    mapped = unit(VECTORS) @ model.text_linear.weight.T + model.text_linear.bias
    close(model(STATES, None, TEXTS), unit(photos_of(model) + mapped))
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
    close(model(STATES, None, TEXTS), unit(a1 * gate * photos + a2 * (inner @ last.weight.T + last.bias)))


@torch.no_grad()
def test_tirg_with_open_gate_and_no_residual_is_a1_r() -> None:
    model = woken(make("tirg"))
    model.weights.copy_(torch.tensor([1.7, 0.0]))
    model.gate[-1].bias.fill_(1e3)
    photos = photos_of(model)
    close(model.compose(photos, unit(VECTORS)), 1.7 * SIZE**0.5 * photos)
    close(model(STATES, None, TEXTS), photos)


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

    def layer(linear: nn.Linear, values: torch.Tensor) -> torch.Tensor:
        return values @ linear.weight.T + linear.bias

    both = torch.cat(
        [layer(model.of_text[0], texts).clamp(min=0), layer(model.of_photo[0], photos).clamp(min=0)], dim=1
    )
    vector = layer(model.vector[-1], layer(model.vector[0], both).clamp(min=0))
    share = 1 / (1 + (-layer(model.share[-1], layer(model.share[0], both).clamp(min=0))).exp())
    assert share.shape == (PHOTOS, 1)
    close(model(STATES, None, TEXTS), unit(vector + share * texts + (1 - share) * photos))


@torch.no_grad()
def test_combiner_without_vector_at_half_share_is_the_sum() -> None:
    model = woken(make("combiner"))
    for last in (model.vector[-1], model.share[-1]):
        nn.init.zeros_(last.weight)
        nn.init.zeros_(last.bias)
    close(model(STATES, None, TEXTS), unit((photos_of(model) + unit(VECTORS)) / 2))
    nn.init.constant_(model.share[-1].bias, 50.0)
    close(model(STATES, None, TEXTS), unit(VECTORS))


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
    found = model.similarities(model(STATES, None, TEXTS), GALLERY)
    close(found, direct(model, photos_of(model), unit(VECTORS), GALLERY))
    assert model(STATES, None, TEXTS).shape == (PHOTOS, 4 * SIZE)


@torch.no_grad()
def test_artemis_with_uniform_attention_adds_two_cosines() -> None:
    model = woken(make("artemis"))
    for last in (model.explicit[-1], model.implicit[-1]):
        nn.init.zeros_(last.weight)
        nn.init.constant_(last.bias, 0.7)
    expected = (model.encode_queries(VECTORS) + photos_of(model)) @ GALLERY.T
    close(model.similarities(model(STATES, None, TEXTS), GALLERY), expected)


@torch.no_grad()
def test_artemis_photo_or_text_alone_searches_by_cosine() -> None:
    model = woken(make("artemis"))
    for queries in (model(STATES), model.encode_queries(VECTORS)):
        close(model.similarities(queries, GALLERY), queries @ GALLERY.T)


def test_artemis_has_1_3_million_parameters_as_published() -> None:
    assert num_added("artemis", 512) == 5 * (512**2 + 512) == 1_313_280
