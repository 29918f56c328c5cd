"""What the tests of the page share: photos with captions, of which some mean to break it, a run and its evaluation."""

from __future__ import annotations

import itertools
import json
from pathlib import Path
from typing import Any, NamedTuple

from extraction_cases import draw
from quick_runs import quick_train, report_of

from saffe_cache.core.controls import Control
from saffe_cache.core.results import Result
from saffe_cache.extraction.config import ExtractConfig
from saffe_cache.extraction.extract import extract
from saffe_cache.report.report import ReportConfig, make_report
from saffe_cache.studies.matching.findings import Crossover, MatchCost, MatchSetting, OverSeeds, Plane, PowerLaw
from saffe_cache.studies.matching.result import MatchResult
from saffe_cache.studies.sweep.result import Level, Published, SweepCost, SweepPoint, SweepResult, SweepSeries

EVIL = "a dog </style><script>alert(1)</script> & \"dogs\" <img src='http://example.org/x.png'>"


class Made(NamedTuple):
    """A dataset, a cache of it, a run and one evaluation."""

    data: Path
    cache: str
    run: str
    out: Path
    metrics: dict[str, Any]


def make_run(folder: Path, tiny_model: Any) -> Made:
    """Photos with two captions each; every caption of dev's first photo is hostile."""
    for split, count in (("train", 40), ("dev", 12)):
        lines = []
        for number in range(count):
            draw(folder / "data" / split / f"{number:03}.png", number + 1000 * len(split))
            captions = [f"{split} {number} one", f"the {number} of {split}"]
            if (split, number) == ("dev", 0):
                captions = [EVIL, EVIL + " again"]
            lines.append(json.dumps({"file_name": f"{number:03}.png", "captions": captions}))
        (folder / "data" / split / "metadata.jsonl").write_text("\n".join(lines))
    cache = extract(
        ExtractConfig(
            data=str(folder / "data"),
            cache=str(folder / "cache.zarr"),
            encoder={"image": str(tiny_model("dinov2")), "text": str(tiny_model("bert"))},
            layers={"image": (2, 3), "text": (1, 3)},
            device="cpu",
        )
    )
    run = quick_train(cache, folder / "run", fusion="linear", epochs=1, validation="heldout")
    metrics = report_of(cache, run, split="dev", baselines="all")
    return Made(folder / "data", cache, run, Path(metrics["out"]), metrics)


def make_page(folders: list[str], out: Path, **options: Any) -> str:
    return Path(make_report(ReportConfig(runs=tuple(folders), out=str(out), **options))).read_text()


def sweep_point(x: str, y: str | None, values: tuple[float, ...], **changes: Any) -> SweepPoint:
    seeds = range(len(values))
    return SweepPoint(
        x=x, y=y, settings={"layers": [1]}, seeds=tuple(seeds), reports=tuple(f"run-{seed}" for seed in seeds),
        values={"mrr": values}, chance={"mrr": 0.01},
        **{"baselines": {"ridge": {"mrr": (0.2, 0.22)}}, "controls": {"photos_shuffled": {"mrr": (0.01, 0.02)}}}
        | {"failures": ()} | changes,
        best_epoch=tuple(seeds), trainable_parameters=1000, fusing_flops=6_912_345,
        training_seconds=(1.0,) * len(values), training_peak_memory_mb=(300,) * len(values),
        evaluation_seconds=(1.0,) * len(values),
    )  # fmt: skip


def sweep(*series: tuple[str, list[SweepPoint]], **changes: Any) -> SweepResult:
    """One series of two points with three seeds each, unless others are given."""
    counts: dict[str, Any] = dict.fromkeys(("cache_bytes", "num_runs", "workers", "photos_seen", "texts_seen"), 5)
    seconds = ("extraction", "training", "control", "evaluation", "re_encoding", "photo", "text")
    cost = SweepCost(**counts, **{f"{name}_seconds": 1.5 for name in seconds}, basis="measured")
    points = [sweep_point("one", None, (0.3, 0.32, 0.34)), sweep_point("two", None, (0.4, 0.4, 0.43))]
    given: dict[str, Any] = {
        "title": "Layers <i>", "question": "Do more find more?", "metric": "mrr", "protocol": "caption", "split": "dev",
        "dataset": "drawn", "definition": "captions search photos", "x_label": "layers", "y_label": None,
        "series": tuple(SweepSeries(name=name, points=tuple(of)) for name, of in series or [("linear", points)]),
        "levels": (Level(name="cosine", value=0.02),), "published": PUBLISHED, "cost": cost,
    }  # fmt: skip
    return SweepResult(**(given | changes))


