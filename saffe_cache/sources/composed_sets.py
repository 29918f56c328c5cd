"""FashionIQ, CIRR and CIRCO as their authors publish them: photos anywhere in a folder, with the original JSON files.

    FashionIQ (Wu et al., arXiv 1905.12794): captions/cap.CATEGORY.SPLIT.json, image_splits/split.CATEGORY.SPLIT.json
    CIRR (Liu et al., arXiv 2108.04024): captions/cap.rc2.SPLIT.json, image_splits/split.rc2.SPLIT.json
    CIRCO (Baldrati et al., arXiv 2303.15247): annotations/SPLIT.json

The files may lie in a folder of the data. A split's gallery is the photos that its list in `image_splits` names; in
CIRCO all photos. What a list names and the folder lacks is an item with a problem. Files without any target, those of
the test sets, give photos and no queries, which a warning counts: nothing here could measure them.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from saffe_cache.core.features import Modality
from saffe_cache.core.items import QueryOf
from saffe_cache.sources.files import walk
from saffe_cache.sources.items import Columns, Format, Media, MediaFile, SourceItem
from saffe_cache.sources.queries import query_item

logger = logging.getLogger(__name__)

_CIRR = "rc2"
"""What stands in the names of CIRR's files where those of FashionIQ have a category."""
_HEAD_BYTES = 2**14
_CIRCO_SPLITS = ("val", "test")


class _Query(NamedTuple):
    """A query as a benchmark's file has it; photos by their names in it."""

    name: str
    reference: str
    texts: tuple[str, ...]
    targets: tuple[str, ...]
    members: tuple[str, ...] = ()


_Parse = Callable[[Mapping[str, Any], int], _Query]


def _recognises(data: str) -> bool:
    root = Path(data).expanduser()
    return root.is_dir() and bool(_caption_files(root) or _circo_files(root))


def benchmark_items(data: str, columns: Columns) -> Iterator[SourceItem]:
    """The photos of all splits, then their queries.

    Raises:
        ValueError: a file is no valid JSON, or lacks a field; or a column is chosen, and there are none.
    """
    root = Path(data).expanduser()
    columns.require((), f"--data {data}")
    photos = _Photos(root)
    files = _caption_files(root)
    found = list(_listed_items(files, photos) if files else _circo_items(_circo_files(root), photos))
    photos.report_unused()
    yield from (item for item in found if item.query is None)
    yield from (item for item in found if item.query is not None)


COMPOSED_SETS = Format(
    layout="photos with the files of FashionIQ or CIRR (captions/cap.*.SPLIT.json) or CIRCO (annotations/val.json)",
    recognises=_recognises,
    read_items=benchmark_items,
)


class _Photos:
    """The photos of a folder by the names that benchmarks give them: those of their files, without the suffix."""

    def __init__(self, root: Path) -> None:
        self._root = root
        self.files = [name for name, kind in walk(root).media.items() if kind == "image"]
        self._by_stem: dict[str, list[str]] = {}
        for name in self.files:
            self._by_stem.setdefault(_stem(name), []).append(name)
        self._unused = dict.fromkeys(self.files)

    def report_unused(self) -> None:
        """Warn of photos that have become no item."""
        if self._unused:
            logger.warning(
                "%s: %d photos are left out: the benchmark's lists do not name them; for instance %s.",
                *(self._root, len(self._unused), ", ".join(list(self._unused)[:3])),
            )

    def item(self, split: str, name: str, labels: tuple[str, ...] = (), path: str = "") -> SourceItem:
        """The item of a photo; `path` chooses among several files of its name."""
        found = self._by_stem.get(name, [])
        chosen = [one for one in found if path and f"/{one}".endswith(f"/{path}")] or found
        media: dict[Modality, Media] = {"image": MediaFile(str(self._root / chosen[0]))} if chosen else {}
        self._unused.pop(chosen[0] if chosen else "", None)
        problem = ""
        if len(chosen) != 1:
            problem = f"{len(chosen)} photos are named {name}, expected one below {self._root}"
            problem += f": {', '.join(chosen[:3])}. Leave one" if chosen else ". Fetch it, or raise --max-invalid"
        return SourceItem(id=f"{split}/{name}", split=split, media=media, labels=labels, problem=problem)


def _caption_files(root: Path) -> list[Path]:
    return [path for pattern in ("", "*/") for path in sorted(root.glob(f"{pattern}captions/cap.*.*.json"))]


def _circo_files(root: Path) -> list[Path]:
    places = [root / "annotations", *sorted(root.glob("*/annotations"))]
    paths = [place / f"{split}.json" for place in places for split in _CIRCO_SPLITS]
    return [path for path in paths if path.is_file() and b'"relative_caption"' in _head(path)]


def _head(path: Path) -> bytes:
    with path.open("rb") as file:
        return file.read(_HEAD_BYTES)


# ---- FashionIQ and CIRR ----


def _listed_items(paths: Sequence[Path], photos: _Photos) -> Iterator[SourceItem]:
    """Photos that the lists name, and the queries; photos of several categories are one item."""
    labels: dict[tuple[str, str], dict[str, None]] = {}
    place_of: dict[tuple[str, str], str] = {}
    queries: list[SourceItem] = []
    for path in paths:
        kind, split = path.name.split(".")[1:3]
        is_cirr = kind == _CIRR
        found = _queries(path, _cirr_query if is_cirr else _fashion_query)
        group = () if is_cirr else (kind,)
        for name, place in _gallery(path, found).items():
            labels.setdefault((split, name), {}).update(dict.fromkeys(group))
            place_of[split, name] = place
        prefix = "" if is_cirr else f"{kind}-"
        queries += [_item(one, split, prefix, group) for one in _with_targets(path, found)]
    for (split, name), groups in sorted(labels.items(), key=lambda one: one[0][0]):
        yield photos.item(split, name, tuple(groups), place_of[split, name])
    yield from queries


