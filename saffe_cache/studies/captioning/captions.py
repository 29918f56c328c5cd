"""Photos and captions from a cache, as tensors; losses of captions; the training of the projector that joins them.

A batch has pooled photo tokens, states of layer l, and tokens to predict.
"""

from __future__ import annotations

import time
from functools import cached_property
from itertools import count
from typing import NamedTuple

import numpy as np
import torch
from torch.nn import functional

from saffe_cache.core.devices import choose_device
from saffe_cache.core.features import CacheError, LibraryModelSpec
from saffe_cache.encoders.causal_tokens import CausalTokens
from saffe_cache.inputs.pairs import Pairs
from saffe_cache.retrieval.fitting import adamw, fit_epochs, update, warmed_cosine
from saffe_cache.store.reader import Cache, EncoderCache
from saffe_cache.studies.captioning.config import CaptionConfig
from saffe_cache.studies.captioning.inserting import (
    InsertedModel,
    LibraryModel,
    Projector,
    photo_side,
    pool_photos,
    typical_size,
)
from saffe_cache.studies.captioning.result import EpochLosses, Training

_BATCH = 64
"""Texts that are measured at once."""
_MEASURED_CAPTIONS = 256
"""From which the size of hidden states is measured."""
_LARGEST_GRADIENT = 1.0
_SORTED_BATCHES = 16
"""Batches whose texts are sorted by length together."""


class Captions(NamedTuple):
    """A batch of texts: `hidden_states[l]` of all tokens but the last, and the token after each, the target.

    float32 [batch, tokens, d], int64 [batch, tokens] and bool [batch, tokens], False on padding and the prompt.
    """

    states: torch.Tensor
    targets: torch.Tensor
    is_target: torch.Tensor

    @property
    def num_targets(self) -> torch.Tensor:
        """Tokens that each caption's loss is summed over, int64 [batch]."""
        return self.is_target.sum(dim=1)


