"""Adding a protocol, a metric or a baseline is one definition and one line of its registry: each is added here."""

from __future__ import annotations

import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from quick_runs import quick_train
from synthetic_cache import make_cache

from saffe_cache.cli import main
from saffe_cache.core.items import Ragged
from saffe_cache.evaluation.baselines import BASELINES, Baseline, photo_vectors
from saffe_cache.evaluation.config import EvaluateConfig
from saffe_cache.evaluation.evaluate import evaluate
from saffe_cache.evaluation.material import Material
from saffe_cache.evaluation.results import EvaluationResult
from saffe_cache.protocols.base import SearchProtocol
from saffe_cache.protocols.registry import PROTOCOLS, Entry
from saffe_cache.protocols.setting import Queries, System
from saffe_cache.report.report import ReportConfig, make_report
from saffe_cache.retrieval.baselines import unit_rows
from saffe_cache.retrieval.metrics import METRICS, Metric, first_ranks
from saffe_cache.retrieval.scores import Scores, text_scores

pytestmark = pytest.mark.slow


class FirstCaptions(SearchProtocol):
    """The first caption of each photo searches the photos."""

    name = "first"
    definition = "the first caption of each photo searches the photos"
    pair_kind = "captions"
    main_metric = "mrr"
    baselines = ("ridge", "random")

    def make_queries(self) -> Queries:
        texts = self.setting.pairs.texts
        rows, places = texts.values[texts.offsets[:-1]], np.arange(len(texts))
        relevant = Ragged(np.arange(len(rows) + 1), places)
        return Queries(rows, self.setting.inputs.text.vectors(rows), relevant, places)

    def score_vectors(self, gallery: np.ndarray, queries: np.ndarray, *, intervals: bool = True) -> Scores:
        return text_scores(
            gallery, queries, self.relevant, self.queries.units, intervals=intervals, seed=self.setting.seed
        )


def random_vectors(of: Material) -> System:
    return photo_vectors(unit_rows(np.random.default_rng(0).normal(size=(len(of.setting.pairs), 12))))


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> tuple[str, str]:
    folder = tmp_path_factory.mktemp("new")
    cache = make_cache(folder / "cache.zarr", {"train": 120, "dev": 20, "test": 40})
    return cache, quick_train(cache, folder / "run", fusion="linear", epochs=3)


@pytest.fixture
def _registered(monkeypatch: pytest.MonkeyPatch) -> None:
    """What a module in saffe_cache/protocols and three lines would do."""
    module: Any = SimpleNamespace(FirstCaptions=FirstCaptions)
    monkeypatch.setitem(sys.modules, "saffe_cache.protocols.first", module)
    monkeypatch.setitem(PROTOCOLS, "first", Entry("first:FirstCaptions", "first captions search photos"))
    monkeypatch.setitem(BASELINES, "random", Baseline("vectors drawn at random", random_vectors))
    two = Metric(
        description="share of queries with a relevant result among the first 2",
        rankings=("texts", "captions"),
        values=lambda ranks: (first_ranks(ranks) <= 2).astype(np.float64),
        chance=lambda order: order.recall(2),
    )
    monkeypatch.setitem(METRICS, "recall_at_2", two)


@pytest.mark.usefixtures("_registered")
def test_new_protocol_metric_and_baseline_are_reported(made: tuple[str, str], tmp_path: Path) -> None:
    cache, run = made
    out = evaluate(EvaluateConfig(cache=cache, run=run, protocol="first", out=str(tmp_path / "out"), device="cpu"))
    result = EvaluationResult.load(out)
    assert (result.protocol, result.num_queries, result.failures) == ("first", 40, ())
    assert set(result.systems) == {"fam", "ridge", "random"}
    assert set(result.controls) == {"photos_shuffled", "photos_constant", "pairs_permuted", "queries_constant"}
    assert result.systems["fam"]["recall_at_2"].chance == pytest.approx(2 / 40)
    assert result.main("fam").value > result.main("random").value

    frame = result.to_frame().set_index(["system", "metric"])
    assert frame.loc[("fam", "recall_at_2"), "value"] == result.systems["fam"]["recall_at_2"].value
    assert ("control: photos_shuffled", "mrr") in frame.index

    text = (Path(out) / "report.txt").read_text()
    page = Path(make_report(ReportConfig(runs=(out,), out=str(tmp_path / "page")))).read_text()
    for shown in ("irst caption of each photo searches the photos", "recall at 2", "among the first 2", "random"):
        assert shown in text
        assert shown in page


@pytest.mark.usefixtures("_registered")
def test_new_metric_joins_existing_protocols(made: tuple[str, str], tmp_path: Path) -> None:
    cache, run = made
    config = EvaluateConfig(cache=cache, run=run, baselines="none", out=str(tmp_path), device="cpu")
    scores = EvaluationResult.load(evaluate(config)).systems["fam"]
    assert scores["recall_at_1"].value <= scores["recall_at_2"].value <= scores["recall_at_5"].value
    assert "image_to_text_recall_at_2" in scores


@pytest.mark.usefixtures("_registered")
def test_help_lists_new_protocol(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main(["evaluate", "--help"])
    assert "first: first captions search photos." in " ".join(capsys.readouterr().out.split())


def test_unknown_protocol_is_refused_by_name() -> None:
    with pytest.raises(ValueError, match="--protocol: found first, expected auto or caption or "):
        EvaluateConfig(cache="c", run="r", protocol="first")
