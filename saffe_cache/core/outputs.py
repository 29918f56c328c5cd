"""Output folders: one command at a time, one result each; what a command ran with; JSON files."""

from __future__ import annotations

import json
import logging
import platform
from collections.abc import Collection, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, is_dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

from saffe_cache import __version__
from saffe_cache.core.atomic_io import hold_folder, remove_partial_files, write_whole
from saffe_cache.core.json_schema import made_of
from saffe_cache.core.options import OptionGroup

logger = logging.getLogger(__name__)

CONFIG, RESULT = "config.json", "result.json"


@contextmanager
def output_folder(out: Path, verb: str, config: Any, resolved: Any, ignored: Collection[str] = ()) -> Iterator[bool]:
    """Hold a verb's output folder; yields whether it holds the finished result already, which is logged.

    A new folder gets its config.json; one that was begun by an equal command is continued. Files that a killed writer
    left half-written are removed.

    Args:
        resolved: what the config resolved to, such as encoders and a hash of the data: a dataclass, or a mapping.
        ignored: fields of the config that may differ from those of the command that began the folder.

    Raises:
        ValueError: the folder holds another result.
        OSError: another process writes to it, or the disk is full or gone.
    """
    content = {
        "verb": verb,
        "resolved": asdict(resolved) if is_dataclass(resolved) and not isinstance(resolved, type) else resolved,
        **provenance(config),
    }
    with hold_folder(out):
        remove_partial_files(out)
        if not is_begun(out, content, {"resolved": type(resolved), "config": type(config)}, ignored):
            write_json(out / CONFIG, content)
        is_finished = (out / RESULT).exists()
        if is_finished:
            logger.info("%s is finished already, nothing to do.", out)
        yield is_finished


def provenance(config: Any) -> dict[str, Any]:
    """The config as given and what it ran with."""
    import torch

    return {
        "config": json.loads(json.dumps(asdict(config), default=str)),
        "versions": {
            "saffe_cache": __version__,
            "python": platform.python_version(),
            **{name: version(name) for name in ("torch", "transformers", "numpy", "zarr")},
        },
        "threads": torch.get_num_threads(),
    }


def is_begun(out: Path, new: Mapping[str, Any], kinds: Mapping[str, type], ignored: Collection[str] = ()) -> bool:
    """Whether a folder holds the beginning of a result already; ValueError if of another one.

    `new` is what its config.json is to hold; `kinds` are the parts of it that are compared, and the dataclass of each.
    A field that the folder does not have yet has its default. Fields that are `ignored` may differ.
    """
    path = out / CONFIG
    if not path.exists():
        return False
    old, asked = read_json(path), json.loads(json.dumps(new))
    pairs = [("the verb", old.get("verb"), new.get("verb"))]
    for part, kind in kinds.items():
        before = with_defaults(kind, old.get(part, {}))
        pairs += [(name, before.get(name), value) for name, value in asked[part].items() if name not in ignored]
    different = [f"{name}: {there!r} there, {now!r} now" for name, there, now in pairs if there != now]
    if different:
        raise ValueError(
            f"--out {out} holds another result ({'; '.join(different)}). Choose another --out, or delete it."
        )
    return True


def with_defaults(kind: type, content: Mapping[str, Any]) -> Mapping[str, Any]:
    """A part of a folder's config.json, where fields that are new since have their defaults."""
    try:
        made: Any = made_of(kind, content)
        made = made.resolved() if isinstance(made, OptionGroup) else made
        return json.loads(json.dumps(asdict(made)))  # type: ignore[no-any-return]
    except (TypeError, ValueError):  # of another version: compared as it stands
        return content


def write_json(path: Path, content: Any) -> None:
    """Write a JSON file, complete or not at all."""
    write_whole(path, (json.dumps(content, indent=2, ensure_ascii=True) + "\n").encode())


def read_json(path: Path) -> dict[str, Any]:
    """Read a JSON object; ValueError if the file is absent, or holds none."""
    try:
        content = json.loads(path.read_text())
    except (ValueError, RecursionError, OSError) as error:
        raise ValueError(f"{path}: not readable as JSON ({error}). Run the stage that writes it again.") from None
    if not isinstance(content, dict):
        raise ValueError(f"{path}: expected a JSON object. Run the stage that writes it again.")
    return content
