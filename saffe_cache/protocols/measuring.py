"""The protocols over a run: from a model and an arrangement of the gallery to scores.

An *arrangement* says which photo and which text stand at each place of the gallery. The honest one is the
identity; the controls are others (photos shuffled, one photo everywhere, texts shuffled), measured by the same code.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Literal, NamedTuple

import numpy as np

from saffe_cache.core.features import short_hash
from saffe_cache.fusion.base import Fusion
from saffe_cache.inputs.feature_loader import FamInputs, encode_gallery, encode_queries
from saffe_cache.inputs.pairs import PairKind, Pairs, select_pairs
from saffe_cache.inputs.spec import RunSpec, data_fingerprint
from saffe_cache.protocols.answers import Answered, ClassScores, Reordered, Vectors
from saffe_cache.protocols.pair_scores import PairScores, score_all_pairs, score_chosen_pairs
from saffe_cache.protocols.search import Search, SearchName, make_search
from saffe_cache.retrieval.candidates import candidate_scores, dealt_map, reordered, reranked_scores
from saffe_cache.retrieval.ranking import InnerProducts, relevant_ranks, top_k
from saffe_cache.retrieval.scores import MAP_K, RECALL_KS, Scores, image_scores
from saffe_cache.store.reader import Cache

ProtocolName = Literal["caption", "class", "metadata", "candidate", "rerank", "image"]
DEFINITIONS: dict[ProtocolName, str] = {
    "caption": "each caption searches the photos, one of which is relevant, so that mean average precision is mrr "
    "(M2); each photo searches the captions; the gallery is f(photo, null text)",
    "class": "each class's text searches the photos (M1); map is the mean over classes of non-interpolated average "
    "precision over the whole ranking, map_at_100 the same over its first 100, divided by min(relevant, 100); "
    "top1 is the share of photos whose nearest class text is theirs (M5); the gallery is f(photo, null text)",
    "metadata": "each text searches photos that lie beside their first caption; relevant are the photos that it "
    "describes; map is the mean over texts of non-interpolated average precision; the gallery is f(photo, caption)",
    "candidate": "every photo is fused with every class's text and scored by the cosine of the two (re-ranking, one "
    "forward pass a pair): map over each class's ranking of the photos, top1 and top5 over the classes of each photo; "
    "prior_removed subtracts each class's mean score over training photos; matching scores by the matching head",
    "rerank": "the first k of the search with null text are re-ordered by the score of the fused pair, or by the "
    "matching logit plus the cosine; what is below keeps its place",
    "image": "each photo searches the other photos of its class (M4); the gallery is f(photo, null text)",
}
_PRIOR_PHOTOS = 500
NUM_SHUFFLES = 10


def reported_pairs(cache: Cache, spec: RunSpec, split: str, protocol: ProtocolName) -> Pairs:
    """The pairs of a split that a protocol measures a run on.

    Raises:
        ValueError: the protocol is none for the run, or the split has no usable pair.
    """
    beside = protocol == "metadata"
    if beside and spec.gallery_text != "first_caption":
        raise ValueError(
            f"--protocol metadata: the run was trained with --gallery-text {spec.gallery_text}, it has not learned to "
            "fuse. Train with --gallery-text first_caption."
        )
    by_class = protocol in ("class", "candidate", "image") or (protocol == "rerank" and spec.pairs == "classes")
    kind: PairKind = "classes" if by_class else "captions"
    gallery, text = cache.encoders[spec.gallery_key], cache.encoders[spec.text_key]
    return select_pairs(cache.table, gallery, text, split, kind, first_beside=beside)


def reported_data(cache: Cache, spec: RunSpec, pairs: Pairs) -> str:
    """Hash over what a report of some pairs looks at besides the run: their content, and all classes that search."""
    hashes = cache.table.inputs["text"].content_hash
    classes = [hashes[rows].tobytes().hex() for rows in cache.table.class_texts] if pairs.kind == "classes" else []
    return short_hash([data_fingerprint(cache, spec, pairs), classes])


def metric_names(cache: Cache, spec: RunSpec, protocol: ProtocolName) -> list[str]:
    """What the scores of a run are called, before there are any."""
    first_ranks = [*(f"recall_at_{k}" for k in RECALL_KS), "mrr", "median_rank"]
    of_classes = ["map", f"map_at_{MAP_K}"]
    match protocol:
        case "caption":
            return [*first_ranks, *(f"image_to_text_{name}" for name in first_ranks)]
        case "class":
            return [*of_classes, "top1"]
        case "metadata" | "rerank":
            return ["map", *first_ranks]
        case "candidate":
            top5 = ["top5"] if len(cache.table.class_names) > 5 else []
            matching = ["map_matching", "top1_matching"] if spec.shape.matches else []
            return [*of_classes, "top1", *top5, "top1_prior_removed", *matching]
        case "image":
            return [*of_classes, "recall_at_1"]


class Arrangement(NamedTuple):
    """Positions in the pairs, int64 [n] each."""

    photos: np.ndarray
    texts: np.ndarray


@dataclass(frozen=True)
class Setting:
    """A run, and the pairs that it is measured on."""

    inputs: FamInputs
    pairs: Pairs
    training_rows: np.ndarray
    """Photos of the training pairs."""
    seed: int
    _vectors: dict[Fusion, np.ndarray] = field(default_factory=dict, repr=False)

    @property
    def cache(self) -> Cache:
        return self.inputs.cache

    @property
    def spec(self) -> RunSpec:
        return self.inputs.spec

    def honest(self) -> Arrangement:
        places = np.arange(len(self.pairs))
        return Arrangement(places, places)

    def gallery(self, model: Fusion, arrangement: Arrangement) -> np.ndarray:
        """f(photo, what lies beside it) at each place: unit vectors [n, d]. With null text a photo is encoded once."""
        if self.pairs.beside is not None:
            rows, beside = self.pairs.rows[arrangement.photos], self.pairs.beside[arrangement.texts]
            return encode_gallery(model, self.inputs, rows, beside)
        if model not in self._vectors:
            self._vectors[model] = encode_gallery(model, self.inputs, self.pairs.rows)
        return np.asarray(self._vectors[model][arrangement.photos])

    def queries(self, model: Fusion, search: Search) -> np.ndarray:
        return encode_queries(model, search.vectors, self.inputs.device)


@dataclass(frozen=True)
class Protocol:
    """What is measured, and how."""

    name: ProtocolName
    main_metric: str
    num_queries: int
    units: np.ndarray
    """int64 [queries]: the photo that each query is drawn with in a bootstrap."""
    answer: Callable[[Fusion, Arrangement], Answered]
    """How a model orders an arrangement of the gallery, and its scores."""
    search: Search | None = None
    """The search by texts that it is, or begins with."""
    num_shuffles: int = 0
    """Shuffles of the photos that tell how far chance spreads, where a bootstrap over the queries does not: the
    photos that search are the gallery too, or the queries are a few classes. 0 where it does."""
    dealt: Callable[[Fusion], tuple[float, float]] | None = None
    """Where classes search: mean and standard deviation of mAP when the class names are dealt at random."""

    def measure(self, model: Fusion, arrangement: Arrangement) -> Scores:
        return self.answer(model, arrangement).scores


def search_protocol(setting: Setting, name: SearchName) -> Protocol:
    """Texts search a gallery of vectors."""
    search = make_search(setting.cache, setting.spec, setting.pairs, name, setting.seed)

    def answer(model: Fusion, arrangement: Arrangement) -> Answered:
        vectors = Vectors(setting.gallery(model, arrangement), setting.queries(model, search))
        return Answered(search.score(*vectors), vectors)

    def dealt(model: Fusion) -> tuple[float, float]:
        gallery = setting.gallery(model, setting.honest())
        return dealt_map(gallery @ setting.queries(model, search).T, setting.pairs.labels, seed=setting.seed)

    by_class = dealt if name == "class" else None
    return Protocol(name, search.main_metric, len(search.vectors), search.units, answer, search, dealt=by_class)


def image_protocol(setting: Setting) -> Protocol:
    """Photos search photos."""
    labels, seed = setting.pairs.labels, setting.seed

    def answer(model: Fusion, arrangement: Arrangement) -> Answered:
        gallery = setting.gallery(model, arrangement)
        return Answered(image_scores(gallery, labels, seed=seed), Vectors(gallery, gallery))

    units = np.arange(len(labels))
    return Protocol("image", "map", len(labels), units, answer, num_shuffles=NUM_SHUFFLES)


def candidate_protocol(setting: Setting) -> Protocol:
    """Every photo with every class."""
    search = make_search(setting.cache, setting.spec, setting.pairs, "class", setting.seed)
    labels, seed = setting.pairs.labels, setting.seed
    known: dict[Fusion, tuple[PairScores, np.ndarray]] = {}

    def of(model: Fusion) -> tuple[PairScores, np.ndarray]:
        if model not in known:
            some = np.random.default_rng(seed).permutation(setting.training_rows)[:_PRIOR_PHOTOS]
            own = score_all_pairs(model, setting.inputs, setting.pairs.rows, search)
            known[model] = own, score_all_pairs(model, setting.inputs, some, search).cosine.mean(axis=0)
        return known[model]

    def answer(model: Fusion, arrangement: Arrangement) -> Answered:
        pairs, prior = of(model)
        cosine = pairs.cosine[arrangement.photos]
        scores = candidate_scores(cosine, labels, seed=seed)
        removed = candidate_scores(cosine, labels, prior=prior, seed=seed)
        scores["top1_prior_removed"] = removed["top1"]
        if pairs.matching is not None:
            matched = candidate_scores(pairs.matching[arrangement.photos], labels, seed=seed)
            scores |= {"map_matching": matched["map"], "top1_matching": matched["top1"]}
        return Answered(scores, ClassScores(cosine))

    def dealt(model: Fusion) -> tuple[float, float]:
        return dealt_map(of(model)[0].cosine, labels, seed=seed)

    return Protocol("candidate", "map", len(search.vectors), search.units, answer, search, dealt=dealt)


def rerank_protocol(setting: Setting, name: SearchName, k: int, most_queries: int) -> Protocol:
    """A search whose first k are scored again as pairs."""
    search = make_search(setting.cache, setting.spec, setting.pairs, name, setting.seed).asked(most_queries)
    k = min(k, len(setting.pairs))

    def answer(model: Fusion, arrangement: Arrangement) -> Answered:
        gallery, queries = setting.gallery(model, arrangement), setting.queries(model, search)
        ranks = relevant_ranks(gallery, queries, search.relevant, seed=setting.seed)
        first = top_k(InnerProducts(gallery, queries), k, seed=setting.seed)
        rows = setting.pairs.rows[arrangement.photos]
        second = score_chosen_pairs(model, setting.inputs, rows[first], search)
        scores = second.cosine
        if second.matching is not None:
            scores = second.matching + np.take_along_axis(queries @ gallery.T, first, axis=1)
        found = reranked_scores(ranks, search.relevant, first, scores, search.units, len(gallery), seed=setting.seed)
        return Answered(found, Reordered(Vectors(gallery, queries), reordered(first, scores)))

    protocol = Protocol("rerank", "map", len(search.vectors), search.units, answer, search)
    if name == "caption":
        return protocol
    return replace(protocol, num_shuffles=NUM_SHUFFLES, dealt=search_protocol(setting, "class").dealt)


def with_true_texts(setting: Setting) -> Setting:
    """The leak: each photo beside a text that it is searched with, or its own class's name.

    Raises:
        ValueError: no text enters the run's fusion.
    """
    if not setting.spec.shape.takes_text:
        fusion = setting.spec.shape.fusion
        raise ValueError(f"--leak-true-text: no text enters fusion {fusion}, so nothing can leak. Leave it out.")
    pairs, table = setting.pairs, setting.cache.table
    if pairs.kind == "captions":
        beside = pairs.texts.values[pairs.texts.offsets[:-1]]
    else:
        beside = np.array([table.class_texts[int(of_photo[0])][0] for of_photo in pairs.labels], np.int64)
    return replace(setting, pairs=replace(pairs, beside=beside))
