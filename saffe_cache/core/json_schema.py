"""JSON and TOML from outside into dataclasses. Each value is of the kind that its field declares, or refused.

Python's json accepts Infinity and numbers of any length; none of them passes here.
"""

from __future__ import annotations

import math
import types
from collections.abc import Mapping
from dataclasses import fields, is_dataclass
from functools import cache
from pathlib import Path
from typing import Any, Literal, TypeVar, Union, get_args, get_origin, get_type_hints

Made = TypeVar("Made")

_LARGEST = 2**63 - 1
"""What numpy's int64 holds."""


def made_of(kind: type[Made], content: Any, *, ignores_unknown: bool = False) -> Made:
    """A dataclass of the fields of a JSON object; `ignores_unknown` fields that it, or one within it, does not declare.

    Raises:
        TypeError, ValueError: a field is missing, unknown or of another kind.
    """
    if not isinstance(content, Mapping):
        raise TypeError(f"{content!r:.60}, expected an object")
    hints = _hints(kind)  # type: ignore[arg-type]
    unknown = {} if ignores_unknown else {name: one for name, one in content.items() if name not in hints}
    known = {name: typed(hint, name, content[name], ignores_unknown) for name, hint in hints.items() if name in content}
    return kind(**known, **unknown)


def whole_number(content: Mapping[str, Any], name: str, least: int = 0) -> int:
    """A whole number among the fields of a JSON object.

    Raises:
        KeyError: there is none of this name.
        ValueError: it is of another kind, or out of range.
    """
    value = content[name]
    if type(value) is not int or not least <= value <= _LARGEST:
        raise ValueError(f"{name}: {value!r:.60}, expected a whole number from {least}")
    return value


def whole_numbers(content: Mapping[str, Any], name: str, least: int = 0) -> tuple[int, ...]:
    """A list of such numbers; errors as of `whole_number`."""
    values = content[name]
    if not isinstance(values, list):
        raise ValueError(f"{name}: {values!r:.60}, expected a list of whole numbers")
    return tuple(whole_number({name: value}, name, least) for value in values)


def typed(hint: Any, name: str, value: Any, ignores_unknown: bool = False) -> Any:
    """A value of JSON or TOML as a field of this name and type declares it.

    Raises:
        TypeError, ValueError: it is of another kind.
    """
    origin, parts = get_origin(hint), get_args(hint)
    if origin in (Union, types.UnionType):
        kind = next(one for one in parts if one is not type(None))
        return None if value is None else typed(kind, name, value, ignores_unknown)
    if origin is tuple and isinstance(value, (list, tuple)):
        return tuple(typed(parts[0], name, one, ignores_unknown) for one in value)
    if origin is Mapping and isinstance(value, Mapping):
        return {str(key): typed(parts[1], f"{name}.{key}", one, ignores_unknown) for key, one in value.items()}
    if hint is Any:
        return value
    if is_dataclass(hint):
        return made_of(hint, value, ignores_unknown=ignores_unknown)  # type: ignore[arg-type]
    if hint is Path and isinstance(value, str):
        return Path(value)
    if origin is Literal:
        fits = value in parts
    elif hint is float:
        fits = type(value) in (int, float) and math.isfinite(value)
    else:
        fits = type(value) is hint and (hint is not int or abs(value) <= _LARGEST)
    if not fits:
        kinds = {tuple: "a list", Mapping: "an object", Literal: " or ".join(map(repr, parts))}
        raise ValueError(f"{name}: {value!r:.60}, expected {kinds.get(origin) or hint.__name__}")
    return float(value) if hint is float else value


@cache
def _hints(kind: type) -> dict[str, Any]:
    """Types of a dataclass's fields, without its class variables."""
    hints = get_type_hints(kind)
    return {one.name: hints[one.name] for one in fields(kind)} if is_dataclass(kind) else hints
