"""What a projector is worth: the loss of captions, beside controls and trivial baselines; who finds the own caption.

| system | sees |
|---|---|
| `photo` | the caption's own photo |
| `photos_shuffled` | another's photo: what is left of the gain is not from what the photo shows |
| `no_photo` | nothing; the text's positions still begin behind the photo's places |
| `plain_model` | nothing, positions from 0: the language model as it came |
| `unigram` | how often each token stands in the captions that were trained on, one added to each |
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from saffe_cache.fusion.flops import counted_flops
from saffe_cache.inputs.pairs import Pairs
from saffe_cache.retrieval.metrics import bootstrap_interval
from saffe_cache.studies.captioning.captions import (
    Captions,
    CaptionSource,
    caption_losses,
    first_captions,
    num_said,
    project,
)
from saffe_cache.studies.captioning.inserting import InsertedModel, Projector

_BATCH = 64
CONTROL = "photos_shuffled"


@dataclass(frozen=True)
class Measured:
    """Losses of texts: nats summed over a caption's tokens, and their number; one for each text."""

    losses: np.ndarray
    counts: np.ndarray

    def report(self, photos: np.ndarray) -> dict[str, float]:
        """Nats a token with a 95 % interval over photos, and perplexity. `photos`: whose each text is."""
        loss, low, high = _ratio(self.losses, self.counts, photos)
        return {"loss": loss, "low": low, "high": high, "perplexity": math.exp(loss)}

    def less(self, other: Measured, photos: np.ndarray) -> dict[str, float]:
        """Nats a token that these losses are above another system's on the same texts, with a 95 % interval."""
        value, low, high = _ratio(self.losses - other.losses, self.counts, photos)
        return {"value": value, "low": low, "high": high}


def _ratio(values: np.ndarray, counts: np.ndarray, photos: np.ndarray) -> tuple[float, float, float]:
    """Sum over sum, and its 95 % bootstrap interval over photos."""
    totals, weights = (np.bincount(photos, weights=one.astype(np.float64)) for one in (values, counts))
    return float(totals.sum() / weights.sum()), *bootstrap_interval(totals, weights)


