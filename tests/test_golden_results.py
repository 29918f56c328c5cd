"""Every verb gives the numbers of a small fixed run that golden/results.json holds; see golden/make_results.py."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from golden.make_results import ADAPTERS, RESULTS, Number, Numbers, digits_of, make_results

from saffe_cache.report.report import ReportConfig, make_report
from saffe_cache.verbs import VERBS

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("results")


@pytest.fixture(scope="module")
def found(folder: Path) -> dict[str, Numbers]:
    return make_results(folder)


def agree(one: Number, other: Number, digits: int) -> bool:
    """Counts and verdicts are equal; fractions and losses but for the last of their stored digits.

    That digit is a hundredth of the last one printed. Another processor sums in another order.
    """
    if not isinstance(one, float) or not isinstance(other, float):
        return one == other
    return abs(one - other) <= 1.01 * 10**-digits + 1e-6 * abs(other)


@pytest.mark.parametrize("verb", ADAPTERS)
def test_verb_gives_the_golden_numbers(found: dict[str, Numbers], verb: str) -> None:
    golden = json.loads(RESULTS.read_text())[verb]
    assert sorted(golden.keys() - found[verb].keys()) == []
    different = {
        name: f"{value} before, {found[verb][name]} now"
        for name, value in golden.items()
        if not agree(found[verb][name], value, digits_of(verb, name))
    }
    assert different == {}


def test_golden_file_holds_all_verbs() -> None:
    assert set(json.loads(RESULTS.read_text())) == set(ADAPTERS)


def test_the_page_shows_the_results_of_every_verb(found: dict[str, Numbers], folder: Path, tmp_path: Path) -> None:
    verbs = {name for name, verb in VERBS.items() if verb.result} & found.keys()
    folders: dict[str, str] = {}
    for path in folder.rglob("result.json"):
        folders.setdefault(json.loads(path.read_text())["verb"], str(path.parent))
    page = Path(make_report(ReportConfig(runs=tuple(folders[verb] for verb in verbs), out=str(tmp_path))))
    text = page.read_text()
    for verb in verbs:
        assert f'<section id="{verb}-1">' in text
        header, *rows = (tmp_path / "data" / f"{verb}-1.csv").read_text().splitlines()
        assert header == "setting,system,metric,value,low,high,chance"
        assert rows
    for path in (tmp_path / "figures").glob("*.svg"):
        assert json.loads((tmp_path / "data" / f"{path.stem}.json").read_text())["caption"]
