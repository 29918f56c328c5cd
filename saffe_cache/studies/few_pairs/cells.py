"""What a part of the study stores: its runs, measured.

For each metric a cell holds its value in up to 1,000 resamples of the reported photos. All methods see the same
resamples, so that the interval of any difference is paired, whichever cells the two methods are in.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True)
class Permuted:
    """The main metric of the same method, trained on permuted pairs."""

    value: float
    level: float
    """Expected where nothing is found."""
    error: float
    """The value's standard error."""


@dataclass(frozen=True, kw_only=True)
class Measured:
    """A method on one gallery; fractions."""

    values: Mapping[str, float]
    """By metric."""
    resampled: Mapping[str, tuple[float, ...]]
    """The same in each resample of the reported photos."""
    chance: Mapping[str, float]
    permuted: Permuted | None
    """None where the control shows nothing, as with few classes."""


@dataclass(frozen=True, kw_only=True)
class Trained:
    """One run, measured."""

    parameters: int
    """Numbers that are trained or fitted."""
    seconds: float
    validation_score: float
    best_epoch: int
    train_photos: int
    validation_photos: int
    galleries: Mapping[str, Measured]


@dataclass(frozen=True, kw_only=True)
class Part:
    """The methods of one group on the same photos with one seed: a cell of the study."""

    runs: Mapping[str, Trained]
    """By method."""
    failed: Mapping[str, str]
    """Why methods could not be trained."""
