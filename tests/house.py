"""Prints how large and how deep the package is, against its limits; exit status 1 where one is exceeded.

    python tests/house.py

Floors are the longest chain of imports at module level within the package. For each thing that users add (fusions,
protocols, ...), the last numbers are the package files that name one of those that exist: its own, the registry, and
those that import it. Half of them need no more than the number printed.
"""

from __future__ import annotations

import ast
import re
import sys
from collections.abc import Iterator
from functools import cache
from pathlib import Path

ROOT = Path(__file__).parents[1]
PACKAGE = ROOT / "saffe_cache"
LIMITS = {"modules": 267, "lines": 23_500, "floors": 14, "longest function": 50}
"""A published method of aligning encoders is a module each, some twenty in all: the number of modules follows them."""
MOST_FILES = 2
REGISTRIES = {
    "fusion": ("fusion.registry", "FUSIONS"),
    "protocol": ("protocols.registry", "PROTOCOLS"),
    "metric": ("retrieval.metrics", "METRICS"),
    "dataset format": ("sources.registry", "FORMATS"),
    "study": ("verbs", "VERBS"),
}
"""The table of each, which names classes and functions, directly or in a string as MODULE:NAME."""


@cache
def trees() -> dict[str, ast.Module]:
    """The syntax trees of the package's modules by dotted name."""
    found = {}
    for path in sorted(PACKAGE.rglob("*.py")):
        name = ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")
        found[name] = ast.parse(path.read_text())
    return found


def imported(node: ast.stmt) -> Iterator[str]:
    """Modules of the package that a statement at module level imports."""
    if isinstance(node, ast.ImportFrom) and node.module:
        names = [f"{node.module}.{alias.name}" for alias in node.names]
        yield from (name if name in trees() else node.module for name in names)
    elif isinstance(node, ast.Import):
        yield from (alias.name for alias in node.names)


@cache
def below(name: str) -> tuple[str, ...]:
    """The longest chain of module-level imports that begins with a module."""
    others = {one for node in trees()[name].body for one in imported(node) if one in trees()} - {name}
    return (name, *max((below(one) for one in sorted(others)), key=len, default=()))


def functions() -> Iterator[tuple[int, str]]:
    """Lines and places of all functions."""
    for name, tree in trees().items():
        for node in ast.walk(tree):
            if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)):
                yield (node.end_lineno or 0) - node.lineno + 1, f"{name}:{node.name}"


def registered(kind: str) -> dict[str, str]:
    """Classes, functions and values that a registry's table names, and the modules that define them."""
    module, name = REGISTRIES[kind]
    tree = trees()[f"{PACKAGE.name}.{module}"]
    places = {
        alias.name: str(node.module) for node in tree.body if isinstance(node, ast.ImportFrom) for alias in node.names
    }
    places |= {
        node.name: f"{PACKAGE.name}.{module}" for node in tree.body if isinstance(node, (ast.FunctionDef, ast.ClassDef))
    }
    table = next(
        node.value for node in tree.body if isinstance(node, ast.AnnAssign) and ast.unparse(node.target) == name
    )
    assert isinstance(table, (ast.Dict, ast.Tuple))
    place = re.compile(rf"({'studies' * (kind == 'study')}[\w.]*):([A-Za-z]\w+)")
    found = {}
    for entry in table.values if isinstance(table, ast.Dict) else table.elts:
        parts = [*entry.args, *entry.keywords] if isinstance(entry, ast.Call) else [entry]
        for node in (node for part in parts for node in ast.walk(part)):
            if isinstance(node, ast.Name) and node.id in places:
                found[node.id] = places[node.id]
            elif isinstance(node, ast.Constant) and (match := place.fullmatch(str(node.value))):
                found[match[2]] = home_of(match[2], match[1])
    return found


def home_of(name: str, module: str) -> str:
    """The module that defines it; a registry may leave out how that module's name begins."""
    end = module.strip(".")
    defines = [
        one
        for one, tree in trees().items()
        if f".{one}".endswith(f".{end}" if end else "")
        and any(getattr(node, "name", None) == name for node in tree.body)
    ]
    assert len(defines) == 1, (name, module, defines)
    return defines[0]


@cache
def importers() -> dict[tuple[str, str], set[str]]:
    """For a module and a name, the modules that import it, also within functions."""
    found: dict[tuple[str, str], set[str]] = {}
    for module, tree in trees().items():
        if module != PACKAGE.name:  # which lists public names for type checkers
            for node in ast.walk(tree):
                if isinstance(node, ast.ImportFrom):
                    for alias in node.names:
                        found.setdefault((str(node.module), alias.name), set()).add(module)
    return found


def files_naming(kind: str, name: str, home: str) -> set[str]:
    """Modules that define, register or import it; the package of a study is one."""
    naming = {home, f"{PACKAGE.name}.{REGISTRIES[kind][0]}", *importers().get((home, name), ())}
    package = home.rpartition(".")[0]
    return {package if kind == "study" and one.startswith(f"{package}.") else one for one in naming}


def counts() -> dict[str, tuple[int, str]]:
    """Each count, and where it comes from."""
    floors = max(map(below, trees()), key=len)
    lines = sum(len(path.read_text().splitlines()) for path in PACKAGE.rglob("*.py"))
    return {
        "modules": (len(trees()), ""),
        "lines": (lines, ""),
        "floors": (len(floors), " > ".join(name.removeprefix("saffe_cache.") for name in floors)),
        "longest function": max(functions()),
    }


def files_for(kind: str) -> tuple[int, str]:
    """Files that name one of a kind: the median, and an example."""
    naming = sorted((sorted(files_naming(kind, *one)) for one in registered(kind).items()), key=len)
    files = naming[(len(naming) - 1) // 2]
    return len(files), ", ".join(files)


def main() -> int:
    exceeded = 0
    for name, (count, place) in counts().items():
        exceeded += count > LIMITS[name]
        print(f"{name:24}{count:7,}  of at most {LIMITS[name]:6,}  {place}")
    for kind in REGISTRIES:
        count, place = files_for(kind)
        exceeded += count > MOST_FILES
        print(f"{f'files for a {kind}':24}{count:7,}  of at most {MOST_FILES:6,}  {place}")
    return 1 if exceeded else 0


if __name__ == "__main__":
    sys.exit(main())
