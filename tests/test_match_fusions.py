"""Fusions that tell pairs apart: their sizes, what of them is trained, what they see, and what they cost."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from saffe_cache.studies.matching.config import FUSIONS, QueryModality
from saffe_cache.studies.matching.fusions import make_fusion, measure_cost

PHOTO, TEXT = 24, 20
COUNTS = {
    "concat": 295_554,
    "concat_linear": 295_554,
    "concat_wide": 328_706,
    "cross": 756_610,
    "cross_residual": 756_610,
    "cross_residual_linear": 756_610,
    "cross_two_norms": 757_122,
    "cross_equations": 393_472 + 33_154,
    "tokens": 756_610,
}


def count(model: nn.Module) -> int:
    return sum(parameter.numel() for parameter in model.parameters())


def batch(pairs: int = 4, tokens: tuple[int, int] = (1, 1)) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    photos = torch.randn(pairs, tokens[0], PHOTO, generator=generator)
    texts = torch.randn(pairs, tokens[1], TEXT, generator=generator)
    return photos, texts, torch.ones(pairs, tokens[1], dtype=torch.bool)


def made(name: str, query_modality: QueryModality = "text") -> nn.Module:
    torch.manual_seed(0)
    return make_fusion(name, PHOTO, TEXT, query_modality).eval()


def test_parameters_equal_the_papers_at_its_widths() -> None:
    assert set(COUNTS) == set(FUSIONS)
    assert {name: count(make_fusion(name, 512, 512)) for name in FUSIONS} == COUNTS
    equations = make_fusion("cross_equations", 512, 512)
    assert count(equations) - count(equations.head) == 393_472  # "3hd + h"
    assert count(make_fusion("concat", 512, 512).project) == 256 * 1024 + 256  # "h (d_v + d_t) + h"


def attention_gradients(model: nn.Module, inputs: tuple[torch.Tensor, ...]) -> dict[str, float]:
    """Largest magnitude of the gradient of what makes queries, keys and values."""
    model(*inputs)[:, 1].sum().backward()
    found = {}
    if hasattr(model, "attention"):
        parts = model.attention.in_proj_weight.grad.chunk(3)
        found |= {name: float(part.abs().max()) for name, part in zip(("query", "key", "value"), parts, strict=True)}
    for name in ("query", "key", "value"):
        found[f"outer {name}"] = float(getattr(model, name).weight.grad.abs().max())
    return found


@pytest.mark.parametrize("query_modality", ["text", "photo"])
@pytest.mark.parametrize("name", ["cross", "cross_equations"])
def test_attention_over_one_key_is_blind_to_queries(name: str, query_modality: QueryModality) -> None:
    """The softmax of one logit is 1: queries and keys are never trained, and the queries' modality changes nothing."""
    photos, texts, mask = batch()
    model = made(name, query_modality)
    gradients = attention_gradients(model, (photos, texts, mask))
    assert gradients["outer value"] > 1e-4
    for role in ("query", "key"):
        assert gradients[f"outer {role}"] < 1e-8
        assert gradients.get(role, 0) < 1e-8
    others = torch.randn(4, 1, PHOTO), torch.randn(4, 1, TEXT)
    of_other_photos, of_other_texts = model(others[0], texts, mask), model(photos, others[1], mask)
    queries, keys = (of_other_texts, of_other_photos) if query_modality == "text" else (of_other_photos, of_other_texts)
    assert torch.equal(queries, model(photos, texts, mask))
    assert (keys - model(photos, texts, mask)).abs().max() > 1e-3


@pytest.mark.parametrize("name", ["cross_residual", "cross_residual_linear", "cross_two_norms"])
def test_residual_sees_both_but_attends_to_nothing(name: str) -> None:
    photos, texts, mask = batch()
    model = made(name)
    gradients = attention_gradients(model, (photos, texts, mask))
    assert gradients["query"] < 1e-8
    assert gradients["key"] < 1e-8
    assert gradients["outer key"] < 1e-8
    assert gradients["outer query"] > 1e-4  # by the residual
    assert (model(photos, torch.randn(4, 1, TEXT), mask) - model(photos, texts, mask)).abs().max() > 1e-3


@pytest.mark.parametrize("query_modality", ["text", "photo"])
def test_tokens_attend_and_padding_changes_nothing(query_modality: QueryModality) -> None:
    photos, texts, mask = batch(tokens=(5, 4))
    model = made("tokens", query_modality)
    gradients = attention_gradients(model, (photos, texts, mask))
    assert min(gradients.values()) > 1e-6
    padded = torch.cat([texts, torch.randn(4, 3, TEXT)], dim=1)
    longer = torch.cat([mask, torch.zeros(4, 3, dtype=torch.bool)], dim=1)
    assert torch.allclose(model(photos, padded, longer), model(photos, texts, mask), atol=1e-5)


@pytest.mark.slow
def test_flops_are_counted_from_the_matrices() -> None:
    """Two a multiplication and addition, attention's own products included: the paper's .53 M and .40 M are of two
    units, and of projections alone."""
    concat = measure_cost("concat", (512, 512), (1, 1))
    assert concat.flops_per_pair == 2 * (1024 * 256 + 256 * 128 + 128 * 2)
    for name, width, queries, keys in (("cross", 512, 1, 1), ("cross_two_norms", 48, 1, 1), ("tokens", 384, 14, 65)):
        of_text = width * 256 + 3 * 256 * 256  # query, outer and inner; behind attention its output, and another map
        of_photo = 2 * (width * 256 + 256 * 256)  # key and value, outer and inner
        attention = 2 * queries * keys * 256  # queries with keys; weights with values
        expected = 2 * (queries * of_text + keys * of_photo + attention + 256 * 128 + 128 * 2)
        assert measure_cost(name, (width, width), (keys, queries)).flops_per_pair == expected
    assert expected == 51_853_824
    equations = measure_cost("cross_equations", (512, 512), (1, 1))
    assert equations.flops_per_pair == 2 * (3 * 512 * 256 + 2 * 256 + 256 * 128 + 128 * 2)
    assert concat.parameters == COUNTS["concat"]
    tokens = measure_cost("tokens", (64, 64), (10, 6))
    assert tokens.kept_bytes_per_pair > concat.kept_bytes_per_pair > 0
