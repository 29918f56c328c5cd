"""binding.json: few-shot episodes, and full classification with names replaced by words that mean nothing."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

from saffe_cache.core.json_schema import known_part, made_of
from saffe_cache.core.outputs import read_json


@dataclass(frozen=True, kw_only=True)
class Mean:
    """Over episodes."""

    mean: float
    half_interval: float


@dataclass(frozen=True, kw_only=True)
class FewShot:
    """One kind of episode."""

    ways: int
    shots: int
    queries: int
    episodes: int
    chance: float
    systems: Mapping[str, Mean]
    controls: Mapping[str, Mean] = field(default_factory=dict)
    """The same where nothing can be known."""

    @property
    def name(self) -> str:
        return f"{self.ways}-way {self.shots}-shot"


@dataclass(frozen=True, kw_only=True)
class Seeds:
    """One value for each seed."""

    values: tuple[float, ...]


@dataclass(frozen=True, kw_only=True)
class NamesReplaced:
    """A classification whose names were replaced."""

    name: str
    classes: int
    metric: str
    systems: Mapping[str, Seeds]


@dataclass(frozen=True, kw_only=True)
class PublishedEpisodes:
    """A number of others."""

    name: str
    ways: int
    shots: int
    value: float
    note: str


@dataclass(frozen=True, kw_only=True)
class Episodes:
    """What binding.json says; all values are fractions."""

    title: str
    dataset: str
    settings: tuple[FewShot, ...]
    names_replaced: tuple[NamesReplaced, ...]
    published: tuple[PublishedEpisodes, ...]
    failures: tuple[str, ...] = ()
    """Controls that are not where they must be."""

    @property
    def systems(self) -> list[str]:
        return list(dict.fromkeys(name for setting in self.settings for name in setting.systems))

    @property
    def controls(self) -> list[str]:
        return list(dict.fromkeys(name for setting in self.settings for name in setting.controls))


def read_episodes(path: Path) -> Episodes:
    """
    Raises:
        ValueError: a field is missing or of another kind.
    """
    content = read_json(path)
    try:
        episodes = made_of(Episodes, known_part(Episodes, content))
        for replaced in episodes.names_replaced:
            for name, seeds in replaced.systems.items():
                if not seeds.values:
                    raise ValueError(f"names_replaced: {replaced.name}: systems: {name}: values is empty")
    except (TypeError, ValueError) as error:
        raise ValueError(f"{path}: {error}. Run what writes it again.") from None
    return episodes
