"""The nouns that the stages exchange. Numpy only: no I/O, no torch, no Zarr.

One index convention holds everywhere: `hidden_states[i]` is the **input** of encoder layer i, as in
Hugging Face's `output_hidden_states=True`. So `hidden_states[0]` is the embedding output,
`hidden_states[num_layers]` the output of the last layer, and *block i* is the layer that consumes
`hidden_states[i]`. `hidden_states_index` translates the SAFFE paper's and its release's numbers.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np

Modality = Literal["image", "text", "audio", "video", "media"]
""""media" stands for several of an item's photo, sound and video together: it exists in memory, never in a cache's
files."""
MODALITIES: tuple[Modality, ...] = ("image", "text", "audio", "video")
NOUNS: Mapping[Modality, str] = {"image": "photo", "text": "text", "audio": "sound", "video": "video", "media": "item"}
"""One input of each, in words."""

IndexKind = Literal["flat", "ivf", "ivf_pq", "hnsw"]
StorageType = Literal["float32", "float16", "bfloat16", "int8", "float8"]
"""Type of hidden states on disk; `store.dtypes` describes each."""
Decoding = Literal["full", "scaled"]
Compression = Literal["none", "zstd"]
"""Of hidden states on disk."""
Layout = Literal["tokens", "time_first", "channels_first", "channels_last"]
"""Axes of hidden states: [batch, tokens, d], [tokens, batch, d] (XLNet), [batch, d, height, width] or [batch, height,
width, d]."""


def nouns(media: Iterable[Modality]) -> str:
    """Inputs of some media in words, as in "photos and sounds"."""
    return " and ".join(f"{NOUNS[one]}s" for one in media)


_PHOTO = re.compile(r"\b(?:([Aa])n? )?(photo|Photo|image(?=-text\b))(?=s?\b)")


def spoken_of(text: str, medium: Modality) -> str:
    """A text about photos, for inputs of a medium: "a photo" becomes "a sound", or "an item" of several media."""
    noun = NOUNS[medium]

    def replaced(found: re.Match[str]) -> str:
        own = noun.capitalize() if found[2].istitle() else noun
        article = f"{found[1]}{'n' if noun[0] in 'aeiou' else ''} " if found[1] else ""
        return article + own

    return text if medium == "image" else _PHOTO.sub(replaced, text)


IndexConvention = Literal["hidden_states", "paper", "reference"]


def hidden_states_index(layer: int, convention: IndexConvention) -> int:
    """The index into `hidden_states` that a layer's number means.

    "hidden_states" and "reference" (the SAFFE release, `hidden_states[i]` with `layers[i]`) count as here. The
    paper counts layers by their output: its l is `hidden_states[l + 1]`, whose next layer is block l + 1.
    """
    return layer + 1 if convention == "paper" else layer


class CacheError(Exception):
    """The cache is invalid or cannot satisfy the request. The message says where, what was found and what to do."""


REPAIR_ADVICE = "Repair it with `saffe cache repair`, or restore it from a copy."
"""What to do about a damaged part of a cache."""


def printable(text: str) -> str:
    """A text of any origin, with characters that control a terminal or are invisible written as escapes."""
    return "".join(char if char.isprintable() else ascii(char)[1:-1] for char in text)


def short_hash(value: Any) -> str:
    """12 hexadecimal digits of SHA-256 over the one JSON text of a value: sorted keys, no spaces, ASCII.

    Raises:
        ValueError: the value contains NaN or an infinity, which JSON cannot express.
    """
    text = json.dumps(value, sort_keys=True, separators=(",", ":"), ensure_ascii=True, allow_nan=False)
    return hashlib.sha256(text.encode()).hexdigest()[:12]


def medium_of_key(key: str) -> Modality:
    """The medium of an encoder, by its key."""
    return next(one for one in NOUNS if key.startswith(f"{one}-"))


@dataclass(frozen=True)
class Fingerprint:
    """Everything that changes an encoder's output, as plain JSON values.

    `fields` holds at least `modality` and `model_id`. Two runs with equal fields write into the same group.
    """

    fields: Mapping[str, Any]

    @property
    def key(self) -> str:
        """Readable name plus hash: `image-dinov2-small-1f3a9c0b7e52`."""
        name = re.sub(r"[^A-Za-z0-9._]+", "-", str(self.fields["model_id"]).rstrip("/").split("/")[-1])
        return f"{self.fields['modality']}-{name}-{short_hash(self.fields)}"

    def differences(self, other: Fingerprint) -> list[str]:
        """One line for each field that differs: `field: mine != theirs`."""
        pairs = [(name, self.fields.get(name), other.fields.get(name)) for name in {*self.fields, *other.fields}]
        return [f"{name}: {mine!r} != {theirs!r}" for name, mine, theirs in sorted(pairs) if mine != theirs]


@dataclass(frozen=True, kw_only=True)
class BlockSpec:
    """How a transformer block is computed from its weights."""

    num_attention_heads: int
    norm_first: bool
    """True for pre-LN (ViT, CLIP): x + f(LN(x)). False for post-LN (BERT, MPNet): LN(x + f(x))."""
    activation: str
    """Hugging Face's name, such as gelu, quick_gelu, relu, silu, gelu_new."""
    layer_norm_eps: float
    is_causal: bool = False
    relative_attention_num_buckets: int = 0
    """Buckets of a T5 or MPNet relative position bias; 0 if the block has none."""
    relative_attention_max_distance: int = 128


