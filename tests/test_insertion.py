"""Photo tokens in a bidirectional text encoder, from a cache, against transformers' own forward pass.

BERT has learned positions, RoBERTa's begin at 2, MPNet also has a bias for each distance between tokens.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
import transformers
from extraction_cases import tiny_config
from tiny_models import CASES, NUM_LAYERS, assert_rounded, load_reference, load_tiny, rand
from torch import nn

from saffe_cache.extraction.extract import extract
from saffe_cache.fusion.base import Blocks, Texts
from saffe_cache.fusion.options import FusionShape
from saffe_cache.fusion.registry import FUSIONS
from saffe_cache.store.reader import Cache, open_cache

Models = Callable[[str], Path]
FIRST_POSITION = {"bert": 0, "roberta": 2, "mpnet": 2}
ROWS = np.array([0, 3, 6, 10, 1])
"""Of texts; 3 to 7 tokens long."""
every_layer = pytest.mark.parametrize("layer", range(NUM_LAYERS))
every_fusion = pytest.mark.parametrize("name", ["limber", "deep_insert"])


class Given(NamedTuple):
    """A text encoder as transformers runs it, its cache, and a batch of texts of that."""

    family: str
    model: Any
    cache: Cache
    ids: torch.Tensor
    mask: torch.Tensor

    def texts(self, layer: int) -> Texts:
        """From the cache."""
        text = self.cache.encoder("text")
        found = text.tokens(ROWS, (layer,))
        assert np.array_equal(found.mask, self.mask)
        return Texts((torch.from_numpy(found.states[0]),), self.mask, torch.from_numpy(text.vectors(ROWS)))

    def states(self, model: Any = None) -> tuple[torch.Tensor, ...]:
        """All hidden states of the plain encoder."""
        found: tuple[torch.Tensor, ...] = (model or self.model)(
            input_ids=self.ids, attention_mask=self.mask.long(), output_hidden_states=True
        ).hidden_states
        return found

    def fusion(self, name: str, layer: int, *, has_class_token: bool = True) -> Any:
        """With cached blocks, from a layer on, and a projection that keeps sizes."""
        blocks = [self.cache.encoder("text").block(number) for number in range(layer, NUM_LAYERS)]
        shape = FusionShape(
            fusion=name,
            head="attention",
            num_layers=1,
            hidden_size=32,
            num_tokens=10,
            text_hidden_size=32,
            text_size=32,
            num_blocks=len(blocks),
            text_rms=3.0,
            has_class_token=has_class_token,
        )
        fusion: Any = FUSIONS[name].make(shape, Blocks((), blocks)).eval()
        for number, parameter in enumerate(fusion.project.parameters()):
            parameter.copy_(rand(*parameter.shape, seed=number) / 32**0.5)
        return fusion


@pytest.fixture(scope="module", params=list(FIRST_POSITION))
def given(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory, tiny_model: Models) -> Given:
    family: str = request.param
    config = tiny_config(tmp_path_factory.mktemp(family), tiny_model)
    encoder = {"image": config.encoder["image"], "text": str(tiny_model(family))}
    layers = {"image": (3,), "text": tuple(range(NUM_LAYERS))}
    cache = open_cache(extract(replace(config, encoder=encoder, layers=layers)))
    loaded, inputs = load_tiny(family, tiny_model(family)), cache.table.inputs["text"].texts
    assert inputs is not None
    batch = loaded.pad(loaded.tokenize([inputs[row] for row in ROWS]))
    return Given(
        family, load_reference(family, tiny_model(family)), cache, batch["input_ids"], batch["attention_mask"].bool()
    )


@every_layer
@every_fusion
@torch.no_grad()
def test_without_photo_tokens_it_is_the_plain_encoder(name: str, layer: int, given: Given, tiny_model: Models) -> None:
    """Bit for bit, where transformers too leaves attention to torch; it writes MPNet's out. Masked photo tokens add
    zeros, in sums of another order."""
    family, photo = CASES[given.family], rand(len(ROWS), 10, 32)
    model = getattr(transformers, family.reference).from_pretrained(tiny_model(given.family)).eval()
    states = given.states(model)
    last, texts = states[NUM_LAYERS][given.mask], given.texts(layer)._replace(states=(states[layer],))
    found = given.fusion(name, layer, has_class_token=False).fuse([photo[:, :0]], None, texts)
    if given.family == "mpnet":
        assert_rounded(found.states[0][given.mask], last)
    else:
        assert torch.equal(found.states[0][given.mask], last)
    nowhere = torch.zeros(photo.shape[:2], dtype=torch.bool)
    found = given.fusion(name, layer).fuse([photo], nowhere, texts)
    assert_rounded(found.states[0][:, 10:][given.mask], last)


@every_fusion
@torch.no_grad()
def test_at_layer_0_photo_tokens_precede_the_embeddings(name: str, given: Given) -> None:
    """Behind their positions, types and norm: it is no prefix of `inputs_embeds`, unless the norm and these have been
    applied to the photo's tokens too, and the text keeps its positions."""
    fusion, photo, model = given.fusion(name, 0), rand(len(ROWS), 10, 32), given.model
    inserted, seen = fusion.insert(photo), with_photo(given.mask)
    with in_front(model.embeddings, inserted):
        expected = model(input_ids=given.ids, attention_mask=seen.long()).last_hidden_state[seen]
    found = fusion.fuse([photo], None, given.texts(0)).states[0][seen]
    assert_rounded(found, expected)
    words = model.embeddings.word_embeddings(given.ids)
    prefix = {"inputs_embeds": torch.cat([inserted, words], dim=1), "attention_mask": seen.long()}
    first = FIRST_POSITION[given.family]
    places = first + torch.cat([torch.zeros(10).long(), torch.arange(words.shape[1])])[None]
    assert (model(**prefix, position_ids=places).last_hidden_state[seen] - expected).abs().max() > 0.1
    embedded = model.embeddings(inputs_embeds=inserted, position_ids=places[:, :10])
    with_norm = model(**prefix, position_ids=places).last_hidden_state[seen]
    fusion.insert = lambda tokens: embedded
    assert_rounded(fusion.fuse([photo], None, given.texts(0)).states[0][seen], with_norm)