PUBLISHED = (
    Published(name="Same", x="two", value=0.35, metric="mrr", note=""),
    Published(name="Other", x="two", value=0.9, metric="top1", note="called mAP"),
)


def heat_map(columns: int, rows: int) -> SweepResult:
    """A sweep over two axes, three seeds a cell; only the last cell has the baseline with the highest value."""
    points = []
    for x, y in itertools.product(range(columns), range(rows)):
        mean = (x + rows * y) / 200
        baselines = {"text_only": {"mrr": (0.1,) * 3}, "late_fusion": {"mrr": (mean + 0.05, mean + 0.1, mean + 0.15)}}
        baselines |= {"somewhere": {"mrr": (0.9,)}} if (x, y) == (columns - 1, rows - 1) else {}
        points.append(sweep_point(f"p{x}", f"t{y}", (mean + 0.2, mean + 0.25, mean + 0.3), baselines=baselines))
    return sweep(("reuse", points), x_label="photo layer", y_label="text layer", levels=(), published=())


def saved(result: Result, folder: Path) -> str:
    folder.mkdir(exist_ok=True)
    result.save(folder)
    return str(folder)


def matches() -> MatchResult:
    """Systems at two sizes, with rotation and five levels of noise; fits, and pairs on two planes."""

    def setting(kind: str, level: float, scale: int) -> MatchSetting:
        metrics = ("accuracy", "f1", "precision", "recall", "auc", "shuffled_auc")
        means = {"concat": 0.8 - level / 10, "cross": 0.5 - level / 10, "ridge_products": 0.85 - level / 10}
        return MatchSetting(
            setting=f"1:1 {kind}",
            kind=kind,
            level=level,
            negatives=1,
            scale=scale,
            pairs={"train": scale, "validation": 100, "test": 100},
            chance=0.5,
            majority=0.5,
            alignment={"photos_with_clean": 1 - level / 4},
            systems={
                name: {metric: OverSeeds.of([mean - 0.01, mean, mean + 0.01]) for metric in metrics}
                for name, mean in means.items()
            },
        )

    noisy = (setting("noise", level, 16384) for level in (0.05, 0.1, 0.2, 0.3, 0.5))
    plane = Plane(photos=((0.0, 1.0), (2.0, 3.0)), texts=((0.5, 1.0), (2.0, 2.5)), own_is_nearest=0.25)
    cost = MatchCost(parameters=295554, flops_per_pair=590336, seconds_per_1000_pairs=0.01, kept_bytes_per_pair=7e3)
    curves = dict.fromkeys(("concat", "cross"), PowerLaw(a=0.1, b=0.6, c=0.1))
    return MatchResult(
        title="drawn",
        split="dev",
        seconds={},
        features="non-aligned",
        features_in_words="non-aligned features",
        made_alignment=None,
        seeds=(0, 1, 2),
        settings=(setting("clean", 0, 2048), setting("clean", 0, 16384), setting("rotation", 1, 16384), *noisy),
        controls=(Control.within("concat, photos shuffled", "AUC", 0.5, 0.5, 0.05),),
        rule=(),
        degradation=(),
        crossovers=(Crossover(names=("concat", "cross"), sentence="no crossover", curves=curves),),
        verdict=("the rule holds at <b>2</b> sizes",),
        cost={"concat": cost, "cross": cost},
        planes={"own": plane, "ridge": plane},
        skipped=(),
        photos={},
        encoders={},
        layers_of_tokens=(3, 3),
    )
