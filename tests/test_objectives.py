"""InfoNCE against plain Python and CLIP's cross-entropy, its gradient, and the temperature's range."""

from __future__ import annotations

import math

import pytest
import torch
from torch.nn import functional

from saffe_cache.objectives import Temperature, info_nce


def unit_vectors(count: int, seed: int, width: int = 6) -> torch.Tensor:
    drawn = torch.randn(count, width, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    return functional.normalize(drawn, dim=1)


def several_positives(num_gallery: int, num_queries: int, seed: int) -> torch.Tensor:
    positives = torch.rand(num_gallery, num_queries, generator=torch.Generator().manual_seed(seed)) < 0.3
    for i in range(max(num_gallery, num_queries)):  # at least one in each row and column
        positives[i % num_gallery, i % num_queries] = True
    return positives


def plain_info_nce(
    gallery: list[list[float]], queries: list[list[float]], positives: list[list[bool]], temperature: float
) -> float:
    def direction(rows: list[list[float]], columns: list[list[float]], is_positive: list[list[bool]]) -> float:
        total = 0.0
        for row, of_row in zip(rows, is_positive, strict=True):
            scores = [sum(a * b for a, b in zip(row, column, strict=True)) / temperature for column in columns]
            normal = math.log(sum(math.exp(score) for score in scores))
            chosen = [score - normal for score, positive in zip(scores, of_row, strict=True) if positive]
            total -= sum(chosen) / len(chosen)
        return total / len(rows)

    flipped = [list(column) for column in zip(*positives, strict=True)]
    return (direction(gallery, queries, positives) + direction(queries, gallery, flipped)) / 2


@pytest.mark.parametrize("temperature", [0.05, 0.5])
@pytest.mark.parametrize(("num_gallery", "num_queries"), [(4, 9), (9, 4), (1, 1)])
def test_info_nce_equals_a_plain_loop(num_gallery: int, num_queries: int, temperature: float) -> None:
    gallery, queries = unit_vectors(num_gallery, 1), unit_vectors(num_queries, 2)
    positives = several_positives(num_gallery, num_queries, 3)
    expected = plain_info_nce(gallery.tolist(), queries.tolist(), positives.tolist(), temperature)
    scalar = torch.tensor(temperature, dtype=torch.float64)
    assert info_nce(gallery, queries, positives, scalar).item() == pytest.approx(expected, rel=1e-12, abs=1e-12)
    low = info_nce(gallery.float(), queries.float(), positives, scalar.float())
    assert low.dtype == torch.float32
    assert low.item() == pytest.approx(expected, rel=1e-4, abs=1e-6)


def test_info_nce_with_one_positive_is_clips_loss() -> None:
    photos, texts, temperature = unit_vectors(7, 1), unit_vectors(7, 2), torch.tensor(0.07, dtype=torch.float64)
    logits, targets = photos @ texts.T / temperature, torch.arange(7)
    expected = (functional.cross_entropy(logits, targets) + functional.cross_entropy(logits.T, targets)) / 2
    torch.testing.assert_close(info_nce(photos, texts, torch.eye(7, dtype=torch.bool), temperature), expected)


def test_info_nce_is_symmetric_and_blind_to_order() -> None:
    gallery, queries, positives = unit_vectors(5, 1), unit_vectors(8, 2), several_positives(5, 8, 3)
    temperature = torch.tensor(0.1, dtype=torch.float64)
    loss = info_nce(gallery, queries, positives, temperature)
    torch.testing.assert_close(info_nce(queries, gallery, positives.T, temperature), loss)
    order = torch.randperm(8, generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(info_nce(gallery, queries[order], positives[:, order], temperature), loss)


def test_info_nce_at_its_ends() -> None:
    one = torch.eye(4, dtype=torch.float64)
    positives = torch.eye(4, dtype=torch.bool)
    assert info_nce(one, one, positives, torch.tensor(0.01)).item() == pytest.approx(0, abs=1e-12)
    same = unit_vectors(1, 0).expand(4, -1)
    assert info_nce(same, same, positives, torch.tensor(0.01)).item() == pytest.approx(math.log(4))


def test_info_nce_survives_the_lowest_temperature_in_float32() -> None:
    gallery = unit_vectors(6, 1).float()
    loss = info_nce(gallery, -gallery, torch.eye(6, dtype=torch.bool), torch.tensor(0.01))
    assert torch.isfinite(loss)
    assert loss > 50


def test_gradient_of_info_nce() -> None:
    inputs = [unit_vectors(3, 1).requires_grad_(), unit_vectors(5, 2).requires_grad_()]
    temperature = torch.tensor(0.2, dtype=torch.float64, requires_grad=True)
    positives = several_positives(3, 5, 3)
    assert torch.autograd.gradcheck(lambda g, q, t: info_nce(g, q, positives, t), (*inputs, temperature))


def test_temperature_starts_as_told_and_has_a_gradient() -> None:
    temperature = Temperature(0.1)
    value = temperature()
    value.backward()
    assert value.item() == pytest.approx(0.1)
    assert temperature.log.grad is not None
    assert temperature.log.grad.item() == pytest.approx(0.1)  # d exp(x) / dx = exp(x)
    assert Temperature()().item() == pytest.approx(0.07)


@pytest.mark.parametrize(("start", "bound", "direction"), [(0.001, 0.01, 1), (9.0, 0.5, -1)])
def test_temperature_stays_in_range_and_can_come_back(start: float, bound: float, direction: int) -> None:
    temperature = Temperature(start)
    assert temperature().item() == pytest.approx(bound)
    optimizer = torch.optim.SGD(temperature.parameters(), lr=1.0)
    loss = -direction * temperature()  # wants the temperature back within its range
    loss.backward()
    optimizer.step()
    assert (temperature().item() - bound) * direction > 1e-6
