"""The log of a running extraction: what has become durable since the manifest was written.

A manifest lists all shards, so writing it again after each of them would cost more than the shards of a large cache.
Writers therefore add one small *record* at a time, a file that is made once and never changed; several may add to one
log. The end of the extraction moves everything into the manifest and removes the log.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, field
from typing import Any

from saffe_cache.core.features import CacheError
from saffe_cache.store.layout import ShardEntry
from saffe_cache.store.storage import Storage

_JOINED = 64
"""Records of one writer that are joined to one, so that a log has few files."""
_ATTEMPTS = 20
"""Readings of a log whose records are joined meanwhile."""


@dataclass
class Record:
    """Durable shards of some arrays by number, and inputs that could not be encoded."""

    shards: dict[str, dict[int, ShardEntry]] = field(default_factory=dict)
    invalid: dict[int, str] = field(default_factory=dict)

    def __bool__(self) -> bool:
        return bool(self.shards or self.invalid)

    def add(self, other: Record) -> None:
        for name, entries in other.shards.items():
            self.shards.setdefault(name, {}).update(entries)
        self.invalid |= other.invalid

    def to_json(self) -> dict[str, Any]:
        shards = {
            name: {str(index): asdict(entry) for index, entry in sorted(entries.items())}
            for name, entries in sorted(self.shards.items())
        }
        return {"shards": shards, "invalid": reasons_to_json(self.invalid)}

    @staticmethod
    def from_json(content: Mapping[str, Any], where: str) -> Record:
        """Raises CacheError if a field is missing or has another type."""
        try:
            return Record(
                {
                    str(name): {row_number(index): ShardEntry.from_json(entry) for index, entry in entries.items()}
                    for name, entries in content["shards"].items()
                },
                reasons_from_json(content["invalid"]),
            )
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            raise CacheError(
                f"{where}: it lacks or misstates {error}. Remove this file, and run saffe extract again."
            ) from None


class LogWriter:
    """Adds one writer's records to a log."""

    def __init__(self, storage: Storage, folder: str, name: str) -> None:
        """`name`: begins the names of this writer's records; no writer that runs at the same time has the same."""
        self._storage, self._folder, self._name = storage, folder, name
        self._number, self._recent = 0, list[str]()
        self._since = Record()
        """What the recent records say together."""

    def add(self, record: Record) -> None:
        """Make a record durable."""
        self._since.add(record)
        self._recent.append(self._create(record))
        if len(self._recent) > _JOINED:
            self.join()

    def join(self) -> None:
        """Replace the recent records by one that says the same, so that the log stays short."""
        if len(self._recent) < 2:
            return
        joined, self._recent = self._recent, []
        self._create(self._since)
        self._since = Record()
        for name in joined:
            self._storage.remove(name)

    def _create(self, record: Record) -> str:
        data = json.dumps(record.to_json(), allow_nan=False).encode()
        while True:
            name = f"{self._folder}/{self._name}-{self._number:06}.json"
            self._number += 1
            if self._storage.create(name, data):  # otherwise an interrupted writer of this name left it
                return name


def read_log(storage: Storage, folder: str) -> Iterator[Record]:
    """The records of a log, in the order of their names.

    Raises CacheError if one is damaged.
    """
    for attempt in range(_ATTEMPTS):
        try:
            contents = {name: storage.read_json(name) for name in storage.list(folder) if name.endswith(".json")}
            break
        except CacheError:
            if attempt == _ATTEMPTS - 1:
                raise  # not joined or removed by its writer, but damaged
    for name, content in contents.items():
        yield Record.from_json(content, f"{storage.root}: {name}")


def reasons_to_json(reasons: Mapping[int, str]) -> dict[str, str]:
    """Reasons by row, as a JSON object."""
    return {str(row): reason for row, reason in sorted(reasons.items())}


def reasons_from_json(content: Mapping[str, Any]) -> dict[int, str]:
    """Raises ValueError if a key is no number."""
    return {row_number(row): str(reason) for row, reason in content.items()}


def row_number(text: str) -> int:
    """A number from the key of a JSON object."""
    if not re.fullmatch(r"[0-9]{1,18}", text):
        raise ValueError(f"{text!r:.60}, expected the number of an input, a layer or a shard")
    return int(text)
