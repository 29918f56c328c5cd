"""The targets of tests/benchmarks/fuzz.py on a few changed inputs: nothing but the promised errors comes out."""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Iterator
from pathlib import Path
from random import Random

import pytest

sys.path.append(str(Path(__file__).parent / "benchmarks"))

import fuzz
from fuzz_inputs import changed_bytes, changed_json
from fuzz_targets import PROMISED, Target, make_target
from store_cases import memory_folder, without_fsync

COUNTS = {"class folders": 20, "HDF5 import": 0}
"""HDF5's own library may hang on a changed file, and end the tests."""


@pytest.fixture(params=fuzz.SHARES)
def target(request: pytest.FixtureRequest) -> Iterator[tuple[Target, int]]:
    with memory_folder() as folder, without_fsync():
        yield make_target(request.param, folder), COUNTS.get(request.param, 60)


def test_changed_inputs_raise_documented_errors(target: tuple[Target, int]) -> None:
    parser, count = target
    parser.call(parser.examples[0])
    random, refused = Random(0), 0
    for number in range(count):
        try:
            parser.call(parser.change(parser.examples[number % len(parser.examples)], random))
        except PROMISED:
            refused += 1
    assert refused < count or not count


def test_changes_follow_from_the_seed_and_keep_odd_values() -> None:
    for change in (changed_json, changed_bytes):
        runs = [[change(b'{"a": [1, {"b": "x"}], "c": null}', Random(seed)) for seed in range(300)] for _ in range(2)]
        assert runs[0] == runs[1]
        assert len(set(runs[0])) > 100


def test_finding_is_written_once_per_place(tmp_path: Path) -> None:
    def call(data: bytes) -> None:
        raise (KeyError if data else ValueError)("x")

    once = fuzz.observed(call, PROMISED, tmp_path / "target")
    for data in (b"", b"1", b"2"):
        with contextlib.suppress(KeyError):
            once(data)
    assert [path.name for path in sorted(tmp_path.iterdir())] == ["target-001.input", "target-001.txt"]
    assert (tmp_path / "target-001.input").read_bytes() == b"1"
    assert (tmp_path / "target-001.txt").read_text().startswith("KeyError: \"'x'\" at the target\nTraceback")
