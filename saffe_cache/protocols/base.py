"""What a protocol is. A subclass says all that training, evaluation, controls, baselines and reports ask of it.

    class MyProtocol(SearchProtocol):
        name, definition, pair_kind = "mine", "which queries search what, and what is relevant", "captions"
        baselines = ("ridge", "mlp", "zero_shot", "pooled_cosine")
        ...

and one line in `saffe_cache.protocols.registry`.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from copy import copy
from types import MappingProxyType
from typing import Any, ClassVar, NamedTuple

import numpy as np

from saffe_cache.core.features import Modality
from saffe_cache.core.items import Ragged
from saffe_cache.fusion.base import Fusion
from saffe_cache.inputs.feature_loader import encode_gallery
from saffe_cache.inputs.pairs import Pairs, select_pairs
from saffe_cache.inputs.spec import PairKind, RunSpec
from saffe_cache.protocols.setting import (
    Answered,
    Answers,
    Arrangement,
    FittedScores,
    Queries,
    QueryScores,
    Setting,
    System,
    Vectors,
    VectorSystem,
)
from saffe_cache.retrieval.baselines import unit_rows
from saffe_cache.retrieval.metrics import Ranking, metrics_of
from saffe_cache.retrieval.ranking import ScoreMatrix
from saffe_cache.retrieval.scores import NO_BIASES, Biases, Scores
from saffe_cache.store.reader import Cache

NULL_GALLERY = "the gallery is f(photo, null text)"
LEAKY_GALLERY = "the gallery is f(photo, a text that searches for it)"
CONTROL_QUERIES = 20_000
"""Queries of a control, drawn by the seed, where there are more and each has a few answers in a gallery of all."""
NUM_SHUFFLES, FEWEST_SHUFFLES = 10, 5
"""Shuffles of the photos that show how far chance spreads, where a bootstrap does not."""
LEAST_CLASSES = 6
"""With fewer, a run trained on permuted classes cannot be distinguished from one that was not."""


class Level(NamedTuple):
    """The score that a control reaches where nothing is found."""

    value: float
    error: float
    """Its standard deviation."""
    expected: str = "chance"
    """In words."""


class Protocol(ABC):
    """How a system is measured on the pairs of one split."""

    name: ClassVar[str]
    definition: ClassVar[str]
    """Queries, relevance, metrics and gallery in words, for reports."""
    main_metric: ClassVar[str] = "map"
    pair_kind: ClassVar[PairKind] = "classes"
    rankings: ClassVar[tuple[Ranking, ...]] = ("texts",)
    """The kinds of rankings that its metrics are of."""
    baselines: ClassVar[tuple[str, ...]] = ()
    """Those of saffe_cache.evaluation.baselines that apply, in the order in which reports list them."""
    required_baselines: ClassVar[tuple[str, ...]] = ()
    """Those that controls are compared with; they are always fitted."""
    can_leak: ClassVar[bool] = False
    """Whether the gallery's null text can be replaced by the text that searches for the photo."""
    fuses_pairs: ClassVar[bool] = False
    """Whether photos are fused with the texts that search for them."""
    shows_photos_alone: ClassVar[bool] = True
    """Whether the gallery holds photos with null text."""
    options: ClassVar[tuple[str, ...]] = ()
    """Options of an evaluation that it is made with."""
    control_metrics: ClassVar[Mapping[str, str]] = MappingProxyType({})
    """The metrics that verdicts on controls rest on, where it is not the main one."""
    photos_search: ClassVar[bool] = False
    """Whether the gallery's photos search the texts too, or rank the classes."""
    corrects_search: ClassVar[bool] = False
    """Whether a search correction applies. Then `score_vectors` also takes `biases`, which it subtracts."""
    least_moves: ClassVar[Mapping[Modality, float]] = MappingProxyType({"image": 0.2, "text": 0.05})
    """Mean distances of unit vectors below which a fusion does not look at its photo, or at its text."""
    shows_classes: ClassVar[bool] = False
    """Whether every class ranks all photos, so that details have curves and confusion of classes."""

    queries: Queries | None = None
    """The texts that search; None where photos do."""
    class_names: tuple[str, ...] = ()
    """Of the classes that search."""
    most_queries: int = 0
    """Texts that search, and photos that do, at most, where each is one of many; 0 for all."""
    num_shuffles: int = 0
    """Shuffles of the photos that the spread of a control is taken from, where a bootstrap over the queries does not
    show it: the photos that search are the gallery too, or the queries are a few classes. 0 for a bootstrap."""

    def __init__(self, setting: Setting) -> None:
        self.setting = setting

    @property
    def described(self) -> str:
        """The definition, with the options that the protocol was made with."""
        return self.definition

    # What a run and a split have to offer

    @classmethod
    def is_trained_for(cls, spec: RunSpec) -> bool:
        """Whether a run is trained for this protocol, and validated with it."""
        return False

    @classmethod
    def select(cls, cache: Cache, spec: RunSpec, split: str) -> Pairs:
        """The pairs of a split that a run is measured on; ValueError where protocol, run and split do not fit."""
        gallery, text = cache.encoders[spec.gallery_key], cache.encoders[spec.text_key]
        return select_pairs(cache.table, gallery, text, split, cls.pair_kind)

    @classmethod
    def metric_names(cls, cache: Cache, spec: RunSpec) -> list[str]:
        """What the scores of a run are called, before there are any."""
        return [name for ranking in cls.rankings for name in metrics_of(ranking)]

    @classmethod
    @abstractmethod
    def search_kind(cls, spec: RunSpec) -> type[SearchProtocol]:
        """The search by vectors whose validation score tunes ridge regressions and other baselines."""

    def validation_search(self) -> SearchProtocol:
        """That search over this protocol's pairs."""
        return self.search_kind(self.setting.spec)(self.setting)

    # Measuring

    @property
    def relevant(self) -> Ragged:
        """Relevant positions in the gallery of each query; none for some."""
        assert self.queries is not None
        return self.queries.relevant

    def answer(self, system: System, arrangement: Arrangement) -> Answered:
        """How a system orders an arrangement of the gallery, and its scores."""
        answers = self.search(system, arrangement)
        return Answered(self.score(answers), answers)

    def measure(self, system: System, arrangement: Arrangement) -> Scores:
        return self.answer(system, arrangement).scores

    def search(self, system: System, arrangement: Arrangement) -> Vectors | QueryScores:
        """How a system orders an arrangement of the gallery if nothing is fused with the texts that search."""
        if isinstance(system, FittedScores):
            return QueryScores(system.scores[arrangement.photos])
        if self.queries is not None:
            return self.setting.vectors(system, arrangement, self.queries, photos_search=self.photos_search)
        gallery = self.setting.gallery(system, arrangement)
        return Vectors(gallery, gallery)

    @abstractmethod
    def score(self, answers: Answers) -> Scores:
        """The scores of such an order."""

    def validate(self, model: Fusion) -> float:
        """The main metric of a model in training; nothing is cached."""
        raise NotImplementedError(f"protocol {self.name}: no run is trained for it")

    def fused_vectors(self, system: VectorSystem, photos: np.ndarray, texts: np.ndarray) -> np.ndarray:
        """f(photo, text), [n, d], of places that have both: in the gallery, or of composed queries.

        `photos` and `texts` are the places that each is taken from; equal ones are the honest pairs.
        """
        return self.setting.gallery(system, Arrangement(photos, texts))

    @property
    def num_fused(self) -> int:
        """How many places `fused_vectors` has."""
        return len(self.setting.pairs)

    @property
    def fuses_texts(self) -> bool:
        """Whether photos there have texts, and not the null text."""
        return self.setting.pairs.paired_texts is not None

    def ranked(self, answers: Answers, queries: np.ndarray) -> ScoreMatrix:
        """Scores of some queries with the gallery, [queries, n], in which photos that are not ranked are last."""
        return answers.scores(queries)

    def fused_texts(self) -> np.ndarray | None:
        """A text row that each photo is fused with, as far as the count of FLOPs goes; None for null text."""
        return self.setting.pairs.paired_texts

    def warnings(self) -> list[str]:
        """What a reader must know of the run under this protocol."""
        spec, found = self.setting.spec, []
        if self.fuses_pairs and not spec.shape.takes_text:
            found.append(f"no text enters fusion {spec.shape.fusion}: a pair's score is that of the photo alone.")
        elif self.fuses_pairs and spec.pairs == "composed":
            found.append("the run was trained on composed queries: photos fused with their own texts are untrained.")
        elif self.fuses_pairs and spec.gallery_text == "null" and not spec.fuses_pairs:
            found.append("the run was trained with null text only: its scores of fused pairs are untrained.")
        always_text = spec.trains_only_pairs or (spec.gallery_text == "first_caption" and not spec.sees_null)
        if self.shows_photos_alone and always_text:
            found.append("the run was trained without null text: its vectors of photos alone are untrained.")
        return found

    def findings(self, own: Scores, baselines: Mapping[str, Scores]) -> list[str]:
        """What a reader must know of the scores of a system beside those of baselines."""
        return []

    # Controls: the same measurement where nothing can be found

    def measure_controls(self, system: System, permuted: System | None) -> dict[str, Scores]:
        """The scores of each control, of at most `CONTROL_QUERIES` queries: a control need not be as exact as a result.

        photos_shuffled    each place of the gallery has another's photo; paired texts stay
        photos_constant    the same photo at every place; paired texts stay
        pairs_permuted     the same kind of system, trained or fitted on permuted pairs
        """
        generator = np.random.default_rng(self.setting.seed)
        honest, count = self.setting.honest(), len(self.setting.pairs)
        shuffled, constant = generator.permutation(count), np.full(count, generator.integers(count))
        few = copy(self)
        few.most_queries = CONTROL_QUERIES
        measured = {
            "photos_shuffled": few.measure(system, Arrangement(shuffled, honest.texts)),
            "photos_constant": few.measure(system, Arrangement(constant, honest.texts)),
        }
        if permuted is not None and not self.why_no_permuted():
            measured["pairs_permuted"] = few.measure(permuted, honest)
        return measured | few.own_controls(system, shuffled)

    def own_controls(self, system: System, shuffled: np.ndarray) -> dict[str, Scores]:
        """Controls that other protocols do not have; `shuffled` are the photos of photos_shuffled."""
        return {}

    def why_no_permuted(self) -> str | None:
        """Why a system trained on permuted pairs shows nothing here; None where it does."""
        if self.class_names and len(np.unique(self.setting.pairs.labels.values)) < LEAST_CLASSES:
            return f"with fewer than {LEAST_CLASSES} classes, names assigned at random are often right"
        return None

    def control_levels(
        self, system: System, permuted: System | None, measured: Mapping[str, Scores], baselines: Mapping[str, Scores]
    ) -> dict[str, Level]:
        """The levels of controls where they are not chance with the error of the control's bootstrap."""
        metric = self.main_metric
        found: dict[str, Level] = {}
        if self.num_shuffles or measured["photos_shuffled"][metric].interval is None:
            generator, texts = np.random.default_rng((self.setting.seed, 1)), self.setting.honest().texts
            values = [
                self.measure(system, Arrangement(generator.permutation(texts), texts))[metric].value
                for _ in range(self.num_shuffles or FEWEST_SHUFFLES)
            ]
            error = float(np.std(values, ddof=1))
            found = {name: Level(scores[metric].chance, error) for name, scores in measured.items()}
        dealt = None if permuted is None else self.dealt(permuted)
        return found if dealt is None else found | {"pairs_permuted": Level(*dealt, "class names assigned at random")}

    def dealt(self, system: System) -> tuple[float, float] | None:
        """Where classes search: mean and standard deviation of map when the class names are dealt at random.

        The chance of a system trained on permuted classes is not that of a random order: photos of one class are still
        alike to it, so that a ranking that knows nothing holds them together, early or late.
        """
        return None


