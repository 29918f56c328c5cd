"""Dropout on a CPU: who stays, how much they count, and what decides it."""

from __future__ import annotations

import pytest
import torch
from tiny_models import rand

from saffe_cache.fusion.layers import Dropout


@pytest.mark.parametrize("share", [0.1, 0.5, 0.9])
def test_so_many_are_dropped_and_the_mean_is_kept(share: float) -> None:
    """Each independently of its neighbours, of which four come from one draw. Bounds are five standard errors."""
    torch.manual_seed(0)
    count = 400_001
    dropped = Dropout(share).train()(torch.ones(count))
    is_kept = (dropped > 0).float()
    error = (share * (1 - share) / count) ** 0.5
    assert float(is_kept.mean()) == pytest.approx(1 - share, abs=5 * error)
    assert float(dropped.mean()) == pytest.approx(1, abs=5 * error / (1 - share))
    torch.testing.assert_close(
        dropped[dropped > 0], torch.full_like(dropped[dropped > 0], 1 / (1 - share)), rtol=1e-4, atol=0
    )
    for apart in (1, 2, 3, 4):
        both = (is_kept[apart:] * is_kept[:-apart]).mean()
        assert float(both) == pytest.approx((1 - share) ** 2, abs=5 * count**-0.5 / 2)


def test_the_gradient_passes_where_numbers_stay() -> None:
    values = rand(7, 3, 5).requires_grad_()
    dropped = Dropout(0.5).train()(values)
    dropped.sum().backward()
    assert values.grad is not None
    torch.testing.assert_close(values.grad * values, dropped)
    assert set(values.grad.unique().tolist()) == {0, 2}


def test_torchs_seed_decides_and_evaluation_drops_nothing() -> None:
    dropout, values = Dropout(0.5).train(), rand(64)
    first, second = (dropout(values) for torch_seed in (1, 1) if torch.manual_seed(torch_seed))
    assert torch.equal(first, second)
    assert not torch.equal(first, dropout(values))
    assert torch.equal(dropout.eval()(values), values)
    assert torch.equal(Dropout(0.0).train()(values), values)
