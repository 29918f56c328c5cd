"""What to train with few pairs, on all caches, and the table of cases that saffe align advises by.

    saffe extract --data flickr8k --encoder image=facebook/dinov2-small \\
        --encoder text=sentence-transformers/all-MiniLM-L6-v2 --image-size 112 --layers image=11,12 --layers text=6 \\
        --cache flickr8k-dinov2-minilm.zarr
    saffe extract --data flickr8k --encoder image=openai/clip-vit-base-patch16 \\
        --encoder text=sentence-transformers/all-mpnet-base-v2 --layers image=11,12 --layers text=12 \\
        --cache flickr8k-clip-mpnet.zarr
    python pipelines/few_pairs.py --cache flickr8k-dinov2-minilm.zarr flickr8k-clip-mpnet.zarr --split dev \\
        --work runs/few-pairs

It runs `saffe few-pairs` on all caches together and `saffe align` on each, then writes WORK/cases.json and prints how
well a rule that is fitted to some data sets and encoders advises for others. With --install the table replaces the one
that comes with the package (saffe_cache/studies/alignment/cases.json). A cache's data set is its name up to the first
hyphen. The same command resumes a killed run.

Time on two CPU cores: under two hours for two caches of 6,000 photos with three seeds; --quick takes a few minutes.
"""

from __future__ import annotations

import argparse
import logging
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path

from saffe_cache.core.outputs import write_json
from saffe_cache.core.results import read_report
from saffe_cache.studies.alignment.align import align
from saffe_cache.studies.alignment.cases import TABLE, Case, advise_method, cases_of, comparable
from saffe_cache.studies.alignment.config import AlignConfig
from saffe_cache.studies.alignment.result import AlignmentResult
from saffe_cache.studies.few_pairs.config import FewPairsConfig
from saffe_cache.studies.few_pairs.few_pairs import few_pairs
from saffe_cache.studies.few_pairs.result import FewPairsResult


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cache", nargs="+", required=True)
    parser.add_argument("--work", type=Path, required=True)
    parser.add_argument("--split", default="test", help="to report on")
    parser.add_argument("--photos", nargs="+", type=int, default=[], help="default: 500, 1500, 3000, 6000")
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    parser.add_argument("--fusions", nargs="+", default=[], help="default: all that run no encoder blocks")
    parser.add_argument("--align-photos", type=int, default=1000, help="photos that saffe align measures on, at most")
    parser.add_argument("--quick", action="store_true", help="two numbers of photos, one seed, three epochs")
    parser.add_argument("--install", action="store_true", help="replace the package's table")
    options = parser.parse_args()
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    config = FewPairsConfig(
        cache=tuple(options.cache),
        out=str(options.work / "few-pairs"),
        split=options.split,
        photos=tuple(options.photos),
        seeds=tuple(options.seeds),
        fusions=tuple(options.fusions),
        quick=options.quick,
    )
    print(read_report(few_pairs(config)))
    cases = cases_of(FewPairsResult.load(config.out), measures(config, options.work, options.align_photos))
    for path in (options.work / "cases.json", *([TABLE] if options.install else [])):
        write_json(path, {"cases": [asdict(case) for case in cases]})
    print("\n".join(outcome(cases)))


def measures(config: FewPairsConfig, work: Path, photos: int) -> dict[str, dict[str, float]]:
    """Of each cache, what a rule may depend on besides the number of photos."""
    found = {}
    for name, path in zip(config.names, config.cache, strict=True):
        out = str(work / f"align-{name}")
        aligned = AlignmentResult.load(align(AlignConfig(cache=path, out=out, max_photos=photos)))
        found[name] = aligned.best_layer.evidence.measures(0)
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
