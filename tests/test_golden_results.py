"""Every verb gives the numbers of a small fixed run that golden/results.json holds; see golden/make_results.py."""

from __future__ import annotations

import json

import pytest
from golden.make_results import ADAPTERS, RESULTS, Number, Numbers, digits_of, make_results


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Numbers]:
    return make_results(tmp_path_factory.mktemp("results"))


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
