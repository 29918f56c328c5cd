"""Make results.json, the numbers of a small fixed run of each verb: `PYTHONPATH=tests python -m golden.make_results`.

tests/test_golden_results.py runs the same and compares every number. Run this again only where numbers are meant to
change, and say why in the commit. The adapters at the top are all that knows the names of files and fields: where those
change, the adapters follow and results.json stays. It holds no times, memory, paths, names or versions.
"""

from __future__ import annotations

import json
import math
import tempfile
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import conftest  # noqa: F401 -- it sets: offline, one thread
import numpy as np
import torch
from captioning_cases import captioned_cache
from extraction_cases import draw
from quick_runs import quick_train, report_of
from report_cases import make_run
from synthetic_cache import TEXT_WIDTH, make_cache
from tiny_models import save_tiny

from saffe_cache.extraction.config import ExtractConfig
from saffe_cache.extraction.extract import extract
from saffe_cache.store.reader import EncoderCache, open_cache
from saffe_cache.studies.alignment.align import align
from saffe_cache.studies.alignment.config import AlignConfig
from saffe_cache.studies.binding.bind import BindConfig, bind
from saffe_cache.studies.binding.names import NamePool, make_names
from saffe_cache.studies.captioning.caption import CaptionConfig, caption
from saffe_cache.studies.matching.config import MatchConfig
from saffe_cache.studies.matching.match import match
from saffe_cache.studies.sweep.ablate import ablate
from saffe_cache.studies.sweep.recipe import AblateConfig

RESULTS = Path(__file__).with_name("results.json")

Number = float | bool | None
Numbers = dict[str, Number]

# Adapters: what a verb left in its folder, as numbers by name.


def extract_numbers(folder: Path) -> Numbers:
    """Of each array the moments, and a sum by which a number in another place is another result."""
    cache = open_cache(folder)
    table = cache.table
    found: Numbers = {f"items/{split}": count for split, count in sorted(Counter(table.splits).items())}
    found |= {f"inputs/{modality}": len(inputs) for modality, inputs in table.inputs.items()}
    found["classes"] = len(table.class_names)
    for encoder in cache.encoders.values():
        found |= _encoder_numbers(encoder)
    return found


def _encoder_numbers(encoder: EncoderCache) -> Numbers:
    manifest, found = encoder.manifest, Numbers()
    for name, array in sorted(manifest.arrays.items()):
        place = f"{manifest.modality}/{name}"
        found[f"{place}/rows"] = array.rows
        found[f"{place}/ordered_mean"] = _ordered_mean(encoder.array(name).read_range(0, array.rows))
        if array.spec.dtype != "int64":
            statistics = encoder.statistics(name)
            found |= {f"{place}/{key}": getattr(statistics, key) for key in ("mean", "std", "max_magnitude")}
    for layer in encoder.block_layers:
        means = [_ordered_mean(values) for _, values in sorted(encoder.block(layer).tensors.items())]
        found[f"{manifest.modality}/block {layer}"] = math.fsum(means)
    return found


def _ordered_mean(values: np.ndarray) -> float:
    flattened = np.asarray(values, np.float64).ravel()
    return float((flattened * np.linspace(-1, 1, flattened.size)).mean())


def train_numbers(folder: Path) -> Numbers:
    found = flat(_read(folder / "result.json"), without=("seconds", "peak_memory_mb"))
    for name in ("", "permuted/"):
        log = folder / name / "log.jsonl"
        for line in log.read_text().splitlines() if log.exists() else ():
            epoch = json.loads(line)
            found |= flat(epoch, f"{name}epoch {epoch['epoch']}", only=("loss", "validation_score"))
    return found


def evaluate_numbers(folder: Path) -> Numbers:
    found = _read(folder / "result.json")
    numbers = flat(found, only=("num_photos", "num_queries", "num_unusable_items", "duplicates", "sensitivity"))
    numbers |= flat(found["cost"], only=("trainable_parameters", "fusing_flops"))
    numbers |= {"failures": len(found["failures"]), "warnings": len(found["warnings"])}
    numbers |= flat(found["index"]["parameters"], "index")
    numbers |= {f"index/recall_at_{k}": share for k, share in found["index"]["recall"].items()}
    for name, scores in found["systems"].items():
        known = {metric: {part: of for part, of in score.items() if of is not None} for metric, score in scores.items()}
        numbers |= flat(known, name, without=() if name == "fam" else ("chance",))
    for best, metrics in found["differences"].items():
        numbers |= flat(metrics, f"fam less {best}")
    for name, control in found["controls"].items():
        numbers |= flat(found["control_scores"][name], f"({name})", only=("value",))
        numbers |= flat(control, f"({name})", only=("limit", "passed"))
    return numbers


