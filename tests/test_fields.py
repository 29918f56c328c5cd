"""JSON from outside into dataclasses: what is taken as it is, and what is refused in which words."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

import pytest

from saffe_cache.core.json_schema import made_of, whole_number, whole_numbers


@dataclass(frozen=True)
class Inner:
    width: int


@dataclass(frozen=True)
class Outer:
    name: str
    inner: Inner
    layers: tuple[int, ...] = ()
    rate: float = 0.5
    is_causal: bool = False
    kind: Literal["a", "b"] = "a"
    window: int | None = None


GOOD: dict[str, Any] = {"name": "x", "inner": {"width": 3}}


def test_json_becomes_the_dataclass() -> None:
    content = {**GOOD, "layers": [1, 2], "rate": 1, "is_causal": True, "kind": "b", "window": None}
    assert made_of(Outer, content) == Outer("x", Inner(3), (1, 2), 1, True, "b", None)
    assert made_of(Outer, {**GOOD, "window": 7}).window == 7


@pytest.mark.parametrize(
    ("content", "words"),
    [
        ([], r"\[\], expected an object"),
        ({"name": "x"}, "'inner'"),
        ({**GOOD, "more": 1}, "'more'"),
        ({**GOOD, "name": 1}, "name: 1, expected str"),
        ({**GOOD, "inner": 3}, "3, expected an object"),
        ({**GOOD, "inner": {"width": "3"}}, "width: '3', expected int"),
        ({**GOOD, "inner": {"width": True}}, "width: True, expected int"),
        ({**GOOD, "inner": {"width": 10**30}}, "width: 1000"),
        ({**GOOD, "layers": "12"}, "layers: '12', expected"),
        ({**GOOD, "layers": [1, None]}, "layers: None, expected int"),
        ({**GOOD, "rate": float("nan")}, "rate: nan, expected float"),
        ({**GOOD, "rate": False}, "rate: False, expected float"),
        ({**GOOD, "is_causal": 1}, "is_causal: 1, expected bool"),
        ({**GOOD, "kind": ["a"]}, r"kind: \['a'\], expected 'a' or 'b'"),
        ({**GOOD, "window": "x"}, "window: 'x', expected int"),
    ],
)
def test_other_kinds_are_refused(content: Any, words: str) -> None:
    with pytest.raises((TypeError, ValueError), match=words):
        made_of(Outer, content)


@pytest.mark.parametrize("value", [-1, 2**63, 1.0, True, "1", None, float("inf")])
def test_whole_numbers(value: Any) -> None:
    assert whole_number({"n": 2**63 - 1}, "n") == 2**63 - 1
    assert whole_numbers({"n": [0, 5]}, "n") == (0, 5)
    with pytest.raises(ValueError, match=r"n: .*expected a whole number from 0"):
        whole_number({"n": value}, "n")
    with pytest.raises(ValueError, match=r"n: .*expected a"):
        whole_numbers({"n": [3, value]}, "n")


@dataclass(frozen=True)
class Named:
    inner: Mapping[str, Inner]
    anything: Mapping[str, Any]


def test_mappings_hold_what_is_declared() -> None:
    anything = {"a": [1, None]}
    assert made_of(Named, {"inner": {"x": {"width": 1}}, "anything": anything}) == Named({"x": Inner(1)}, anything)
    with pytest.raises(ValueError, match="width: 'wide', expected int"):
        made_of(Named, {"inner": {"x": {"width": "wide"}}, "anything": {}})
    with pytest.raises(ValueError, match=r"inner: \[\], expected an object"):
        made_of(Named, {"inner": [], "anything": {}})
