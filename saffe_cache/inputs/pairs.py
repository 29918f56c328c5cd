"""Pairs of gallery inputs and texts, and splits by photo content: for training, choosing and reporting.

One rule for all verbs: a photo that belongs to several splits is not trained on, and a photo that is reported does not
choose either. Photos are compared by the hash of their bytes: equal files have one row in a cache.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass, replace
from pathlib import Path
from typing import NamedTuple

import numpy as np

from saffe_cache.core.features import NOUNS, Modality, short_hash
from saffe_cache.core.items import Inputs, ItemTable, Ragged
from saffe_cache.core.options import require
from saffe_cache.core.texts import Texts
from saffe_cache.inputs.composed import Composed, composed_queries
from saffe_cache.inputs.spec import PairKind, RunSpec, SplitOptions
from saffe_cache.retrieval.baselines import Rows, unit_rows
from saffe_cache.store.reader import Cache, EncoderCache

_BLOCK = 2**16
"""Photos whose hashes are drawn together."""
VALIDATION_SPLITS = ("dev", "val", "valid", "validation")


@dataclass(frozen=True)
class Pairs:
    """Gallery inputs, one row for each, and the texts that describe them."""

    kind: PairKind
    ids: Texts
    rows: np.ndarray
    """int64 [n]: the photo's (or sound's) row in its encoder's arrays; no two are equal."""
    texts: Ragged
    """Text rows of each: its captions, or the prompts of its classes. With composed queries there may be none."""
    labels: Ragged
    """Class indices of each."""
    paired_texts: np.ndarray | None = None
    """int64 [n]: the text row that is paired with each photo in the gallery; None for null text."""
    num_unusable: int = 0
    """Items that are left out because an input is unreadable or missing."""
    drawn_from: int = 0
    """Photos that these were drawn from; 0 where they are all that there are."""
    composed: Composed | None = None
    """Queries of photos and texts that search these photos; None of another kind."""

    def __len__(self) -> int:
        return len(self.rows)

    def take(self, chosen: np.ndarray) -> Pairs:
        """The chosen pairs, in the given order; composed queries stay whose photos do."""
        places = np.full(len(self), -1)
        places[chosen] = np.arange(len(chosen))
        return replace(
            self,
            ids=self.ids.take(chosen),
            rows=self.rows[chosen],
            texts=self.texts.take(chosen),
            labels=self.labels.take(chosen),
            paired_texts=None if self.paired_texts is None else self.paired_texts[chosen],
            composed=None if self.composed is None else self.composed.over(places),
        )

    def permuted(self, seed: int) -> Pairs:
        """The same photos with permuted texts, to train a control on; composed queries get each other's targets."""
        generator = np.random.default_rng(seed)
        if self.composed is None:
            return replace(self, rows=self.rows[generator.permutation(len(self))])
        order = generator.permutation(len(self))
        return replace(self, texts=self.texts.take(order), composed=self.composed.permuted(generator))

    def described(self) -> Pairs:
        """Those that have a text; with composed queries some may have none."""
        has_text = self.texts.lengths > 0
        return self if has_text.all() else self.take(np.flatnonzero(has_text))

    @property
    def num_samples(self) -> int:
        """What an epoch of training sees once: the pairs, or their composed queries."""
        return len(self) if self.composed is None else len(self.composed)

    @property
    def searching(self) -> Ragged:
        """Text rows of what searches: of each pair, or of each composed query."""
        return self.texts if self.composed is None else self.composed.texts

    @property
    def owners(self) -> np.ndarray:
        """int64: the pair that each of `texts.values` belongs to."""
        return self.texts.owners


def pair_kind(table: ItemTable) -> PairKind:
    """Captions if the items have any, else classes; ValueError if they have neither."""
    are_photos = ~table.are_queries  # of whatever medium: composed queries have texts and groups of their own
    if table.captions.lengths[are_photos].any():
        return "captions"
    if table.labels.lengths[are_photos].any():
        return "classes"
    raise ValueError(
        "the cache's items have neither captions nor labels: there is nothing to align. Extract data with either."
    )


def gallery_modality(cache: Cache) -> Modality:
    """ "image", or "audio" or "video" in a cache of sounds or videos without photos."""
    kinds = {encoder.manifest.modality for encoder in cache.encoders.values()}
    order: tuple[Modality, ...] = ("image", "audio", "video")
    return next((modality for modality in order if modality in kinds), "image")


