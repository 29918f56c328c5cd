"""The options of `saffe few-pairs`."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

from saffe_cache.core.devices import choose_device, is_fast_with_bfloat16
from saffe_cache.core.features import MODALITIES
from saffe_cache.core.options import positional, require, require_keys, require_seed
from saffe_cache.fusion.registry import FUSIONS
from saffe_cache.retrieval.correction import CorrectionOptions
from saffe_cache.training.config import TrainingType

DEFAULT, EVERY = "default", "all"
"""Names of several fusions."""
SIZES = (500, 1500, 3000, 6000)
"""Default numbers of photos, as far as a cache has them."""
QUICK_SIZES, QUICK_EPOCHS = 2, 3


@dataclass(frozen=True, kw_only=True)
class FewPairsConfig(CorrectionOptions):
    """Train every method on a few photos of each cache, and compare them all with the best closed form.

    Every method sees the same photos, texts and seeds; runs that share batches read the cache once. A finished part is
    not repeated: the same command resumes a killed study. Exits with status 3 if a control fails.
    """

    cache: tuple[str, ...] = positional()
    """Caches, one for each data set and pair of encoders."""
    out: str
    """Folder of the result."""
    split: str = "test"
    """Split to report on; its photos are the gallery."""
    train_split: str = "train"
    """Split that the photos are drawn from. A photo that also belongs to another split is not used."""
    photos: tuple[int, ...] = ()
    """Numbers of photos, each with all its texts. Photos that choose epochs and hyper-parameters are counted, too.
    Default: 500, 1,500, 3,000 and 6,000, as far as a cache has them; of a small cache a quarter of its photos and
    all."""
    seeds: tuple[int, ...] = (0, 1, 2)
    """Seeds of the photos that are drawn, and of starting weights."""
    fusions: tuple[str, ...] = field(default=(), metadata={"entries": FUSIONS})
    """Methods to compare; closed forms are always added, as one of them is what all are compared with. default: all
    that train on photos alone and run no block of an encoder's. all: those too. Default: default."""
    validation: str = "heldout"
    """Where epochs and hyper-parameters are chosen: heldout takes a part of the photos that are drawn; or the name of
    a split, whose photos are not counted."""
    validation_fraction: float = 0.1
    """Fraction of the photos that heldout takes."""
    layers: Mapping[str, tuple[int, ...]] = field(default_factory=dict)
    """Layers to train on in every cache, as for saffe train."""
    encoder: Mapping[str, str] = field(default_factory=dict)
    """Which encoder to use if a cache has several of a modality, as for saffe train."""
    report_cache: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    """Further caches to report on, such as the same photos with captions in another language: NAME=CACHE,CACHE, where
    NAME is that of the cache to train on, without its suffix. They need the same encoders and the split."""
    quick: bool = False
    """Only the two smallest numbers of photos, the first seed, and 3 epochs: to see that all works."""
    keep_runs: bool = False
    """Keep the folders of all trained runs; by default each is removed once it is measured."""
    title: str | None = None
    """Title of the result. Default: the caches' names."""
    workers: int | None = None
    """Processes that train side by side. Default: one per processor core, at most 4; 1 on a GPU."""
    device: str = "auto"
    """cpu, cuda or cuda:N. auto: a GPU if there is one."""
    dtype: TrainingType = "auto"
    """Type of the matrix products of training steps. auto: bfloat16 where the device has fast ones, as GPUs and CPUs
    with AVX-512 BF16 or AMX do; float32 elsewhere."""

    def check(self) -> None:
        """Raise ValueError if an option is out of range, or unknown."""
        require(len(self.cache) > 0, "cache", "no cache", "one or more")
        names = self.names
        require(len(set(names)) == len(names), "cache", ", ".join(names), "caches of different names")
        for name in self.fusions:
            require(name in (*FUSIONS, DEFAULT, EVERY), "fusions", name, f"{DEFAULT}, {EVERY} or {', '.join(FUSIONS)}")
        require(all(count >= 2 for count in self.photos), "photos", self.photos, "2 or more")
        for option in ("photos", "seeds"):
            values = getattr(self, option)
            require(len(set(values)) == len(values), option, values, "each once")
        require(len(self.seeds) > 0, "seeds", "none", "one or more")
        for seed in self.seeds:
            require_seed("seeds", seed)
        require(self.workers is None or self.workers > 0, "workers", self.workers, "a number above 0")
        fraction = self.validation_fraction
        require(0 < fraction < 1, "validation_fraction", fraction, "a fraction between 0 and 1")
        others = ("auto", self.train_split, self.split)
        require(self.validation not in others, "validation", self.validation, "heldout, or a split of its own")
        require_keys("report_cache", self.report_cache, names)
        for option in ("layers", "encoder"):
            require_keys(option, getattr(self, option), MODALITIES)

    @property
    def names(self) -> tuple[str, ...]:
        """Of the caches, in order: their files' names without suffix."""
        return tuple(Path(path.rstrip("/")).stem for path in self.cache)

    @property
    def training_type(self) -> TrainingType:
        """The resolved --dtype."""
        if self.dtype == "auto":
            return "bfloat16" if is_fast_with_bfloat16(choose_device(self.device)) else "float32"
        return self.dtype

    @property
    def used_seeds(self) -> tuple[int, ...]:
        return self.seeds[:1] if self.quick else self.seeds
