"""Sums over normed tokens against a layer norm of each token, in double precision."""

from __future__ import annotations

import pytest
import torch
from tiny_models import rand
from torch.nn import functional

from saffe_cache.fusion.layers import NormedTokens, mean_weights, summary_weights

MASK = torch.tensor([[True] * 6, [True] * 3 + [False] * 3, [True] + [False] * 5])
STATE = rand(3, 6, 12)
STATES = {
    "plain": STATE,
    "padded": STATE * MASK[..., None],
    "far from zero": STATE + 3,
    "one large number": STATE + 1000 * torch.eye(12)[3],
    "tiny": STATE * 1e-3,
}


@pytest.mark.parametrize("state", STATES.values(), ids=STATES)
def test_products_and_sums_are_those_of_a_layer_norm(state: torch.Tensor) -> None:
    """Their values, and the gradients of all that goes in."""
    vectors, weights, heads = rand(12, 4, seed=1), rand(3, 5, 6, seed=2), rand(3, 5, 12, seed=3)
    given = [value.clone().requires_grad_() for value in (state, vectors, weights)]
    tokens = NormedTokens(given[0])
    products, sums = tokens.products(given[1]), tokens.sums(given[2])
    ((products * rand(3, 4, 6, seed=4)).sum() + (sums * heads).sum()).backward()

    plain = [value.double().requires_grad_() for value in (state, vectors, weights)]
    normed = functional.layer_norm(plain[0], (12,))
    expected = torch.einsum("btd,dn->bnt", normed, plain[1]), torch.einsum("btd,bnt->bnd", normed, plain[2])
    ((expected[0] * rand(3, 4, 6, seed=4).double()).sum() + (expected[1] * heads.double()).sum()).backward()
    for actual, double in zip((products, sums), expected, strict=True):
        torch.testing.assert_close(actual.double(), double, atol=1e-4, rtol=1e-4)
    for actual, double in zip(given, plain, strict=True):
        assert actual.grad is not None
        assert double.grad is not None
        scale = float(double.grad.abs().max())
        torch.testing.assert_close(actual.grad.double(), double.grad, atol=1e-4 * scale, rtol=1e-3)


@pytest.mark.parametrize("state", [*STATES.values(), STATE + 100], ids=[*STATES, "very far from zero"])
def test_products_in_bfloat16_lose_its_rounding_alone(state: torch.Tensor) -> None:
    vectors = rand(12, 4, seed=1)
    with torch.autocast("cpu", torch.bfloat16):
        products = NormedTokens(state).products(vectors).float()
    exact = torch.einsum("btd,dn->bnt", functional.layer_norm(state.double(), (12,)), vectors.double())
    torch.testing.assert_close(products.double(), exact, atol=0.02 * float(exact.abs().max()), rtol=0)


def test_backward_pass_keeps_nothing_as_large_as_cached_tokens() -> None:
    kept: list[torch.Tensor] = []

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        kept.append(tensor)
        return tensor

    state, queries = rand(3, 6, 12), rand(12, 2, seed=1).requires_grad_()
    with torch.autograd.graph.saved_tensors_hooks(keep, keep):
        tokens = NormedTokens(state)
        tokens.sums(tokens.products(queries).softmax(dim=-1)).square().sum().backward()
    large = {tensor.untyped_storage().data_ptr() for tensor in kept if tensor.numel() >= state.numel()}
    assert large == {state.untyped_storage().data_ptr()}


@pytest.mark.parametrize("mask", [None, MASK], ids=["whole", "padded"])
def test_weights_make_the_first_token_and_means(mask: torch.Tensor | None) -> None:
    means, summaries = mean_weights(STATE, mask), summary_weights(STATE, mask)
    for row in range(3):
        length = 6 if mask is None else int(mask[row].sum())
        tokens = STATE[row, :length]
        others = tokens[1:].mean(dim=0) if length > 1 else torch.zeros(12)
        torch.testing.assert_close(means[row] @ STATE[row], tokens.mean(dim=0, keepdim=True))
        torch.testing.assert_close(summaries[row] @ STATE[row], torch.stack([tokens[0], others]))
