"""Heat maps against attention that is recomputed by hand, and the tokens that are no grid."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from test_fusion import blocks_for, draw_states, make_fam
from test_fusion import draw_texts as draw_fam_texts
from test_known_fusions import draw_texts, make, wake
from tiny_models import rand
from torch import nn

from saffe_cache.fusion.base import Fusion
from saffe_cache.inference.heatmap import grid_of, on_grid, token_weights

Models = Callable[[str], Path]


def softmax(scores: np.ndarray) -> np.ndarray:
    exponents = np.exp(scores - scores.max(axis=-1, keepdims=True))
    return exponents / exponents.sum(axis=-1, keepdims=True)


def numpy_norm(values: np.ndarray) -> np.ndarray:
    centred = values - values.mean(-1, keepdims=True)
    return centred / np.sqrt((centred**2).mean(-1, keepdims=True) + 1e-5)


@torch.no_grad()
def roused(model: Any) -> Any:
    """With attention that differs from place to place."""
    generator = torch.Generator().manual_seed(5)
    for parameter in model.parameters():
        parameter += 0.4 * torch.randn(parameter.shape, generator=generator)
    return model


@pytest.mark.parametrize("fusion", ["linear", "concat"])
def test_pooling_weights_are_those_of_the_head(fusion: str) -> None:
    model, states = roused(make_fam(fusion=fusion)), draw_states(3)
    queries = model.head.pool_queries.detach().double().numpy()
    by_hand = np.mean(
        [
            [softmax(numpy_norm(state[row].double().numpy()) @ own[:, head]) for row in range(3)]
            for state, own in zip(states, queries, strict=True)
            for head in range(queries.shape[2])
        ],
        axis=0,
    )
    found = token_weights(model, states)
    np.testing.assert_allclose(found, by_hand, atol=1e-6)
    np.testing.assert_allclose(found.sum(dim=1), 1, atol=1e-6)
    assert by_hand.std(axis=1).min() > 0.01


@pytest.mark.parametrize("fusion", ["reuse", "paper"])
def test_pooling_after_a_decoder_sees_fused_tokens(fusion: str, tiny_model: Models) -> None:
    model = roused(make_fam(blocks_for(tiny_model, fusion), fusion=fusion))
    states, texts = draw_states(2), draw_fam_texts(torch.ones(2, 4, dtype=torch.bool))
    fused, _ = model.decode(states, None, texts)
    found = token_weights(model, states, None, texts)
    queries = model.head.pool_queries.detach().double().numpy()
    by_hand = [
        softmax((numpy_norm(state.detach().double().numpy()) @ own).swapaxes(1, 2)).mean(axis=1)
        for state, own in zip(fused, queries, strict=True)
    ]
    np.testing.assert_allclose(found, np.mean(by_hand, axis=0), atol=1e-5)
    assert not torch.allclose(found, token_weights(model, states), atol=1e-4)  # the text moves it


def recorded(model: Fusion, *given: Any) -> list[tuple[Any, Any, Any]]:
    """Each attending module with its input and output in a forward pass."""
    calls: list[tuple[Any, Any, Any]] = []
    hooks = [one.register_forward_hook(lambda *call: calls.append(call)) for one in model.attending]
    with torch.no_grad():
        model(*given)
    for hook in hooks:
        hook.remove()
    return calls


def heads_of(values: torch.Tensor, count: int) -> torch.Tensor:
    return values.unflatten(-1, (count, -1)).transpose(1, 2)


def output_by_hand(module: Any, given: Any, weights: torch.Tensor) -> torch.Tensor:
    """What a module returns if its attention has these weights, [batch, heads * queries, keys]."""
    if hasattr(module, "keys_values"):
        values, output = given[1][1], module.output
    elif hasattr(module, "key_value"):
        context = torch.cat([module.context_norm(given[1]), module.norm(given[0])], dim=1)
        values, output = heads_of(module.key_value(context).chunk(2, dim=-1)[1], 8), module.output
    else:
        own: nn.MultiheadAttention = module.attention
        weight = own.in_proj_weight[-own.embed_dim :] if own.v_proj_weight is None else own.v_proj_weight
        context = module.context_norm(given[1])
        values = heads_of(context @ weight.T + own.in_proj_bias[-own.embed_dim :], own.num_heads)
        output = own.out_proj
    of_heads = weights.unflatten(1, (values.shape[1], -1))
    return output((of_heads @ values).transpose(1, 2).flatten(2))  # type: ignore[no-any-return]


def crossing(fusion: str, tiny_model: Models) -> tuple[Fusion, tuple[Any, ...], int]:
    """A fusion with a cross-attention to the photo, what it is called with, and how many calls attend."""
    if fusion in ("reuse", "paper"):
        model = make_fam(blocks_for(tiny_model, fusion), fusion=fusion, query_side="text")
        return roused(model), (draw_states(3), None, draw_fam_texts(torch.ones(3, 4, dtype=torch.bool))), 2
    return wake(roused(make(fusion, tiny_model))), ([rand(3, 10, 32)], None, draw_texts()), 2


@pytest.mark.parametrize("fusion", ["reuse", "paper", "albef", "flamingo"])
@torch.no_grad()
def test_cross_attention_weights_make_the_modules_output(fusion: str, tiny_model: Models) -> None:
    model, given, num_calls = crossing(fusion, tiny_model)
    calls = recorded(model, *given)
    assert len(calls) == num_calls
    num_tokens, all_weights = given[0][0].shape[1], []
    for module, arguments, output in calls:
        weights = module.attention_weights(*arguments)
        torch.testing.assert_close(weights.sum(dim=-1), torch.ones(weights.shape[:2]))
        torch.testing.assert_close(output_by_hand(module, arguments, weights), output, atol=1e-4, rtol=1e-4)
        all_weights.append(weights[..., :num_tokens].mean(dim=1))
    found, mean = token_weights(model, *given), torch.stack(all_weights).mean(dim=0)
    torch.testing.assert_close(found, mean / mean.sum(dim=1, keepdim=True))
    assert found.shape == (3, num_tokens)


def test_recording_leaves_no_trace(tiny_model: Models) -> None:
    model, given, _ = crossing("reuse", tiny_model)
    before = model(*given)
    token_weights(model, *given)
    assert not any(one._forward_pre_hooks for one in model.modules())
    torch.testing.assert_close(model(*given), before, atol=0, rtol=0)


@pytest.mark.parametrize(
    ("fusion", "changes", "expected"),
    [("linear", {"head": "mean"}, "linear with head mean has no attention to the photo's tokens:"),
     ("linear", {"head": "flatten"}, "head flatten has no attention")],
)  # fmt: skip
def test_fusion_without_attention_says_so(fusion: str, changes: dict[str, Any], expected: str) -> None:
    with pytest.raises(ValueError, match=expected):
        token_weights(make_fam(fusion=fusion, **changes), draw_states(1))


@pytest.mark.parametrize(
    ("fusion", "expected"), [("late", "photo's tokens:"), ("albef", "photo's tokens without a text")]
)
def test_published_fusions_without_attention_say_so(fusion: str, expected: str, tiny_model: Models) -> None:
    with pytest.raises(ValueError, match=expected):
        token_weights(make(fusion, tiny_model), [rand(1, 10, 32)])


@pytest.mark.parametrize(
    ("given", "expected"),
    [((65, 1), (1, 8)), ((261, 5), (5, 16)), ((196, 0), (0, 14)), ((17, 1, "cls+grid=4"), (1, 4)),
     ((18, 1, "cls+mean+grid=4"), (2, 4)), ((16, 5, "grid=4"), (0, 4))],
)  # fmt: skip
def test_square_grids_are_found(given: Sequence[Any], expected: tuple[int, int]) -> None:
    assert grid_of(*given) == expected


@pytest.mark.parametrize(
    "given",
    [(66, 1), (50, 0), (1, 1), (2, 1), (2, 1, "cls+mean"), (9, 1, "cls+top=8"), (25, 1, "cls+grid=4+top=8"), (1, 5)],
)
def test_tokens_that_are_no_grid_have_no_map(given: Sequence[Any]) -> None:
    with pytest.raises(ValueError, match="are no square grid: there is no heat map"):
        grid_of(*given)


def test_class_token_is_left_out_and_rows_come_first() -> None:
    weights = torch.tensor([0.9, 0.01, 0.02, 0.03, 0.04])
    np.testing.assert_allclose(on_grid(weights, 1, 2), [[0.1, 0.2], [0.3, 0.4]], atol=1e-6)