class CaptionSource:
    """Both sides of a cache for one place of insertion, and the frozen language model."""

    def __init__(self, cache: Cache, photos: EncoderCache, text: EncoderCache, config: CaptionConfig) -> None:
        """CacheError or ValueError if a layer is not cached, or photos are not square, too small or at other places."""
        self.cache, self.photos, self.text, self.device = cache, photos, text, choose_device(config.device)
        self.image_layer = photos.layers[-1] if config.image_layer is None else config.image_layer
        self.layer, self.grid = config.layer, config.grid
        self.weights = text.language_model()
        self.tokens = CausalTokens(self.weights.tokenizer, self.weights.spec)
        self.photo_size = photos.array(f"hidden_states/{self.image_layer}").spec.row_shape[-1]
        num_tokens = photos.num_tokens(self.image_layer)
        self._has_class_token = photos.manifest.class_tokens > 0
        side = photo_side(num_tokens, has_class_token=self._has_class_token)
        if self.grid > side:
            raise ValueError(f"--grid {self.grid}: the photos have {side} x {side} patches. Use --grid {side} or less.")
        text.array(f"hidden_states/{self.layer}")
        found, expected = self.weights.spec.position_offset, self.num_photo_tokens
        if found != expected:
            raise CacheError(
                f"{cache.storage.root}: in {text.key} texts begin at position {found}, expected {expected}: after the "
                f"photo's tokens (--grid {self.grid}). Extract the language model with --position-offset {expected}, "
                "or choose another --grid."
            )

    @cached_property
    def model(self) -> InsertedModel:
        blocks = [self.text.block(number) for number in range(self.text.manifest.num_layers)]
        kind = LibraryModel if isinstance(self.weights.spec, LibraryModelSpec) else InsertedModel
        return kind(self.weights, blocks, self.layer).to(self.device)

    @property
    def num_photo_tokens(self) -> int:
        return 1 + self.grid**2

    @property
    def num_positions(self) -> int:
        """Most tokens of photo and text together."""
        places = self.weights.tensors.get("position_embedding")
        return self.weights.spec.max_length + self.num_photo_tokens if places is None else len(places)

    def photo_tokens(self, rows: np.ndarray) -> torch.Tensor:
        """Pooled tokens of photos, float32 [n, m, d_photo]."""
        (states,) = self.photos.tokens(rows, (self.image_layer,)).states
        tokens = torch.from_numpy(states).to(self.device).float()
        return pool_photos(tokens, self.grid, has_class_token=self._has_class_token)

    def token_ids(self, rows: np.ndarray) -> tuple[torch.Tensor, torch.Tensor]:
        """Tokens of texts, int64 [n, tokens], padded with 0, and bool [n, tokens], True on real ones.

        CacheError if their number differs from that of the cached states, or they do not begin with the prompt's.
        """
        texts = self.cache.table.inputs["text"].texts
        assert texts is not None
        found = self.tokens.encode([texts[row] for row in rows])
        _, mask = self.text.token_rows(rows)
        assert mask is not None
        if [len(ids) for ids in found] != mask.sum(axis=1).tolist():
            raise CacheError(
                f"{self.cache.storage.root}: {self.text.key}: the tokenizer now splits texts differently than at "
                "extraction. Install the versions that the manifest's history names, or extract into a new cache."
            )
        start = self.tokens.start
        other = next((ids for ids in found if ids[: len(start)] != start), None)
        if other is not None:
            raise CacheError(
                f"{self.cache.storage.root}: {self.text.key}: a text begins with the tokens {other[: len(start)]}, "
                f"expected {start}, the prompt's: its last word and the text's first are one token. Extract with "
                "a --prompt that has a space before {}."
            )
        padded = torch.zeros(mask.shape, dtype=torch.long)
        padded[torch.from_numpy(mask)] = torch.tensor([token for ids in found for token in ids])
        return padded.to(self.device), torch.from_numpy(mask).to(self.device)

    def captions(self, rows: np.ndarray, *, plain: bool = False) -> Captions:
        """Texts with their cached states; `plain` ones with those at positions from 0 on, as without any photo."""
        ids, mask = self.token_ids(rows)
        if plain:
            states = self.model.text_states(ids, 0)
        else:
            states = torch.from_numpy(self.text.tokens(rows, (self.layer,)).states[0]).to(self.device).float()
        is_target = mask[:, 1:].clone()
        is_target[:, : len(self.tokens.start) - 1] = False
        return Captions(states[:, :-1], ids[:, 1:], is_target)


def caption_losses(model: InsertedModel, captions: Captions, photos: torch.Tensor | None) -> torch.Tensor:
    """Summed cross-entropy of each caption's tokens in nats, float32 [batch]. `photos`: projected tokens."""
    hidden = model(captions.states, photos)[captions.is_target]  # scores of padding would be most of the work
    losses = functional.cross_entropy(model.logits(hidden), captions.targets[captions.is_target], reduction="none")
    owners = torch.nonzero(captions.is_target)[:, 0]
    return torch.zeros(len(captions.targets), device=losses.device).index_add(0, owners, losses)


class Measured(NamedTuple):
    """Losses of texts: nats summed over a caption's tokens, and their number; float64 [texts] each."""

    losses: np.ndarray
    counts: np.ndarray


@torch.inference_mode()
def measure_losses(
    source: CaptionSource,
    texts: np.ndarray,
    projector: Projector | None = None,
    photos: np.ndarray | None = None,
    *,
    plain: bool = False,
) -> Measured:
    """Losses of text rows, each with the photo row at the same index, or without any; see `CaptionSource.captions`.

    Texts of similar length are measured together; photos that a batch has several times are projected once.
    """
    found = Measured(np.zeros(len(texts)), np.zeros(len(texts)))
    order = np.argsort(np.diff(source.text.offsets)[texts], kind="stable")
    for start in range(0, len(texts), _BATCH):
        chosen, projected = order[start : start + _BATCH], None
        captions = source.captions(texts[chosen], plain=plain)
        if projector is not None and photos is not None:
            seen, places = np.unique(photos[chosen], return_inverse=True)
            projected = projector(source.photo_tokens(seen))[torch.from_numpy(places).to(source.device)]
        found.losses[chosen] = caption_losses(source.model, captions, projected).cpu().numpy()
        found.counts[chosen] = captions.num_targets.cpu().numpy()
    return found


