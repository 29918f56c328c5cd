"""The options of `saffe bridge`."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from saffe_cache.core.options import require, require_seed


@dataclass(frozen=True, kw_only=True)
class BridgeConfig:
    """Search the photos of one run by the sounds of another, and the reverse, through the texts that both know.

    Neither run has seen a pair of photo and sound. The result compares this with maps that are fitted on such pairs.
    The same command does nothing for a finished result. The exit status is 3 if a control fails.
    """

    cache: str
    """A cache that holds the encoders of both runs."""
    run: tuple[str, ...]
    """The two runs, as saffe train wrote them: --run A --run B. Their galleries are of two modalities, such as
    --gallery image and --gallery audio, and their texts of one encoder."""
    out: str
    """Folder of the result."""
    split: str = "test"
    """Split to report on."""
    relevance: Literal["auto", "item", "class"] = "auto"
    """What is found: the other medium of the same item, or media of the same class. auto: class, if the split's items
    have classes."""
    train_split: str = "train"
    """Split whose items with both media the direct maps are fitted on; inputs of --split are left out."""
    texts: int = 5000
    """Most texts that the bridge goes through, drawn from those that the runs were trained on."""
    title: str | None = None
    """Title of the result. Default: the cache's name."""
    seed: int = 0
    """Seed of what is drawn, and of the direct maps."""
    device: str = "auto"
    """auto (a GPU if there is one), cpu or cuda."""

    def __post_init__(self) -> None:
        require(len(self.run) == 2, "run", ", ".join(self.run) or "none", "two runs, as --run A --run B")
        require(self.texts >= 2, "texts", self.texts, "2 or more")
        require(self.split != self.train_split, "split", self.split, "another split than --train-split")
        require_seed("seed", self.seed)
