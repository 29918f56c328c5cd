"""Batches of a run's training pairs, straight from the cache, its validation score, and its objective over one batch.

The objective is a weighted sum of losses. Most see each photo fused with its paired text (the null text, its first
caption, or one of its own texts). `pair` and `matching` fuse some photos of the batch with several candidate texts:
their cost grows with photos times candidates, so both are bounded.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from functools import cached_property, partial
from typing import NamedTuple

import numpy as np
import torch
from torch import nn

from saffe_cache.core import ranks
from saffe_cache.core.devices import num_cores
from saffe_cache.core.items import Ragged
from saffe_cache.core.options import require
from saffe_cache.core.ranks import Share
from saffe_cache.fusion.base import Fused, Fusion, Pairing, Texts, TrainingVectors
from saffe_cache.fusion.losses import Batch, Contrast, UnpairedBatch, distinct_positives
from saffe_cache.fusion.mixing import mixed
from saffe_cache.fusion.options import ObjectiveOptions
from saffe_cache.fusion.registry import OBJECTIVES
from saffe_cache.inputs.feature_loader import FeatureLoader, in_blocks
from saffe_cache.inputs.pairs import Pairs, Unpaired, mean_text_rows
from saffe_cache.protocols.base import Protocol, SearchProtocol
from saffe_cache.protocols.registry import load_protocol, own_protocol
from saffe_cache.protocols.setting import Setting
from saffe_cache.retrieval import fitting
from saffe_cache.retrieval.baselines import LinearMap, Rows, fit_ridge, unit_rows

_TEXT_WEIGHTS = (4.0, 2.0, 1.0, 0.5, 0.25)
"""Candidates for the starting weight of the paired text's vector, relative to the photo's."""


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
    ) -> None:
        """`unpaired`: photos and texts that each batch has too, drawn independently of each other."""
        self.inputs, self._pairs, self._validation, self._seed = inputs, pairs, validation, seed
        self._unpaired = unpaired
        self._order: EpochOrder | None = None
        self._held: tuple[int, ...] = ()
        self._batch_size = fitting.batch_size(batch_size, len(pairs))
        require(self._batch_size >= ranks.size(), "batch_size", self._batch_size, f"{ranks.size()}, one for each rank")
        self._ridges: dict[bool, tuple[LinearMap, np.ndarray]] = {}

    @property
    def steps_per_epoch(self) -> int:
        """Whole batches; the photos of a short last batch take part in other epochs."""
        return len(self._pairs) // self._batch_size

    def batches(self, step: int, stop: int) -> Iterator[Batch]:
        """The batches of steps `step` to `stop`, read one ahead if the steps leave a processor core for it."""
        reads_ahead = self.inputs.device != "cpu" or torch.get_num_threads() * ranks.on_this_host() < num_cores()
        # The reader gets one thread: more would exceed the cores and slow down the steps.
        with ThreadPoolExecutor(1, initializer=torch.set_num_threads, initargs=(1,)) as pool:
            ahead: Future[Batch] | None = None
            for number in range(step, stop):
                batch = ahead.result() if ahead else self._read(number)
                if number + 1 < stop:
                    self.inputs.will_need(
                        self._pairs.rows[_own_pairs(*self._place(number + 1))], self._views(number + 1)
                    )
                    ahead = pool.submit(self._read, number + 1) if reads_ahead else None
                yield batch

    def seen(self, steps: int) -> tuple[int, int]:
        """Photos and texts that passed through the model in this number of steps and in the validations between them.

        Without a cache, the encoders would have had to encode these.
        """
        texts, validations = self._pairs.texts, steps // self.steps_per_epoch + 1
        of_batch = min(len(np.unique(texts.values)), round(self._batch_size * len(texts.values) / len(self._pairs)))
        photos = steps * self._batch_size + validations * len(self._validation)
        return photos, steps * of_batch + validations * len(self._search.queries)

    def _place(self, step: int) -> tuple[EpochOrder, slice]:
        """The order of a step's epoch, and the slice of it that is the step's batch."""
        epoch, within = divmod(step, self.steps_per_epoch)
        if self._order is None or self._order.epoch != epoch:
            spec = self.inputs.spec
            gallery = self.inputs.gallery
            shard_rows = gallery.array(f"hidden_states/{spec.gallery_layers[0]}").spec.shard_rows
            shards = gallery.first_rows(self._pairs.rows) // shard_rows
            self._order = draw_order(shards, spec.shuffled_shards, self._seed, epoch)
        return self._order, slice(within * self._batch_size, (within + 1) * self._batch_size)

    def _read(self, step: int) -> Batch:
        epoch, within = divmod(step, self.steps_per_epoch)
        order, here = self._place(step)
        self._hold(order, here)
        chosen = np.sort(order.pairs[here])
        texts = self._pairs.texts.take(chosen)
        distinct, columns, positives = distinct_positives(texts)
        draws = np.random.default_rng((self._seed, epoch, within)).random(len(chosen))
        own = columns[texts.offsets[:-1] + (draws * texts.lengths).astype(np.int64)]
        matches, drawn = (torch.from_numpy(of_batch).to(self.inputs.device) for of_batch in (positives, own))
        of_photos, of_texts = Share.of(len(chosen)), Share.of(len(distinct))
        states, mask = self.inputs.photos(self._pairs.rows[chosen[of_photos.own]], self._views(step))
        paired = None
        if self.inputs.spec.gallery_text != "null":
            paired_texts = self._pairs.paired_texts
            of_chosen = distinct[own] if paired_texts is None else paired_texts[chosen]
            paired = self.inputs.texts(of_chosen[of_photos.own])
        queries = self.inputs.queries(distinct[of_texts.own])
        with_tokens = queries if queries.states else None
        unpaired = None if self._unpaired is None else self._read_unpaired(self._unpaired, (epoch, within))
        inputs = of_photos, of_texts, states, mask, paired, distinct, queries.vectors
        return Batch(*inputs, matches, drawn, queries=with_tokens, unpaired=unpaired)

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

    def _views(self, step: int) -> np.ndarray | None:
        """The view of each of this rank's photos in the batch of a step, drawn at random; None if there is only one."""
        count = 1 + len(self.inputs.spec.views)
        if count == 1:
            return None
        drawn = np.random.default_rng((self._seed, *divmod(step, self.steps_per_epoch), count))
        return drawn.integers(count, size=self._batch_size)[Share.of(self._batch_size).own]

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

    def start_as_late_fusion(self, model: Fusion, linear: nn.Linear) -> None:
        """Set the ridge regression of the photo and the weight of the paired text, both chosen by validation.

        `linear` is the linear path of a new model. Everything else starts at zero, so the model's output for a photo is
        known without running it.
        """
        best, mapped = self._ridge(model)
        paired = self._validation.paired_texts
        with torch.no_grad():
            linear.weight.copy_(torch.from_numpy(best.weight))
            linear.bias.copy_(torch.from_numpy(best.bias))
            if model.shape.pooled_text and paired is not None:
                photos, texts = unit_rows(mapped), model.eval().text_map(self.inputs.vectors(paired)).cpu().numpy()
                weights = {one: self._search_score(unit_rows(photos + one * texts), model) for one in _TEXT_WEIGHTS}
                model.text_weight.fill_(max(weights, key=weights.__getitem__))

    def _ridge(self, model: Fusion) -> tuple[LinearMap, np.ndarray]:
        """The ridge regression from what a model's linear path sees to the photos' texts, and the validation photos.

        Validation picks its strength.
        """
        known = None if model.fuses_first else model.shape.maps_queries  # where all else that is new is equal
        if known is not None and known in self._ridges:
            return self._ridges[known]
        model.eval()
        training, validation = (
            self._linear_features(self._pairs, model),
            self._linear_features(self._validation, model).whole,
        )
        best = fit_ridge(training, self._text_means, lambda fit: self._search_score(unit_rows(fit(validation)), model))
        found = best, best(validation)
        if known is not None:
            self._ridges[known] = found
        return found

    def ridge(self) -> LinearMap:
        """The ridge regression from the photos' summaries to their texts, the baseline: that of `_ridge` of any model
        whose linear path sees the photo alone."""
        for best, _ in self._ridges.values():
            return best
        training, validation = (_rows(pairs.rows, self.inputs.summaries) for pairs in (self._pairs, self._validation))
        photos = validation.whole
        queries = unit_rows(self._search.queries.vectors)
        return fit_ridge(
            training,
            self._text_means,
            lambda fit: self._search.validation_score(unit_rows(fit(photos)), queries),
        )

    def training_vectors(self, model: Fusion) -> TrainingVectors:
        """What a fusion in closed form is fitted on; it validates the model that is to be fitted."""
        texts = self._pairs.texts
        distinct, places = np.unique(texts.values, return_inverse=True)
        photos = _rows(self._pairs.rows, self.inputs.summaries).whole
        vectors = unit_rows(self.inputs.text.vectors(distinct))
        return TrainingVectors(photos, vectors, Ragged(texts.offsets, places), lambda: self.validate(model))

    def validate(self, model: Fusion) -> float:
        """The validation score of a model, on which all ranks agree."""
        measured = self.protocol.validate(model.eval())
        return ranks.agreed(lambda: measured)

    def _search_score(self, photos: np.ndarray, model: Fusion) -> float:
        """The main metric of a search over unit vectors of the validation photos."""
        return self._search.validate_gallery(photos, model)

    def _linear_features(self, pairs: Pairs, model: Fusion) -> Rows:
        paired = pairs.paired_texts if model.fuses_first else None

        def features(places: np.ndarray) -> torch.Tensor:
            texts = None if paired is None else self.inputs.texts(paired[places])
            return model.linear_features(*self.inputs.photos(pairs.rows[places]), texts)

        return _rows(np.arange(len(pairs)), features)

    @property
    def _text_means(self) -> Rows:
        return mean_text_rows(self._pairs, self.inputs.text)

    @cached_property
    def protocol(self) -> Protocol:
        """The run's own protocol on the validation pairs."""
        return load_protocol(own_protocol(self.inputs.spec))(Setting(self.inputs, self._validation))

    @cached_property
    def _search(self) -> SearchProtocol:
        return self.protocol.validation_search()


