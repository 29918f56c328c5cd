"""A frozen causal language model, rebuilt from a cache, that photo tokens join at one of its layers (DeepInsert).

Layers below `layer` see only the text; from there on, layers see the photo's tokens followed by the text: DeepInsert's
[h^{<p}; e; h^{>=p}] with p = 0. A text before a photo, or between two, is not supported. Positions are those of the
whole sequence: photo tokens have 0 … m - 1, text tokens m and more, also below the place of insertion. Layer 0 is known
as a prefix: photo tokens in front of the text's embeddings.

Captions are generated token by token. Layers below the insertion keep keys and values of the text, those above also of
the photo, so each new token runs every layer once and the photo's tokens never run the lower ones.

Source: DeepInsert (arXiv 2504.19327). It was made for rotary positions, which act in every layer. A learned position
is added once, to the embedding; photo tokens get theirs where they join, as in `inputs_embeds` of a prefix.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import nn
from torch.nn import functional

from saffe_cache.core.features import (
    BlockWeights,
    LanguageModelSpec,
    LanguageModelWeights,
    LibraryBlockSpec,
    LibraryModelSpec,
)
from saffe_cache.core.tensors import entering, replacing
from saffe_cache.fusion.block import EncoderBlock, KeysValues
from saffe_cache.fusion.library_block import GivenStates, Skipped, blank_model, call_of, load_own

_MOST_IN_FRONT = 8
"""Tokens of a photo before its patches: the class token, and registers."""


class InsertedModel(nn.Module):
    """The frozen model; all of its weights come from the cache."""

    def __init__(self, weights: LanguageModelWeights, blocks: Sequence[BlockWeights], layer: int) -> None:
        """`blocks` are all of the model; photo tokens join the input of layer `layer`, `hidden_states[layer]`."""
        super().__init__()
        self.spec, self.layer = weights.spec, layer
        self.blocks = nn.ModuleList(EncoderBlock(block) for block in blocks)
        self.weights = nn.ParameterDict(
            {name: nn.Parameter(torch.tensor(value), requires_grad=False) for name, value in weights.tensors.items()}
        )

    @property
    def hidden_size(self) -> int:
        return int(self.weights["token_embedding"].shape[1])

    @property
    def vocabulary(self) -> int:
        """Tokens of the vocabulary."""
        return len(self.weights["token_embedding"])

    def decoding(self, photos: torch.Tensor | None) -> Decoding:
        """Captions that are being generated for projected photo tokens [batch, m, d]; None for none."""
        return Decoding(self, photos)

    def embed(self, token_ids: torch.Tensor, first_position: int) -> torch.Tensor:
        """`hidden_states[0]` of tokens that follow one another, [batch, tokens, d]."""
        places: torch.Tensor = self.weights["position_embedding"][first_position : first_position + token_ids.shape[1]]
        return functional.embedding(token_ids, self.weights["token_embedding"]) + places

    def text_states(self, token_ids: torch.Tensor, first_position: int) -> torch.Tensor:
        """`hidden_states[layer]` of texts: what a cache holds of them."""
        hidden = self.embed(token_ids, first_position)
        for block in self.blocks[: self.layer]:
            hidden = block(hidden)
        return hidden

    def placed(self, photos: torch.Tensor) -> torch.Tensor:
        """Projected photo tokens [batch, m, d] at the first positions."""
        places: torch.Tensor = self.weights["position_embedding"][: photos.shape[1]]
        return photos + places

    def forward(self, states: torch.Tensor, photos: torch.Tensor | None) -> torch.Tensor:
        """The last layer's output for texts, from `hidden_states[layer]` [batch, tokens, d] and projected photo tokens.

        Padding comes after the text, where no real token sees it, so no mask is needed.
        """
        hidden = states if photos is None else torch.cat([self.placed(photos), states], dim=1)
        for block in self.blocks[self.layer :]:
            hidden = block(hidden)
        return hidden[:, hidden.shape[1] - states.shape[1] :]

    def logits(self, hidden: torch.Tensor) -> torch.Tensor:
        """Scores of the next token, [..., tokens of the vocabulary], from the last layer's output."""
        norm = [self.weights[f"final_norm_{part}"] for part in ("weight", "bias")]
        assert isinstance(self.spec, LanguageModelSpec)
        normed = functional.layer_norm(hidden, norm[0].shape, norm[0], norm[1], self.spec.layer_norm_eps)
        head = self.weights["head_weight"] if "head_weight" in self.weights else self.weights["token_embedding"]
        return functional.linear(normed, head)


