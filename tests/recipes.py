"""The recipes of docs/extending.md, to be run as they stand there."""

from __future__ import annotations

import importlib
import importlib.util
import re
import sys
from pathlib import Path
from typing import Any

import pytest

PAGE = Path(__file__).parents[1] / "docs" / "extending.md"


def blocks() -> list[str]:
    return re.findall(r"^```python\n(.*?)^```", PAGE.read_text(encoding="utf-8"), re.MULTILINE | re.DOTALL)


def install(path: str, folder: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    """The file that a recipe adds, imported as the module that it would be."""
    [code] = [block for block in blocks() if block.startswith(f"# {path}\n")]
    name = path.removesuffix(".py").replace("/", ".")
    file = folder / Path(path).name
    file.write_text(code, encoding="utf-8")
    spec = importlib.util.spec_from_file_location(name, file)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, name, module)
    spec.loader.exec_module(module)
    return module


def register(key: str, registry: Any, table: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Add the entry that a recipe gives to a registry's table."""
    [code] = [block for block in blocks() if re.match(rf'\{{\s*"{key}": ', block)]
    monkeypatch.setitem(getattr(registry, table), key, eval(code, vars(registry))[key])  # noqa: S307 — our own page
