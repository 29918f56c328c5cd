"""Batches of a run's training pairs, straight from the cache, its start, and its validation score."""

from __future__ import annotations

from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from functools import cached_property
from typing import NamedTuple

import numpy as np
import torch

from saffe_cache.core import ranks
from saffe_cache.core.devices import num_cores
from saffe_cache.core.items import Ragged
from saffe_cache.core.options import require
from saffe_cache.core.ranks import Share
from saffe_cache.fusion.base import Fusion, TrainingVectors
from saffe_cache.fusion.layers import Mask, States
from saffe_cache.fusion.losses import Batch, ComposedBatch, UnpairedBatch, distinct_positives
from saffe_cache.inputs.composed import ComposedDraw, draw_composed
from saffe_cache.inputs.feature_loader import FeatureLoader
from saffe_cache.inputs.media import Groups
from saffe_cache.inputs.pairs import Pairs, Unpaired
from saffe_cache.protocols.base import Protocol, SearchProtocol
from saffe_cache.protocols.registry import load_protocol, own_protocol
from saffe_cache.protocols.setting import Setting
from saffe_cache.retrieval import fitting
from saffe_cache.store.joined import JoinedEncoder
from saffe_cache.training.starting import LateStart, computed_rows, training_vectors


class EpochOrder(NamedTuple):
    """The order in which one epoch sees the pairs."""

    epoch: int
    pairs: np.ndarray
    """int64 [pairs]: a permutation."""
    windows: np.ndarray | None
    """int64 [pairs]: the window of each position, ascending; None if all pairs are shuffled together."""


def draw_order(shards: np.ndarray, shards_per_window: int | None, seed: int, epoch: int) -> EpochOrder:
    """The order of an epoch; it follows from seed and epoch alone.

    If reading a row costs the same anywhere, all pairs are shuffled (`shards_per_window` is None). If it costs a whole
    shard, shards are drawn at random, a window of several at a time, and the pairs of a window are shuffled. `shards`,
    int64 [pairs], holds the shard of each; epochs count from 0.
    """
    generator = np.random.default_rng((seed, epoch))
    shuffled = generator.permutation(len(shards))
    if shards_per_window is None:
        return EpochOrder(epoch, shuffled, None)
    names, members = np.unique(shards, return_inverse=True)
    window_of_shard = generator.permutation(len(names)) // shards_per_window
    windows = window_of_shard[members[shuffled]]
    by_window = np.argsort(windows, kind="stable")
    return EpochOrder(epoch, shuffled[by_window], windows[by_window])


class _Draw(NamedTuple):
    """What a batch holds."""

    photos: np.ndarray
    """int64: pairs, ascending, each once."""
    composed: ComposedDraw | None = None


