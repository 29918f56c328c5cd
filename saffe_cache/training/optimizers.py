"""The optimisers of a training by name: AdamW, and Lion."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import nn

from saffe_cache.retrieval.fitting import adamw
from saffe_cache.training.config import OptimizerName


def make_optimizer(
    name: OptimizerName, groups: Sequence[dict[str, Any]], learning_rate: float
) -> torch.optim.Optimizer:
    """An optimiser of groups of parameters, which remember their peak learning rates."""
    if name == "lion":
        return Lion(groups, learning_rate)
    return adamw(groups, learning_rate, betas=(0.9, 0.98), fused=True)  # fused: one pass over the weights, not 12


class Lion(torch.optim.Optimizer):
    """Steps of equal size for all weights (Chen et al. 2023, arXiv 2302.06675, algorithm 2).

        u = sign(b1 m + (1 - b1) g),   w <- w (1 - lr wd) - lr u,   m <- b2 m + (1 - b2) g

    Each weight moves by lr in a step, whatever the size of its gradient, so lr must be some 10 times below AdamW's, and
    a scalar, such as a temperature, moves at most by the sum of all learning rates.
    """

    def __init__(
        self, groups: Sequence[dict[str, Any]], learning_rate: float, betas: tuple[float, float] = (0.9, 0.99)
    ) -> None:
        super().__init__(groups, {"lr": learning_rate, "betas": betas, "weight_decay": 0.0})
        for group in self.param_groups:
            group["peak"] = group["lr"]

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> None:  # type: ignore[override]
        for group in self.param_groups:
            first, second = group["betas"]
            for weights in group["params"]:
                if weights.grad is None:
                    continue
                momentum = self._momentum(weights)
                towards = torch.lerp(weights.grad, momentum, first).sign_()
                weights.mul_(1 - group["lr"] * group["weight_decay"]).sub_(towards, alpha=group["lr"])
                momentum.lerp_(weights.grad, 1 - second)

    def _momentum(self, weights: nn.Parameter) -> torch.Tensor:
        state = self.state[weights]
        if not state:
            state["momentum"] = torch.zeros_like(weights)
        return state["momentum"]  # type: ignore[no-any-return]
