"""How many parameters each fusion trains, counted by hand from the widths of its maps, and what the documentation says.

The documented ones are of two encoders, one photo layer, a text beside each photo, and two blocks where blocks run on.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pytest
import torch

from saffe_cache.core.features import BlockSpec, BlockWeights
from saffe_cache.fusion.base import Blocks
from saffe_cache.fusion.options import FusionShape
from saffe_cache.fusion.registry import FUSIONS

TOKENS, BLOCKS = 65, 2
"""Of DINOv2-small at 112 pixels; of the text encoder from layer 4 of 6."""


class Widths(NamedTuple):
    """Of the photo's tokens, the text's tokens, and the text's own vector."""

    photo: int
    text: int
    vector: int


DOCUMENTED = Widths(384, 384, 384)
OTHERS = Widths(96, 48, 32)


def linear(inner: int, outer: int) -> int:
    return inner * outer + outer


def norm(width: int) -> int:
    return 2 * width


def text_map(w: Widths) -> int:
    return linear(w.vector, w.vector) + linear(w.vector, 512) + linear(512, w.vector)


def late(w: Widths) -> int:
    """First token and mean of the others into the text's space; a map of the queries, one of the texts, a weight."""
    return linear(2 * w.photo, w.vector) + 2 * text_map(w) + 1


def head(w: Widths, beside: int) -> int:
    """8 queries, each with values 48 wide; an MLP on what they pool, the summary and what lies beside; a linear map."""
    seen = 8 * 48 + 2 * w.photo + beside
    pooling = 8 * w.photo + 8 * w.photo * 48
    return pooling + norm(seen) + linear(seen, 1024) + linear(1024, w.vector) + linear(2 * w.photo, w.vector)


def cross_attention(w: Widths) -> int:
    """Queries, keys, values and output of the photo's width; the text is brought to it where its own is another."""
    return 4 * linear(w.photo, w.photo) + (0 if w.photo == w.text else linear(w.text, w.photo))


def reuse(w: Widths) -> int:
    null_text, gate = w.text, 1
    decoder = cross_attention(w) + norm(w.photo) + norm(w.text) + gate
    return decoder + null_text + head(w, w.vector) + 2 * text_map(w) + 1


def paper(w: Widths) -> int:
    """DINOv2's self-attention has a norm and a scale for each channel. No text is added."""
    self_attention = 4 * linear(w.photo, w.photo) + norm(w.photo) + w.photo
    return self_attention + cross_attention(w) + norm(w.photo) + w.text + head(w, 0) + text_map(w)


def reference(w: Widths) -> int:
    """Four layers that work, three that are never used, three norms; all tokens into one linear map; no text maps."""
    unused = linear(w.photo, 3 * w.photo) + linear(w.photo, 2 * w.photo) + linear(w.photo, w.photo)
    used = 2 * linear(w.photo, w.photo) + linear(w.photo, 2048) + linear(2048, w.photo) + 3 * norm(w.photo)
    return unused + used + w.text + linear(TOKENS * w.photo, w.vector)


def hadamard(w: Widths) -> int:
    return late(w) + linear(2 * w.photo, 1200) + linear(w.vector, 1200) + linear(1200, w.vector)


def two_tower(w: Widths) -> int:
    return linear(w.photo, 256) + linear(w.vector, 256)


def mbt(w: Widths) -> int:
    between = 0 if w.photo == w.text else linear(w.photo, w.text) + linear(w.text, w.photo)
    return late(w) + 4 * w.photo + between + linear(2 * (w.photo + w.text), w.vector)


def flamingo(w: Widths) -> int:
    """64 latents and a position; two layers and a norm; for each block an attention and its MLP behind two gates."""
    of_photo, of_text = (norm(width) + width * 4 * width + 4 * width * width for width in (w.photo, w.text))
    resampling = 2 * norm(w.photo) + w.photo * 512 + w.photo * 1024 + 512 * w.photo + of_photo
    asking = norm(w.text) + w.text * 512 + w.photo * 1024 + 512 * w.text + of_text + 2
    resampler = 64 * w.photo + w.photo + 2 * resampling + norm(w.photo)
    return late(w) + resampler + BLOCKS * asking + linear(w.photo + w.text, w.vector)


def limber(w: Widths) -> int:
    return late(w) + linear(w.photo, w.text) + linear(2 * w.text, w.vector)