def in_one_space(gallery: EncoderCache, text: EncoderCache) -> bool:
    """Whether both encoders are halves of one model, of one revision, and project into one space."""
    manifests = gallery.manifest, text.manifest
    models = {(of.fingerprint.fields["model_id"], of.fingerprint.fields.get("revision")) for of in manifests}
    return len(models) == 1 and all(of.vector == "projected" for of in manifests)


def select_pairs(
    table: ItemTable,
    gallery: EncoderCache,
    text: EncoderCache,
    split: str,
    kind: PairKind,
    *,
    first_paired: bool = False,
) -> Pairs:
    """All usable pairs of a split; items with the same photo become one, with the texts of all.

    `kind` says which texts describe an item. With `first_paired`, the first caption is paired with the photo, and only
    the others describe it. Composed queries search all photos of the split, with and without captions.

    Raises:
        ValueError: the split has no usable pair.
    """
    least = 2 if first_paired else 0 if kind == "composed" else 1
    items = table.in_split(split)
    rows = table.rows[gallery.manifest.modality][items]
    texts = _texts_of(table, items, kind)
    is_usable = (table.problems.lengths[items] == 0) & gallery.usable(rows) & (_num_distinct(texts, least) >= least)
    is_usable[texts.owners[~text.usable(texts.values)]] = False
    unusable = int(np.count_nonzero(~is_usable))
    if unusable == len(items):
        needed = f"at least {least} captions" if first_paired else kind
        raise ValueError(
            f"split {split!r}: none of its {unusable} items has a readable input and {needed}. See inspect."
        )
    kept = np.flatnonzero(is_usable)
    distinct, first, inverse = np.unique(rows[kept], return_index=True, return_inverse=True)
    order = np.argsort(first)  # of the photos, by their first item
    group = np.argsort(order)[inverse]
    merged, labels = (_merged(of.take(kept), group) for of in (texts, table.labels.take(items)))
    paired = merged.values[merged.offsets[:-1]] if first_paired else None
    texts = _without_first(merged) if first_paired else merged
    ids = table.ids.take(items[kept[first[order]]])
    pairs = Pairs(kind, ids, distinct[order], texts, labels, paired, unusable)
    if kind != "composed":
        return pairs
    places = np.full(len(table), -1)
    places[items[kept]] = group
    composed, num_others = composed_queries(table, split, places, labels, text.usable)
    _require_queries(composed, f"split {split!r}", num_others)
    return replace(pairs, num_unusable=unusable + num_others, composed=composed)


def _require_queries(composed: Composed, where: str, num_others: int = 0) -> None:
    """Raise ValueError if there are none."""
    if not len(composed):
        others = f"; {num_others} others lack a photo or a target" if num_others else ""
        raise ValueError(
            f"{where}: found no composed query{others}. Give queries.jsonl beside the photos, or use another --pairs."
        )


def _texts_of(table: ItemTable, items: np.ndarray, kind: PairKind) -> Ragged:
    """Text rows of each item: its captions, or the prompts of its classes."""
    if kind != "classes":
        return table.captions.take(items)
    labels = table.labels.take(items)
    texts = table.class_texts.take(labels.values)
    return Ragged(texts.offsets[labels.offsets], texts.values)


def _num_distinct(rows: Ragged, most: int) -> np.ndarray:
    """How many different values each row has, counted up to `most` (1 or 2)."""
    lengths = rows.lengths
    if most == 1 or not len(rows.values):
        return np.asarray(np.minimum(lengths, most))
    is_first = np.ones(len(rows.values), bool)
    is_first[1:] = rows.owners[1:] != rows.owners[:-1]
    differs = rows.values != np.repeat(rows.values[is_first], lengths[lengths > 0])
    differing = np.bincount(rows.owners[differs], minlength=len(rows))
    return np.asarray(np.minimum(lengths, 1) + np.minimum(differing, 1))


def _merged(rows: Ragged, group: np.ndarray) -> Ragged:
    """The rows of each group as one, in their order; of equal values the first is kept."""
    groups = group[rows.owners]
    order = np.argsort(groups, kind="stable")
    groups, values = groups[order], rows.values[order]
    _, first = np.unique(groups * (values.max(initial=0) + 1) + values, return_index=True)
    first.sort()
    lengths = np.bincount(groups[first], minlength=group.max() + 1)
    return Ragged(np.concatenate([np.zeros(1, np.int64), np.cumsum(lengths)]), values[first])


