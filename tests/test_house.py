"""How many files it takes to add to the package."""

from __future__ import annotations

import ast
from pathlib import Path

import house
import pytest


@pytest.mark.parametrize("kind", house.REGISTRIES)
def test_an_addition_is_one_file_and_one_registry_entry(kind: str) -> None:
    count, files = house.files_for(kind)
    assert 1 <= count <= house.MOST_FILES, files


def test_counts_see_the_package() -> None:
    counts = house.counts()
    assert counts.keys() == house.LIMITS.keys()
    assert all(count > 5 for count, _ in counts.values())
    assert counts["floors"][1].split(" > ")[-1].startswith("core.")


@pytest.mark.parametrize("name", ["modules", "floors", "longest function"])
def test_limit_holds(name: str) -> None:
    count, place = house.counts()[name]
    assert count <= house.LIMITS[name], place


def test_names_of_tests_are_short() -> None:
    names = [
        node.name
        for path in Path(__file__).parent.glob("test_*.py")
        for node in ast.parse(path.read_text()).body
        if isinstance(node, ast.FunctionDef) and node.name.startswith("test_")
    ]
    assert not [name for name in names if len(name) > 60]
