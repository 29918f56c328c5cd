"""The heads against loops in plain numpy."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
import pytest
import torch
from tiny_models import rand

from saffe_cache.fusion.layers import AttentionHead, FlattenHead, MatchHead, MeanHead, masked_mean, summarize

Tensors = Sequence[torch.Tensor]
MASK = torch.tensor([[True] * 6, [True] * 3 + [False] * 3, [True] + [False] * 5])


def numpy_layer_norm(values: np.ndarray) -> np.ndarray:
    centred = values - values.mean(-1, keepdims=True)
    return centred / np.sqrt((centred**2).mean(-1, keepdims=True) + 1e-5)


def numpy_summary(states: Tensors, row: int, length: int) -> np.ndarray:
    parts = []
    for state in states:
        tokens = [numpy_layer_norm(state[row, t].double().numpy()) for t in range(length)]
        parts += [tokens[0], sum(tokens[1:]) / max(1, length - 1) if length > 1 else 0 * tokens[0]]
    return np.concatenate(parts)


def numpy_gelu(values: np.ndarray) -> np.ndarray:
    return np.array([x * (1 + math.erf(x / math.sqrt(2))) / 2 for x in values])


@pytest.mark.parametrize("seen", ["own", "others", "beside"])
@pytest.mark.parametrize("mask", [None, MASK], ids=["whole", "padded"])
@torch.no_grad()
def test_attention_head_is_attention_with_folded_key_projection(mask: torch.Tensor | None, seen: str) -> None:
    """Loops over an explicit key projection (its bias too) and values projected before pooling.

    The linear path sees the summary of these tokens or of others; the MLP sees a vector beside them too.
    """
    d, heads, size, out, layers = 12, 3, 4, 5, 2
    torch.manual_seed(1)
    given = rand(3, 7, seed=8) if seen == "others" else None
    beside = rand(3, 6, seed=9) if seen == "beside" else None
    summary_size, extra_size = 7 if seen == "others" else 2 * layers * d, 6 if seen == "beside" else 0
    sizes = {"num_heads": heads, "head_size": size, "mlp_size": 16}
    head = AttentionHead(d, layers, out, summary_size=summary_size, extra_size=extra_size, **sizes).eval()
    head.mlp[-1].weight.copy_(rand(out, 16, seed=10))
    head.mlp[-1].bias.copy_(rand(out, seed=11))
    key_weight, key_bias, queries = (
        rand(layers, heads, 7, d),
        rand(layers, heads, 7, seed=1),
        rand(layers, heads, 7, seed=2),
    )
    head.pool_queries.copy_(torch.einsum("lhkd,lhk->ldh", key_weight, queries))
    states = [rand(3, 6, d, seed=3 + layer) for layer in range(layers)]
    weights = {name: value.double().numpy() for name, value in head.state_dict().items()}
    actual = head(states, mask, given, beside)
    for row in range(3):
        length = 6 if mask is None else int(mask[row].sum())
        features = []
        for layer, state in enumerate(states):
            tokens = [numpy_layer_norm(state[row, t].double().numpy()) for t in range(length)]
            for h in range(heads):
                keys = [key_weight[layer, h].double().numpy() @ x + key_bias[layer, h].double().numpy() for x in tokens]
                scores = np.exp([key @ queries[layer, h].double().numpy() for key in keys])
                values = [x @ weights["pool_values"][layer, h] for x in tokens]
                features.append(sum(s * v for s, v in zip(scores / scores.sum(), values, strict=True)))
        summary = numpy_summary(states, row, length) if given is None else given[row].double().numpy()
        features += [summary] if beside is None else [summary, beside[row].double().numpy()]
        entering = numpy_layer_norm(np.concatenate(features))
        inner = numpy_gelu(weights["mlp.1.weight"] @ entering + weights["mlp.1.bias"])
        expected = weights["mlp.4.weight"] @ inner + weights["mlp.4.bias"]
        expected = expected + weights["linear.weight"] @ summary + weights["linear.bias"]
        np.testing.assert_allclose(actual[row], expected, atol=1e-5)


@torch.no_grad()
def test_attention_head_starts_from_a_fitted_map() -> None:
    """Which it then is, as the MLP starts at zero; later the MLP corrects it."""
    head = AttentionHead(12, 2, 5, summary_size=48, mlp_size=16).eval()
    states = [rand(3, 6, 12, seed=seed) for seed in range(2)]
    torch.testing.assert_close(head(states, MASK), head.linear(summarize(states, MASK)), atol=1e-6, rtol=1e-6)
    head.mlp[-1].weight.normal_()
    correction = head(states, MASK) - head.linear(summarize(states, MASK))
    assert correction.abs().max() > 0.1
    weight, bias = rand(5, 48), rand(5, seed=1)
    head.linear.weight.copy_(weight)
    head.linear.bias.copy_(bias)
    fitted = (
        np.stack([weight.numpy() @ numpy_summary(states, row, n) for row, n in enumerate((6, 3, 1))]) + bias.numpy()
    )
    torch.testing.assert_close(head(states, MASK), torch.tensor(fitted).float() + correction, atol=1e-5, rtol=1e-5)


@torch.no_grad()
def test_mean_head_means_real_tokens() -> None:
    head = MeanHead(4, 2, 5)
    states = [rand(3, 6, 4, seed=seed) for seed in range(2)]
    for row, length in enumerate((6, 3, 1)):
        means = torch.cat([state[row, :length].mean(0) for state in states])
        torch.testing.assert_close(head(states, MASK)[row], head.linear(means))
        torch.testing.assert_close(head(states, None)[row], head.linear(torch.cat([s[row].mean(0) for s in states])))


def test_flatten_head_is_the_papers() -> None:
    """Two layers of 50 tokens, 768 wide, into 768: (2 x 50 x 768) x 768 weights and 768 biases."""
    with torch.device("meta"):
        head = FlattenHead(768, 2, 50, 768)
    assert sum(parameter.numel() for parameter in head.parameters()) == 58_983_168
    small, states = FlattenHead(4, 2, 6, 5), [rand(3, 6, 4, seed=seed) for seed in range(2)]
    flat = torch.tensor([[float(x) for state in states for token in state[row] for x in token] for row in range(3)])
    torch.testing.assert_close(small(states, None), small.linear(flat))
    with pytest.raises(AssertionError, match="fixed number of tokens"):
        small(states, MASK)
    released = FlattenHead(4, 2, 6, 5, has_relu=True)
    released.load_state_dict(small.state_dict())
    torch.testing.assert_close(released(states, None), small(states, None).clamp(min=0))
    assert small(states, None).min() < 0


@pytest.mark.parametrize("mask", [None, MASK], ids=["whole", "padded"])
@torch.no_grad()
def test_match_head_sees_the_tokens_means_and_the_agreement(mask: torch.Tensor | None) -> None:
    """Of each coordinate of the two unit vectors the product, so scaled that it weighs as much as a normed token."""
    torch.manual_seed(1)
    head = MatchHead(4, 2, 5, inner_size=8)
    states = [rand(3, 6, 4, seed=seed) for seed in range(2)]
    vectors, queries = (torch.nn.functional.normalize(rand(3, 5, seed=seed), dim=-1) for seed in (3, 4))
    logits = head(states, mask, vectors, queries)
    assert logits.shape == (3,)
    weights = {name: value.double().numpy() for name, value in head.state_dict().items()}
    for row in range(3):
        length = 6 if mask is None else int(mask[row].sum())
        means = [np.mean([numpy_layer_norm(s[row, t].double().numpy()) for t in range(length)], axis=0) for s in states]
        agreement = vectors[row].numpy() * queries[row].numpy() * math.sqrt(5)
        inner = numpy_gelu(weights["mlp.0.weight"] @ np.concatenate([*means, agreement]) + weights["mlp.0.bias"])
        expected = weights["mlp.2.weight"] @ inner + weights["mlp.2.bias"]
        np.testing.assert_allclose(logits[row], expected[0], atol=1e-5)


def test_matching_passes_no_gradient_to_the_vectors() -> None:
    head = MatchHead(4, 2, 5, inner_size=8)
    states = [rand(3, 6, 4, seed=seed).requires_grad_() for seed in range(2)]
    vectors, queries = (rand(3, 5, seed=seed).requires_grad_() for seed in (3, 4))
    head(states, MASK, vectors, queries).sum().backward()
    assert vectors.grad is None
    assert queries.grad is None
    for state in states:
        assert state.grad is not None
        assert (state.grad.abs().sum(dim=-1) > 0).eq(MASK).all()
    assert all(parameter.grad is not None for parameter in head.parameters())


@torch.no_grad()
def test_summary_is_the_first_token_and_the_mean_of_the_others() -> None:
    states = [rand(3, 6, 4, seed=seed) for seed in range(2)]
    expected = [numpy_summary(states, row, length) for row, length in enumerate((6, 3, 1))]
    np.testing.assert_allclose(summarize(states, MASK), expected, atol=1e-5)
    assert not masked_mean(states[0], torch.zeros_like(MASK)).any()