def _without_first(rows: Ragged) -> Ragged:
    """The rows without the first value of each."""
    is_rest = np.ones(len(rows.values), bool)
    is_rest[rows.offsets[:-1]] = False
    return Ragged(rows.offsets - np.arange(len(rows.offsets)), rows.values[is_rest])


def mean_text_rows(pairs: Pairs, text: EncoderCache) -> Rows:
    """Mean of the unit vectors of each pair's texts, float32 [n, d]: the target of a ridge regression."""

    def means(these: slice) -> np.ndarray:
        offsets = pairs.texts.offsets[these.start : these.stop + 1]
        distinct, position = np.unique(pairs.texts.values[offsets[0] : offsets[-1]], return_inverse=True)
        vectors = unit_rows(text.vectors(distinct))[position]
        sums = np.add.reduceat(vectors, offsets[:-1] - offsets[0], axis=0)
        return np.asarray(sums / np.diff(offsets)[:, None], np.float32)

    return Rows(len(pairs), means)


def class_vectors(table: ItemTable, text: EncoderCache) -> np.ndarray:
    """Mean of the unit vectors of each class's prompts, float32 [classes, d]."""
    return np.stack([unit_rows(text.vectors(rows)).mean(axis=0) for rows in table.class_texts]).astype(np.float32)


class Unpaired(NamedTuple):
    """Photos and texts of some items, without their pairing: each side's order follows from its content alone."""

    rows: np.ndarray
    """int64: distinct photos (or sounds), by their rows in the encoder's arrays."""
    texts: np.ndarray
    """int64: distinct texts, by their rows."""


class Parts(NamedTuple):
    """Pairs without a common photo."""

    training: Pairs
    validation: Pairs
    num_shared: int
    """Photos of the train split that are left out because they belong to other splits too."""


def own_pairs(table: ItemTable, modality: Modality, split: str, pairs: Pairs) -> Pairs:
    """The pairs of a split whose photo belongs to no other split; ValueError if there are none."""
    elsewhere = table.rows[modality][~table.splits.are(split)]
    is_own = ~table.inputs[modality].shared(pairs.rows, elsewhere)
    if not is_own.any():
        raise ValueError(
            f"split {split!r}: all of its {len(pairs)} {NOUNS[modality]}s belong to other splits too. Keep each in one."
        )
    return pairs.take(np.flatnonzero(is_own))


def split_pairs(
    cache: Cache,
    encoders: tuple[EncoderCache, EncoderCache],
    kind: PairKind,
    options: SplitOptions,
    seed: int,
    *,
    reported: Pairs | None = None,
    first_paired: bool = False,
) -> Parts:
    """Pairs to train on, and pairs to choose by.

    Args:
        encoders: the gallery's and the text's.
        options: the splits' names and fractions; `validation` is a split's name or heldout.
        seed: of what is held out.
        reported: pairs that must not choose.
        kind, first_paired: as of `select_pairs`.

    Raises:
        ValueError: a split has no usable pair, or no photo of its own.
    """
    modality, table = encoders[0].manifest.modality, cache.table
    hashes = table.inputs[modality].content_hash
    chosen = select_pairs(table, *encoders, options.train_split, kind, first_paired=first_paired)
    training = own_pairs(table, modality, options.train_split, chosen)
    num_shared = len(chosen) - len(training)
    if options.validation == "heldout":
        training, validation = hold_out(training, options.validation_fraction, seed, hashes, options.validation_photos)
        training = _without(training, validation, table.inputs[modality])
    else:
        validation = select_pairs(table, *encoders, options.validation, kind, first_paired=first_paired)
        require_classes(validation, table, options.validation)
    if reported is not None:
        is_free = ~table.inputs[modality].shared(validation.rows, reported.rows)
        if not is_free.any():
            raise ValueError(f"--validation {options.validation}: all of its {len(validation)} items are reported.")
        validation = validation.take(np.flatnonzero(is_free))
    if 0 < options.validation_photos < len(validation):
        first = _drawn_pairs(validation, seed, hashes)[: options.validation_photos]
        validation = replace(validation.take(np.sort(first)), drawn_from=len(validation))
    training = keep_part(training, options.train_fraction, seed, hashes)
    for part, name in ((training, options.train_split), (validation, options.validation)):
        if part.composed is not None:
            _require_queries(part.composed, f"items of {name!r} to train or validate on")
    return Parts(training, validation, num_shared)


