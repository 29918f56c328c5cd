"""Does saffe align advise well? Its measures and its rule, compared with trained fusions.

    python pipelines/alignment.py --cache flickr8k.zarr cifar10.zarr --work runs/alignment

For each cache and each of four photo layers, the script takes the measures from the cache alone, then trains every
fusion on a part of the photos and reports it on unseen ones: `linear` and `reuse` with only photos in the gallery, and
for captions also `linear`, `concat` and `reuse` with a caption paired with each photo. "No FAM" is the ridge regression
of the same photos and layer (with paired captions: its late fusion with them). A decoder contains an encoder's block,
which computes hidden_states l from l - 1, so it gets the layer before the measured one; otherwise it would win by a
layer. There are three seeds, which also draw the photos; the best epoch is chosen on a 20th of train.
alignment-test.json and .md report how each measure correlates with the gain of a FAM, and how often the advised fusion
was the best, compared with advisers that look at nothing. The same command resumes a killed run.

Needs scipy, which scikit-learn brings (the extra `test` or `bench`). Time on two CPU cores: about 25 minutes for two
caches; --train-fraction 0.5 --epochs 6 takes three times as long and gives clearer results.
"""

from __future__ import annotations

import argparse
import json
import logging
import statistics
import sys
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from itertools import product
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1]))  # pipelines/ is next to the package, not in it

from pipelines.advisers import Case, advisers, correlations, proposal
from saffe_cache.core.atomic_io import make_folder, write_whole
from saffe_cache.core.features import Modality
from saffe_cache.core.options import require
from saffe_cache.core.outputs import write_json
from saffe_cache.inputs.pairs import gallery_modality, pair_kind
from saffe_cache.retrieval.metrics import seed_interval
from saffe_cache.store.manifest import content_hash
from saffe_cache.store.reader import EncoderCache, open_cache
from saffe_cache.store.storage import Storage
from saffe_cache.studies.alignment.align import align
from saffe_cache.studies.alignment.config import AlignConfig
from saffe_cache.studies.alignment.result import AlignmentResult, Evidence, advise
from saffe_cache.studies.sweep.ablate import ablate
from saffe_cache.studies.sweep.recipe import AblateConfig
from saffe_cache.studies.sweep.result import SweepResult

ALONE, BESIDE = "photos alone", "photos with paired text"
NO_FAM = {ALONE: "ridge", BESIDE: "late_fusion_ridge"}
"""The baseline that stands for it."""
TRAINED = {
    ALONE: {"linear": "linear", "decoder": "reuse"},
    BESIDE: {"linear": "linear", "concat": "concat", "decoder": "reuse"},
}
"""What is advised, and the fusion that is trained for it."""
NUM_LAYERS = 4


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cache", nargs="+", required=True, help="each with photos' and texts' layers and blocks")
    parser.add_argument("--work", type=Path, required=True)
    parser.add_argument("--gallery-layers", nargs="+", type=int, help="default: four, the last among them")
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    parser.add_argument("--train-fraction", type=float, default=0.2)
    parser.add_argument("--epochs", type=int, default=4)
    parser.add_argument("--workers", type=int, help="default: one a processor core")
    options = parser.parse_args()
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    stems = [Path(path).stem for path in options.cache]
    require(len(set(stems)) == len(stems), "cache", stems, "caches of different names")
    cases: dict[str, list[Case]] = {}
    for path in options.cache:
        for setting in settings_of(path):
            for gallery, found in cases_of(setting, options).items():
                cases.setdefault(gallery, []).extend(found)
    result = {"options": json.loads(json.dumps(vars(options), default=str))}
    result |= {gallery: outcome(of) for gallery, of in cases.items()}
    table = "\n\n".join(as_markdown(gallery, result[gallery]) for gallery in cases)
    write_whole(options.work / "alignment-test.md", f"{table}\n".encode())
    write_json(options.work / "alignment-test.json", result)
    print(table)


@dataclass(frozen=True, kw_only=True)
class Setting:
    """Two encoders of a cache."""

    name: str
    cache: str
    modality: Modality
    encoder: Mapping[str, str]
    usable: Sequence[int]
    """Photo layers that both a decoder and the other fusions can make use of."""
    text_layer: int
    kinds: Sequence[str]
    """Of galleries."""
    split: str
    """To report on."""


def settings_of(path: str) -> list[Setting]:
    """Each photo encoder of a cache with each text encoder."""
    cache = open_cache(path)
    modality = gallery_modality(cache)
    sides = [[one for one in cache.encoders.values() if one.manifest.modality == of] for of in (modality, "text")]
    several = len(sides[0]) * len(sides[1]) > 1
    return [
        Setting(
            name="-".join([Path(path).stem, *([gallery.key, text.key] if several else [])]),
            cache=path,
            modality=modality,
            encoder={modality: gallery.key, "text": text.key},
            usable=fused_layers(gallery),
            text_layer=fused_layers(text)[-1],
            kinds=[ALONE, BESIDE] if pair_kind(cache.table) == "captions" else [ALONE],
            split="test" if "test" in cache.table.splits else "dev",
        )
        for gallery, text in product(*sides)
    ]


