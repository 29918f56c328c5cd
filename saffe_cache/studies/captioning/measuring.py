"""Measures of a projector: the loss of captions, with controls and trivial baselines, and how often own captions win.

`result.SYSTEMS` defines what each system sees.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping

import numpy as np
import torch

from saffe_cache.core.controls import Control
from saffe_cache.core.results import Estimate
from saffe_cache.fusion.base import counted_flops
from saffe_cache.inputs.pairs import Pairs
from saffe_cache.retrieval.metrics import bootstrap_interval
from saffe_cache.studies.captioning.captions import CaptionSource, Measured, first_captions, measure_losses
from saffe_cache.studies.captioning.inserting import InsertedModel, Projector
from saffe_cache.studies.captioning.result import CONTROL, CaptionCost, Measurements

_TOKENIZED_AT_ONCE = 1024


def _ratio(values: np.ndarray, counts: np.ndarray, photos: np.ndarray) -> Estimate:
    """Sum over sum, with a bootstrap interval over the photos that the values belong to."""
    totals, weights = (np.bincount(photos, weights=one.astype(np.float64)) for one in (values, counts))
    low, high = bootstrap_interval(totals, weights)
    return Estimate(value=float(totals.sum() / weights.sum()), low=low, high=high)


class Measuring:
    """The photos that are reported on, and a projector."""

    def __init__(self, source: CaptionSource, projector: Projector, pairs: Pairs, seed: int) -> None:
        self.source, self.projector, self.pairs = source, projector, pairs
        self._generator = np.random.default_rng(seed)
        order = self._generator.permutation(len(pairs))
        self.other = np.empty(len(pairs), np.int64)
        self.other[order] = np.roll(order, 1)
        """For each photo another one: a cycle through all, so that no photo gets itself."""

    def measure(self, training: Pairs, num_others: int) -> Measurements:
        """The captions of all photos, and how often own captions are found among `num_others` more."""
        texts, owners = self.pairs.texts.values, self.pairs.owners
        found = {
            "photo": self.losses(texts, self.pairs.rows[owners]),
            CONTROL: self.losses(texts, self.pairs.rows[self.other[owners]]),
            "no_photo": self.losses(texts),
            "plain_model": self.losses(texts, plain=True),
            "unigram": self._unigram(texts, training),
        }
        seen, counts = found["photo"].losses, found["photo"].counts
        return Measurements(
            losses={name: _ratio(one.losses, one.counts, owners) for name, one in found.items()},
            differences={
                name: _ratio(seen - one.losses, counts, owners) for name, one in found.items() if name != "photo"
            },
            own_caption=self.own_captions(num_others),
        )

    def losses(self, texts: np.ndarray, photos: np.ndarray | None = None, *, plain: bool = False) -> Measured:
        """Of text rows, each with the photo row at the same index, or without any."""
        return measure_losses(self.source, texts, self.projector, photos, plain=plain)

    def own_captions(self, num_others: int) -> dict[str, Estimate]:
        """How often a photo's own first caption is likelier than those of `num_others` other photos.

        By loss: by nats per token. By gain: by what the photo takes off the caption's loss.
        """
        num, texts = len(self.pairs), first_captions(self.pairs)
        shifts = np.stack([self._generator.choice(num - 1, num_others, replace=False) + 1 for _ in range(num)])
        candidates = np.hstack([np.arange(num)[:, None], (np.arange(num)[:, None] + shifts) % num])
        alone = self.losses(texts).losses[candidates]
        report: dict[str, Estimate] = {}
        for system, photos in (("photo", np.arange(num)), (CONTROL, self.other)):
            seen = np.repeat(self.pairs.rows[photos], candidates.shape[1])
            losses, counts = (one.reshape(candidates.shape) for one in self.losses(texts[candidates.ravel()], seen))
            for by, scores in (("loss", losses / counts), ("gain", losses - alone)):
                is_own = (scores[:, :1] < scores[:, 1:]).all(axis=1)
                report[f"{system}, by {by}"] = _ratio(is_own, np.ones(num), np.arange(num))
        return report

    def _unigram(self, texts: np.ndarray, training: Pairs) -> Measured:
        vocabulary = len(self.source.model.weights["token_embedding"])
        trained = np.concatenate(list(self._caption_tokens(training.texts.values)))
        frequencies = 1 + np.bincount(trained, minlength=vocabulary)
        nats = -np.log(frequencies / frequencies.sum())
        found = [(nats[ids].sum(), len(ids)) for ids in self._caption_tokens(texts)]
        return Measured(*(np.array(column) for column in zip(*found, strict=True)))

    def _caption_tokens(self, texts: np.ndarray) -> Iterator[np.ndarray]:
        """The tokens of each caption that count."""
        begin = len(self.source.tokens.start)
        for start in range(0, len(texts), _TOKENIZED_AT_ONCE):
            ids, mask = self.source.token_ids(texts[start : start + _TOKENIZED_AT_ONCE])
            for row, real in zip(ids.cpu().numpy(), mask.sum(dim=1).tolist(), strict=True):
                yield row[begin:real]


def judge_controls(own: Mapping[str, Estimate], num_others: int, num_photos: int) -> list[Control]:
    """With another photo, a photo's own caption must not be found more often than chance allows."""
    chance = 1 / (num_others + 1)
    error = math.sqrt(chance * (1 - chance) / num_photos)
    return [
        Control.at_most(name, "own caption found", found.value, chance, error)
        for name, found in own.items()
        if name.startswith(CONTROL)
    ]


def count_cost(model: InsertedModel, projector: Projector, batch: int, tokens: int, photo_tokens: int) -> CaptionCost:
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
