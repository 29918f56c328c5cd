"""Measures of a projector: the loss of captions, with controls and trivial baselines, and how often own captions win.

`result.SYSTEMS` defines what each system sees.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import numpy as np
import torch

from saffe_cache.core.controls import Control
from saffe_cache.core.results import Estimate
from saffe_cache.fusion.base import counted_flops
from saffe_cache.inputs.pairs import Pairs
from saffe_cache.retrieval.metrics import bootstrap_interval
from saffe_cache.studies.captioning.captions import (
    Captions,
    CaptionSource,
    caption_losses,
    first_captions,
    num_targets,
    project,
)
from saffe_cache.studies.captioning.inserting import InsertedModel, Projector
from saffe_cache.studies.captioning.result import CONTROL, CaptionCost, Measurements

_BATCH = 64


@dataclass(frozen=True)
class Measured:
    """Losses of texts: nats summed over a caption's tokens, and their number; one for each text."""

    losses: np.ndarray
    counts: np.ndarray

    def report(self, photos: np.ndarray) -> Estimate:
        """Nats per token. `photos`: the photo of each text."""
        return _ratio(self.losses, self.counts, photos)

    def less(self, other: Measured, photos: np.ndarray) -> Estimate:
        """By how many nats per token these losses exceed another system's on the same texts."""
        return _ratio(self.losses - other.losses, self.counts, photos)


def _ratio(values: np.ndarray, counts: np.ndarray, photos: np.ndarray) -> Estimate:
    """Sum over sum, with a bootstrap interval over photos."""
    totals, weights = (np.bincount(photos, weights=one.astype(np.float64)) for one in (values, counts))
    low, high = bootstrap_interval(totals, weights)
    return Estimate(value=float(totals.sum() / weights.sum()), low=low, high=high)


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
        """For each photo another one: a cycle through all, so that no photo gets itself."""

    def measure(self, training: Pairs, num_others: int) -> Measurements:
        """Losses of all captions of all photos, and how often own captions are found among `num_others` more."""
        texts, owners = self.pairs.texts.values, self.pairs.owners
        found = {
            "photo": self._with_photos(texts, self.pairs.rows[owners]),
            CONTROL: self._with_photos(texts, self.pairs.rows[self.other[owners]]),
            "no_photo": self._without(texts),
            "plain_model": self._without(texts, plain=True),
            "unigram": self._unigram(texts, training),
        }
        return Measurements(
            losses={name: measured.report(owners) for name, measured in found.items()},
            differences={name: found["photo"].less(one, owners) for name, one in found.items() if name != "photo"},
            own_caption=self.own_captions(num_others),
        )

    def own_captions(self, num_others: int) -> dict[str, Estimate]:
        """How often a photo's own first caption is likelier than those of `num_others` other photos.

        By loss: by nats per token. By gain: by what the photo takes off the caption's loss.
        """
        num, texts = len(self.pairs), first_captions(self.pairs)
        shifts = np.stack([self._generator.choice(num - 1, num_others, replace=False) + 1 for _ in range(num)])
        candidates = np.hstack([np.arange(num)[:, None], (np.arange(num)[:, None] + shifts) % num])
        alone = self._without(texts).losses[candidates]
        report: dict[str, Estimate] = {}
        for system, photos in (("photo", np.arange(num)), (CONTROL, self.other)):
            seen = np.repeat(self.pairs.rows[photos], candidates.shape[1])
            measured = self._with_photos(texts[candidates.ravel()], seen)
            losses, counts = (one.reshape(candidates.shape) for one in (measured.losses, measured.counts))
            for by, scores in (("loss", losses / counts), ("gain", losses - alone)):
                is_own = (scores[:, :1] < scores[:, 1:]).all(axis=1)
                report[f"{system}, by {by}"] = _ratio(is_own, np.ones(num), np.arange(num))
        return report

    def _with_photos(self, texts: np.ndarray, photos: np.ndarray) -> Measured:
        """Each text with the photo at the same index."""

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
        """In batches of texts of similar length; losses come in the order of the texts."""
        found = Measured(np.zeros(len(texts)), np.zeros(len(texts)))
        order = np.argsort(np.diff(self.source.text.offsets)[texts], kind="stable")
        for start in range(0, len(texts), _BATCH):
            chosen = order[start : start + _BATCH]
            captions = captions_of(texts[chosen])
            found.losses[chosen] = losses_of(chosen, captions).cpu().numpy()
            found.counts[chosen] = num_targets(captions).cpu().numpy()
        return found

    def _unigram(self, texts: np.ndarray, training: Pairs) -> Measured:
        frequencies = np.ones(len(self.model.weights["token_embedding"]))
        for tokens in self._caption_tokens(training.texts.values):
            frequencies += np.bincount(np.concatenate(tokens), minlength=len(frequencies))
        nats = -np.log(frequencies / frequencies.sum())
        found = [(nats[ids].sum(), len(ids)) for tokens in self._caption_tokens(texts) for ids in tokens]
        return Measured(*(np.array(column) for column in zip(*found, strict=True)))

    def _caption_tokens(self, texts: np.ndarray) -> list[list[np.ndarray]]:
        """The tokens of each caption that count, in batches."""
        begin = len(self.source.tokens.start)
        found = []
        for start in range(0, len(texts), 1024):
            ids, mask = (one.cpu().numpy() for one in self.source.token_ids(texts[start : start + 1024]))
            found.append([row[begin : real.sum()] for row, real in zip(ids, mask, strict=True)])
        return found


def judge_controls(own: Mapping[str, Estimate], num_others: int, num_photos: int) -> list[Control]:
    """With another photo, a photo's own caption must not be found more often than chance allows."""
    chance = 1 / (num_others + 1)
    error = math.sqrt(chance * (1 - chance) / num_photos)
    return [
        Control.at_most(name, "own caption found", found.value, chance, error)
        for name, found in own.items()
        if name.startswith(CONTROL)
    ]


def count_cost(
    model: InsertedModel, projector: Projector, *, batch: int, tokens: int, photo_tokens: int
) -> CaptionCost:
    """Parameters of the projector, and FLOPs of texts of `tokens` tokens."""
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
    return CaptionCost(
        trainable_parameters=sum(parameter.numel() for parameter in projector.parameters()),
        training_step_flops=int(training.get_total_flops()),
        whole_pass_flops=int(whole.get_total_flops()),
        flops_batch=batch,
        flops_tokens=tokens,
    )