class LibraryModel(InsertedModel):
    """A frozen model of any family, run by transformers' own code on weights from the cache.

    What a layer takes besides hidden states comes from the library's model. Photo tokens have the first positions,
    which only rotate; keys and values are not kept, so each new token runs over the whole text again.
    """

    def __init__(self, weights: LanguageModelWeights, blocks: Sequence[BlockWeights], layer: int) -> None:
        nn.Module.__init__(self)
        assert isinstance(weights.spec, LibraryModelSpec)
        self.spec, self.layer = weights.spec, layer
        model = blank_model(self.spec.model_class, self.spec.config)
        layers = model.get_submodule(self.spec.layers)
        for module, block in zip(layers, blocks, strict=True):
            load_own(module, block)
        model.load_state_dict({name: torch.tensor(value) for name, value in weights.tensors.items()}, strict=False)
        model.tie_weights()
        self.model = model.eval().requires_grad_(False)
        base, path = model.base_model, self.spec.layers.removeprefix(f"{model.base_model_prefix}.")
        skipped = [
            Skipped(one, block.spec.num_outputs)
            for one, block in zip(layers[:layer], blocks, strict=False)
            if isinstance(block.spec, LibraryBlockSpec)
        ]
        self._first, self._above = layers[layer], _with_layers(base, path, [*skipped, *layers[layer:]])
        self._head = copy.copy(model)
        self._head._modules = {**model._modules, model.base_model_prefix: GivenStates()}

    @property
    def hidden_size(self) -> int:
        return int(self.model.get_input_embeddings().weight.shape[1])

    @property
    def vocabulary(self) -> int:
        return int(self.model.get_output_embeddings().weight.shape[0])

    def train(self, mode: bool = True) -> LibraryModel:
        """The model always runs without dropout."""
        return super().train(False)

    def text_states(self, token_ids: torch.Tensor, first_position: int) -> torch.Tensor:
        places = torch.arange(first_position, first_position + token_ids.shape[1], device=token_ids.device)[None]
        inputs = {"input_ids": token_ids, "position_ids": places, "use_cache": False}
        return entering(*call_of(self._first, self.model.base_model, inputs))[1]

    def forward(self, states: torch.Tensor, photos: torch.Tensor | None) -> torch.Tensor:
        hidden = states if photos is None else torch.cat([photos, states], dim=1)
        places = torch.arange(hidden.shape[1], device=hidden.device)[None]

        def put(module: nn.Module, arguments: tuple[Any, ...], keywords: dict[str, Any]) -> Any:
            return replacing(hidden, arguments, keywords)

        handle = self._first.register_forward_pre_hook(put, with_kwargs=True)
        try:
            output = self._above(inputs_embeds=torch.zeros_like(hidden), position_ids=places, use_cache=False)
        finally:
            handle.remove()
        return output.last_hidden_state[:, hidden.shape[1] - states.shape[1] :]  # type: ignore[no-any-return]

    def logits(self, hidden: torch.Tensor) -> torch.Tensor:
        scores = self._head(inputs_embeds=hidden.reshape(1, -1, hidden.shape[-1]), use_cache=False).logits
        return scores.reshape(*hidden.shape[:-1], -1)  # type: ignore[no-any-return]

    def decoding(self, photos: torch.Tensor | None) -> Decoding:
        return _Recomputed(self, photos)


def _with_layers(base: Any, path: str, layers: Sequence[nn.Module]) -> Any:
    """The same model with other layers; its other parts are shared."""
    changed = copy.copy(base)
    changed._modules = dict(base._modules)
    name, _, rest = path.partition(".")
    changed._modules[name] = _with_layers(base.get_submodule(name), rest, layers) if rest else nn.ModuleList(layers)
    return changed


class Projector(nn.Module):
    """Photo tokens as hidden states of the language model: norm, linear map, and a norm that starts at their size.

    d_photo · d + 3 d parameters.
    """

    def __init__(self, photo_size: int, hidden_size: int, scale: float) -> None:
        """`scale`: root mean square that the tokens begin with."""
        super().__init__()
        self.entering = nn.LayerNorm(photo_size, elementwise_affine=False)
        self.linear = nn.Linear(photo_size, hidden_size)
        self.norm = nn.LayerNorm(hidden_size)
        nn.init.constant_(self.norm.weight, scale)

    def forward(self, photos: torch.Tensor) -> torch.Tensor:
        projected: torch.Tensor = self.norm(self.linear(self.entering(photos)))
        return projected


