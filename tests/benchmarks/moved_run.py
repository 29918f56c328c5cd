"""A run that has moved, without its cache: R@1 of its captions through `fam.index` and `search`, beside its report's.

    python tests/benchmarks/moved_run.py RUN DATA SPLIT

RUN has been evaluated on SPLIT by the caption protocol with null text; DATA are the photos of its cache.
It is copied to a temporary folder and indexed there. Each caption then searches alone.
"""

from __future__ import annotations

import shutil
import sys
import tempfile
from pathlib import Path

from tqdm import tqdm

import saffe_cache as sc
from saffe_cache.evaluation.results import EvaluationResult


def main() -> None:
    run, data, split = sys.argv[1:]
    reported = EvaluationResult.load(Path(run) / f"{split}-caption")
    with tempfile.TemporaryDirectory() as work:
        fam = sc.load_run(shutil.copytree(run, Path(work) / "moved", ignore=shutil.ignore_patterns("*-caption")))
        index = fam.index(data, out=Path(work) / "index", splits=(split,))
        queries = [(name, text) for name, texts in zip(index.ids, index.texts, strict=True) for text in texts]
        found = [index.search(text, k=1)[0].id == name for name, text in tqdm(queries, unit=" captions")]
    expected = reported.systems["fam"]["recall_at_1"].value
    print(f"{len(index)} photos, {len(queries)} captions: R@1 {sum(found) / len(found):.6f}, reported {expected:.6f}")
    sys.exit(0 if sum(found) == round(expected * len(found)) and len(found) == reported.num_queries else 1)


if __name__ == "__main__":
    main()
