"""STRUCTURE's term: its invariances, its bounds, and the published form beside the true divergence."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from scipy.spatial.distance import jensenshannon

from saffe_cache.fusion.vectors.structure import (
    jensen_shannon,
    neighbourhoods,
    published_divergence,
    structure_term,
)


def vectors(count: int = 12, width: int = 5, seed: int = 0) -> torch.Tensor:
    return torch.randn(count, width, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def plain_term(own: np.ndarray, mapped: np.ndarray, levels: int, temperature: float) -> float:
    """The formula with numpy and scipy's distance, row by row."""

    def similar(rows: np.ndarray) -> np.ndarray:
        unit = rows / np.linalg.norm(rows, axis=1, keepdims=True)
        centred = unit - unit.mean(axis=0)
        weights = np.exp(centred @ centred.T / temperature)
        return np.asarray(weights / weights.sum(axis=1, keepdims=True))

    left, right, total = similar(own), similar(mapped), 0.0
    for level in range(1, levels + 1):
        powers = [np.linalg.matrix_power(one, level) for one in (left, right)]
        rows = [jensenshannon(p, q) ** 2 for p, q in zip(*powers, strict=True)]
        total += np.mean(rows) / level
    return float(total / levels)


@pytest.mark.parametrize("levels", [1, 2, 3])
def test_term_equals_the_formula(levels: int) -> None:
    own, mapped = vectors(width=7), vectors(seed=1)
    found = structure_term(own, mapped, levels=levels)
    assert found.item() == pytest.approx(plain_term(own.numpy(), mapped.numpy(), levels, 0.05), rel=1e-9)


@given(st.floats(1e-3, 1e3), st.integers(0, 99), st.integers(1, 3), st.booleans())
def test_scaled_and_rotated_copy_costs_nothing(scale: float, seed: int, levels: int, has_diagonal: bool) -> None:
    own = vectors(seed=seed)
    rotation = torch.linalg.qr(vectors(5, 5, seed + 1)).Q
    assert structure_term(own, scale * own @ rotation, levels=levels, has_diagonal=has_diagonal) < 1e-9


@given(st.integers(0, 99), st.integers(1, 3), st.booleans())
def test_term_is_within_0_and_ln_2_and_ignores_order(seed: int, levels: int, has_diagonal: bool) -> None:
    own, mapped = vectors(seed=seed), vectors(width=3, seed=seed + 100)
    term = structure_term(own, mapped, levels=levels, has_diagonal=has_diagonal)
    assert 0 <= term <= math.log(2)
    order = torch.randperm(12, generator=torch.Generator().manual_seed(seed))
    permuted = structure_term(own[order], mapped[order], levels=levels, has_diagonal=has_diagonal)
    assert permuted.item() == pytest.approx(term.item(), rel=1e-9)


def test_divergence_is_symmetric_and_at_most_ln_2() -> None:
    left, right = torch.tensor([[0.9, 0.1]]), torch.tensor([[0.1, 0.9]])
    assert jensen_shannon(left, right) == jensen_shannon(right, left)
    assert jensen_shannon(left, right).item() == pytest.approx(0.368, abs=1e-3)
    assert jensen_shannon(torch.eye(2), torch.eye(2).flip(0)).item() == pytest.approx(math.log(2), rel=1e-6)


def test_published_divergence_has_no_upper_bound() -> None:
    left, right = torch.tensor([[0.9, 0.1]]), torch.tensor([[0.1, 0.9]])
    assert published_divergence(left, right).item() == pytest.approx(0.51, abs=1e-2)
    assert published_divergence(torch.eye(2), torch.eye(2).flip(0)).item() == pytest.approx(13.1, abs=0.1)


@pytest.mark.parametrize("has_diagonal", [True, False])
def test_powers_of_neighbourhoods_have_rows_that_sum_to_1(has_diagonal: bool) -> None:
    rows = neighbourhoods(vectors(), has_diagonal=has_diagonal)
    for level in (1, 2, 3, 5):
        sums = torch.linalg.matrix_power(rows, level).sum(dim=1)
        torch.testing.assert_close(sums, torch.ones_like(sums))
    assert bool((rows.diagonal() == 0).all()) is not has_diagonal


def test_left_out_diagonal_makes_the_term_larger() -> None:
    own, mapped = vectors(64, 64), vectors(64, 64, seed=1)
    assert structure_term(own, mapped, has_diagonal=False) > 5 * structure_term(own, mapped)


@pytest.mark.parametrize("divergence", [jensen_shannon, published_divergence])
def test_gradient_reaches_the_mapped_side_alone(divergence: object) -> None:
    own, mapped = vectors(6).requires_grad_(), vectors(6, 3, seed=1).requires_grad_()

    def term(of: torch.Tensor) -> torch.Tensor:
        return structure_term(own, of, levels=2, temperature=0.5, divergence=divergence)  # type: ignore[arg-type]

    assert torch.autograd.gradcheck(term, (mapped,))
    term(mapped).backward()  # type: ignore[no-untyped-call]
    assert own.grad is None
    assert mapped.grad is not None


def test_gradient_is_finite_where_similarities_vanish() -> None:
    own, mapped = torch.eye(8), (torch.eye(8) + 0.01 * torch.ones(8, 8)).requires_grad_()
    structure_term(own, mapped, temperature=1e-3, has_diagonal=False).backward()  # type: ignore[no-untyped-call]
    assert mapped.grad is not None
    assert bool(torch.isfinite(mapped.grad).all())
