"""What `import saffe_cache` offers, and what it costs."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import pytest

import saffe_cache
from saffe_cache.verbs import load_name

SOURCE = Path(saffe_cache.__file__)


def typed_names() -> dict[str, str]:
    """What type checkers see: names and MODULE:NAME."""
    found = {}
    for node in ast.walk(ast.parse(SOURCE.read_text())):
        if isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING":
            for one in node.body:
                assert isinstance(one, ast.ImportFrom)
                for alias in one.names:
                    assert alias.asname == alias.name, "else mypy takes it for private"
                    found[alias.name] = f"{one.module}:{alias.name}".removeprefix("saffe_cache.")
    assert found
    return found


@pytest.mark.parametrize(("name", "place"), typed_names().items())
def test_type_checkers_see_what_is_imported(name: str, place: str) -> None:
    assert load_name(place) is getattr(saffe_cache, name)


@pytest.mark.parametrize("name", saffe_cache._places())
def test_every_public_name_is_there(name: str) -> None:
    value = getattr(saffe_cache, name)
    assert value.__name__ == name
    assert value.__module__.startswith("saffe_cache.")
    assert name in dir(saffe_cache)
    assert value.__doc__, "documented"


def test_unknown_name_is_an_attribute_error() -> None:
    with pytest.raises(AttributeError, match="module 'saffe_cache' has no attribute 'nonsense'"):
        saffe_cache.nonsense  # noqa: B018


def test_importing_the_package_imports_nothing_else() -> None:
    code = (
        "import sys; before = set(sys.modules); import saffe_cache; "
        "print(*sorted(set(sys.modules) - before - {'typing'}))\n"
        "dir(saffe_cache); print('torch' in sys.modules, 'numpy' in sys.modules)"
    )
    shown = subprocess.run([sys.executable, "-S", "-c", code], capture_output=True, text=True, cwd=SOURCE.parents[1])
    imported, after_dir = shown.stdout.splitlines()
    assert {name.split(".")[0] for name in imported.split()} - sys.stdlib_module_names == {"saffe_cache"}
    assert after_dir == "False False"
