"""Output folders: what a command ran with, whether a folder holds its result already, and JSON files."""

from __future__ import annotations

import json
import platform
from collections.abc import Collection, Mapping
from dataclasses import asdict
from importlib.metadata import version
from pathlib import Path
from typing import Any

from saffe_cache import __version__
from saffe_cache.core.atomic_io import write_whole
from saffe_cache.core.devices import num_threads
from saffe_cache.core.json_schema import made_of


def provenance(config: Any) -> dict[str, Any]:
    """The config as given and what it ran with."""
    return {
        "config": json.loads(json.dumps(asdict(config), default=str)),
        "versions": {
            "saffe_cache": __version__,
            "python": platform.python_version(),
            **{name: version(name) for name in ("torch", "transformers", "numpy", "zarr")},
        },
        "threads": num_threads(),
    }


def is_begun(out: Path, new: Mapping[str, Any], kinds: Mapping[str, type], ignored: Collection[str] = ()) -> bool:
    """Whether a folder holds the beginning of a result already; two results are not mixed in one.

    Args:
        out: the folder.
        new: what its config.json is to hold.
        kinds: the parts of that which are compared, and of what dataclass each is. A field that the folder does not
            know yet has its default.
        ignored: fields that may differ.

    Raises:
        ValueError: it holds another one.
    """
    path = out / "config.json"
    if not path.exists():
        return False
    old, asked = read_json(path), json.loads(json.dumps(new))
    different = []
    for part, kind in kinds.items():
        before = _with_defaults(kind, old.get(part, {}))
        different += [
            f"{name}: {before.get(name)!r} there, {value!r} now"
            for name, value in asked[part].items()
            if name not in ignored and before.get(name) != value
        ]
    if different:
        raise ValueError(
            f"--out {out} holds another result ({'; '.join(different)}). Choose another --out, or delete it."
        )
    return True


def _with_defaults(kind: type, content: Mapping[str, Any]) -> Mapping[str, Any]:
    try:
        return json.loads(json.dumps(asdict(made_of(kind, content))))  # type: ignore[no-any-return]
    except (TypeError, ValueError):  # of another version: what is there is compared as it is
        return content


def write_json(path: Path, content: Any) -> None:
    """Whole or not at all."""
    write_whole(path, (json.dumps(content, indent=2, ensure_ascii=True) + "\n").encode())


def read_json(path: Path) -> dict[str, Any]:
    """
    Raises:
        ValueError: not a JSON object.
    """
    try:
        content = json.loads(path.read_text())
    except (ValueError, RecursionError, OSError) as error:
        raise ValueError(f"{path}: not readable as JSON ({error}). Run the stage that writes it again.") from None
    if not isinstance(content, dict):
        raise ValueError(f"{path}: expected a JSON object. Run the stage that writes it again.")
    return content
