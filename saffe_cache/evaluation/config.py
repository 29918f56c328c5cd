"""The options of an evaluation."""

from __future__ import annotations

from dataclasses import dataclass, fields
from typing import Literal

from saffe_cache.core.features import IndexKind
from saffe_cache.core.options import one_of, refuse, require, require_seed
from saffe_cache.core.views import IndexViews
from saffe_cache.inputs.spec import ReferenceChoice, SplitOptions
from saffe_cache.protocols.registry import protocol_choices
from saffe_cache.retrieval.correction import CorrectionOptions
from saffe_cache.training.config import DataOptions

BaselineChoice = Literal["all", "linear", "none"]

_OF_RUNS = ("baselines", "baseline_layers", "leak_true_text", "index_views")
"""Options that have no effect on a baseline alone."""
_OF_SYSTEMS = ("data_seed", *(one.name for group in (SplitOptions, DataOptions) for one in fields(group)))
"""Options that a run has decided already."""


def _choices() -> dict[str, str]:
    return {"auto": "the one that the run was trained for", **protocol_choices()}


@dataclass(frozen=True, kw_only=True)
class EvaluateConfig(SplitOptions, DataOptions, CorrectionOptions):
    """Index the vectors of a run, or of a baseline without a run, and measure retrieval with controls and chance.

    A run is reported with baselines. A baseline alone (--system) needs no training; the groups of options below choose
    what it is fitted on, as in saffe train. Exits with status 3 if a control fails.
    """

    cache: str
    """The cache. For a run, the one that it was trained on."""
    run: str | None = None
    """The run's folder, as saffe train wrote it. Either this or --system is required."""
    system: str | None = None
    """A baseline to evaluate without a run: ridge, mlp, zero_shot, pooled_cosine, summary_cosine, linear_probe,
    class_means, zlap, text_only, text_only_linear, image_only_ridge, image_only_mlp, concat_mlp, late_fusion_ridge,
    late_fusion_mlp, or of composed queries composed_image, composed_text, composed_zero_shot, composed_image_ridge,
    composed_text_ridge, composed_ridge, composed_sum, composed_late or composed_mlp, as far as the protocol has it."""
    split: str = "test"
    """Split to report on; its photos are the gallery."""
    out: str | None = None
    """Folder for the result, the report and the index. Default: SPLIT-PROTOCOL in the run's folder, with -leak if the
    true text leaks, the name of --search-correction if it is not the default, and -views if the mean of all views is
    searched; for a baseline, CACHE-baselines/SPLIT-PROTOCOL-SYSTEM. A result of other options is never replaced."""
    protocol: str = one_of(_choices, "auto")
    """What the queries and the gallery are, and what is relevant."""
    rerank_k: int = 16
    """Results of each query that rerank scores again."""
    rerank_queries: int = 500
    """Most queries that rerank measures, drawn at random: each costs rerank_k fusions."""
    reference: ReferenceChoice = "removed"
    """Whether composed ranks the query's own reference photo. removed: no, as CIRR does. kept: yes, as FashionIQ and
    CIRCO do."""
    index: IndexKind = "flat"
    """Kind of the index that is written for later searches. flat compares with every photo; ivf with those of the
    nearest clusters; ivf_pq does so with codes of a sixteenth of the size; hnsw follows a graph. Metrics are always
    exact; the report says how many of flat's results another kind finds."""
    index_views: IndexViews = "plain"
    """Views of each photo of the gallery. plain: the photo itself. mean: the mean of the vectors of all views that the
    cache had of the run's layers when it was trained. Baselines, and scores of fused pairs, always take the photo
    itself."""
    baselines: BaselineChoice = "all"
    """Which baselines are fitted for a run. linear: those that take seconds, such as ridge regression and linear probe.
    none: only those that controls are compared with."""
    baseline_layers: Literal["cache", "run"] = "cache"
    """Layers of the photos that a run's baselines see: all of the cache, or those that the run fuses. With --system,
    give --layers instead."""
    leak_true_text: bool = False
    """Fuse each photo of the gallery with a text that searches for it. THIS LEAKS THE ANSWER: noise instead of photos
    scores as well. It shows what such numbers are worth."""
    seed: int = 0
    """Seed of the controls, the breaking of ties and the bootstrap."""
    data_seed: int = 0
    """With --system, the seed of what is held out: the --seed, or --data-seed, of a comparable run."""
    device: str = "auto"
    """cpu, cuda or cuda:N. auto: a GPU if there is one."""

    def check(self) -> None:
        """Raise ValueError if a value is out of range, or an option has no effect with what is evaluated."""
        for option in ("rerank_k", "rerank_queries"):
            require(getattr(self, option) > 0, option, getattr(self, option), "a number above 0")
        require_seed("seed", self.seed)
        require_seed("data_seed", self.data_seed)
        require(self.protocol in _choices(), "protocol", self.protocol, " or ".join(_choices()))
        if self.run is None and self.system is None:
            raise ValueError("found neither --run nor --system, expected one of them: a run's folder, or a baseline.")
        if self.run is not None and self.system is not None:
            raise ValueError(f"found both --run {self.run} and --system {self.system}, expected one of them.")
        without_effect, kind = (_OF_RUNS, "--run") if self.run is None else (_OF_SYSTEMS, "--system")
        for one in fields(self):
            default = one.default_factory() if callable(one.default_factory) else one.default
            if one.name in without_effect and getattr(self, one.name) != default:
                refuse(one.name, getattr(self, one.name), f"this option only with {kind}")