def _gallery(path: Path, queries: Sequence[_Query]) -> dict[str, str]:
    """The names of a split's photos, with their paths where the list has them."""
    listing = path.parent.parent / "image_splits" / path.name.replace("cap.", "split.", 1)
    if not listing.is_file():
        named = [name for one in queries for name in (one.reference, *one.targets, *one.members)]
        logger.warning(
            "%s does not exist: the gallery is the %d photos that queries name, which is easier to search than the "
            "benchmark's own.",
            *(listing, len(set(named))),
        )
        return dict.fromkeys(named, "")
    found = _json(listing)
    if isinstance(found, dict):
        return {str(name): str(place).removeprefix("./") for name, place in found.items()}
    if not isinstance(found, list) or not all(isinstance(name, str) for name in found):
        raise ValueError(f"{listing}: expected a list of names of photos, or an object of their paths. Fetch it again.")
    return dict.fromkeys(found, "")


def _fashion_query(entry: Mapping[str, Any], number: int) -> _Query:
    """Two captions of one change are four texts, of which training draws one (Baldrati et al., arXiv 2308.11485)."""
    captions = [text for one in entry["captions"] if (text := str(one).strip(" .?,\n\t"))]
    if len(entry["captions"]) != 2:
        raise ValueError(f"has {len(entry['captions'])} captions, not 2")
    one, *others = captions or [""]
    texts = (f"{one} and {others[0]}", f"{others[0]} and {one}", one, others[0]) if others else (one,) * bool(one)
    targets = () if entry.get("target") is None else (str(entry["target"]),)
    return _Query(str(number), str(entry["candidate"]), tuple(dict.fromkeys(texts)), targets)


def _cirr_query(entry: Mapping[str, Any], number: int) -> _Query:
    targets = () if entry.get("target_hard") is None else (str(entry["target_hard"]),)
    members = tuple(map(str, entry["img_set"]["members"]))
    return _Query(str(entry["pairid"]), str(entry["reference"]), _text(entry["caption"]), targets, members)


# ---- CIRCO ----


def _circo_items(paths: Sequence[Path], photos: _Photos) -> Iterator[SourceItem]:
    """All photos in each split that has queries with targets, and the queries."""
    named: dict[int, list[str]] = {}
    for name in photos.files:
        if _stem(name).isdecimal():
            named.setdefault(int(_stem(name)), []).append(_stem(name))
    of_split: dict[str, list[_Query]] = {path.stem: _with_targets(path, _queries(path, _circo_query)) for path in paths}
    splits = [split for split, found in of_split.items() if found] or list(of_split)
    for split in splits:
        yield from (photos.item(split, name) for number in sorted(named) for name in named[number][:1])
        for one in of_split[split]:
            names = {name: next(iter(named.get(int(name), ())), name) for name in (one.reference, *one.targets)}
            targets = tuple(names[name] for name in one.targets)
            yield _item(one._replace(reference=names[one.reference], targets=targets), split)


def _circo_query(entry: Mapping[str, Any], number: int) -> _Query:
    """The photos by their numbers in COCO."""
    reference, *targets = map(int, [entry["reference_img_id"], *(entry.get("gt_img_ids") or ())])
    return _Query(str(entry["id"]), str(reference), _text(entry["relative_caption"]), tuple(map(str, targets)))


# ---- what they share ----


def _queries(path: Path, parse: _Parse) -> list[_Query]:
    entries = _json(path)
    if not isinstance(entries, list) or not entries:
        raise ValueError(f"{path}: expected a list of queries, found {entries!r:.60}. Fetch it again.")
    found: list[_Query] = []
    for number, entry in enumerate(entries, start=1):
        try:
            found.append(parse(entry, number))
        except (ArithmeticError, AttributeError, KeyError, TypeError, ValueError) as error:
            fields = ", ".join(entry) if isinstance(entry, dict) else repr(entry)[:60]
            raise ValueError(
                f"{path}: query {number}: {type(error).__name__} {error}, expected the benchmark's own fields, found "
                f"{fields}. Fetch the file again."
            ) from None
    return found


def _json(path: Path) -> Any:
    try:
        return json.loads(path.read_bytes())
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path}: no valid JSON ({error}). Fetch it again.") from None


def _with_targets(path: Path, queries: list[_Query]) -> list[_Query]:
    if any(one.targets for one in queries):
        return queries
    logger.warning(
        "%s: its %d queries are left out: they have no targets, which only the benchmark's own server knows.",
        *(path, len(queries)),
    )
    return []


def _item(query: _Query, split: str, prefix: str = "", labels: tuple[str, ...] = ()) -> SourceItem:
    targets, members = (tuple(f"{split}/{name}" for name in names) for names in (query.targets, query.members))
    of = QueryOf(f"{split}/{query.reference}", targets, members)
    return query_item(f"{split}/queries/{prefix}{query.name}", split, query.texts, of, labels)


def _text(value: Any) -> tuple[str, ...]:
    return (value.strip(),) if isinstance(value, str) and value.strip() else ()


def _stem(name: str) -> str:
    last = name.rpartition("/")[2]
    return last[: last.rfind(".")] if "." in last else last