class SearchProtocol(Protocol):
    """Texts search a gallery of vectors."""

    queries: Queries

    def __init__(self, setting: Setting) -> None:
        super().__init__(setting)
        self.queries = self.make_queries()

    @abstractmethod
    def make_queries(self) -> Queries:
        """The queries of the setting's pairs."""

    @abstractmethod
    def score_vectors(self, gallery: np.ndarray, queries: np.ndarray, *, intervals: bool = True) -> Scores:
        """Scores of unit vectors: `gallery` [pairs, d], `queries` [queries, d]."""

    @classmethod
    def search_kind(cls, spec: RunSpec) -> type[SearchProtocol]:
        return cls

    def validation_search(self) -> SearchProtocol:
        return self

    def score(self, answers: Answers) -> Scores:
        assert isinstance(answers, Vectors)
        biases: dict[str, Any] = {} if self.setting.bank is None else {"biases": answers.biases}
        return self.score_vectors(answers.gallery, answers.queries, **biases)

    def own_controls(self, system: System, shuffled: np.ndarray) -> dict[str, Scores]:
        """queries_constant: every text that searches is the same."""
        if isinstance(system, FittedScores):
            return {"queries_constant": self.score(QueryScores(system.scores).with_one_query())}
        same = self.queries.with_one_text()
        vectors = self.setting.vectors(system, self.setting.honest(), same, photos_search=self.photos_search)
        return {"queries_constant": self.score(vectors)}

    def validation_score(self, gallery: np.ndarray, queries: np.ndarray, biases: Biases = NO_BIASES) -> float:
        """The main metric of unit vectors; `biases` only where the protocol corrects searches."""
        corrected: dict[str, Any] = {"biases": biases} if self.corrects_search else {}
        return self.score_vectors(gallery, queries, intervals=False, **corrected)[self.main_metric].value

    def validate(self, model: Fusion) -> float:
        pairs = self.setting.pairs
        return self.validate_gallery(encode_gallery(model, self.setting.inputs, pairs.rows, pairs.paired_texts), model)

    def validate_gallery(self, gallery: np.ndarray, model: Fusion) -> float:
        """The main metric of a gallery of photos' vectors that a model's queries search."""
        return self.validation_score(gallery, self.setting.queries(model, self.queries))

    def validate_late(self, gallery: np.ndarray, model: Fusion) -> float:
        """The same where the model adds the paired texts' vectors to the photos', with its present weight."""
        paired = self.setting.pairs.paired_texts
        assert paired is not None
        texts = model.text_map(self.setting.inputs.vectors(paired)).detach().cpu().numpy()
        return self.validate_gallery(unit_rows(gallery + model.text_weight.item() * texts), model)

    def validate_photos(self, gallery: np.ndarray) -> float:
        """The main metric of photos' vectors in the space of the text encoder's own vectors, which search them."""
        return self.validation_score(gallery, unit_rows(self.queries.vectors))
