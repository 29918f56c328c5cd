"""Columns of strings that hold no Python object for each of them: bytes with offsets, and codes of a few names.

Both are sequences of `str` that make a string when it is asked for. UTF-8 is decoded with `surrogatepass`, because
Python's strings may hold lone surrogates.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from itertools import pairwise
from typing import Any, overload

import numpy as np

_BLOCK_BYTES, _BLOCK_ROWS = 2**24, 2**16
"""What is looked at together."""


def encoded(text: str) -> bytes:
    """The UTF-8 of a text."""
    return text.encode("utf-8", "surrogatepass")


def take_values(offsets: np.ndarray, values: np.ndarray, chosen: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Offsets and values of the chosen rows, where row i is `values[offsets[i]:offsets[i + 1]]`."""
    starts, lengths = offsets[:-1][chosen], np.diff(offsets)[chosen]
    ends = np.concatenate([np.zeros(1, np.int64), np.cumsum(lengths, dtype=np.int64)])
    taken = np.empty(ends[-1], values.dtype)
    for begin in range(0, len(chosen), _BLOCK_ROWS):
        of_block = slice(begin, begin + _BLOCK_ROWS)
        first, last = ends[begin], ends[min(begin + _BLOCK_ROWS, len(chosen))]
        places = np.repeat(starts[of_block] - ends[:-1][of_block], lengths[of_block]) + np.arange(first, last)
        taken[first:last] = values[places]
    return ends, taken


class _Strings(Sequence[str]):
    """What both kinds of columns share: slices are columns, and a column equals any sequence of the same strings."""

    __slots__ = ()

    def take(self, chosen: np.ndarray) -> Any:
        raise NotImplementedError

    def _one(self, index: int) -> str:
        raise NotImplementedError

    @overload
    def __getitem__(self, index: int) -> str: ...
    @overload
    def __getitem__(self, index: slice) -> Any: ...
    def __getitem__(self, index: int | slice) -> Any:
        if isinstance(index, slice):
            return self.take(np.arange(len(self))[index])
        place = range(len(self))[index]  # raises IndexError
        return self._one(place)

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, Sequence) or isinstance(other, str | bytes):
            return NotImplemented
        return len(self) == len(other) and all(mine == theirs for mine, theirs in zip(self, other, strict=True))

    __hash__ = None  # type: ignore[assignment]

    def __repr__(self) -> str:
        return f"{type(self).__name__} of {len(self)}"


class Texts(_Strings):
    """Texts as bytes: text i is `utf8[offsets[i]:offsets[i + 1]]`."""

    __slots__ = ("_bytes", "offsets", "utf8")

    def __init__(self, offsets: np.ndarray, utf8: np.ndarray) -> None:
        """
        Args:
            offsets: int64 [n + 1], ascending.
            utf8: uint8, in one piece.
        """
        self.offsets, self.utf8 = offsets, utf8
        self._bytes = utf8.data

    @staticmethod
    def of(texts: Iterable[str]) -> Texts:
        """The texts of any other sequence."""
        if isinstance(texts, Texts):
            return texts
        parts = [encoded(text) for text in texts]
        ends = np.cumsum(np.fromiter(map(len, parts), np.int64, len(parts)))
        return Texts(np.concatenate([np.zeros(1, np.int64), ends]), np.frombuffer(b"".join(parts), np.uint8))

    @staticmethod
    def joined(parts: Sequence[Texts]) -> Texts:
        """Some columns after one another; a single one is not copied."""
        if len(parts) == 1:
            return parts[0]
        starts = np.cumsum([0, *(part.offsets[-1] for part in parts)])
        offsets = [part.offsets[1:] + start for part, start in zip(parts, starts, strict=False)]
        utf8 = [part.utf8 for part in parts]
        return Texts(np.concatenate([np.zeros(1, np.int64), *offsets]), np.concatenate([np.zeros(0, np.uint8), *utf8]))

    def __reduce__(self) -> tuple[type, tuple[np.ndarray, np.ndarray]]:
        return Texts, (self.offsets, self.utf8)

    def __len__(self) -> int:
        return len(self.offsets) - 1

    def _one(self, index: int) -> str:
        return str(self.bytes_at(index), "utf-8", "surrogatepass")

    def __iter__(self) -> Iterator[str]:
        for start in range(0, len(self), 4096):
            data = self._bytes
            for begin, end in pairwise(self.offsets[start : start + 4097].tolist()):
                yield str(data[begin:end], "utf-8", "surrogatepass")

    @property
    def lengths(self) -> np.ndarray:
        """Bytes of each text."""
        return np.asarray(np.diff(self.offsets))

    def bytes_at(self, index: int) -> memoryview:
        """The bytes of a text."""
        return self._bytes[self.offsets.item(index) : self.offsets.item(index + 1)]

    def take(self, chosen: np.ndarray) -> Texts:
        """The chosen texts, in the given order."""
        return Texts(*take_values(self.offsets, self.utf8, chosen))

    def places(self, text: str) -> np.ndarray:
        """Where a text stands, ascending."""
        data = encoded(text)
        found = np.flatnonzero(self.lengths == len(data))
        for position, byte in enumerate(data):
            if not len(found):
                break
            found = found[self.utf8[self.offsets[found] + position] == byte]
        return found

    def index(self, text: Any, *limits: int) -> int:
        """The first place of a text; ValueError if it stands nowhere."""
        found = self.places(text)
        if limits or not len(found):
            return super().index(text, *limits)
        return int(found[0])

    def __contains__(self, text: object) -> bool:
        return isinstance(text, str) and len(self.places(text)) > 0

    def check_decodes(self) -> None:
        """Raises ValueError if some text is not UTF-8."""
        for start, stop in pairwise(_cuts(self.offsets)):
            first, end = self.offsets.item(start), self.offsets.item(stop)
            block = self.utf8[first:end]
            if len(block) and block.max() > 0x7F:
                str(self._bytes[first:end], "utf-8", "surrogatepass")
                inner = self.offsets[start:stop]
                begins = self.utf8[inner[inner < end]] if end else inner
                if ((begins & 0xC0) == 0x80).any():
                    raise ValueError("a text begins within a character")


