"""The options of an evaluation."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from saffe_cache.core.features import IndexKind
from saffe_cache.core.options import one_of, require, require_seed
from saffe_cache.protocols.registry import protocol_choices

BaselineChoice = Literal["all", "linear", "none"]


def _choices() -> dict[str, str]:
    return {"auto": "the one that the run was trained for", **protocol_choices()}


@dataclass(frozen=True, kw_only=True)
class EvaluateConfig:
    """Index a run's vectors and measure retrieval, with baselines, controls and chance.

    Exits with status 3 where a control fails.
    """

    cache: str
    """The cache that the run was trained on."""
    run: str
    """The run's folder, as saffe train wrote it."""
    split: str = "test"
    """Split to report on; its photos are the gallery."""
    out: str | None = None
    """Folder for the result, the report and the index. Default: SPLIT-PROTOCOL in the run's folder, and -leak."""
    protocol: str = one_of(_choices, "auto")
    """What searches what."""
    rerank_k: int = 16
    """Results of each query that rerank scores again."""
    rerank_queries: int = 500
    """The most queries that rerank measures, drawn at random: each costs rerank_k fusions."""
    index: IndexKind = "flat"
    """Kind of the index that is written for later searches. flat compares with every photo; ivf with those of the
    nearest clusters; ivf_pq does so with codes of a sixteenth of the size; hnsw follows a graph. Metrics are always
    exact; the report says how many of flat's results another kind finds."""
    baselines: BaselineChoice = "all"
    """Which baselines are fitted. linear: those that take seconds, such as ridge regression and linear probe. none:
    only those that controls are compared with."""
    baseline_layers: Literal["cache", "run"] = "cache"
    """Layers of the photos that baselines see: all of the cache, or those that the run fuses."""
    leak_true_text: bool = False
    """Fuse each photo of the gallery with a text that searches for it. THIS LEAKS THE ANSWER: noise instead of photos
    scores as well. It shows what such numbers are worth."""
    seed: int = 0
    """Of the controls, the breaking of ties and the bootstrap."""
    device: str = "auto"
    """auto takes a GPU where there is one; or cpu, cuda."""

    def __post_init__(self) -> None:
        for option in ("rerank_k", "rerank_queries"):
            require(getattr(self, option) > 0, option, getattr(self, option), "a number above 0")
        require_seed("seed", self.seed)
        require(self.protocol in _choices(), "protocol", self.protocol, " or ".join(_choices()))