def first_captions(pairs: Pairs) -> np.ndarray:
    """The text row of each photo's first caption."""
    rows: np.ndarray = pairs.texts.values[pairs.texts.offsets[:-1]]
    return rows


def fit_projector(
    source: CaptionSource, training: Pairs, validation: Pairs, config: CaptionConfig
) -> tuple[Projector, Training]:
    """Train the only part that learns, and keep the epoch with the lowest loss on captions held out.

    An epoch sees each photo once, with one of its captions drawn at random.
    """
    projector = new_projector(source, training, config.seed)
    total, steps = config.epochs * -(-len(training) // config.batch_size), count()
    optimizer = adamw(projector.parameters(), config.learning_rate, weight_decay=config.weight_decay)
    lengths, times = np.diff(source.text.offsets), []

    def run_epoch(epoch: int) -> float:
        summed, num_tokens = 0.0, 0
        generator, offsets = np.random.default_rng((config.seed, epoch)), training.texts.offsets
        texts = training.texts.values[offsets[:-1] + generator.integers(np.diff(offsets))]
        for chosen in shuffled_batches(lengths[texts], config.batch_size, generator):
            started = time.perf_counter()
            captions = source.captions(texts[chosen])
            losses = caption_losses(source.model, captions, projector(source.photo_tokens(training.rows[chosen])))
            targets = int(captions.num_targets.sum())
            rate = warmed_cosine(next(steps), total, max(1, total // 10))
            update(optimizer, losses.sum() / targets, rate, tuple(projector.parameters()), _LARGEST_GRADIENT)
            summed, num_tokens = summed + float(losses.detach().sum()), num_tokens + targets
            times.append(time.perf_counter() - started)
        return summed / num_tokens

    def judge(_: int) -> float:
        measured = measure_losses(source, first_captions(validation), projector, validation.rows)
        return -float(measured.losses.sum() / measured.counts.sum())

    fitted = fit_epochs(projector, config.epochs, run_epoch, judge)
    losses = enumerate(zip((None, *fitted.losses), fitted.scores, strict=True))
    return projector.eval(), Training(
        best_epoch=fitted.best_epoch,
        seconds_per_step=float(np.median(times)),
        training_photos=len(training),
        validation_photos=len(validation),
        log=tuple(EpochLosses(epoch=epoch, training=loss, validation=-score) for epoch, (loss, score) in losses),
    )


def new_projector(source: CaptionSource, training: Pairs, seed: int) -> Projector:
    """With weights from a seed, and tokens of the size of the layer's hidden states."""
    captions = source.captions(first_captions(training)[:_MEASURED_CAPTIONS])
    size = typical_size(captions.states, captions.is_target)
    torch.manual_seed(seed)
    return Projector(source.photo_size, source.model.hidden_size, size).to(source.device)


def shuffled_batches(lengths: np.ndarray, batch_size: int, generator: np.random.Generator) -> list[np.ndarray]:
    """Indices of all texts in batches of similar length, since padding would otherwise be half of the work.

    Texts are shuffled, those of a few batches are sorted by length, and the batches are shuffled.
    """
    order, batches = generator.permutation(len(lengths)), []
    for some in np.split(order, range(_SORTED_BATCHES * batch_size, len(order), _SORTED_BATCHES * batch_size)):
        ordered = some[np.argsort(lengths[some], kind="stable")]
        batches += np.split(ordered, range(batch_size, len(ordered), batch_size))
    return [batches[number] for number in generator.permutation(len(batches))]