class Measuring:
    """The photos that are reported on, a model, and its projector."""

    def __init__(
        self, source: CaptionSource, model: InsertedModel, projector: Projector, pairs: Pairs, seed: int
    ) -> None:
        self.source, self.model, self.projector, self.pairs = source, model, projector, pairs
        self._generator = np.random.default_rng(seed)
        order = self._generator.permutation(len(pairs))
        self.other = np.empty(len(pairs), np.int64)
        self.other[order] = np.roll(order, 1)
        """For each photo another one: a cycle through all, so that none is its own."""

    def losses(self, training: Pairs) -> dict[str, dict[str, dict[str, float]]]:
        """Of all captions of all photos: `losses` of each system; `differences`, the loss with the photo less these."""
        texts, owners = self.pairs.texts.values, self.pairs.owners
        found = {
            "photo": self._with_photos(texts, self.pairs.rows[owners]),
            CONTROL: self._with_photos(texts, self.pairs.rows[self.other[owners]]),
            "no_photo": self._without(texts),
            "plain_model": self._without(texts, plain=True),
            "unigram": self._unigram(texts, training),
        }
        return {
            "losses": {name: measured.report(owners) for name, measured in found.items()},
            "differences": {name: found["photo"].less(one, owners) for name, one in found.items() if name != "photo"},
        }

    def own_captions(self, num_others: int) -> dict[str, dict[str, float]]:
        """How often a photo's own first caption is the likeliest among those of `num_others` other photos too.

        `loss`: by nats a token; `gain`: by what the photo takes off the caption's loss, which is the fairer one, since
        short and usual captions are likely with any photo. `low` and `high`: 95 % interval over photos.
        """
        num, texts = len(self.pairs), first_captions(self.pairs)
        shifts = np.stack([self._generator.choice(num - 1, num_others, replace=False) + 1 for _ in range(num)])
        candidates = np.hstack([np.arange(num)[:, None], (np.arange(num)[:, None] + shifts) % num])
        alone = self._without(texts).losses[candidates]
        report: dict[str, dict[str, float]] = {}
        for system, photos in (("photo", np.arange(num)), (CONTROL, self.other)):
            seen = np.repeat(self.pairs.rows[photos], candidates.shape[1])
            measured = self._with_photos(texts[candidates.ravel()], seen)
            losses, counts = (one.reshape(candidates.shape) for one in (measured.losses, measured.counts))
            for by, scores in (("loss", losses / counts), ("gain", losses - alone)):
                is_own = (scores[:, :1] < scores[:, 1:]).all(axis=1)
                value, low, high = _ratio(is_own, np.ones(num), np.arange(num))
                report[f"{system}, by {by}"] = {"value": value, "low": low, "high": high}
        return report

    def _with_photos(self, texts: np.ndarray, photos: np.ndarray) -> Measured:
        """Each text with the photo at its place."""

        def losses(chosen: np.ndarray, captions: Captions) -> torch.Tensor:
            seen, places = np.unique(photos[chosen], return_inverse=True)
            projected = project(self.source, self.projector, seen)[torch.from_numpy(places).to(self.source.device)]
            return caption_losses(self.model, captions, projected)

        return self._measured(texts, self.source.captions, losses)

    def _without(self, texts: np.ndarray, *, plain: bool = False) -> Measured:
        """`plain`: at the positions from 0 on."""

        def plain_captions(rows: np.ndarray) -> Captions:
            return self.source.plain_captions(rows, self.model)

        return self._measured(
            texts,
            plain_captions if plain else self.source.captions,
            lambda _, captions: caption_losses(self.model, captions, None),
        )

    @torch.inference_mode()
    def _measured(
        self,
        texts: np.ndarray,
        captions_of: Callable[[np.ndarray], Captions],
        losses_of: Callable[[np.ndarray, Captions], torch.Tensor],
    ) -> Measured:
        """In batches of texts about as long as one another; the losses are of places among the texts."""
        found = Measured(np.zeros(len(texts)), np.zeros(len(texts)))
        order = np.argsort(np.diff(self.source.text.offsets)[texts], kind="stable")
        for start in range(0, len(texts), _BATCH):
            chosen = order[start : start + _BATCH]
            captions = captions_of(texts[chosen])
            found.losses[chosen] = losses_of(chosen, captions).cpu().numpy()
            found.counts[chosen] = num_said(captions).cpu().numpy()
        return found

    def _unigram(self, texts: np.ndarray, training: Pairs) -> Measured:
        frequencies = np.ones(len(self.model.weights["token_embedding"]))
        for said in self._said(training.texts.values):
            frequencies += np.bincount(np.concatenate(said), minlength=len(frequencies))
        nats = -np.log(frequencies / frequencies.sum())
        found = [(nats[ids].sum(), len(ids)) for said in self._said(texts) for ids in said]
        return Measured(*(np.array(column) for column in zip(*found, strict=True)))

    def _said(self, texts: np.ndarray) -> list[list[np.ndarray]]:
        """Tokens of each caption that count, in batches."""
        begin = len(self.source.tokens.start)
        found = []
        for start in range(0, len(texts), 1024):
            ids, mask = (one.cpu().numpy() for one in self.source.token_ids(texts[start : start + 1024]))
            found.append([row[begin : real.sum()] for row, real in zip(ids, mask, strict=True)])
        return found


def chance_alarms(own: dict[str, dict[str, float]], num_others: int, num_photos: int) -> list[str]:
    """Controls that find a photo's own caption more often than chance allows (3 standard errors)."""
    chance = 1 / (num_others + 1)
    limit = chance + 3 * math.sqrt(chance * (1 - chance) / num_photos)
    return [
        f"{name}: {found['value']:.3f} of the photos find their own caption, expected {chance:.3f}"
        for name, found in own.items()
        if name.startswith(CONTROL) and found["value"] > limit
    ]


def count_flops(
    model: InsertedModel, projector: Projector, *, batch: int, tokens: int, photo_tokens: int
) -> dict[str, Any]:
    """FLOPs of texts of `tokens` tokens.

    `training_step`: from cached states, forward and back to the projector. `whole_pass`: a forward pass that begins
    with the text's tokens, as a caption that nobody has cached takes it.
    """
    device = model.weights["token_embedding"].device
    photos = torch.zeros(batch, photo_tokens, projector.linear.in_features, device=device)
    ids = torch.zeros(batch, tokens, dtype=torch.long, device=device)
    with torch.no_grad():
        states = model.text_states(ids, photo_tokens)
    with counted_flops() as training:
        model.logits(model(states, projector(photos))).sum().backward()  # type: ignore[no-untyped-call]
    projector.zero_grad()
    with torch.no_grad(), counted_flops() as whole:
        model.logits(model(model.text_states(ids, photo_tokens), projector(photos)))
    return {
        "training_step_flops": int(training.get_total_flops()),
        "whole_pass_flops": int(whole.get_total_flops()),
        "flops_batch": batch,
        "flops_tokens": tokens,
    }
