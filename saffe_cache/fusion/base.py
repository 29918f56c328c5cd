"""The interface of fusions: they map gallery tokens, with or without paired texts, into the space of the queries."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import ClassVar, NamedTuple, TypeVar

import numpy as np
import torch
from torch import nn
from torch.nn import functional
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from saffe_cache.core.features import BlockWeights
from saffe_cache.core.items import Ragged
from saffe_cache.fusion.layers import Learning, Mask, States, TextMap, summarize
from saffe_cache.fusion.options import FusionShape


class Blocks(NamedTuple):
    """Encoder blocks that a fusion runs or is initialised from, in order."""

    gallery: Sequence[BlockWeights] = ()
    text: Sequence[BlockWeights] = ()


_Values = TypeVar("_Values", torch.Tensor, torch.Tensor | None)


def gathered(values: _Values, index: torch.Tensor | None) -> _Values:
    """The rows of an index; all rows if it is None."""
    return values if values is None or index is None else values[index]


class Texts(NamedTuple):
    """Texts that are paired with gallery inputs; a row whose mask has no True is the null text."""

    states: States
    """Empty for a fusion that takes no tokens."""
    mask: torch.Tensor
    """bool [texts, tokens]"""
    vectors: torch.Tensor
    """[texts, text_size]: the text encoder's own output."""

    @staticmethod
    def of_vectors(vectors: torch.Tensor) -> Texts:
        """Texts without tokens, none of them null."""
        return Texts((), torch.ones(len(vectors), 1, dtype=torch.bool, device=vectors.device), vectors)

    @property
    def is_text(self) -> torch.Tensor:
        """bool [texts, 1]: False for null texts."""
        return self.mask.any(dim=1, keepdim=True)

    def rows(self, index: torch.Tensor | None) -> Texts:
        """The texts of an index; all if it is None."""
        states = tuple(gathered(state, index) for state in self.states)
        return Texts(states, gathered(self.mask, index), gathered(self.vectors, index))

    def without(self, is_dropped: torch.Tensor) -> Texts:
        """The same texts, with the null text where bool [texts] is True."""
        return self._replace(mask=self.mask & ~is_dropped[:, None])


class Pairing(NamedTuple):
    """Which gallery input is fused with which text: int64 [pairs] each; None where row i is fused with row i."""

    gallery: torch.Tensor | None = None
    text: torch.Tensor | None = None


ROW_BY_ROW = Pairing()


class Fused(NamedTuple):
    """What a fusion makes of pairs, one row for each."""

    vectors: torch.Tensor
    """Unit vectors [pairs, text_size]."""
    states: States
    """What the head pooled."""
    mask: Mask


@dataclass(frozen=True)
class TrainingVectors:
    """The training pairs as one vector for each photo and text, for fusions in closed form."""

    photos: np.ndarray
    """Summaries of the photos, float32 [n, summary_size]."""
    texts: np.ndarray
    """Unit vectors of the distinct texts, float32 [m, text_size]."""
    positives: Ragged
    """Rows of each photo's texts."""
    validate: Callable[[], float]
    """The validation score of the model as it is at the time."""

    @property
    def mean_texts(self) -> np.ndarray:
        """Mean of the unit vectors of each photo's texts, float32 [n, text_size]."""
        sums = np.add.reduceat(self.texts[self.positives.values], self.positives.offsets[:-1], axis=0)
        return np.asarray(sums / self.positives.lengths[:, None], np.float32)


def cosines(gallery: torch.Tensor, queries: torch.Tensor) -> torch.Tensor:
    """Of unit vectors, [n, m]; in full precision, also under autocast.

    At a temperature of 0.01, bfloat16 products would be off by 0.4.
    """
    with torch.autocast(gallery.device.type, enabled=False):
        return gallery @ queries.T


def inner_products(queries: torch.Tensor, gallery: torch.Tensor) -> torch.Tensor:
    """Of unit vectors, [queries, gallery]."""
    return cosines(gallery, queries).T


def as_read(shape: FusionShape, states: States, mask: Mask) -> tuple[States, Mask]:
    """What a fusion sees of gallery inputs, of all their tokens: these, or their summaries as one token each."""
    if shape.entry.reads == "tokens":
        return states, mask
    return [shape_summaries(shape, states, mask).unsqueeze(1)], None


def shape_summaries(shape: FusionShape, states: States, mask: Mask) -> torch.Tensor:
    """Summaries of gallery inputs, [inputs, summary_size], as a fusion of this shape has them.

    Those of the media of an item follow one another; that of a missing one is zero.
    """
    found = [
        summarize(own, is_real, has_class_token=shape.has_class_token, has_spread=shape.entry.has_spread)
        for own, is_real in of_media(shape, states, mask)
    ]
    return found[0] if len(found) == 1 else torch.cat(found, dim=1)


def of_media(shape: FusionShape, states: States, mask: Mask) -> list[tuple[States, Mask]]:
    """The layers and the mask of each medium of fused items; where there is one medium, all as they are."""
    if not shape.media:
        return [(states, mask)]
    assert mask is not None, "an item may lack a medium"
    found, layer, token = list[tuple[States, Mask]](), 0, 0
    for medium in shape.media:
        own = states[layer : layer + medium.num_layers]
        count = own[0].shape[1]
        found.append((own, mask[:, token : token + count]))
        layer, token = layer + medium.num_layers, token + count
    return found