def cases_of(setting: Setting, options: argparse.Namespace) -> dict[str, list[Case]]:
    """By kind of gallery."""
    step = max(1, len(setting.usable) // NUM_LAYERS)
    layers = options.gallery_layers or setting.usable[::-step][:NUM_LAYERS][::-1]
    work = options.work / setting.name
    measured = {layer: measure(setting, work, layer) for layer in layers}
    recipes = [write_recipe(setting, options, kind, layers) for kind in setting.kinds]
    folders = ablate(
        AblateConfig(
            recipe=tuple(map(str, recipes)),
            cache=setting.cache,
            out=str(work / "sweep"),
            split=setting.split,
            seeds=tuple(options.seeds),
            workers=options.workers,
        )
    )
    found: dict[str, list[Case]] = {}
    for kind, folder in zip(setting.kinds, folders, strict=True):
        sweep = SweepResult.load(folder)
        found[kind] = [case_of(setting.name, kind, layer, sweep, measured[layer]) for layer in layers]
    return found


def fused_layers(encoder: EncoderCache) -> list[int]:
    """Layers with the one before them and the block between."""
    return [layer for layer in encoder.layers if layer - 1 in encoder.block_layers]


def measure(setting: Setting, work: Path, layer: int) -> AlignmentResult:
    """What saffe align measures for one combination; measured once for the cache's content."""
    out = work / "align" / f"{setting.modality}-{layer}-{content_hash(Storage(setting.cache))}"
    layers: dict[str, tuple[int, ...]] = {setting.modality: (layer,), "text": (setting.text_layer,)}
    config = AlignConfig(cache=setting.cache, out=str(out), layers=layers, encoder=setting.encoder)
    return AlignmentResult.load(align(config))


def write_recipe(setting: Setting, options: argparse.Namespace, kind: str, layers: Sequence[int]) -> Path:
    """The trainings of one kind of gallery, as saffe ablate reads them."""
    modality = setting.modality
    encoders = ", ".join(f'{name} = "{key}"' for name, key in setting.encoder.items())
    beside = 'gallery_text = "first_caption"\nlearning_rate = 1e-3\ntext_dropout = 0.3\n' if kind == BESIDE else ""
    head = f"""title = "{kind}"
question = "What does each fusion find?"
x = "layers.{modality}"
x_label = "hidden_states"

[shared]
encoder = {{ {encoders} }}
validation = "heldout"
validation_fraction = 0.05
train_fraction = {options.train_fraction}
epochs = {options.epochs}
control_epochs = 1
{beside}"""
    series = []
    for fusion in TRAINED[kind].values():
        if fusion == "reuse":
            given = [f"{modality} = [{layer - 1}], text = [{setting.text_layer - 1}]" for layer in layers]
        else:
            given = [f"{modality} = [{layer}]" for layer in layers]
        of_layers = ", ".join(f"{{ {one} }}" for one in given)
        series.append(f'[[series]]\nname = "{fusion}"\nfusion = "{fusion}"\nlayers = [{of_layers}]\n')
    path: Path = options.work / setting.name / "recipes" / f"{'beside' if kind == BESIDE else 'alone'}.toml"
    make_folder(path.parent)
    write_whole(path, "\n".join([head, *series]).encode())
    return path


def case_of(dataset: str, kind: str, layer: int, sweep: SweepResult, alignment: AlignmentResult) -> Case:
    """One photo layer."""
    metric = sweep.metric
    points = {}
    for series in sweep.series:
        own = layer - 1 if series.name == "reuse" else layer
        [points[series.name]] = [point for point in series.points if point.x == str(own)]
    linear = points["linear"]
    values = {"no FAM": linear.baselines[NO_FAM[kind]][metric]}
    values |= {advised: points[fusion].values[metric] for advised, fusion in TRAINED[kind].items()}
    by_measures = advise(alignment.best_layer.evidence, has_paired_texts=True)
    [advised] = [one.fusion for one in by_measures if one.gallery == kind]
    return Case(
        dataset=dataset,
        name=f"{dataset}, hidden_states {layer}",
        values=values,
        measures=measures_of(alignment),
        advised=advised,
        hypothesis=hypothesis(kind, alignment.best_layer.evidence),
        metric=metric,
        chance=linear.chance[metric],
        shuffled=statistics.mean(linear.controls["photos_shuffled"][metric]),
        failures=[failure for point in points.values() for failure in point.failures],
    )


def hypothesis(kind: str, evidence: Evidence) -> str:
    """What the rule advised that these cases refuted: a decoder where an MLP or tokens find more, beyond noise."""
    without, mlp, tokens = evidence.without_map, evidence.mlp_gain, evidence.token_gain
    if kind == BESIDE:
        return "decoder" if tokens.sign > 0 else "concat"
    is_curved = mlp.sign > 0 and evidence.a_lin < 0.9 * evidence.a_mlp
    if max(evidence.a_lin, evidence.a_mlp) <= evidence.null or (without is not None and without.sign > 0):
        return "no FAM"
    return "decoder" if is_curved or tokens.sign > 0 else "linear"


def measures_of(alignment: AlignmentResult) -> dict[str, float]:
    """Of the photo layer, which comes first, with the texts' own vectors, which come last."""
    of, evidence = alignment.measures, alignment.best_layer.evidence
    normalised = of["mutual_neighbours"].normalised
    assert normalised is not None
    cells = {"CKA": of["cka"].value, "shared neighbours": normalised, "SVCCA": of["svcca"].value}
    return {
        **{name: value for name, grid in cells.items() if (value := grid[0][-1]) is not None},
        "A_lin": evidence.a_lin,
        "A_mlp": evidence.a_mlp,
        "A_mlp - A_lin": evidence.mlp_gain.value,
        "A_lin / A_mlp": evidence.a_lin / max(evidence.a_mlp, 1e-9),
        "A_tok": evidence.a_tok,
        "A_tok - A_lin": evidence.token_gain.value,
    }


def outcome(cases: Sequence[Case]) -> dict[str, Any]:
    """Of one kind of gallery."""
    gains = {
        "the best FAM less no FAM": lambda case: max(map(case.mean, case.fusions[1:])) - case.mean("no FAM"),
        "linear less no FAM": lambda case: case.mean("linear") - case.mean("no FAM"),
        "decoder less linear": lambda case: case.mean("decoder") - case.mean("linear"),
    }
    return {
        "cases": [asdict(case) | {"best": case.best, "lost": case.regret(case.advised)} for case in cases],
        "correlations": {name: correlations(cases, gain) for name, gain in gains.items()},
        "advisers": advisers(cases),
        "proposal": proposal(cases),
    }


def as_markdown(gallery: str, found: Mapping[str, Any]) -> str:
    """Percent; what each fusion finds, what the measures say, and how they and the advice fare."""
    cases = found["cases"]
    fusions, measures = list(cases[0]["values"]), list(cases[0]["measures"])
    seeds = len(cases[0]["values"][fusions[0]])
    failures = [f"{case['name']}: {failure}" for case in cases for failure in case["failures"]]
    lines = [f"CONTROL FAILED: {failure}. Do not use these numbers." for failure in failures]
    lines += [f"### {gallery[0].upper()}{gallery[1:]}: {len(cases)} cases", ""]
    lines += [f"Percent, mean over {seeds} seeds ± half of its 95 % t-interval; the best in bold.", ""]
    lines += _table("case", "metric", "chance", "photos shuffled", *fusions, "advised")
    for case in cases:
        values = (_spread(of, bold=name == case["best"]) for name, of in case["values"].items())
        controls = f"{100 * case['chance']:.1f}", f"{100 * case['shuffled']:.1f}"
        lines += _row(case["name"], case["metric"], *controls, *values, case["advised"])
    lines += ["", "What saffe align measures, percent; A_… are R@1.", "", *_table("case", *measures)]
    for case in cases:
        lines += _row(case["name"], *(f"{100 * value:.1f}" for value in case["measures"].values()))
    lines += ["", "Spearman's rank correlation within datasets, [95 % bootstrap over cases], p by permutation.", ""]
    lines += _table("measure", *found["correlations"])
    for name in measures:
        of_gains = (of.get(name) for of in found["correlations"].values())
        lines += _row(name, *("too few cases" if of is None else _correlation(of) for of in of_gains))
    lines += ["", *_table("adviser", "best", "within noise of it", "points lost on average")]
    for name, one in found["advisers"].items():
        shares = (f"{100 * one[share]:.0f} %" for share in ("best", "within_noise"))
        lines += _row(name, *shares, f"{100 * one['lost']:.2f}")
    return "\n".join([*lines, "", f"What these cases support: {found['proposal']}."])


def _spread(values: Sequence[float], *, bold: bool) -> str:
    mean, low, _ = seed_interval(values)
    shown = f"**{100 * mean:.1f}**" if bold else f"{100 * mean:.1f}"
    return f"{shown} ± {100 * (mean - low):.1f}" if len(values) > 1 else shown


def _correlation(of: Mapping[str, float]) -> str:
    return f"{of['rho']:+.2f} [{of['low']:+.2f}, {of['high']:+.2f}] {of['p']:.3f}"


def _table(*header: str) -> list[str]:
    return [*_row(*header), *_row(*["---"] * len(header))]


def _row(*cells: str) -> list[str]:
    return ["| " + " | ".join(cells) + " |"]


if __name__ == "__main__":
    main()
