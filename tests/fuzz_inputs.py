"""Inputs for the fuzzer: JSON with a part of it changed, or bytes with some of them changed. All by a seed."""

from __future__ import annotations

import json
from collections.abc import Sequence
from copy import deepcopy
from random import Random
from typing import Any

WORDS = [
    "",
    "x",
    "text",
    "..",
    "../x",
    "/etc/x",
    "a\0b",
    "\ud800",
    "\x1b[2J",
    "float32",
    "int64",
    "none",
    "zstd",
    "é" * 300,
]
ODD_VALUES: Sequence[Any] = [
    *(None, True, False, [], {}, [[]], [0], {"x": 1}),
    *(0, 1, -1, 2, 7, 2**31, 2**63, -(2**63) - 1, 10**30),
    *(0.5, 1.0, -0.0, 1e308, float("nan"), float("inf")),
    *WORDS,
]


def changed_json(data: bytes, random: Random) -> bytes:
    """One to three values replaced, removed, renamed or doubled; what is no JSON has bytes changed instead."""
    try:
        content = json.loads(data)
    except (ValueError, RecursionError):
        return changed_bytes(data, random)
    if random.random() < 0.1:
        return changed_bytes(data, random)
    for _ in range(random.choice([1, 1, 1, 2, 3])):
        content = _changed(content, random)
    try:
        return json.dumps(content).encode()
    except RecursionError:
        return data


def changed_bytes(data: bytes, random: Random) -> bytes:
    """A few bytes replaced, taken out, put in, or the rest cut off."""
    changed = bytearray(data)
    for _ in range(random.choice([1, 1, 2, 4, 8])):
        place, length = random.randrange(len(changed) + 1), random.choice([1, 1, 2, 4, 8, 32])
        match random.randrange(5):
            case 0:
                changed[place : place + length] = random.randbytes(length)
            case 1:
                del changed[place : place + length]
            case 2:
                changed[place:place] = random.choice([random.randbytes(length), bytes(length), b"\xff" * length])
            case 3:
                changed[place : place + 1] = bytes([1 << random.randrange(8)])
            case 4 if random.random() < 0.2:
                del changed[place:]
    return bytes(changed)


def _changed(content: Any, random: Random) -> Any:
    if not isinstance(content, (dict, list)) or not content or random.random() < 0.1:
        return _other(content, random)
    keys = list(content) if isinstance(content, dict) else list(range(len(content)))
    key = random.choice(keys)
    match random.randrange(12):
        case 0:
            del content[key]
        case 1 if isinstance(content, dict):
            content[random.choice([*WORDS, *map(str, keys), f"{key}x"])] = content.pop(key)
        case 1:
            content.insert(key, content[key])
        case 2:
            content[key] = deepcopy(content[random.choice(keys)])
        case _:
            content[key] = _changed(content[key], random)
    return content


def _other(value: Any, random: Random) -> Any:
    match random.randrange(4):
        case 0 if isinstance(value, int):
            return value + random.choice([-1, 1, 2, 2**20, -(2**40)])
        case 1 if isinstance(value, str):
            return value + random.choice(WORDS)
        case 2:
            return random.choice([[value], {"x": value}, str(value)])
    return deepcopy(random.choice(ODD_VALUES))
