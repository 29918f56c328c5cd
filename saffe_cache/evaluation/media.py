"""What a run of several media finds when some of an item's media are missing, or are those of another item.

Measured by the run's own protocol on the items that have all media, so that the numbers are of the same items. Where
training dropped media, one of another item must not help: it is a control that finds no more than the run does without
that medium.
"""

from __future__ import annotations

from collections.abc import Sequence
from copy import copy
from dataclasses import dataclass, field, replace
from itertools import combinations

import numpy as np

from saffe_cache.core.controls import Control
from saffe_cache.core.features import Modality
from saffe_cache.fusion.base import Fusion
from saffe_cache.inputs.feature_loader import FeatureLoader
from saffe_cache.protocols.base import SearchProtocol
from saffe_cache.protocols.setting import Setting
from saffe_cache.retrieval.scores import Scores
from saffe_cache.store.joined import JoinedEncoder


@dataclass(frozen=True)
class MediaScores:
    """Scores of a run by the media that are shown."""

    num_items: int = 0
    """Items that have all media."""
    shown: dict[str, Scores] = field(default_factory=dict)
    """By the media that are shown, all of them first."""
    shuffled: dict[str, Scores] = field(default_factory=dict)
    """By the medium that is another item's."""

    @property
    def rows(self) -> dict[str, Scores]:
        """All of them by name, for a table."""
        return self.shown | {f"{medium} of another item": scores for medium, scores in self.shuffled.items()}

    def controls(self, metric: str) -> dict[str, Control]:
        """Verdicts on the media of another item, by the name of each control; undecided without an interval."""
        found = {}
        for medium, scores in self.shuffled.items():
            others = " + ".join(name for name in self.shuffled if name != medium)
            level, value, name = self.shown[others][metric], scores[metric].value, f"{medium}_shuffled"
            expected = f"no more than without {medium}"
            if level.interval is None:
                found[name] = Control.within(name, metric, value, level.value, None, expected)
            else:
                found[name] = Control.at_most(name, metric, value, level.value, level.error, expected)
        return found


def measure_media(protocol: SearchProtocol, model: Fusion, scores: Scores) -> MediaScores:
    """The scores of a run for each subset of its media; nothing where no two items have all of them.

    `scores` are the run's own, with all that each item has.
    """
    setting, gallery = protocol.setting, protocol.setting.inputs.gallery
    assert isinstance(gallery, JoinedEncoder)
    has_all = (gallery.parts[setting.pairs.rows] >= 0).all(axis=1)
    if has_all.sum() < 2:
        return MediaScores()
    pairs = setting.pairs.take(np.flatnonzero(has_all))
    whole = replace(setting, pairs=pairs)

    def measured(encoder: JoinedEncoder) -> Scores:
        return _measure(protocol, whole, encoder, model)

    media = tuple(gallery.encoders)
    every, *smaller = subsets_of(media)
    return MediaScores(
        num_items=len(pairs),
        shown={
            " + ".join(every): scores if has_all.all() else measured(gallery),
            **{" + ".join(shown): measured(gallery.showing(shown)) for shown in smaller},
        },
        shuffled={name: measured(gallery.shuffled(name, pairs.rows, setting.seed)) for name in media},
    )


def subsets_of(media: Sequence[Modality]) -> list[tuple[Modality, ...]]:
    """Every subset of some media, the largest first."""
    return [one for size in range(len(media), 0, -1) for one in combinations(media, size)]


def _measure(protocol: SearchProtocol, setting: Setting, encoder: JoinedEncoder, model: Fusion) -> Scores:
    inputs = setting.inputs
    cache = copy(inputs.cache)
    cache.encoders = {**cache.encoders, encoder.key: encoder}
    views = [inputs.views[number] for number in inputs.index_views]
    loader = FeatureLoader(cache, inputs.spec, inputs.device, index_views=views)
    seen = replace(setting, inputs=loader, _vectors={})  # a search correction's bank keeps all media: it may lack these
    return type(protocol)(seen).measure(model, seen.honest())
