"""Some of the tokens: what is kept equals what the whole cache gives, also after an interruption and for texts."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from extraction_cases import dying_behind, files_of, tiny_config
from quick_runs import quick_train, report_of
from store_cases import verify

from saffe_cache.core.features import CacheError
from saffe_cache.encoders.selection import TokenSelection
from saffe_cache.extraction.config import ExtractConfig
from saffe_cache.extraction.extract import extract
from saffe_cache.store.reader import open_cache

SELECTED = {"image": "cls+mean+grid=2+top=3", "text": "cls+mean+top=2"}


@pytest.fixture
def config(tmp_path: Path, tiny_model: Callable[[str], Path]) -> ExtractConfig:
    return tiny_config(tmp_path, tiny_model)


def chosen_by_hand(state: np.ndarray, grid: int, top: int) -> np.ndarray:
    """Class token, mean of the others, means over a grid, and the longest ones, of one input [tokens, d]."""
    places = state[1:]
    parts = [state[0], places.mean(axis=0) if len(places) else np.zeros_like(state[0])]
    if grid:
        side = round(len(places) ** 0.5)
        step = side // grid
        square = places.reshape(side, side, -1)
        for row in range(0, side, step):
            parts += [square[row : row + step, col : col + step].mean(axis=(0, 1)) for col in range(0, side, step)]
    longest = np.sort(np.argsort(-np.linalg.norm(places, axis=1), kind="stable")[:top])
    return np.stack([*parts, *places[longest]])


def test_selected_tokens_equal_those_of_the_whole_cache(config: ExtractConfig) -> None:
    whole = open_cache(extract(config))
    some = open_cache(extract(replace(config, cache=config.cache + "-some", tokens=SELECTED)))
    for modality, grid, top in (("image", 2, 3), ("text", 0, 2)):
        everything, selected = whole.encoder(modality), some.encoder(modality)
        rows = np.arange(everything.manifest.finished_rows)
        for layer in everything.layers:
            (states,), mask = everything.tokens(rows, (layer,)).states, everything.tokens(rows, (layer,)).mask
            found = selected.tokens(rows, (layer,))
            for row in rows:
                own = states[row] if mask is None else states[row][mask[row]]
                mine = found.states[0][row] if found.mask is None else found.states[0][row][found.mask[row]]
                np.testing.assert_allclose(mine, chosen_by_hand(own, grid, top), rtol=1e-4, atol=1e-5)
        assert np.array_equal(everything.vectors(rows), selected.vectors(rows))
        assert selected.block_layers == []
        assert selected.manifest.class_tokens == 1
    assert verify(some.storage.root)[1] == []


def test_interrupted_selection_resumes_to_equal_bytes(config: ExtractConfig) -> None:
    config = replace(config, tokens=SELECTED)
    extract(config)
    again = replace(config, cache=config.cache + "-again")
    with dying_behind(3):
        extract(again)
    extract(again)
    assert files_of(again.cache) == files_of(config.cache)


def test_other_tokens_are_another_encoder(config: ExtractConfig) -> None:
    extract(config)
    cache = open_cache(extract(replace(config, tokens={"image": "cls"})))
    assert len(cache.encoders_named("image")) == 2
    assert sorted(one.manifest.selected_tokens for one in cache.encoders.values()) == ["all", "all", "cls"]


def test_fusions_without_blocks_train_on_them(config: ExtractConfig, tmp_path: Path) -> None:
    cache = extract(replace(config, tokens=SELECTED))
    run = quick_train(cache, tmp_path / "run", fusion="linear", epochs=1)
    report = report_of(cache, run, split="dev")
    assert report["num_photos"] == 6
    assert report["run"]["shape"]["num_tokens"] == 9
    with pytest.raises(CacheError, match=r"--tokens .*--fusion reuse runs an encoder's blocks, which need all tokens"):
        quick_train(cache, tmp_path / "reuse", fusion="reuse", epochs=1)


@pytest.mark.parametrize("text", ["", "cls+", "grid", "grid=0", "top=-1", "cls+cls", "middle", "all+cls"])
def test_unknown_selection_is_refused(text: str) -> None:
    with pytest.raises(ValueError, match=r"--tokens: found .*expected all, or some of cls, mean, grid=K and top=N"):
        TokenSelection.parse(text)


@pytest.mark.parametrize(
    ("encoder", "tokens", "reason"),
    [
        ("resnet", "image=cls", "no class token"),
        ("dinov2", "image=grid=9", "has 16 places, expected a square of at least 9 x 9"),
        ("dinov2", "image=top=17", "has 16 places"),
        ("dinov2", "text=grid=2", "texts have no grid"),
    ],
)
def test_selection_that_the_encoder_lacks_is_refused(
    encoder: str, tokens: str, reason: str, config: ExtractConfig, tiny_model: Callable[[str], Path]
) -> None:
    modality, _, text = tokens.partition("=")
    encoders = {**config.encoder, "image": str(tiny_model(encoder))}
    layers = {"image": (3,), "text": (3,)}
    with pytest.raises(ValueError, match=reason):
        extract(replace(config, encoder=encoders, layers=layers, tokens={modality: text}))