class TrainingData:
    """Batches of the training pairs, and the validation score."""

    def __init__(
        self,
        inputs: FeatureLoader,
        pairs: Pairs,
        validation: Pairs,
        batch_size: int,
        seed: int,
        unpaired: Unpaired | None = None,
        least_photos: int = 0,
    ) -> None:
        """`unpaired`: photos and texts that each batch has too, drawn independently of each other. `least_photos`: of a
        batch of composed queries."""
        self._least_photos = least_photos
        self.inputs, self._pairs, self._validation, self._seed = inputs, pairs, validation, seed
        self._unpaired = unpaired
        self._order: EpochOrder | None = None
        self._held: tuple[int, ...] = ()
        self._batch_size = fitting.batch_size(batch_size, pairs.num_samples)
        require(self._batch_size >= ranks.size(), "batch_size", self._batch_size, f"{ranks.size()}, one for each rank")

    @property
    def steps_per_epoch(self) -> int:
        """Whole batches; the photos, or composed queries, of a short last batch take part in other epochs."""
        return self._pairs.num_samples // self._batch_size

    def batches(self, step: int, stop: int) -> Iterator[Batch]:
        """The batches of steps `step` to `stop`, read one ahead if the steps leave a processor core for it."""
        reads_ahead = self.inputs.device != "cpu" or torch.get_num_threads() * ranks.on_this_host() < num_cores()
        # The reader gets one thread: more would exceed the cores and slow down the steps.
        with ThreadPoolExecutor(1, initializer=torch.set_num_threads, initargs=(1,)) as pool:
            ahead: Future[Batch] | None = None
            for number in range(step, stop):
                batch = ahead.result() if ahead else self._read(number)
                if number + 1 < stop:
                    photos = self._draw(number + 1).photos
                    own = photos[Share.of(len(photos)).own]
                    if self._groups is None:
                        self.inputs.will_need(self._pairs.rows[own], self._views(number + 1, len(photos)))
                    ahead = pool.submit(self._read, number + 1) if reads_ahead else None
                yield batch

    def seen(self, steps: int) -> tuple[int, int]:
        """Photos and texts that passed through the model in this number of steps and in the validations between them.

        Without a cache, the encoders would have had to encode these.
        """
        pairs, validations = self._pairs, steps // self.steps_per_epoch + 1
        texts, in_batch = pairs.searching, self._batch_size
        of_batch = min(len(np.unique(texts.values)), round(in_batch * len(texts.values) / pairs.num_samples))
        if pairs.composed is not None:  # a reference and a target of each, and one of its texts
            of_batch, in_batch = in_batch, min(max(2 * in_batch, self._least_photos), len(pairs))
        photos = steps * in_batch + validations * len(self._validation)
        return photos, steps * of_batch + validations * len(self._search.queries)

    def _place(self, step: int) -> tuple[EpochOrder, slice]:
        """The order of a step's epoch, and the slice of it that is the step's batch."""
        epoch, within = divmod(step, self.steps_per_epoch)
        if self._order is None or self._order.epoch != epoch:
            self._order = draw_order(self._shards, self.inputs.spec.shuffled_shards, self._seed, epoch)
        return self._order, slice(within * self._batch_size, (within + 1) * self._batch_size)

    @cached_property
    def _shards(self) -> np.ndarray:
        """The shard of each sample's photo; all 0 where reading one costs the same anywhere."""
        spec, gallery = self.inputs.spec, self.inputs.gallery
        if spec.shuffled_shards is None:
            return np.zeros(self._pairs.num_samples, np.int64)
        shard_rows = gallery.array(f"hidden_states/{spec.gallery_layers[0]}").spec.shard_rows
        shards = gallery.first_rows(self._pairs.rows) // shard_rows
        return shards if self._pairs.composed is None else shards[self._pairs.composed.references]

    def _draw(self, step: int) -> _Draw:
        """What the batch of a step holds."""
        order, here = self._place(step)
        chosen = np.sort(order.pairs[here])
        if self._pairs.composed is None:
            return _Draw(chosen)
        generator = np.random.default_rng((self._seed, *divmod(step, self.steps_per_epoch), 3))
        composed = draw_composed(self._pairs.composed, chosen, generator, self._least_photos, len(self._pairs))
        return _Draw(composed.photos, composed)

    def _read(self, step: int) -> Batch:
        epoch, within = divmod(step, self.steps_per_epoch)
        order, here = self._place(step)
        self._hold(order, here)
        chosen, composed = self._draw(step)
        texts = self._texts_of(chosen)
        distinct, columns, positives = distinct_positives(texts)
        draws = np.random.default_rng((self._seed, epoch, within)).random(len(chosen))
        drawn_texts = texts.offsets[:-1] + (draws * texts.lengths).astype(np.int64)
        own = columns[drawn_texts] if texts.lengths.all() else np.zeros(len(chosen), np.int64)
        matches, drawn = (torch.from_numpy(of_batch).to(self.inputs.device) for of_batch in (positives, own))
        of_photos, of_texts = Share.of(len(chosen)), Share.of(len(distinct))
        states, mask = self._photos(step, chosen, of_photos)
        paired = None
        if self.inputs.spec.gallery_text != "null":
            paired_texts = self._pairs.paired_texts
            of_chosen = distinct[own] if paired_texts is None else paired_texts[chosen]
            paired = self.inputs.texts(of_chosen[of_photos.own])
        queries = self.inputs.queries(distinct[of_texts.own])
        with_tokens = queries if queries.states else None
        unpaired = None if self._unpaired is None else self._read_unpaired(self._unpaired, (epoch, within))
        inputs = of_photos, of_texts, states, mask, paired, distinct, queries.vectors
        asked = None if composed is None else self._on_device(composed)
        return Batch(*inputs, matches, drawn, queries=with_tokens, unpaired=unpaired, composed=asked)

    def _photos(self, step: int, chosen: np.ndarray, share: Share) -> tuple[States, Mask]:
        """What the fusion sees of this rank's share of some pairs."""
        if self._groups is None:
            return self.inputs.photos(self._pairs.rows[chosen[share.own]], self._views(step, len(chosen)))
        generator = np.random.default_rng((self._seed, *divmod(step, self.steps_per_epoch), 4))
        return self.inputs.media(self._groups.draw_parts(chosen, generator)[share.own])

    @cached_property
    def _groups(self) -> Groups | None:
        """Items whose media take each other's place; None where they stay as they are."""
        gallery = self.inputs.gallery
        if not self.inputs.spec.regroup or not isinstance(gallery, JoinedEncoder):
            return None
        columns = gallery.parts[self._pairs.rows].T
        groups = Groups(self._pairs.texts, dict(zip(gallery.encoders, columns, strict=True)))
        return groups if groups.are_mixed else None

    def _on_device(self, of: ComposedDraw) -> ComposedBatch:
        texts, references, positives = (
            torch.from_numpy(array).to(self.inputs.device) for array in (of.texts, of.references, of.positives)
        )
        return ComposedBatch(of.text_rows, texts, references, positives)

    def _texts_of(self, chosen: np.ndarray) -> Ragged:
        """Text rows of some pairs; none where captions do not train beside composed queries."""
        texts = self._pairs.texts
        if self._pairs.composed is not None and not self.inputs.spec.caption_weight:
            texts = Ragged(np.zeros_like(texts.offsets), texts.values[:0])
        return texts.take(chosen)

    def _read_unpaired(self, unpaired: Unpaired, step: tuple[int, int]) -> UnpairedBatch:
        """As many photos as a batch has, and as many texts, each drawn by a generator of its own."""
        drawn = []
        for side, rows in enumerate(unpaired):
            generator = np.random.default_rng((self._seed, *step, 1 + side))
            drawn.append(rows[generator.choice(len(rows), min(self._batch_size, len(rows)), replace=False)])
        of_photos, of_texts = (Share.of(len(rows)) for rows in drawn)
        states, mask = self.inputs.photos(drawn[0][of_photos.own])
        queries = self.inputs.queries(drawn[1][of_texts.own])
        with_tokens = queries if queries.states else None
        return UnpairedBatch(of_photos, of_texts, states, mask, queries.vectors, with_tokens)

    def _views(self, step: int, num_photos: int) -> np.ndarray | None:
        """The view of each of this rank's photos in the batch of a step, drawn at random; None if there is only one."""
        count = 1 + len(self.inputs.spec.views)
        if count == 1:
            return None
        drawn = np.random.default_rng((self._seed, *divmod(step, self.steps_per_epoch), count))
        return drawn.integers(count, size=num_photos)[Share.of(num_photos).own]

    def _hold(self, order: EpochOrder, here: slice) -> None:
        """If photos are streamed, load the windows of a batch and prefetch the next one."""
        if order.windows is None:
            return
        first, last = int(order.windows[here][0]), int(order.windows[here][-1]) + 1
        if self._held != (order.epoch, first, last):
            self._held = (order.epoch, first, last)
            places = np.flatnonzero((order.windows >= first) & (order.windows <= last))
            pairs = order.pairs[places]
            paired = [] if self._pairs.paired_texts is None else [self._pairs.paired_texts[pairs]]
            texts = np.unique(np.concatenate([self._pairs.texts.take(pairs).values, *paired]))
            if ranks.size() > 1:  # photos are large: each rank holds those of its own
                numbers = range(int(places[0]) // self._batch_size, int(places[-1]) // self._batch_size + 1)
                batches = (slice(number * self._batch_size, (number + 1) * self._batch_size) for number in numbers)
                pairs = np.intersect1d(pairs, np.concatenate([_own_pairs(order, batch) for batch in batches]))
            self.inputs.hold(self._pairs.rows[pairs], texts)

    @property
    def summaries(self) -> np.ndarray:
        """Of the training photos, float32 [n, summary_size]."""
        return computed_rows(self._pairs.rows, self.inputs.summaries).whole

    def training_vectors(self, model: Fusion) -> TrainingVectors:
        """What a fusion in closed form is fitted on; it validates the model that is to be fitted."""
        return training_vectors(self.inputs, self._pairs, lambda: self.validate(model))

    def validate(self, model: Fusion) -> float:
        """The validation score of a model, on which all ranks agree."""
        measured = self.protocol.validate(model.eval())
        return ranks.agreed(lambda: measured)

    @cached_property
    def protocol(self) -> Protocol:
        """The run's own protocol on the validation pairs."""
        return load_protocol(own_protocol(self.inputs.spec))(Setting(self.inputs, self._validation))

    @cached_property
    def _search(self) -> SearchProtocol:
        return self.protocol.validation_search()

    @cached_property
    def start(self) -> LateStart:
        """The ridge regression that new models start from."""
        return LateStart(self.inputs, self._pairs, self._search)


def _own_pairs(order: EpochOrder, batch: slice) -> np.ndarray:
    """The pairs of a batch whose photos this rank reads, ascending."""
    chosen = np.sort(order.pairs[batch])
    return chosen[Share.of(len(chosen)).own]
