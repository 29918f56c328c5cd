"""How fast parameters learn, and which of them decay: each module says it of its own.

A module may have a class attribute `learning`: a `Learning` by the name of one of its parameters or submodules, or by
"*" for everything in it. What is declared further inside wins. Everything else learns at the run's rate, and its
matrices decay.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import NamedTuple

from torch import nn


class Learning(NamedTuple):
    """Of a parameter."""

    rate: float = 1.0
    """Multiple of the run's learning rate."""
    decays: bool = True
    """Whether it decays if it is a matrix; vectors and scalars never do."""


def parameter_groups(module: nn.Module, learning_rate: float, weight_decay: float) -> list[dict[str, object]]:
    """Groups of trainable parameters for AdamW."""
    groups: dict[tuple[float, float], list[nn.Parameter]] = {}
    for parameter, learning in _parameters(module, Learning()):
        if parameter.requires_grad:
            decay = weight_decay if learning.decays and parameter.ndim > 1 else 0.0
            groups.setdefault((learning.rate, decay), []).append(parameter)
    return [
        {"params": parameters, "lr": learning_rate * rate, "weight_decay": decay}
        for (rate, decay), parameters in groups.items()
    ]


def _parameters(module: nn.Module, usual: Learning) -> Iterator[tuple[nn.Parameter, Learning]]:
    """In the order of `module.parameters()`."""
    declared: Mapping[str, Learning] = getattr(module, "learning", {})
    usual = declared.get("*", usual)
    for name, parameter in module.named_parameters(recurse=False):
        yield parameter, declared.get(name, usual)
    for name, child in module.named_children():
        yield from _parameters(child, declared.get(name, usual))
