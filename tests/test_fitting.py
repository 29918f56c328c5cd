"""The loop, the update and the schedule that fits of small modules share."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional

from saffe_cache.retrieval.fitting import adamw, clip_gradient, fit_epochs, update, warmed_cosine


class Number(nn.Module):
    """Its one parameter is the number of the last epoch."""

    def __init__(self) -> None:
        super().__init__()
        self.value = nn.Parameter(torch.zeros(()))

    def run_epoch(self, epoch: int) -> float:
        assert self.training
        with torch.no_grad():
            self.value.fill_(epoch)
        return 1 / epoch


@pytest.mark.parametrize(
    ("scores", "patience", "best", "judged"),
    [
        ((0.1, 0.3, 0.3, 0.2), None, 1, 4),
        ((0.5, 0.3, 0.4, 0.6), None, 3, 4),
        ((0.5, 0.3, 0.4, 0.6), 2, 0, 3),
        ((0.1, math.nan, 0.2, 0.1), None, 2, 4),
    ],
)
def test_best_weights_are_kept(scores: Sequence[float], patience: int | None, best: int, judged: int) -> None:
    model = Number()
    fitted = fit_epochs(model, 3, model.run_epoch, lambda epoch: scores[epoch], patience=patience)
    assert (fitted.best_epoch, model.value.item()) == (best, best)
    assert fitted.best_score == scores[best]
    assert len(fitted.scores) == judged == len(fitted.losses) + 1
    assert not model.training


def test_start_is_not_judged_on_request() -> None:
    model = Number()
    fitted = fit_epochs(model, 2, model.run_epoch, lambda epoch: -epoch, judges_start=False)
    assert (fitted.best_epoch, fitted.scores, fitted.losses) == (1, (-1, -2), (1.0, 0.5))


@pytest.mark.parametrize("steps", [1, 2, 10, 300])
@pytest.mark.parametrize("floor", [0.0, 0.02])
def test_learning_rate_rises_once_then_falls_to_floor(steps: int, floor: float) -> None:
    rates = [warmed_cosine(step, steps, max(1, steps // 10), floor) for step in range(steps + 1)]
    top = int(np.argmax(rates))
    assert rates[top] == 1.0
    assert rates[0] > 0
    assert (np.diff(rates[: top + 1]) > 0).all()
    assert (np.diff(rates[top:]) <= 0).all()
    assert rates[-1] == pytest.approx(floor, abs=1e-9) or steps == 1


def test_schedule_without_a_rise_is_torchs_cosine() -> None:
    optimizer = torch.optim.SGD([nn.Parameter(torch.zeros(()))], lr=1.0)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, 20)
    expected = []
    for _ in range(20):
        expected.append(schedule.get_last_lr()[0])
        optimizer.step()
        schedule.step()
    assert [warmed_cosine(step, 20) for step in range(20)] == pytest.approx(expected)


def test_updates_equal_torchs_with_a_schedule() -> None:
    ours, torchs = nn.Parameter(torch.ones(3)), nn.Parameter(torch.ones(3))
    optimizer, plain = adamw([ours], 0.1, weight_decay=0.0), torch.optim.AdamW([torchs], lr=0.1, weight_decay=0.0)
    schedule = torch.optim.lr_scheduler.LambdaLR(plain, lambda step: warmed_cosine(step, 5, 2))
    for step in range(5):
        update(optimizer, (ours - torch.arange(3)).square().sum(), warmed_cosine(step, 5, 2), [ours], 0.7)
        plain.zero_grad()
        (torchs - torch.arange(3)).square().sum().backward()  # type: ignore[no-untyped-call]
        nn.utils.clip_grad_norm_([torchs], 0.7)
        plain.step()
        schedule.step()
    torch.testing.assert_close(ours, torchs, rtol=0, atol=0)


@pytest.mark.parametrize("length", [0.5, 4.9, 80.0, float("nan")])
def test_gradients_are_clipped_as_torch_does(length: float) -> None:
    """To the bit where they are short enough; a parameter without a gradient is left alone."""
    ours, torchs = ([nn.Parameter(torch.ones(3, 4)) for _ in range(3)] for _ in range(2))
    for parameters in (ours, torchs):
        torch.manual_seed(0)
        for one in parameters[:2]:
            one.grad = length * functional.normalize(torch.randn(12), dim=0).view(3, 4) / 2**0.5
    clip_gradient(ours, 5.0)
    nn.utils.clip_grad_norm_(torchs, 5.0)
    for mine, plain in zip(ours[:2], torchs[:2], strict=True):
        torch.testing.assert_close(mine.grad, plain.grad, rtol=0, atol=0, equal_nan=True)
