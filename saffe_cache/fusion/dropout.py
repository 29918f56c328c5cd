"""Dropout whose mask is quick to draw on a CPU."""

from __future__ import annotations

import torch
from torch import nn
from torch.nn import functional

_LEVELS = 2**16


class Dropout(nn.Dropout):
    """torch's own on an accelerator; on a CPU, where that draws a double for every number, 16 random bits decide.

    The probability is the nearest multiple of 2^-16, and the numbers that stay are divided by what that leaves.
    """

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        if input.device.type != "cpu" or not self.training or not self.p:
            return functional.dropout(input, self.p, self.training)
        num_dropped = min(round(self.p * _LEVELS), _LEVELS - 1)
        words = torch.empty(input.numel() // 4 + 1, dtype=torch.int64).random_(-(2**63), None)
        levels = words.view(torch.int16)[: input.numel()].view(input.shape)
        is_kept = levels >= num_dropped - _LEVELS // 2
        return input * is_kept.to(input.dtype).mul_(_LEVELS / (_LEVELS - num_dropped))