def magma(w: Widths) -> int:
    return limber(w) + BLOCKS * (linear(w.text, w.text // 4) + linear(w.text // 4, w.text))


def deep_insert(w: Widths) -> int:
    return limber(w) + norm(w.text)


def frozen(w: Widths) -> int:
    """Two tokens of the photo's summary; both means are read."""
    return late(w) + linear(2 * w.photo, 2 * w.text) + linear(2 * w.text, w.vector)


def fromage(w: Widths) -> int:
    """The token, and two maps into 256 dimensions."""
    return w.text + linear(2 * w.photo, 256) + linear(w.text, 256)


def pang(w: Widths) -> int:
    """Maps without biases in front of the block and behind it; the class token and the mean are read."""
    return late(w) + 2 * w.photo * w.text + linear(2 * w.photo, w.vector)


def albef(w: Widths) -> int:
    """Queries and output of the text's width, keys and values of the photo's tokens; a head that matches."""
    attention = linear(w.text, w.text) + 2 * linear(w.photo, w.text) + linear(w.text, w.text)
    asking = norm(w.text) + norm(w.photo) + attention
    return late(w) + BLOCKS * asking + linear(w.text, w.vector) + linear(w.text, 2)


def contrastive(w: Widths) -> int:
    return linear(2 * w.photo, 512) + linear(w.vector, 512)


def fusemix(w: Widths) -> int:
    """A block of two layers, a norm and a map on each side."""
    total = 0
    for size in (2 * w.photo, w.vector):
        inner = min(4 * size, 2048)
        total += norm(size) + linear(size, inner) + linear(inner, size) + norm(size) + linear(size, 512)
    return total


def sail(w: Widths) -> int:
    """A norm, a gate, what it lets pass, and a map on each side."""
    sides = [(size, min(4 * size, 2048)) for size in (2 * w.photo, w.vector)]
    return sum(norm(size) + 2 * linear(size, inner) + linear(inner, 512) for size, inner in sides)


def sharelock(w: Widths) -> int:
    """Three layers with batch norms and a map, of the text alone."""
    inner = linear(w.vector, 1024) + 2 * linear(1024, 1024) + 3 * norm(1024)
    return inner + linear(1024, 2 * w.photo)


def freeze_align(w: Widths) -> int:
    """Projectors of the patches, the class token and the text's vector; three layers and a norm of the text."""
    projectors = sum(2 * linear(size, 512) + linear(512, 512) for size in (w.photo, w.photo, w.vector))
    return projectors + 2 * linear(512, 512) + norm(512)


def gpo(w: Widths) -> int:
    """A bidirectional GRU has a matrix and a bias for its input and its state, in each of 3 gates and 2 directions."""
    operator = 2 * 3 * 2 * linear(32, 32) + 32
    return linear(w.photo, 256) + operator + linear(w.vector, 256)


def dino_txt(w: Widths) -> int:
    return 2 * linear(w.photo, w.photo) + linear(w.vector, 2 * w.photo)


def composed(w: Widths) -> int:
    """The map of photos into the text's space."""
    return linear(2 * w.photo, w.vector)


def tirg(w: Widths) -> int:
    """A gate and a residual, each behind a batch norm, and their two weights."""
    both = 2 * w.vector
    return composed(w) + 2 * (norm(both) + linear(both, w.vector)) + linear(both, both) + 2


def combiner(w: Widths) -> int:
    """A projection of each, then a vector and a share of both."""
    projection, inner = 4 * w.vector, 8 * w.vector
    outputs = 2 * linear(2 * projection, inner) + linear(inner, w.vector) + linear(inner, 1)
    return composed(w) + 2 * linear(w.vector, projection) + outputs


def compose(w: Widths) -> int:
    """The head without its linear map to k; the text's linear map and MLP, a map of captions, R, a gate, a residual."""
    summary, both = 3 * w.photo, 256 + w.vector
    seen = 8 * 48 + summary
    photo = 8 * w.photo + 8 * w.photo * 48 + norm(seen) + linear(seen, 1024) + linear(1024, 256) + linear(summary, 256)
    text = 2 * linear(w.vector, 256) + linear(w.vector, 512) + linear(512, 256)
    gate, residual = linear(both, 512) + linear(512, 256), linear(both, 768) + linear(768, 256)
    return photo + text + linear(256, 256) + norm(256) + norm(w.vector) + gate + residual + 2


COUNTS: Mapping[str, Callable[[Widths], int]] = {
    "reuse": reuse,
    "paper": paper,
    "reference": reference,
    "linear": lambda w: head(w, 0) + 2 * text_map(w) + 1,
    "concat": lambda w: head(w, w.vector) + 2 * text_map(w) + 1,
    "late": late,
    "hadamard": hadamard,
    "two_tower": two_tower,
    "mbt": mbt,
    "flamingo": flamingo,
    "limber": limber,
    "magma": magma,
    "deep_insert": deep_insert,
    "frozen": frozen,
    "fromage": fromage,
    "pang": pang,
    "albef": albef,
    "structure": lambda w: linear(2 * w.photo, 512) + linear(w.vector, 512),
    "sotalign": lambda w: linear(2 * w.photo, 1024) + linear(w.vector, 1024),
    "contrastive": contrastive,
    "fusemix": fusemix,
    "sail": sail,
    "sharelock": sharelock,
    "freeze_align": freeze_align,
    "gpo": gpo,
    "dino_txt": dino_txt,
    "compose": compose,
    "sum": lambda w: composed(w) + linear(w.vector, w.vector),
    "tirg": tirg,
    "combiner": combiner,
    "artemis": lambda w: composed(w) + 5 * linear(w.vector, w.vector),
}


def block(width: int, heads: int, *, has_scales: bool) -> BlockWeights:
    """As wide as DINOv2's or BERT's: all zeros."""
    sizes = {"query": (width, width), "key": (width, width), "value": (width, width), "output": (width, width)}
    sizes |= {"mlp_in": (4 * width, width), "mlp_out": (width, 4 * width)}
    tensors = {f"{role}_weight": np.zeros(size, np.float32) for role, size in sizes.items()}
    tensors |= {f"{role}_bias": np.zeros(size[0], np.float32) for role, size in sizes.items()}
    for role in ("attention_norm", "mlp_norm"):
        tensors |= {f"{role}_{part}": np.zeros(width, np.float32) for part in ("weight", "bias")}
    if has_scales:
        tensors |= {f"{role}_layer_scale": np.zeros(width, np.float32) for role in ("attention", "mlp")}
    spec = BlockSpec(num_attention_heads=heads, norm_first=has_scales, activation="gelu", layer_norm_eps=1e-6)
    return BlockWeights(spec, tensors)


def num_trained(name: str, widths: Widths) -> int:
    """As training counts them, of the fusion as its defaults shape it."""
    entry = FUSIONS[name]
    shape = FusionShape(
        fusion=name,
        head=entry.head,
        num_layers=1,
        hidden_size=widths.photo,
        num_tokens=TOKENS,
        text_hidden_size=widths.text,
        text_size=widths.vector,
        share_decoder=entry.share_decoder,
        pooled_text=entry.pooled_text,
        maps_queries=entry.maps_queries,
        matches="matching" in entry.objective,
        num_blocks={"none": 0, "paired": 0, "text": BLOCKS, "one_text": 1, "both": BLOCKS}[entry.blocks],
    )
    used = {"none": (0, 0), "paired": (1, 1), "text": (0, BLOCKS), "one_text": (0, 1), "both": (BLOCKS, BLOCKS)}
    num_photo, num_text = used[entry.blocks]
    photo, text = block(widths.photo, 6, has_scales=True), block(widths.text, 12, has_scales=False)
    with torch.device("meta"):
        fusion = entry.make(shape, Blocks([photo] * num_photo, [text] * num_text))
    fusion.freeze_unused(null_only=False)
    return sum(parameter.numel() for parameter in fusion.parameters() if parameter.requires_grad)


@pytest.mark.parametrize("name", COUNTS)
def test_parameters_are_as_many_as_the_widths_of_the_maps_say(name: str) -> None:
    assert num_trained(name, DOCUMENTED) == COUNTS[name](DOCUMENTED)
    if name != "reference":  # which takes equal widths alone
        assert num_trained(name, OTHERS) == COUNTS[name](OTHERS)


def test_docs_list_the_parameters_of_each() -> None:
    page = (Path(__file__).parents[1] / "docs" / "fusions.md").read_text(encoding="utf-8")
    rows = re.findall(r"^\| `(\w+)`[^|]*\|.*\| ([\d,]+) \|$", page, flags=re.MULTILINE)
    assert {name: int(number.replace(",", "")) for name, number in rows} == {
        name: count(DOCUMENTED) for name, count in COUNTS.items()
    }
