"""The files that inputs were encoded from, found again by item and content."""

from __future__ import annotations

from collections.abc import Collection, Iterable

from saffe_cache.core.features import ItemTable
from saffe_cache.extraction.planning import Job
from saffe_cache.sources import Columns, Media, SourceItem, read_named_items


class OriginalFiles:
    """The files of some inputs, where they are what they were."""

    def __init__(
        self, job: Job, table: ItemTable, places: Iterable[tuple[str, Columns]], inputs: Collection[int]
    ) -> None:
        """`places`: datasets and their columns, where the files may be; only those of the inputs are read."""
        self._job = job
        self.media: dict[bytes, Media] = {}
        """By content hash."""
        self._ids: dict[int, str] = {}
        self._found: dict[str, SourceItem] = {}
        self._failures: list[str] = []
        modality = job.manifest.modality
        if modality == "text" or not inputs:
            return
        ids = set()
        for item, row in zip(table.ids, table.rows[modality].tolist(), strict=True):
            if row in inputs:
                ids.add(item)
                self._ids.setdefault(row, item)
        for data, columns in places:
            try:
                found = read_named_items(data, columns, ids)
            except (ValueError, OSError) as error:
                self._failures.append(str(error))
                continue
            self._found |= {item.id: item for item in found}
            self.media |= {item.hashes[modality]: item.media[modality] for item in found if modality in item.hashes}

    def absent(self, inputs: range) -> list[str]:
        """Which of them cannot be encoded again, and why; one that no item points to, or was invalid, need not be."""
        job = self._job
        if job.offsets is not None:
            return []
        return [
            f"{self._ids[row]}: {self._why(self._ids[row])}"
            for row in inputs
            if job.is_wanted[row]
            and row not in job.manifest.invalid
            and job.inputs.content_hash[row].tobytes() not in self.media
        ]

    def _why(self, item_id: str) -> str:
        item = self._found.get(item_id)
        if item is None:
            return " ".join(self._failures) or "it is not in the data any more"
        has_changed = self._job.manifest.modality in item.hashes
        return "the file has changed since it was extracted" if has_changed else item.problem
