"""saffe_cache: run each frozen encoder once, then train and evaluate fusions from the cache.

The layers of the package; an import may only point downwards, and packages of one layer do not import
each other (tests/test_architecture.py holds this):

    cli                                         the commands
    report                                      one page from results
    studies   inference                         alignment, binding, captioning, matching, sweeps; a run on new inputs
    evaluation                                  baselines and controls beside a run's scores; the index
    training                                    one config, the loop, a run's folder
    protocols                                   queries, relevance and scores, for validation and evaluation
    extraction   inputs                         encoders into a cache; what a training reads from one
    retrieval                                   ranks, metrics, baselines, index
    store   sources   encoders   fusion         the cache, the data, the frozen models, the trained modules
    core                                        nouns, options, files, JSON

Every verb is a function of one frozen dataclass, and its result is read back by `load_result`:

    from saffe_cache import ExtractConfig, extract, load_result
    cache = extract(ExtractConfig(data="photos", cache="photos.zarr", encoder={"image": "facebook/dinov2-small"}))

Importing the package imports nothing; a name is imported when it is first used.
"""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:  # for type checkers and editors: a selection of what _places holds
    from saffe_cache.core.features import CacheError as CacheError
    from saffe_cache.encoders.own import OwnEncoder as OwnEncoder
    from saffe_cache.evaluation.config import EvaluateConfig as EvaluateConfig
    from saffe_cache.evaluation.evaluate import evaluate as evaluate
    from saffe_cache.evaluation.results import EvaluationResult as EvaluationResult
    from saffe_cache.extraction.config import ExtractConfig as ExtractConfig
    from saffe_cache.extraction.config import RepairConfig as RepairConfig
    from saffe_cache.extraction.exporting import export_cache as export_cache
    from saffe_cache.extraction.extract import extract as extract
    from saffe_cache.extraction.repair import repair as repair
    from saffe_cache.inference.benchmarks import BenchmarkResult as BenchmarkResult
    from saffe_cache.inference.benchmarks import benchmark as benchmark
    from saffe_cache.inference.config import BenchmarkConfig as BenchmarkConfig
    from saffe_cache.inference.config import IndexConfig as IndexConfig
    from saffe_cache.inference.config import SearchConfig as SearchConfig
    from saffe_cache.inference.indexing import index as index
    from saffe_cache.inference.model import TrainedFusion as TrainedFusion
    from saffe_cache.inference.model import load_run as load_run
    from saffe_cache.inference.search_index import SearchIndex as SearchIndex
    from saffe_cache.inference.search_index import search as search
    from saffe_cache.report.report import ReportConfig as ReportConfig
    from saffe_cache.report.report import make_report as make_report
    from saffe_cache.store.config import ConvertConfig as ConvertConfig
    from saffe_cache.store.config import ExportConfig as ExportConfig
    from saffe_cache.store.config import ImportConfig as ImportConfig
    from saffe_cache.store.config import InspectConfig as InspectConfig
    from saffe_cache.store.config import VerifyConfig as VerifyConfig
    from saffe_cache.store.exchange import convert_cache as convert_cache
    from saffe_cache.store.exchange import import_cache as import_cache
    from saffe_cache.store.inspect import inspect_cache as inspect_cache
    from saffe_cache.store.inspect import verify_cache as verify_cache
    from saffe_cache.store.reader import Cache as Cache
    from saffe_cache.store.reader import open_cache as open_cache
    from saffe_cache.studies.alignment.align import align as align
    from saffe_cache.studies.alignment.config import AlignConfig as AlignConfig
    from saffe_cache.studies.alignment.result import AlignmentResult as AlignmentResult
    from saffe_cache.studies.binding.bind import bind as bind
    from saffe_cache.studies.binding.config import BindConfig as BindConfig
    from saffe_cache.studies.binding.result import BindingResult as BindingResult
    from saffe_cache.studies.captioning.caption import caption as caption
    from saffe_cache.studies.captioning.config import CaptionConfig as CaptionConfig
    from saffe_cache.studies.captioning.result import CaptionResult as CaptionResult
    from saffe_cache.studies.matching.config import MatchConfig as MatchConfig
    from saffe_cache.studies.matching.match import match as match
    from saffe_cache.studies.matching.result import MatchResult as MatchResult
    from saffe_cache.studies.sweep.ablate import ablate as ablate
    from saffe_cache.studies.sweep.recipe import AblateConfig as AblateConfig
    from saffe_cache.studies.sweep.result import SweepResult as SweepResult
    from saffe_cache.training.config import TrainConfig as TrainConfig
    from saffe_cache.training.result import TrainResult as TrainResult
    from saffe_cache.training.train import train as train
    from saffe_cache.verbs import load_result as load_result

__version__ = "0.1.0"


def _places() -> dict[str, str]:
    """Where each public name is, as MODULE:NAME: what the verbs name, and what opens their outputs."""
    from saffe_cache.verbs import VERBS

    of_verbs = (place for verb in VERBS.values() for place in (verb.config, verb.run, verb.result) if place)
    others = (
        "core.features:CacheError",
        "encoders.own:OwnEncoder",
        "store.reader:Cache",
        "store.reader:open_cache",
        "inference.model:TrainedFusion",
        "inference.model:load_run",
        "inference.search_index:SearchIndex",
        "verbs:load_result",
    )
    return {place.partition(":")[2]: place for place in (*of_verbs, *others)}


def __getattr__(name: str) -> Any:
    """Called for names that are not imported yet."""
    if name.startswith("_") or name not in (places := _places()):
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from saffe_cache.verbs import load_name

    globals()[name] = value = load_name(places[name])
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *_places()})