class Fusion(nn.Module):
    """Gallery side f(x, text or null) and query side g(text), both as unit vectors.

    A fusion defines `fuse`. The text that is paired with a gallery input may also be added to the output
    (`pooled_text`): its own vector, mapped, with a learned weight, which is late fusion.
    """

    learning: ClassVar[Mapping[str, Learning]] = {"text_weight": Learning(20.0, decays=False)}
    idle_with_null: ClassVar[tuple[str, ...]] = ()
    """Parts of the names of parameters that get no gradient if only null text is fused."""

    composes_vectors: ClassVar[bool] = False
    """Whether `compose_queries` makes composed queries of gallery vectors, so that no photo is read twice."""

    match_head: nn.Module

    def __init__(self, shape: FusionShape) -> None:
        super().__init__()
        self.shape = shape

    def _make_text_maps(self) -> None:
        """Make the maps of queries and of paired texts."""
        shape = self.shape
        self.query_map = TextMap(shape.text_size, shape.dropout) if shape.maps_queries else nn.Identity()
        if shape.pooled_text:
            self.text_map = TextMap(shape.text_size, shape.dropout)
            self.text_weight = nn.Parameter(torch.ones(()))

    def forward(
        self, states: States, mask: Mask = None, texts: Texts | None = None, pairing: Pairing = ROW_BY_ROW
    ) -> torch.Tensor:
        """Unit vectors [pairs, width of the output].

        `states` and `mask` are those of the gallery's inputs; `texts`, one for each input or as `pairing` says, are the
        null text for all where they are None.
        """
        return self.fuse(states, mask, texts, pairing).vectors

    def fuse(
        self, states: States, mask: Mask = None, texts: Texts | None = None, pairing: Pairing = ROW_BY_ROW
    ) -> Fused:
        """The vectors, and what a matching head sees of the pairs; same arguments as `forward`."""
        raise NotImplementedError

    def encode_queries(self, vectors: torch.Tensor) -> torch.Tensor:
        """Unit vectors [batch, width of the output] of the text encoder's own vectors."""
        return functional.normalize(self.query_map(vectors), dim=-1)

    def encode_texts(self, texts: Texts) -> torch.Tensor:
        """Unit vectors [texts, width of the output] of texts that search.

        A fusion that reads their tokens (`FusionEntry.query_tokens`) defines this instead of `encode_queries`.
        """
        return self.encode_queries(texts.vectors)

    def compose_queries(self, photos: torch.Tensor, texts: Texts) -> torch.Tensor:
        """f(x, t) of gallery vectors f(x, null), [pairs, d], and the pairs' texts: the same as `forward` of both.

        A fusion of which `composes_vectors` is true defines this.
        """
        raise NotImplementedError

    def similarities(self, queries: torch.Tensor, gallery: torch.Tensor) -> torch.Tensor:
        """Scores [queries, gallery] of composed queries f(x, t) with gallery vectors f(x, null), both as `forward` has
        them: in training and in evaluation.

        A fusion whose scores are no inner products (`FusionEntry.scores`) defines this; its vectors for queries may
        then have another width than the gallery's, and any length.
        """
        return inner_products(queries, gallery)

    def match(self, fused: Fused, queries: torch.Tensor) -> torch.Tensor:
        """Logits [pairs] that photo and text belong together; `queries` are the texts' unit vectors."""
        return self.match_head(fused.states, fused.mask, fused.vectors, queries)  # type: ignore[no-any-return]

    @property
    def fuses_first(self) -> bool:
        """Whether the linear path sees fused tokens instead of the cached ones."""
        return False

    def linear_features(self, states: States, mask: Mask, texts: Texts | None) -> torch.Tensor:
        """What the linear path sees, [inputs, summary_size]; same arguments as `forward`."""
        return self.summaries(states, mask)

    def summaries(self, states: States, mask: Mask) -> torch.Tensor:
        """Summaries of gallery inputs, [inputs, summary_size], from what the fusion reads of them."""
        if self.shape.entry.reads == "summary":
            return states[0].squeeze(1)
        return shape_summaries(self.shape, states, mask)

    @property
    def attending(self) -> list[nn.Module]:
        """Modules that attend to the gallery's tokens, if any.

        Each has a method `attention_weights`, which takes what its `forward` takes and returns [batch, n, keys]: the
        weights with which its n queries see the gallery's tokens, which are the first keys.
        """
        return []

    @property
    def linear_start(self) -> nn.Linear | None:
        """The linear path from the photo's summary, if everything else that reads the photo starts at zero."""
        return None

    def prepare(self, photos: np.ndarray) -> None:
        """Compute what depends on the training photos alone, before the first step (`FusionEntry.sees_photos_first`).

        `photos` are their summaries, float32 [n, summary_size].
        """
        raise NotImplementedError

    def fit(self, seen: TrainingVectors) -> None:
        """Compute the weights of a fusion in closed form; what it must choose, it chooses by `seen.validate`."""
        raise NotImplementedError

    @property
    def num_fitted(self) -> int:
        """How many numbers a training sets."""
        if self.shape.entry.is_closed_form:
            return sum(one.numel() for one in self.state_dict().values())
        return sum(one.numel() for one in self.parameters() if one.requires_grad)

    def freeze_unused(self, *, null_only: bool) -> None:
        """Freeze what must not train and, if only null text is fused, what gets no gradient."""
        for name, parameter in self.named_parameters():
            if null_only and name.startswith(self.idle_with_null):
                parameter.requires_grad_(False)

    def _add_text(self, vectors: torch.Tensor, texts: Texts | None) -> torch.Tensor:
        """Unit vectors, plus the mapped vectors of texts that are not null."""
        if texts is None or not self.shape.pooled_text:
            return vectors
        return functional.normalize(vectors + self.text_weight * self.text_map(texts.vectors) * texts.is_text, dim=-1)


@contextmanager
def counted_flops() -> Iterator[FlopCounterMode]:
    """Count the matrix products inside, two FLOPs for a multiplication and an addition.

    Attention uses its plain implementation meanwhile, since torch does not count its fast kernels on a CPU.
    """
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        yield counter