def _rows(inputs: np.ndarray, compute: Callable[[np.ndarray], torch.Tensor]) -> Rows:
    """What is computed of some inputs, a block at a time."""
    return Rows(len(inputs), lambda rows: in_blocks(lambda these: compute(inputs[rows][these]), len(inputs[rows])))


def _own_pairs(order: EpochOrder, batch: slice) -> np.ndarray:
    """The pairs of a batch whose photos this rank reads, ascending."""
    chosen = np.sort(order.pairs[batch])
    return chosen[Share.of(len(chosen)).own]


def _mapped(
    model: Fusion, batch: Batch | UnpairedBatch, paired: Texts | None = None
) -> tuple[torch.Tensor, torch.Tensor]:
    """Unit vectors of a batch's photos, with the texts that are paired with the own ones, and of its texts."""
    with batch.photos.drawn():
        photos = batch.photos.gather(model(batch.states, batch.mask, paired).float())
    with batch.texts.drawn():
        texts = Texts.of_vectors(batch.vectors) if batch.queries is None else batch.queries
        queries = batch.texts.gather(model.encode_texts(texts).float())
    return photos, queries


class Objective(nn.Module):
    """The weighted sum, and the losses' own learned scalars."""

    def __init__(self, options: ObjectiveOptions, read_texts: Callable[[np.ndarray], Texts]) -> None:
        """`read_texts` reads texts by their rows."""
        super().__init__()
        self._options, self._read_texts = options, read_texts
        self.losses = nn.ModuleDict({name: OBJECTIVES[name].make(options) for name in options.objective})

    def fit(self, seen: Callable[[], TrainingVectors]) -> None:
        """Fit what losses compare with, before the first step."""
        taught = [loss for name, loss in self.losses.items() if OBJECTIVES[name].has_teacher]
        if taught:
            vectors = seen()
            for loss in taught:
                loss.fit(vectors)  # type: ignore[operator]

    def scalars(self) -> dict[str, float]:
        """The learned scalars, for the log."""
        return {name: float(value.detach()) for name, value in self.losses.named_parameters()}

    def forward(self, model: Fusion, batch: Batch) -> torch.Tensor:
        """The loss of a batch; draws at random from torch's generator."""
        if self._options.mixup:
            batch = mixed(batch, self._options.mixup)
        paired = batch.paired_texts
        if paired is not None and self._options.text_dropout:
            dropped = torch.rand(batch.photos.total, device=paired.mask.device) < self._options.text_dropout
            paired = paired.without(dropped[batch.photos.own])
        self._check(batch.positives)
        photos, queries = _mapped(model, batch, paired)
        unpaired = None if batch.unpaired is None else _mapped(model, batch.unpaired)

        def match(fused: Fused, columns: torch.Tensor) -> torch.Tensor:
            return model.match(fused, queries[columns].detach())

        fuse = partial(self._of_pairs, model, batch, lambda fused, _: fused.vectors)
        matched = partial(self._of_pairs, model, batch, match)
        contrast = Contrast(batch, photos, queries, fuse, matched, model.summaries, unpaired)
        losses = [weight * self.losses[name](contrast) for name, weight in self._options.objective.items()]
        return torch.stack(losses).sum()

    def _check(self, positives: torch.Tensor) -> None:
        """Raise ValueError if a loss over fused pairs finds no wrong partner for some photo or text."""
        over_pairs = {name: OBJECTIVES[name] for name in self._options.objective if OBJECTIVES[name].fuses_pairs}
        no_text = bool(over_pairs) and bool(positives.all(dim=1).any())
        needs_photos = any(entry.needs_wrong_photos for entry in over_pairs.values())
        if no_text or (needs_photos and bool(positives.all(dim=0).any())):
            raise ValueError(
                f"--objective {', '.join(over_pairs)}: a photo of the batch has no wrong text in it, or a text no "
                "wrong photo. Give several classes, or a larger --batch-size."
            )

    def _of_pairs(
        self,
        model: Fusion,
        batch: Batch,
        compute: Callable[[Fused, torch.Tensor], torch.Tensor],
        photos: torch.Tensor,
        columns: torch.Tensor,
    ) -> torch.Tensor:
        """What is computed of photos of the batch, by position, fused with texts, by column, where the photos are."""
        pairs = batch.photos.owning(photos)
        own, places = columns[pairs.own], photos[pairs.own] - batch.photos.start
        with pairs.drawn():
            # without a pair of its own, a rank computes one in vain, of any photo that it has
            fused = self._fuse(model, batch, places % batch.photos.num_own, own)
            return pairs.gather(compute(fused, own))

    def _fuse(self, model: Fusion, batch: Batch, photos: torch.Tensor, columns: torch.Tensor) -> Fused:
        """Fuse own photos, by position, with texts of the batch, by column; each side is computed once."""
        distinct_photos, gallery = torch.unique(photos, return_inverse=True)
        distinct_columns, text = torch.unique(columns, return_inverse=True)
        texts = self._read_texts(batch.text_rows[distinct_columns.cpu().numpy()])
        mask = None if batch.mask is None else batch.mask[distinct_photos]
        return model.fuse([state[distinct_photos] for state in batch.states], mask, texts, Pairing(gallery, text))
