"""Search correction: items that are near to every query (hubs) lose what they would gain from that. Pure numpy.

A bank of training queries shows how near an item g is to queries in general. Each correction subtracts a bias b of the
item from every score, so that the ranking is that of <q, g> - b:

| correction | b(g), with s_j = <g, bank_j> | source |
|---|---|---|
| `nnn` | strength * mean of the k largest s_j | nearest-neighbour normalisation, Chowdhury et al. 2024 (2410.24114) |
| `csls` | half the mean of the k largest s_j | Conneau et al. 2018 (1710.04087), halved |
| `inverted_softmax` | T * log(mean over j of exp(s_j / T)) | Smith et al. 2017 (1702.03859) |

CSLS also subtracts a term of the query, which is the same for all items and cannot change its ranking; so it equals
`nnn` with strength 0.5. Inverted softmax is T times the log of the published probability; what that leaves out is the
same for all items, too. T is one over the paper's beta. With the queries of the evaluated split as its bank it would be
the dual softmax, which uses what a single query cannot know; here the bank holds training queries alone.

Biases are computed from exact inner products and rounded to multiples of 2^-23, which float32 holds: equal vectors have
equal biases, whatever stands beside them.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, NamedTuple

import numpy as np

from saffe_cache.core import ranks
from saffe_cache.core.options import OptionGroup, refuse, require
from saffe_cache.retrieval.ranking import InnerProducts

CorrectionKind = Literal["none", "nnn", "csls", "inverted_softmax"]
DEFAULT_CORRECTION: CorrectionKind = "none"
"""Where --search-correction is not given and the protocol, the run and its bank allow it."""
MOST_BANK_TEXTS, MOST_BANK_PHOTOS = 10_000, 2_000
"""Training queries of a bank at most. Its photos pass the fusion for it, which takes longer than mapping texts."""
_ITEMS = 128
"""Items at a time: 10 MB of scores with a full bank."""
_SCALE = 2.0**23


@dataclass(frozen=True, kw_only=True)
class SearchCorrection:
    """A correction and its parameters."""

    kind: CorrectionKind
    k: int
    """Nearest queries of the bank that count; nnn and csls."""
    strength: float
    """Of nnn."""
    temperature: float
    """Of inverted_softmax."""

    def __str__(self) -> str:
        if self.kind == "inverted_softmax":
            return f"{self.kind}, temperature {self.temperature:g}"
        return f"{self.kind}, k {self.k}" + (f", strength {self.strength:g}" if self.kind == "nnn" else "")

    def least_bank(self) -> int:
        """The fewest queries of a bank."""
        return 1 if self.kind == "inverted_softmax" else self.k

    def biases(self, items: np.ndarray, bank: np.ndarray) -> np.ndarray:
        """What is subtracted from all scores of each item, float32 [n].

        `items` [n, d] and `bank` [m, d] are unit vectors of one space.

        Raises:
            ValueError: the bank is too small, or a vector is not finite or not of unit length.
        """
        if len(bank) < self.least_bank():
            raise ValueError(f"search correction: a bank of {len(bank)} queries, k is {self.k}. Use a smaller k.")
        scores = InnerProducts(bank, items)

        def of_block(rows: slice) -> np.ndarray:
            return self._levels(scores[rows, slice(0, len(bank))])

        blocks = [slice(start, min(start + _ITEMS, len(items))) for start in range(0, len(items), _ITEMS)]
        levels = ranks.concatenated(blocks, of_block) if blocks else np.zeros(0)
        return np.asarray(np.rint(levels * _SCALE) / _SCALE, np.float32)

    def _levels(self, scores: np.ndarray) -> np.ndarray:
        """The bias of each row of scores with the whole bank, float64."""
        if self.kind == "inverted_softmax":
            highest = scores.max(axis=1)
            shares = np.exp((scores - highest[:, None]) / self.temperature)
            return np.asarray(highest + self.temperature * np.log(shares.mean(axis=1)))
        nearest = np.partition(scores, -self.k, axis=1)[:, -self.k :]
        nearest.sort(axis=1)  # so that the order of the bank does not reach the sum
        return np.asarray((self.strength if self.kind == "nnn" else 0.5) * nearest.mean(axis=1))


class Bank(NamedTuple):
    """Training queries, and the correction that they are for."""

    correction: SearchCorrection
    texts: np.ndarray
    """int64 [texts]: text rows, ascending."""
    photos: np.ndarray
    """int64 [photos]: positions in the training pairs, ascending."""


@dataclass(frozen=True, kw_only=True)
class CorrectionOptions(OptionGroup):
    """Search correction"""

    search_correction: CorrectionKind | None = None
    """What is subtracted from the scores of photos that are near to all texts, measured with a bank of up to 10,000
    training texts, never those of the split. nnn: nearest-neighbour normalisation; csls: half the mean similarity to
    the nearest of the bank, as nnn with strength 0.5; inverted_softmax: a soft maximum over the bank. Default: none."""
    correction_k: int = 10
    """Nearest texts of the bank that nnn and csls average."""
    correction_strength: float = 0.5
    """Part of that average that nnn subtracts, above 0, at most 2. Choose it on validation."""
    correction_temperature: float = 0.05
    """Temperature of inverted_softmax, from 0.001 to 10. Choose it on validation."""

    def check(self) -> None:
        """Raise ValueError if a value is out of range or has no effect."""
        strength, temperature = self.correction_strength, self.correction_temperature
        require(self.correction_k > 0, "correction_k", self.correction_k, "a number above 0")
        require(0 < strength <= 2, "correction_strength", strength, "a number above 0, at most 2")
        require(0.001 <= temperature <= 10, "correction_temperature", temperature, "a number from 0.001 to 10")
        used = {"nnn": ("k", "strength"), "csls": ("k",), "inverted_softmax": ("temperature",)}
        kind = self.search_correction or DEFAULT_CORRECTION
        for name in ("k", "strength", "temperature"):
            value, default = getattr(self, f"correction_{name}"), getattr(CorrectionOptions, f"correction_{name}")
            if value != default and name not in used.get(kind, ()):
                fits = " or ".join(one for one, names in used.items() if name in names)
                refuse(f"correction_{name}", value, f"this option only with --search-correction {fits}")

    @property
    def correction(self) -> SearchCorrection | None:
        """The correction that is requested, or by default."""
        kind = self.search_correction or DEFAULT_CORRECTION
        if kind == "none":
            return None
        return SearchCorrection(
            kind=kind,
            k=self.correction_k,
            strength=self.correction_strength,
            temperature=self.correction_temperature,
        )