@dataclass(frozen=True, kw_only=True)
class LibraryBlockSpec:
    """A transformers layer of any family, rebuilt by the library's own code: its model class makes the layer, and all
    that it takes besides hidden states (masks, rotary tables, position biases)."""

    model_class: str
    """MODULE:CLASS in transformers, of the model that runs the layers."""
    config: Mapping[str, Any]
    """The model's config, as its `to_dict` gives it."""
    layers: str
    """Path of the list of layers below the model."""
    calls: tuple[int, ...]
    """The layer that each step of the forward pass calls; ALBERT calls one layer several times."""
    index: int
    """The step."""
    input_name: str
    """What the model takes: `inputs_embeds`, `input_ids`, `pixel_values`, …"""
    input_shape: tuple[int, ...]
    """Shape of one photo or sound; (width,) of the embeddings of texts."""
    hidden_size: int
    num_attention_heads: int
    is_causal: bool = False
    is_time_first: bool = False
    """Whether the layer takes [tokens, batch, d], as XLNet's."""
    num_outputs: int = 0
    """Results of a layer if it returns a tuple; 0 if it returns hidden states alone."""
    runs_first_layer: bool = False
    """Whether what the layer takes comes from the first layer (T5's position bias)."""
    has_equal_lengths: bool = False
    """Whether texts of different lengths run apart, because the layer mixes in padding whatever the mask (FNet)."""


@dataclass(frozen=True)
class BlockWeights:
    """One whole encoder layer, enough to rebuild it without the model.

    With a `BlockSpec`, the names of `tensors`, all in torch's (out, in) order, are
    `{query,key,value,output}_{weight,bias}`, `{attention_norm,mlp_norm}_{weight,bias}`,
    `{mlp_in,mlp_out}_{weight,bias}`, and where the family has them `mlp_gate_{weight,bias}` (SwiGLU),
    `{attention,mlp}_layer_scale`, `relative_position_bias` [buckets, heads]. A bias that is absent (Whisper's keys) is
    absent here too.

    With a `LibraryBlockSpec`, they are the layer's own names, those of further weights that it depends on with
    `model.` before them, and of a self-check: `check.input` [inputs, tokens, d], `check.lengths` [inputs] (-1: no mask)
    and `check.output`.
    """

    spec: BlockSpec | LibraryBlockSpec
    tensors: Mapping[str, np.ndarray]

    @property
    def hidden_size(self) -> int:
        """Width of the hidden states that it takes."""
        return self.spec.hidden_size if isinstance(self.spec, LibraryBlockSpec) else len(self.tensors["output_weight"])


@dataclass(frozen=True, kw_only=True)
class CausalTextSpec:
    """How a causal language model reads a text: its begin token, `prompt` with the text in it, its end token."""

    begin_token: int
    end_token: int
    prompt: str
    max_length: int
    """Most tokens of a text, begin and end included."""
    position_offset: int
    """Position of a text's first token. The positions before it are for tokens that are inserted at a later layer."""


@dataclass(frozen=True, kw_only=True)
class LanguageModelSpec(CausalTextSpec):
    """GPT-2, which is rebuilt here."""

    layer_norm_eps: float


@dataclass(frozen=True, kw_only=True)
class LibraryModelSpec(CausalTextSpec):
    """A causal language model of any family, rebuilt by transformers."""

    model_class: str
    """MODULE:CLASS in transformers."""
    config: Mapping[str, Any]
    """Its config, as its `to_dict` gives it."""
    layers: str
    """Path of its list of layers."""


@dataclass(frozen=True)
class LanguageModelWeights:
    """What a causal language model has besides its blocks, enough to train and to generate without the model.

    Names of `tensors`: `token_embedding` [tokens, d], `position_embedding` [positions, d],
    `final_norm_{weight,bias}`, and `head_weight` [tokens, d] where it is not the token embedding. With a
    `LibraryModelSpec`, they are the model's own names of all weights outside its layers.
    """

    spec: LanguageModelSpec | LibraryModelSpec
    tensors: Mapping[str, np.ndarray]
    tokenizer: str
    """Its JSON, as the library `tokenizers` reads it."""


Weights = BlockWeights | LanguageModelWeights


@dataclass(frozen=True)
class Tokens:
    """Hidden states of a batch of inputs: `states[p]` is [batch, tokens, hidden_size] of the p-th layer.

    `mask` is bool [batch, tokens], True on real tokens; None where no row is padded.
    """

    states: tuple[np.ndarray, ...]
    mask: np.ndarray | None = None