@every_layer
@every_fusion
@torch.no_grad()
def test_running_from_cached_states_equals_the_whole_encoder(name: str, layer: int, given: Given) -> None:
    """The text alone below the layer, and both from there on."""
    fusion, photo = given.fusion(name, layer), rand(len(ROWS), 10, 32)
    alone, seen = given.states()[layer], with_photo(given.mask)
    texts = given.texts(layer)
    assert_rounded(texts.states[0][given.mask], alone[given.mask])
    joint = torch.cat([fusion.insert(photo), alone], dim=1)
    entering = given.model.encoder.layer[layer].register_forward_pre_hook(lambda _, found: (joint, *found[1:]))
    anything = torch.zeros_like(joint)  # below the layer, where it is replaced
    expected = given.model(inputs_embeds=anything, attention_mask=seen.long()).last_hidden_state
    entering.remove()
    fused = fusion.fuse([photo], None, texts)
    assert_rounded(fused.states[0][seen], expected[seen])
    assert (expected[:, 10:] - given.states()[NUM_LAYERS])[given.mask].abs().max() > 0.1, "the photo is not seen"


def with_photo(mask: torch.Tensor) -> torch.Tensor:
    """Of 10 photo tokens and the text behind them."""
    return torch.cat([mask.new_ones(len(mask), 10), mask], dim=1)


def in_front(embeddings: nn.Module, tokens: torch.Tensor) -> Any:
    """While this is open, the embeddings' output has these tokens in front."""
    return embeddings.register_forward_hook(lambda _module, _inputs, found: torch.cat([tokens, found], dim=1))