def align_numbers(folder: Path) -> Numbers:
    found = _read(folder / "result.json")
    numbers = flat(found, only=("photos", "num_texts", "measures"))
    for name, value in found["best_layer"]["evidence"].items():
        if isinstance(value, dict):
            value = [value[part] for part in ("value", "low", "high")]
        numbers |= flat({name: value}, "evidence")
    for maps in found["best_layer"]["maps"]:
        numbers |= flat(maps, f"layers {maps['gallery_layer']}, {maps['text_layer']}", only=("chance", "scores"))
    return numbers


def bind_numbers(folder: Path) -> Numbers:
    found = _read(folder / "result.json")
    numbers: Numbers = {"failures": len(found["failures"])}
    for setting in found["settings"]:
        for part in ("systems", "differences", "controls"):
            for name, one in setting[part].items():
                setting[part][name] = {"mean": one["value"], "half_interval": (one["high"] - one["low"]) / 2}
        numbers |= flat(setting, f"{setting['ways']}-way {setting['shots']}-shot", without=("verdicts",))
    for replaced in found["names_replaced"]:
        values = {name: {"values": of} for name, of in replaced["systems"].items()}
        numbers |= flat(values, f"names replaced/{replaced['metric']}")
    return numbers


def match_numbers(folder: Path) -> Numbers:
    found = _read(folder / "result.json")
    numbers: Numbers = {"failures": len(found["failures"]), "controls": len(found["controls"])}
    for setting in found["settings"]:
        place = f"{setting['setting']}, {setting['scale']}"
        for scores in setting["systems"].values():
            for score in scores.values():
                score["mean"] = score.pop("value")
        numbers |= flat(setting, place, without=("scale", "level", "negatives", "values"))
    for control in found["controls"]:
        limit = None if control["limit"] is None else control["limit"] - control["level"]
        verdict = {"auc": control["value"], "limit": limit, "passed": control["passed"]}
        numbers |= flat(verdict, f"({control['name']})")
    for crossover in found["crossovers"]:
        place = " and ".join(crossover["names"])
        numbers |= flat(crossover, place, without=("curves",))
        for name, curve in (crossover["curves"] or {}).items():
            is_flat = curve["a"] < 1e-4  # a N^-b + c: b is then anything
            numbers |= flat(curve, f"{place}/{name}", without=("b",) if is_flat else ())
    for name, cost in found["cost"].items():
        numbers |= flat(cost, name, only=("parameters", "flops_per_pair", "kept_bytes_per_pair"))
    return numbers


def caption_numbers(folder: Path) -> Numbers:
    found = _read(folder / "result.json")
    numbers = flat(found, without=("cost", "measured", "verdicts", "training", "examples", "failures", "epochs"))
    for loss in found["measured"]["losses"].values():
        loss |= {"loss": loss["value"], "perplexity": math.exp(loss["value"])}
    for part in ("measured", "training", "cost"):
        numbers |= flat(found[part], without=("seconds_per_step",))
    return numbers | {"failures": len(found["failures"])}


def ablate_numbers(folder: Path) -> Numbers:
    """Of one recipe's folder."""
    found = _read(folder / "result.json")
    numbers = flat(found["levels"], "lines") | flat(found["cost"], only=("num_runs", "photos_seen", "texts_seen"))
    for series in found["series"]:
        for point in series["points"]:
            place = "/".join(filter(None, (series["name"], point["x"], point["y"])))
            without = (
                "settings",
                "seeds",
                "failures",
                "training_seconds",
                "training_peak_memory_mb",
                "evaluation_seconds",
            )
            numbers |= flat(point, place, without=without)
    return numbers


def _read(path: Path) -> dict[str, Any]:
    return json.loads(path.read_text())  # type: ignore[no-any-return]


def flat(content: Any, place: str = "", *, only: tuple[str, ...] = (), without: tuple[str, ...] = ()) -> Numbers:
    """The numbers in nested JSON by their way there; words are left out.

    Args:
        only: the keys of the first level, or of the last, that are taken.
        without: keys of any level that are not.
    """

    def walk(part: Any, way: tuple[str, ...]) -> Iterator[tuple[tuple[str, ...], Number]]:
        if isinstance(part, Mapping):
            for key, value in part.items():
                if key not in without:
                    yield from walk(value, (*way, str(key)))
        elif isinstance(part, list):
            for number, value in enumerate(part):
                yield from walk(value, (*way, str(number)))
        elif part is None or isinstance(part, bool | int | float):
            yield way, part

    wanted = ((way, value) for way, value in walk(content, ()) if not only or {way[0], way[-1]} & set(only))
    return {"/".join((*filter(None, (place,)), *way)): value for way, value in wanted}


