"""The table of cases by which saffe align advises a method, from finished studies of few pairs.

    saffe few-pairs flickr8k-dinov2.zarr flickr8k-clip.zarr --split dev --out runs/few-pairs-flickr8k
    saffe few-pairs cifar10-dinov2.zarr --split test --out runs/few-pairs-cifar10
    python pipelines/few_pairs.py runs/few-pairs-flickr8k runs/few-pairs-cifar10 --work runs/cases

It runs `saffe align` on each study's caches, which must still be where they were, writes WORK/cases.json, and prints
how well a rule that is fitted to some data sets and encoders advises for others. With --install the table replaces the
one that comes with the package (saffe_cache/studies/alignment/cases.json). A cache's data set is its name up to the
first hyphen. The same command resumes a killed run; it takes a minute or two for each cache on two CPU cores.
"""

from __future__ import annotations

import argparse
import logging
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path

from saffe_cache.core.json_schema import made_of
from saffe_cache.core.outputs import CONFIG, read_json, write_json
from saffe_cache.studies.alignment.align import align
from saffe_cache.studies.alignment.cases import TABLE, Case, advise_method, cases_of, comparable
from saffe_cache.studies.alignment.config import AlignConfig
from saffe_cache.studies.alignment.result import AlignmentResult
from saffe_cache.studies.few_pairs.config import FewPairsConfig
from saffe_cache.studies.few_pairs.result import FewPairsResult


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("studies", nargs="+", type=Path, help="folders of results of saffe few-pairs")
    parser.add_argument("--work", type=Path, required=True)
    parser.add_argument("--align-photos", type=int, default=1000, help="photos that saffe align measures on, at most")
    parser.add_argument("--install", action="store_true", help="replace the package's table")
    options = parser.parse_args()
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    cases = [
        case
        for study in options.studies
        for case in cases_of(FewPairsResult.load(study), measures(study, options.work, options.align_photos))
    ]
    for path in (options.work / "cases.json", *([TABLE] if options.install else [])):
        write_json(path, {"cases": [asdict(case) for case in cases]})
    print("\n".join(outcome(cases)))


def measures(study: Path, work: Path, photos: int) -> dict[str, dict[str, float]]:
    """Of each cache of a study, what a rule may depend on besides the number of photos."""
    config = made_of(FewPairsConfig, read_json(study / CONFIG)["config"])
    found = {}
    for name, path in zip(config.names, config.cache, strict=True):
        out = str(work / f"align-{study.name}-{name}")
        given = AlignConfig(cache=path, out=out, encoder=config.encoder, layers=config.layers, max_photos=photos)
        found[name] = AlignmentResult.load(align(given)).best_layer.evidence.measures(0)
        del found[name]["photos"]
    return found


def outcome(cases: Sequence[Case]) -> list[str]:
    """What each method loses on average to the best one of each case, and the rule that these cases support."""
    known = comparable(cases, cases[0].measures)
    lost = {name: sum(case.regret(name) for case in known) / len(known) for name in known[0].fusions}
    lines = ["| method | points lost on average | best in |", "|---|---|---|"]
    for name in sorted(lost, key=lambda one: lost[one]):
        best = sum(case.best == name for case in known)
        lines.append(f"| {name} | {100 * lost[name]:.1f} | {best} of {len(known)} |")
    advice = advise_method(cases, cases[-1].measures)
    return [*lines, "", f"{len(cases)} cases are too few for advice." if advice is None else f"{advice.sentence}."]


if __name__ == "__main__":
    main()
