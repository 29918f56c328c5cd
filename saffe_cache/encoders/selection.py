"""Keep some of an input's tokens: fewer bytes leave the device and are stored."""

from __future__ import annotations

import re
from dataclasses import dataclass

import torch
from torch.nn import functional

_PARTS = re.compile(r"cls|mean|grid=([1-9][0-9]*)|top=([1-9][0-9]*)")


@dataclass(frozen=True, kw_only=True)
class TokenSelection:
    """Which tokens are kept, in this order: the class token, the mean of the others, means over a grid of places, or
    the longest vectors among them."""

    text: str
    """As the option has it: parts joined by +."""
    has_cls: bool = False
    has_mean: bool = False
    grid: int = 0
    """Places on a side; each is the mean of the patches there."""
    top: int = 0
    """Tokens with the largest norm, in their order."""

    @staticmethod
    def parse(text: str) -> TokenSelection | None:
        """None for `all`.

        Raises:
            ValueError: a part is unknown or given twice.
        """
        if text == "all":
            return None
        parts = text.split("+")
        found = [_PARTS.fullmatch(part) for part in parts]
        names = [part.partition("=")[0] for part in parts]
        if not all(found) or len({*names}) < len(names):
            raise ValueError(
                f"--tokens: found {text!r}, expected all, or some of cls, mean, grid=K and top=N joined by +, such as "
                "cls+grid=4."
            )
        numbers = {name: int(part.partition("=")[2] or 0) for name, part in zip(names, parts, strict=True)}
        return TokenSelection(
            text=text,
            has_cls="cls" in numbers,
            has_mean="mean" in numbers,
            grid=numbers.get("grid", 0),
            top=numbers.get("top", 0),
        )

    def check(self, num_tokens: int, class_tokens: int, *, is_text: bool) -> None:
        """
        Args:
            num_tokens: of one input, class tokens among them.
            class_tokens: before those of places.

        Raises:
            ValueError: the tokens have no class token, or no square of places that is large enough.
        """
        if self.has_cls and not class_tokens:
            raise ValueError(f"--tokens {self.text}: the encoder has no class token. Use mean, grid=K or top=N.")
        if is_text and self.grid:
            raise ValueError(f"--tokens {self.text}: texts have no grid of places. Use cls, mean or top=N.")
        places = num_tokens - class_tokens
        side = round(places**0.5)
        if self.grid and (side * side != places or side < self.grid):
            raise ValueError(
                f"--tokens {self.text}: the encoder has {places} places, expected a square of at least {self.grid} x "
                f"{self.grid}. Use mean or top=N, or a smaller grid."
            )
        if not is_text and self.top > places:
            raise ValueError(f"--tokens {self.text}: the encoder has {places} places. Use --tokens all.")

    def count(self, length: int) -> int:
        """Tokens that are kept of a text of so many."""
        return self.has_cls + self.has_mean + min(self.top, max(0, length - 1))

    def apply(
        self, states: torch.Tensor, class_tokens: int, mask: torch.Tensor | None
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """The kept tokens of hidden states [batch, tokens, d], and how many each text has, int64 [batch].

        `mask`: bool [batch, tokens], True on real tokens of texts; they come first.
        """
        places = states[:, class_tokens:]
        is_real = None if mask is None else mask[:, class_tokens:].unsqueeze(-1).to(states.dtype)
        parts = [states[:, :1]] if self.has_cls else []
        if self.has_mean:
            total = places if is_real is None else places * is_real
            count = places.shape[1] if is_real is None else is_real.sum(dim=1, keepdim=True).clamp(min=1)
            parts.append(total.sum(dim=1, keepdim=True) / count)
        if self.grid:
            side = round(places.shape[1] ** 0.5)
            square = places.transpose(1, 2).reshape(len(places), -1, side, side)
            parts.append(functional.adaptive_avg_pool2d(square, self.grid).flatten(2).transpose(1, 2))
        if self.top:
            norms = places.float().norm(dim=-1)
            if mask is not None:
                norms = norms.masked_fill(~mask[:, class_tokens:], -1)
            chosen = norms.topk(min(self.top, places.shape[1]), dim=1).indices
            if mask is not None:  # padding last
                chosen = chosen + places.shape[1] * ~mask[:, class_tokens:].gather(1, chosen)
            chosen = chosen.sort(dim=1).values % places.shape[1]
            parts.append(places.gather(1, chosen.unsqueeze(-1).expand(-1, -1, places.shape[-1])))
        lengths = None
        if mask is not None:
            real = (mask.sum(dim=1) - class_tokens).clamp(min=0, max=self.top)
            lengths = int(self.has_cls) + int(self.has_mean) + real
        return torch.cat(parts, dim=1).contiguous(), lengths