def typical_size(states: torch.Tensor, mask: torch.Tensor) -> float:
    """The median token's root mean square. The mean would be that of a few: a model's first token may be far larger."""
    return float(states[mask].square().mean(dim=-1).sqrt().median())


def photo_side(num_tokens: int, *, has_class_token: bool = True) -> int:
    """Patches on a side of a square photo with this number of tokens; ValueError if they form no square.

    A few tokens come before the patches; without a class token none do: all are places of a feature map.
    """
    side = math.isqrt(num_tokens)
    in_front = num_tokens - side * side
    if not (0 < in_front <= _MOST_IN_FRONT if has_class_token else in_front == 0):
        expected = (
            "a class token (and registers), then a square of patches" if has_class_token else "a square of places"
        )
        raise ValueError(f"photos of {num_tokens} tokens: expected {expected}. Use another image encoder.")
    return side


def pool_photos(tokens: torch.Tensor, grid: int, *, has_class_token: bool = True) -> torch.Tensor:
    """The class token and the mean patch of each of grid x grid fields: [n, 1 + grid², d] of [n, tokens, d].

    Without a class token the mean of all places replaces it.
    """
    side = photo_side(tokens.shape[1], has_class_token=has_class_token)
    patches = tokens[:, -side * side :].transpose(1, 2).reshape(len(tokens), -1, side, side)
    fields = functional.adaptive_avg_pool2d(patches, grid).flatten(2).transpose(1, 2)
    whole = tokens[:, :1] if has_class_token else tokens.mean(dim=1, keepdim=True)
    return torch.cat([whole, fields], dim=1)


class Decoding:
    """A batch of captions that are being generated."""

    def __init__(self, model: InsertedModel, photos: torch.Tensor | None) -> None:
        """`photos`: projected tokens [batch, m, d]; None for none."""
        self._model = model
        self.past: list[KeysValues | None] = [None] * len(model.blocks)
        """Of each layer."""
        self._position = 0 if photos is None else photos.shape[1]
        self._waiting = None if photos is None else model.placed(photos)

    def extend(self, token_ids: torch.Tensor) -> torch.Tensor:
        """Take the next tokens, [batch, tokens], and return the scores of the token after them, [batch, vocabulary]."""
        hidden = self._model.embed(token_ids, self._position)
        self._position += token_ids.shape[1]
        for number, block in enumerate(self._model.blocks):
            if number == self._model.layer and self._waiting is not None:
                hidden, self._waiting = torch.cat([self._waiting, hidden], dim=1), None
            assert isinstance(block, EncoderBlock)
            hidden, self.past[number] = block.extend(hidden, self.past[number])
        return self._model.logits(hidden[:, -1])


class _Recomputed(Decoding):
    """As Decoding, without keys and values: every step runs over all tokens."""

    def __init__(self, model: LibraryModel, photos: torch.Tensor | None) -> None:
        self._library, self._photos = model, photos
        self._ids: torch.Tensor | None = None

    def extend(self, token_ids: torch.Tensor) -> torch.Tensor:
        self._ids = token_ids if self._ids is None else torch.cat([self._ids, token_ids], dim=1)
        first = 0 if self._photos is None else self._photos.shape[1]
        hidden = self._library(self._library.text_states(self._ids, first), self._photos)
        return self._library.logits(hidden[:, -1])


@torch.inference_mode()
def greedy_captions(
    model: InsertedModel, photos: torch.Tensor, start: Sequence[int], max_tokens: int
) -> list[list[int]]:
    """The likeliest token, repeatedly, after `start`: at most `max_tokens` for each photo, up to the end token."""
    decoding = model.decoding(photos)
    chosen = torch.tensor(list(start), device=photos.device).expand(len(photos), -1)
    found: list[torch.Tensor] = []
    is_done = torch.zeros(len(photos), dtype=torch.bool, device=photos.device)
    while len(found) < max_tokens and not bool(is_done.all()):
        chosen = decoding.extend(chosen).argmax(dim=-1, keepdim=True)
        is_done |= chosen[:, 0] == model.spec.end_token
        found.append(chosen)
    rows = torch.cat(found, dim=1).tolist()
    return [row[: row.index(model.spec.end_token)] if model.spec.end_token in row else row for row in rows]
