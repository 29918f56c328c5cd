"""Captions, token by token. Layers below the insertion hold keys and values of the text, those above of the photo too.

So each new token runs every layer once, and the photo's tokens never run the lower ones.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from saffe_cache.fusion.block import EncoderBlock, KeysValues
from saffe_cache.studies.captioning.inserting import InsertedModel


class Decoding:
    """A batch of captions under way."""

    def __init__(self, model: InsertedModel, photos: torch.Tensor | None) -> None:
        """`photos`: projected tokens [batch, m, d]; None for none."""
        self._model = model
        self._lower: list[KeysValues | None] = [None] * len(model.lower)
        self._upper: list[KeysValues | None] = [None] * len(model.upper)
        self._position = 0 if photos is None else photos.shape[1]
        self._waiting = None if photos is None else model.placed(photos)

    @property
    def lengths(self) -> tuple[int, ...]:
        """Tokens whose keys and values each layer holds."""
        return tuple(0 if one is None else one[0].shape[2] for one in [*self._lower, *self._upper])

    def extend(self, token_ids: torch.Tensor) -> torch.Tensor:
        """Take the next tokens, [batch, tokens], and give the scores of the one behind them, [batch, vocabulary]."""
        hidden = self._model.embed(token_ids, self._position)
        self._position += token_ids.shape[1]
        hidden = _through(self._model.lower, self._lower, hidden)
        if self._waiting is not None:
            hidden, self._waiting = torch.cat([self._waiting, hidden], dim=1), None
        return self._model.logits(_through(self._model.upper, self._upper, hidden)[:, -1])


def _through(blocks: Sequence[EncoderBlock], past: list[KeysValues | None], hidden: torch.Tensor) -> torch.Tensor:
    for number, block in enumerate(blocks):
        hidden, past[number] = block.extend(hidden, past[number])
    return hidden


@torch.inference_mode()
def greedy_captions(
    model: InsertedModel, photos: torch.Tensor, start: Sequence[int], max_tokens: int
) -> list[list[int]]:
    """The likeliest token, again and again, behind `start`: at most `max_tokens` of each photo, up to the end token."""
    decoding = Decoding(model, photos)
    chosen = torch.tensor(list(start), device=photos.device).expand(len(photos), -1)
    found: list[torch.Tensor] = []
    is_done = torch.zeros(len(photos), dtype=torch.bool, device=photos.device)
    while len(found) < max_tokens and not bool(is_done.all()):
        chosen = decoding.extend(chosen).argmax(dim=-1, keepdim=True)
        is_done |= chosen[:, 0] == model.spec.end_token
        found.append(chosen)
    rows = torch.cat(found, dim=1).tolist()
    return [row[: row.index(model.spec.end_token)] if model.spec.end_token in row else row for row in rows]