def _without(pairs: Pairs, others: Pairs, inputs: Inputs) -> Pairs:
    """The pairs that share no input with others, where items of several media may share some of them.

    Raises:
        ValueError: there are none.
    """
    if inputs.of_media is None:  # the rows of pairs are distinct
        return pairs
    kept = np.flatnonzero(~inputs.shared(pairs.rows, others.rows))
    if not len(kept):
        raise ValueError(
            f"all of {len(pairs)} items share a photo, sound or video with one that is held out. Use a split for "
            "--validation."
        )
    return pairs.take(kept)


def require_classes(pairs: Pairs, table: ItemTable, split: str) -> None:
    """Raise ValueError if all photos of a split have the same one of several classes: any ranking is perfect."""
    present = np.unique(pairs.labels.values)
    if pairs.kind == "classes" and len(present) == 1 < len(table.class_names):
        raise ValueError(
            f"split {split!r}: all of its {len(pairs)} items have the class {table.class_names[int(present[0])]!r}, "
            f"one of {len(table.class_names)}: every ranking is perfect. Correct its classes, or use another split."
        )


def training_pairs(spec: RunSpec, cache: Cache) -> Parts:
    """The pairs that a run trains on and is validated on."""
    encoders = cache.encoders[spec.gallery_key], cache.encoders[spec.text_key]
    first_paired = spec.gallery_text == "first_caption"
    return split_pairs(cache, encoders, spec.pairs, spec, spec.seed, first_paired=first_paired)


def unpaired_inputs(spec: RunSpec, cache: Cache) -> Unpaired | None:
    """The photos and texts that a run uses without their pairing, if any; ValueError if none are left."""
    gallery, text = cache.encoders[spec.gallery_key], cache.encoders[spec.text_key]
    modality, table = gallery.manifest.modality, cache.table
    if spec.unpaired is None:
        return None
    if spec.unpaired == "rest":
        whole, kept = (training_pairs(of, cache).training for of in (replace(spec, train_fraction=1.0), spec))
        pairs = whole.take(np.flatnonzero(~np.isin(whole.rows, kept.rows)))
        require(len(pairs) > 0, "unpaired", "rest, with all items trained on", "a smaller --train-fraction")
    else:
        chosen = select_pairs(table, gallery, text, spec.unpaired, spec.pairs)
        pairs = own_pairs(table, modality, spec.unpaired, chosen)
    texts = np.unique(pairs.texts.values)
    sides = ((pairs.rows, table.inputs[modality]), (texts, table.inputs["text"]))
    return Unpaired(*(rows[drawn_order(rows, spec.seed, of.content_hash)] for rows, of in sides))


def run_fingerprint(cache: Cache, spec: RunSpec, training: Pairs, validation: Pairs) -> str:
    """Hash of the content of all that a run trains on and is validated on."""
    of_pairs, unpaired = data_fingerprint(cache, spec, training, validation), unpaired_inputs(spec, cache)
    if unpaired is None:
        return of_pairs
    inputs, modality = cache.table.inputs, cache.encoders[spec.gallery_key].manifest.modality
    sides = ((unpaired.rows, inputs[modality]), (unpaired.texts, inputs["text"]))
    return short_hash([of_pairs, *(hashlib.sha256(of.content_hash[rows].tobytes()).hexdigest() for rows, of in sides)])


def data_fingerprint(cache: Cache, spec: RunSpec, *parts: Pairs) -> str:
    """Hash of the content of pairs that a run sees."""
    return content_fingerprint(cache.table, cache.encoders[spec.gallery_key].manifest.modality, *parts)


def content_fingerprint(table: ItemTable, modality: Modality, *parts: Pairs) -> str:
    """Hash of the content of some pairs: photos by their bytes, texts by their characters, in order."""
    photo_hash, text_hash = (table.inputs[name].content_hash for name in (modality, "text"))
    digest = hashlib.sha256()
    for pairs in parts:
        digest.update(photo_hash[pairs.rows].tobytes())
        digest.update(text_hash[pairs.texts.values].tobytes())
        digest.update(pairs.texts.lengths.astype("<i8").tobytes())
        if pairs.paired_texts is not None:
            digest.update(text_hash[pairs.paired_texts].tobytes())
        if (of := pairs.composed) is not None:
            for photos in (of.references, of.targets.values, of.members.values):
                digest.update(photo_hash[pairs.rows[photos]].tobytes())
            digest.update(text_hash[of.texts.values].tobytes())
            for numbers in (of.targets.lengths, of.members.lengths, of.texts.lengths, of.groups):
                digest.update(numbers.astype("<i8").tobytes())
    return digest.hexdigest()[:16]


