"""Transport plans against a plain Sinkhorn and an assignment, and KLOT's value, gradient and invariances."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from scipy.linalg import sqrtm
from scipy.optimize import linear_sum_assignment
from scipy.special import logsumexp

from saffe_cache.core.items import Ragged
from saffe_cache.fusion.vectors.sotalign import RIDGES, fit_teacher, klot, transport_plan


def cosines(rows: int = 7, columns: int = 7, seed: int = 0) -> torch.Tensor:
    drawn = torch.randn(rows + columns, 4, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    unit = torch.nn.functional.normalize(drawn, dim=1)
    return unit[:rows] @ unit[rows:].T


def plain_sinkhorn(scores: np.ndarray, entropy: float, iterations: int) -> np.ndarray:
    """Each half-update by logsumexp, and the average at the end."""
    logits, (n, m) = scores / entropy, scores.shape
    u, v = np.zeros(n), np.zeros(m)
    for _ in range(iterations):
        u = -np.log(n) - logsumexp(logits + v, axis=1)
        v = -np.log(m) - logsumexp(logits + u[:, None], axis=0)
    more_u = -np.log(n) - logsumexp(logits + v, axis=1)
    more_v = -np.log(m) - logsumexp(logits + u[:, None], axis=0)
    return np.asarray(logits + (u + more_u)[:, None] / 2 + (v + more_v) / 2)


@pytest.mark.parametrize("entropy", [1.0, 0.05, 1e-4])
@pytest.mark.parametrize(("rows", "columns"), [(7, 7), (5, 9)])
@pytest.mark.parametrize("iterations", [1, 15, 100])
def test_plan_equals_a_plain_sinkhorn(rows: int, columns: int, entropy: float, iterations: int) -> None:
    scores = cosines(rows, columns)
    found = transport_plan(scores, entropy, iterations).numpy()
    np.testing.assert_allclose(found, plain_sinkhorn(scores.numpy(), entropy, iterations), rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("size", [50, 300])
def test_plan_has_uniform_marginals(size: int) -> None:
    plan = transport_plan(cosines(size, 2 * size).float(), 0.05).exp()
    for axis in (0, 1):
        sums = plan.sum(dim=axis)
        assert (sums * len(sums) - 1).abs().max() < 1e-4


def test_plan_without_entropy_is_the_best_assignment() -> None:
    scores = cosines(8, 8, seed=3)
    plan = transport_plan(scores, 1e-3, 5000).exp()
    assert plan.argmax(dim=1).tolist() == linear_sum_assignment(-scores.numpy())[1].tolist()
    torch.testing.assert_close(plan.max(dim=1).values, torch.full((8,), 1 / 8, dtype=torch.float64), rtol=0, atol=1e-3)


@pytest.mark.parametrize("order", [[0, 1, 2, 3, 4], [1, 2, 3, 4, 0]], ids=["right", "wrong"])
def test_plan_follows_the_teacher_right_or_wrong(order: list[int]) -> None:
    teacher = torch.eye(5)[order]
    scores = (0.1 * cosines(5, 5)).requires_grad_()
    optimizer = torch.optim.SGD([scores], lr=1.0)
    for _ in range(200):
        optimizer.zero_grad()
        klot(scores, 10 * teacher, 0.1, 0.1).backward()  # type: ignore[no-untyped-call]
        optimizer.step()
    torch.testing.assert_close(transport_plan(scores, 0.1).exp(), teacher.double() / 5, rtol=0, atol=0.01)


def test_klot_to_itself_is_0_and_otherwise_positive() -> None:
    scores = cosines(6, 8)
    assert klot(scores, scores, 0.05, 0.05).abs() < 1e-12
    assert klot(scores, cosines(6, 8, seed=1)) > 0.01


@pytest.mark.parametrize("axis", [0, 1])
def test_constant_row_or_column_changes_nothing(axis: int) -> None:
    scores, teacher = cosines(6, 8), cosines(6, 8, seed=1)
    shifts = torch.linspace(-0.3, 0.3, scores.shape[axis], dtype=torch.float64).unsqueeze(1 - axis)
    usual = klot(scores, teacher, iterations=2000)
    assert klot(scores + shifts, teacher, iterations=2000).item() == pytest.approx(usual.item(), rel=1e-8)
    softmaxes = [(of / 0.05).log_softmax(dim=1) for of in (scores, scores + shifts)]
    assert torch.allclose(*softmaxes) is (axis == 0)  # a softmax over rows does not absorb what a column gets


def test_gradient_equals_finite_differences() -> None:
    scores, teacher = cosines(5, 7).requires_grad_(), cosines(5, 7, seed=1).requires_grad_()
    klot(scores, teacher, 0.2, 0.1, 500).backward()  # type: ignore[no-untyped-call]
    assert teacher.grad is None
    assert scores.grad is not None
    step = 1e-5
    for place in [(0, 0), (2, 5), (4, 1)]:
        shift = torch.zeros_like(scores)
        shift[place] = step
        ends = [klot(scores.detach() + sign * shift, teacher, 0.2, 0.1, 500) for sign in (1, -1)]
        assert scores.grad[place].item() == pytest.approx((ends[0] - ends[1]).item() / (2 * step), abs=1e-9)


def pairs(count: int, noise: float, seed: int = 0) -> tuple[np.ndarray, np.ndarray, Ragged]:
    """Unit vectors of photos and of one text each, which share 4 directions."""
    generator = np.random.default_rng(seed)
    shared = generator.normal(size=(count, 4))
    sides = [shared @ generator.normal(size=(4, width)) for width in (9, 7)]
    noisy = [side + noise * generator.normal(size=side.shape) for side in sides]
    photos, texts = (side / np.linalg.norm(side, axis=1, keepdims=True) for side in noisy)
    return photos, texts, Ragged.from_rows(np.arange(count)[:, None])


def plain_cca(photos: np.ndarray, texts: np.ndarray, ridge: float) -> np.ndarray:
    """Cosines in the space of canonical coordinates, each times the root of its correlation."""
    whitened, centred = [], []
    for rows in (photos, texts):
        centred.append(rows - rows.mean(axis=0))
        covariance = centred[-1].T @ centred[-1] / len(rows)
        strength = ridge * np.trace(covariance) / len(covariance)
        whitened.append(np.linalg.inv(sqrtm(covariance + strength * np.eye(len(covariance)))).real)
    left, shares, right = np.linalg.svd(whitened[0] @ centred[0].T @ centred[1] @ whitened[1] / len(photos))
    count = len(shares)
    mapped = [centred[0] @ whitened[0] @ left[:, :count], centred[1] @ whitened[1] @ right.T[:, :count]]
    units = [one * np.sqrt(shares) / np.linalg.norm(one * np.sqrt(shares), axis=1, keepdims=True) for one in mapped]
    return np.asarray(units[0] @ units[1].T)


def test_teacher_is_a_regularised_cca_of_the_pairs() -> None:
    photos, texts, positives = pairs(60, 0.3)
    teacher = fit_teacher(photos, texts, positives)
    mapped = (photos - teacher.photo_center) @ teacher.photo_map, (texts - teacher.text_center) @ teacher.text_map
    units = [side / np.linalg.norm(side, axis=1, keepdims=True) for side in mapped]
    candidates = [plain_cca(photos, texts, ridge) for ridge in RIDGES]
    assert sum(np.allclose(units[0] @ units[1].T, one, atol=1e-8) for one in candidates) == 1


def test_teacher_of_permuted_pairs_knows_nothing() -> None:
    photos, texts, positives = pairs(400, 0.3)
    fitted, others = slice(0, 300), slice(300, 400)
    permuted = Ragged.from_rows(np.random.default_rng(1).permutation(300)[:, None])
    right, wrong = (fit_teacher(photos[fitted], texts[fitted], of) for of in (positives.take(np.arange(300)), permuted))
    chance = np.mean(1 / np.arange(1, 101))
    assert right.score(photos[others], texts[others]) > 10 * chance
    assert wrong.score(photos[others], texts[others]) < 2 * chance
