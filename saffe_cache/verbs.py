"""All verbs by name: where their config, their function and their result are. Strings alone, so that naming a verb
imports nothing. A new verb or study is one module and one entry here."""

from __future__ import annotations

import importlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from saffe_cache.core.results import Result


@dataclass(frozen=True, kw_only=True)
class Verb:
    """A command; what it names is imported when it is needed."""

    summary: str
    """One line of help."""
    config: str
    """MODULE:CLASS of its options."""
    run: str
    """MODULE:FUNCTION, which takes the config and returns the path that it wrote, or several, or what it found (with a
    text and an `exit_status`)."""
    result: str | None = None
    """MODULE:CLASS of its result; None where it writes none."""
    over_ranks: bool = False
    """Whether processes that torchrun starts share its work."""
    extra: str | None = None
    """Its optional dependencies, as in pip install 'saffe-cache[EXTRA]'; None where it has none."""

    def load_config(self) -> type[Any]:
        return load_name(self.config)  # type: ignore[no-any-return]

    def load_run(self) -> Callable[[Any], Any]:
        """Raise ImportError if an optional dependency is not installed; the message says what to install."""
        try:
            return load_name(self.run)  # type: ignore[no-any-return]
        except ModuleNotFoundError as error:
            if self.extra is None or str(error.name).startswith("saffe_cache"):
                raise
            what = f"It needs the package {error.name}: pip install 'saffe-cache[{self.extra}]'."
            raise ImportError(what) from None

    def load_result(self) -> type[Any] | None:
        return None if self.result is None else load_name(self.result)


def load_result(folder: str | Path) -> Result:
    """The result that a verb wrote to a folder, as an instance of that verb's class.

    Raises:
        ValueError: the folder holds no result, or one that is damaged or of another version.
    """
    from saffe_cache.core.outputs import RESULT, read_json

    path = Path(folder) / RESULT
    content = read_json(path)
    verb = VERBS.get(str(content.get("verb")))
    kind = verb.load_result() if verb else None
    if kind is None:
        known = [name for name, one in VERBS.items() if one.result]
        raise ValueError(
            f"{path}: found verb {content.get('verb')!r:.60}, expected one of {', '.join(known)}. "
            "Run the command that writes it again."
        )
    result: Result = kind.from_json(content, path)
    return result


def load_name(name: str) -> Any:
    """What MODULE:NAME names, below saffe_cache."""
    module, _, attribute = name.partition(":")
    return getattr(importlib.import_module(f"saffe_cache.{module}"), attribute)


VERBS: Mapping[str, Verb] = {
    "extract": Verb(
        summary="Run frozen encoders once and cache their hidden states.",
        config="extraction.config:ExtractConfig",
        run="extraction.extract:extract",
    ),
    "train": Verb(
        summary="Train a fusion from a cache.",
        config="training.config:TrainConfig",
        run="training.train:train",
        result="training.result:TrainResult",
        over_ranks=True,
    ),
    "evaluate": Verb(
        summary="Index a run's vectors and measure retrieval, with baselines, controls and chance.",
        config="evaluation.config:EvaluateConfig",
        run="evaluation.evaluate:evaluate",
        result="evaluation.results:EvaluationResult",
        over_ranks=True,
    ),
    "align": Verb(
        summary="Measure how well two encoders' layers agree, before training.",
        config="studies.alignment.config:AlignConfig",
        run="studies.alignment.align:align",
        result="studies.alignment.result:AlignmentResult",
    ),
    "ablate": Verb(
        summary="Train and evaluate every cell of a recipe.",
        config="studies.sweep.recipe:AblateConfig",
        run="studies.sweep.ablate:ablate",
        result="studies.sweep.result:SweepResult",
    ),
    "few-pairs": Verb(
        summary="Compare all methods that align encoders with few pairs, and the claims of their papers.",
        config="studies.few_pairs.config:FewPairsConfig",
        run="studies.few_pairs.few_pairs:few_pairs",
        result="studies.few_pairs.result:FewPairsResult",
    ),
    "bind": Verb(
        summary="Learn made-up names from a few photos, in many episodes.",
        config="studies.binding.config:BindConfig",
        run="studies.binding.bind:bind",
        result="studies.binding.result:BindingResult",
    ),
    "match": Verb(
        summary="Compare fusions that decide whether a text belongs to a photo.",
        config="studies.matching.config:MatchConfig",
        run="studies.matching.match:match",
        result="studies.matching.result:MatchResult",
        extra="match",
    ),
    "caption": Verb(
        summary="Feed photo tokens to a frozen language model and measure its captions.",
        config="studies.captioning.config:CaptionConfig",
        run="studies.captioning.caption:caption",
        result="studies.captioning.result:CaptionResult",
    ),
    "bridge": Verb(
        summary="Search photos by sounds, or the reverse, through two runs with one text encoder.",
        config="studies.bridge.config:BridgeConfig",
        run="studies.bridge.bridge:bridge",
        result="studies.bridge.result:BridgeResult",
    ),
    "subsets": Verb(
        summary="Fuse items of several media, and measure every subset of them.",
        config="studies.subsets.config:SubsetsConfig",
        run="studies.subsets.subsets:subsets",
        result="studies.subsets.result:SubsetsResult",
    ),
    "index": Verb(
        summary="Embed a folder of photos or sounds with a run, for searching.",
        config="inference.config:IndexConfig",
        run="inference.indexing:index",
    ),
    "search": Verb(
        summary="Search an index by a text, by a photo or sound, or by both.",
        config="inference.config:SearchConfig",
        run="inference.search_index:search",
    ),
    "serve": Verb(
        summary="Serve a page that searches an index.",
        config="inference.config:ServeConfig",
        run="inference.serving:serve",
        extra="app",
    ),
    "benchmark": Verb(
        summary="Measure a run on tasks of mteb or CLIP_benchmark, with intervals.",
        config="inference.config:BenchmarkConfig",
        run="inference.benchmarks:benchmark",
        result="inference.benchmarks:BenchmarkResult",
        extra="benchmarks",
    ),
    "report": Verb(
        summary="Make one page from runs, evaluations and studies.",
        config="report.report:ReportConfig",
        run="report.report:make_report",
    ),
    "cache inspect": Verb(
        summary="Show encoders, layers, shapes, splits, sizes, ranges and a few items.",
        config="store.config:InspectConfig",
        run="store.inspect:inspect_cache",
    ),
    "cache status": Verb(
        summary="Show how far an extraction by several processes is.",
        config="store.config:StatusConfig",
        run="store.work:cache_status",
    ),
    "cache verify": Verb(
        summary="Read every shard and compare it with its checksum.",
        config="store.config:VerifyConfig",
        run="store.inspect:verify_cache",
    ),
    "cache repair": Verb(
        summary="Rebuild damaged parts from the data and the encoders.",
        config="extraction.config:RepairConfig",
        run="extraction.repair:repair",
    ),
    "cache convert": Verb(
        summary="Copy a cache, with hidden states of another type or compression.",
        config="store.config:ConvertConfig",
        run="store.exchange:convert_cache",
    ),
    "cache export": Verb(
        summary="Write a cache as one HDF5 file, or as plain numbers.",
        config="store.config:ExportConfig",
        run="extraction.exporting:export_cache",
    ),
    "cache import": Verb(
        summary="Make a cache from such a file.",
        config="store.config:ImportConfig",
        run="store.exchange:import_cache",
    ),
}

GROUPS: Mapping[str, str] = {"cache": "Look into a cache, check it, repair it, convert it, exchange it."}
"""First words that several verbs share, and one line of help for each."""