def reported_fingerprint(cache: Cache, spec: RunSpec, pairs: Pairs) -> str:
    """Hash over the data that an evaluation measures on: the pairs' content, and all classes that search."""
    hashes = cache.table.inputs["text"].content_hash
    classes = [hashes[rows].tobytes().hex() for rows in cache.table.class_texts] if pairs.kind == "classes" else []
    return short_hash([data_fingerprint(cache, spec, pairs), classes])


def require_encoders(spec: RunSpec, cache: Cache, run_dir: str | Path) -> None:
    """Raise ValueError if the cache lacks an encoder that a run was trained on."""
    if (
        spec.media
        and all(key in cache.encoders for key in spec.media.values())
        and spec.gallery_key not in cache.encoders
    ):
        raise ValueError(
            f"--run {run_dir}: it fuses {' and '.join(spec.media)} of each item, expected a run of one medium: this "
            "command joins no media. Train with another --gallery."
        )
    keys = (*(spec.media.values() or [spec.gallery_key]), spec.text_key)
    missing = [key for key in keys if key not in cache.encoders]
    if missing:
        raise ValueError(
            f"--run {run_dir}: it was trained on {missing[0]}, which {cache.storage.root} does not hold "
            f"({', '.join(cache.encoders) or 'no encoder'}). Give the cache that it was trained on."
        )


def same_training_pairs(spec: RunSpec, cache: Cache, run_dir: str | Path) -> tuple[Pairs, Pairs]:
    """The pairs that a run was trained and validated on, from the cache that it was trained on.

    Raises:
        ValueError: the cache holds other encoders or data than the run has seen: it is another cache, or has grown.
    """
    require_encoders(spec, cache, run_dir)
    training, validation, _ = training_pairs(spec, cache)
    if run_fingerprint(cache, spec, training, validation) != spec.data:
        raise ValueError(
            f"--run {run_dir}: it was trained on other items or texts than {cache.storage.root} holds now for "
            f"split {spec.train_split!r}: what it has seen is unknown. Give the cache of its training, or train again."
        )
    return training, validation


def hold_out(pairs: Pairs, fraction: float, seed: int, content_hash: np.ndarray, most: int = 0) -> tuple[Pairs, Pairs]:
    """Split by photo into a part to train on and a part that is held out, of at most `most` photos; 0 sets no bound.

    Photos are ordered by a hash of their content and the seed, so the parts change little as the data grow.
    """
    order = _drawn_pairs(pairs, seed, content_hash)
    wanted = max(1, round(fraction * len(pairs)))
    if wanted >= len(pairs):
        raise ValueError(f"{len(pairs)} pairs are too few to hold out {fraction:.0%}. Use more data.")
    count = min(wanted, most or wanted)
    held = pairs.take(np.sort(order[:count]))
    return pairs.take(np.sort(order[count:])), replace(held, drawn_from=wanted) if count < wanted else held


def keep_part(pairs: Pairs, fraction: float, seed: int, content_hash: np.ndarray) -> Pairs:
    """A fraction of the pairs, at least one, drawn as in `hold_out`: a smaller part lies within a larger one."""
    if fraction == 1:
        return pairs
    order = _drawn_pairs(pairs, seed, content_hash)
    first = order if pairs.composed is not None else order[::-1]
    return pairs.take(np.sort(first[: max(1, round(fraction * len(pairs)))]))


def _drawn_pairs(pairs: Pairs, seed: int, content_hash: np.ndarray) -> np.ndarray:
    """Positions of the pairs in an order that follows from their content and the seed.

    With composed queries, the reference and a target of each follow one another: both must be in one part.
    """
    order = drawn_order(pairs.rows, seed, content_hash)
    return order if pairs.composed is None else pairs.composed.first_photos(order)


def drawn_order(rows: np.ndarray, seed: int, content_hash: np.ndarray) -> np.ndarray:
    """The order of some photos' or texts' rows by a hash of their content and the seed, as positions in `rows`."""
    end, draws = seed.to_bytes(8, "big"), np.empty(len(rows), np.uint64)
    for start in range(0, len(rows), _BLOCK):
        contents = content_hash[rows[start : start + _BLOCK]].tobytes()
        digests = [hashlib.sha256(contents[at : at + 32] + end).digest()[:8] for at in range(0, len(contents), 32)]
        draws[start : start + _BLOCK] = np.frombuffer(b"".join(digests), ">u8")
    return np.argsort(draws, kind="stable")