def _cuts(offsets: np.ndarray) -> list[int]:
    """Rows at which blocks of about `_BLOCK_BYTES` begin, and the number of rows."""
    last = len(offsets) - 1
    inner = np.searchsorted(offsets, np.arange(_BLOCK_BYTES, offsets[-1], _BLOCK_BYTES))
    return sorted({0, *inner.tolist(), last})


class Coded(_Strings):
    """Strings of few different values: string i is `names[codes[i]]`."""

    __slots__ = ("codes", "names")

    def __init__(self, codes: np.ndarray, names: Sequence[str]) -> None:
        """
        Args:
            codes: int32 [n].
            names: without duplicates.
        """
        self.codes, self.names = codes, tuple(names)

    @staticmethod
    def of(strings: Iterable[str]) -> Coded:
        """The strings of any other sequence."""
        if isinstance(strings, Coded):
            return strings
        number_of: dict[str, int] = {}
        codes = [number_of.setdefault(one, len(number_of)) for one in strings]
        return Coded(np.array(codes, np.int32), tuple(number_of))

    @staticmethod
    def joined(parts: Sequence[Coded]) -> Coded:
        """Some columns after one another; a single one is not copied."""
        if len(parts) == 1:
            return parts[0]
        names = tuple(dict.fromkeys(name for part in parts for name in part.names))
        number_of = {name: number for number, name in enumerate(names)}
        codes = [np.array([number_of[name] for name in part.names], np.int32)[part.codes] for part in parts]
        return Coded(np.concatenate([np.zeros(0, np.int32), *codes]), names)

    def __len__(self) -> int:
        return len(self.codes)

    def __reduce__(self) -> tuple[type, tuple[np.ndarray, tuple[str, ...]]]:
        return Coded, (self.codes, self.names)

    def _one(self, index: int) -> str:
        return self.names[int(self.codes[index])]

    def __iter__(self) -> Iterator[str]:
        for start in range(0, len(self), 4096):
            yield from (self.names[code] for code in self.codes[start : start + 4096].tolist())

    def take(self, chosen: np.ndarray) -> Coded:
        """The chosen strings, in the given order."""
        return Coded(self.codes[chosen], self.names)

    def counts(self) -> dict[str, int]:
        """How often each string stands there, sorted by the string."""
        numbers = np.bincount(self.codes, minlength=len(self.names)).tolist()
        return {name: count for name, count in sorted(zip(self.names, numbers, strict=True)) if count}

    def are(self, name: str) -> np.ndarray:
        """bool [n]: which strings are this one."""
        return np.asarray(self.codes == (self.names.index(name) if name in self.names else -1))