# Runs: each verb on data that are drawn.

ADAPTERS: Mapping[str, tuple[Callable[[Path], Numbers], int]] = {
    "extract": (extract_numbers, 5),
    "train": (train_numbers, 6),
    "evaluate": (evaluate_numbers, 6),
    "align": (align_numbers, 5),
    "bind": (bind_numbers, 5),
    "match": (match_numbers, 5),
    "caption": (caption_numbers, 5),
    "ablate": (ablate_numbers, 5),
}
"""And decimals of fractions, losses and statistics: two more than the verb's table prints."""

_FEWER_DIGITS = {("train", "loss"): 4, ("caption", "perplexity"): 3}
"""What other processors' order of sums shows in, up to 3e-5 of a loss."""


def digits_of(verb: str, name: str) -> int:
    """Decimals of a number that results.json holds."""
    return _FEWER_DIGITS.get((verb, name.split("/")[-1]), ADAPTERS[verb][1])


Folders = dict[str, str]
"""What a verb wrote, by the name of its part in results.json."""


def make_results(folder: Path) -> dict[str, Numbers]:
    """Run all verbs in a folder that is empty: the numbers of each, rounded."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        folders = run_verbs(folder)
    finally:
        torch.set_num_threads(threads)
    found = {}
    for verb, (adapter, _) in ADAPTERS.items():
        parts = {part: adapter(Path(path)) for part, path in folders[verb].items()}
        found[verb] = {
            f"{part}/{name}": round(value, digits_of(verb, name)) if isinstance(value, float) else value
            for part, numbers in parts.items()
            for name, value in numbers.items()
        }
    return found


def run_verbs(folder: Path) -> dict[str, Folders]:
    made = make_run(folder / "made", _tiny_models(folder / "models"))
    caches, extracted = _caches(folder), _extract(folder)
    caches["captioned"] = extracted["dinov2, gpt2"]
    runs = _train(caches, folder / "runs")
    reports = _evaluate(caches, runs)
    studies = _studies(caches, folder)
    [sweep] = ablate(_ablate_config(caches["captions"], folder / "ablate"))
    return {
        "extract": {"dinov2, bert": made.cache, **extracted},
        "train": {"linear, made": made.run, **runs},
        "evaluate": {"caption, made": str(made.out), **reports},
        **studies,
        "ablate": {"layers": sweep},
    }


def _tiny_models(folder: Path) -> Callable[[str], Path]:
    def folder_of(name: str) -> Path:
        path = folder / f"tiny-{name}"
        return path if path.exists() else save_tiny(name, path)

    return folder_of


def _caches(folder: Path) -> Folders:
    """Texts to find photos by, classes, and captions beside photos that tell of half of it."""
    notes: dict[str, Any] = {"captions": 3, "joint": True, "deep": True}
    return {
        "captions": make_cache(folder / "captions.zarr", {"train": 120, "dev": 20, "test": 40}),
        "classes": make_cache(folder / "classes.zarr", {"train": 90, "test": 60}, classes=4),
        "notes": make_cache(folder / "notes.zarr", {"train": 100, "dev": 20, "test": 40}, **notes),
    }


def _extract(folder: Path) -> Folders:
    """A language model, and families and storage types that no other cache here has."""
    tiny_models = _tiny_models(folder / "models")
    for number in range(12):
        split = ("train", "test")[number % 3 == 2]
        draw(folder / "photos" / split / f"word{number % 2}" / f"{number}.png", number)
    found = {"dinov2, gpt2": captioned_cache(folder / "captioned", tiny_models)}
    families: tuple[tuple[str, str, Any], ...] = (
        ("clip-vision", "clip-text", "int8"),
        ("resnet", "roberta", "float16"),
    )
    for image, text, storage in families:
        config = ExtractConfig(
            data=f"{folder}/photos",
            cache=f"{folder}/{image}.zarr",
            encoder={"image": str(tiny_models(image)), "text": str(tiny_models(text))},
            storage=storage,
            device="cpu",
        )
        found[f"{image}, {text}"] = extract(config)
    return found


def _train(caches: Folders, folder: Path) -> Folders:
    """A run of each kind of fusion with texts beside photos, and those that the protocols need."""
    asked: dict[str, tuple[str, dict[str, Any]]] = {
        fusion: ("notes", {"fusion": fusion, "gallery_text": "first_caption"})
        for fusion in ("linear", "reuse", "paper", "concat", "late", "mbt", "deep_insert", "albef")
    }
    asked |= {
        "linear, captions": ("captions", {"fusion": "linear"}),
        "linear, classes": ("classes", {"fusion": "linear"}),
        "concat, classes": ("classes", {"fusion": "concat", "objective": {"info_nce": 1.0, "matching": 1.0}}),
    }
    quick = {"epochs": 2, "batch_size": 32, "control_epochs": 1}
    return {
        name: quick_train(caches[cache], folder / name, **(quick | options)) for name, (cache, options) in asked.items()
    }


def _evaluate(caches: Folders, runs: Folders) -> Folders:
    """Each protocol with all baselines."""
    asked: dict[str, tuple[str, str, dict[str, Any]]] = {
        "caption": ("linear, captions", "captions", {"index": "hnsw"}),
        "class": ("linear, classes", "classes", {}),
        "metadata": ("reuse", "notes", {}),
        "candidate": ("concat, classes", "classes", {}),
        "rerank": ("albef", "notes", {"rerank_k": 5, "rerank_queries": 40}),
        "image": ("linear, classes", "classes", {}),
    }
    return {
        protocol: report_of(caches[cache], runs[run], protocol=protocol, baselines="all", **options)["out"]
        for protocol, (run, cache, options) in asked.items()
    }


def _studies(caches: Folders, folder: Path) -> dict[str, Folders]:
    quick: dict[str, Any] = {"neighbours": 4, "components": 4, "permutations": 5, "half_samples": 3}
    return {
        "align": {
            name: align(AlignConfig(cache=caches[name], out=f"{folder}/align-{name}", **quick))
            for name in ("captions", "classes")
        },
        "bind": {"classes": bind(_bind_config(caches["classes"], folder / "bind"))},
        "match": {"captions": match(_match_config(caches["captions"], folder / "match"))},
        "caption": {"layer 1": caption(_caption_config(caches["captioned"], folder / "caption"))},
    }


def _bind_config(cache: str, out: Path) -> BindConfig:
    """The vectors of names are drawn: no encoder made the cache."""
    names = make_names(30, [], 0)
    vectors = np.random.default_rng(0).normal(size=(len(names), TEXT_WIDTH)).astype(np.float32)
    NamePool(tuple(names), vectors, open_cache(cache).encoder("text").key).save(out / "names.npz")
    return BindConfig(
        cache=cache,
        out=str(out),
        ways=(2, 3),
        shots=(1, 3),
        queries=5,
        episodes=12,
        tuning_episodes=2,
        max_epochs=4,
        num_names=len(names),
        replaced_seeds=2,
        replaced_epochs=2,
        device="cpu",
    )


def _match_config(cache: str, out: Path) -> MatchConfig:
    return MatchConfig(
        cache=cache,
        out=str(out),
        scales=(60, 120, 200),
        token_scales=(120,),
        noise=(0.5,),
        rotation=(1.0,),
        degraded_scale=200,
        seeds=(0, 1),
        epochs=2,
        batch_size=32,
        tsne_pairs=0,
        device="cpu",
    )


def _caption_config(cache: str, out: Path) -> CaptionConfig:
    return CaptionConfig(
        cache=cache,
        out=str(out),
        layer=1,
        grid=2,
        held_out=0.25,
        others=3,
        epochs=2,
        batch_size=4,
        max_tokens=6,
        device="cpu",
    )


RECIPE = """
title = "T"
question = "Q?"
x = "layers.image"
x_label = "layer"
seeds = [0, 1]
[shared]
epochs = 2
control_epochs = 1
[[series]]
name = "linear"
fusion = "linear"
layers.image = [[2], [3]]
[[series]]
name = "stored"
fusion = "linear"
storage = ["int8"]
layers = { image = [2, 3] }
"""


def _ablate_config(cache: str, out: Path) -> AblateConfig:
    out.mkdir()
    recipe = out.parent / "layers.toml"
    recipe.write_text(RECIPE)
    return AblateConfig(recipe=(str(recipe),), cache=cache, out=str(out), device="cpu", workers=1)


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as scratch:
        RESULTS.write_text(json.dumps(make_results(Path(scratch)), indent=0) + "\n")
