"""Fitting small modules by AdamW: one update, one schedule, one loop over epochs that keeps the best weights.

Training of fusions (training/loop.py) uses the update and the schedule; its loop also resumes, and trains several runs
side by side. Few-shot episodes (studies/binding) stack the weights of many modules and get their gradients by vmap.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn


def adamw(parameters: Iterable[Any], learning_rate: float, **options: Any) -> torch.optim.AdamW:
    """An optimiser whose groups remember their peak learning rate; parameters or groups as torch takes them."""
    optimizer = torch.optim.AdamW(parameters, lr=learning_rate, **options)
    for group in optimizer.param_groups:
        group["peak"] = group["lr"]
    return optimizer


def update(
    optimizer: torch.optim.Optimizer,
    loss: torch.Tensor,
    rate: float,
    clipped: Sequence[nn.Parameter] = (),
    largest_norm: float = math.inf,
) -> None:
    """One step downhill with an optimiser from `adamw`, at the fraction `rate` of its peak learning rates.

    The gradient of the `clipped` parameters together is scaled down where it is longer than `largest_norm`.
    """
    for group in optimizer.param_groups:
        group["lr"] = group["peak"] * rate
    optimizer.zero_grad()
    loss.backward()  # type: ignore[no-untyped-call]
    if clipped:
        clip_gradient(clipped, largest_norm)
    optimizer.step()


def clip_gradient(parameters: Sequence[nn.Parameter], largest_norm: float) -> None:
    """`clip_grad_norm_`, but gradients that are short enough are left alone instead of multiplied by one."""
    norm = nn.utils.get_total_norm([one.grad for one in parameters if one.grad is not None])
    if not norm <= largest_norm:
        nn.utils.clip_grads_with_norm_(parameters, largest_norm, norm)


def warmed_cosine(step: int, total: int, rising: int = 0, floor: float = 0.0) -> float:
    """Fraction of the peak learning rate of an update, from 0 to below `total`.

    A linear rise over `rising` updates, of which the last is at the peak, then a cosine down to `floor`.
    """
    if step < rising:
        return (step + 1) / rising
    return floor + (1 - floor) * (1 + math.cos(math.pi * (step - rising) / max(1, total - rising))) / 2


@dataclass(frozen=True)
class Fitted:
    """How a module was fitted; it has the best weights."""

    best_epoch: int
    """0 is before the first update."""
    best_score: float
    scores: tuple[float, ...]
    """After each epoch that was judged, in order."""
    losses: tuple[float, ...]
    """Of each epoch."""


def fit_epochs(
    model: nn.Module,
    epochs: int,
    run_epoch: Callable[[int], float],
    judge: Callable[[int], float],
    *,
    judges_start: bool = True,
    patience: int | None = None,
) -> Fitted:
    """Run epochs, and leave the model with its best weights, in evaluation mode.

    Args:
        run_epoch: updates the model in an epoch, counted from 1; returns the loss.
        judge: a validation score after an epoch, of which higher is better. Of equal ones the first counts.
        judges_start: whether the start, epoch 0, is judged too and may be the best.
        patience: stop after this many epochs without a better score; None never stops early.
    """
    best_epoch, best_score, weights = 0, -math.inf, _copied(model)
    scores, losses = [], []
    for epoch in range(0 if judges_start else 1, epochs + 1):
        if epoch:
            model.train()
            losses.append(run_epoch(epoch))
        scores.append(judge(epoch))
        if scores[-1] > best_score:
            best_epoch, best_score, weights = epoch, scores[-1], _copied(model)
        if patience is not None and epoch - best_epoch >= patience:
            break
    model.load_state_dict(weights)
    model.eval()
    return Fitted(best_epoch, best_score, tuple(scores), tuple(losses))


def _copied(model: nn.Module) -> dict[str, torch.Tensor]:
    return {name: value.detach().clone() for name, value in model.state_dict().items()}
