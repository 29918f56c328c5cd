"""Fusions get what the cache holds, and keep the weights that validation chose."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from synthetic_cache import make_cache

from saffe_cache.inputs.pairs import select_pairs
from saffe_cache.store.reader import Cache, open_cache
from saffe_cache.studies.matching.config import MatchConfig
from saffe_cache.studies.matching.examples import Inputs, PairVectors, draw_examples, draw_judged
from saffe_cache.studies.matching.fusions import fit, scores_of


@pytest.fixture(scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory) -> Cache:
    path: Path = tmp_path_factory.mktemp("inputs") / "c.zarr"
    return open_cache(make_cache(path, {"train": 40, "test": 30}, signal=2, text_width=6))


def test_tokens_and_vectors_match_their_rows(cache: Cache) -> None:
    photo, text = cache.encoder("image"), cache.encoder("text")
    photo_rows, text_rows = np.array([2, 3, 7, 30]), np.array([0, 4, 5, 11, 20])
    tokens = Inputs.read_tokens(photo, text, photo_rows, text_rows, (3, 2))
    asked = np.array([30, 2, 2]), np.array([4, 20, 0])
    photos, texts, mask = tokens.batch(*asked)
    deviation = photo.array("hidden_states/3").read(np.arange(70)).std()
    expected = photo.tokens(asked[0], (3,)).states[0] / deviation
    assert np.allclose(photos, expected, atol=0.02)
    lengths = np.diff(text.offsets)[asked[1]]
    assert np.array_equal(mask.sum(dim=1).numpy(), lengths)
    assert texts.shape[1] == lengths.max()
    stored = text.array("hidden_states/2")
    deviation = stored.read(np.arange(len(stored))).std()
    for place, row in enumerate(asked[1]):
        own = stored.read(np.arange(text.offsets[row], text.offsets[row + 1])) / deviation
        assert np.allclose(texts[place, : len(own)], own, atol=0.02)
        assert not texts[place, len(own) :].any()
    vectors = PairVectors.read(photo, text, photo_rows, text_rows)
    photos, texts, mask = vectors.inputs.batch(*asked)
    own = photo.vectors(asked[0])
    assert torch.allclose(photos.norm(dim=2), torch.tensor(photo.manifest.hidden_size**0.5))
    assert np.allclose(photos[:, 0] / photos.norm(dim=2), own / np.linalg.norm(own, axis=1, keepdims=True), atol=1e-5)
    assert (tuple(texts.shape), tuple(mask.shape), bool(mask.all())) == ((3, 1, 6), (3, 1), True)


def test_weights_of_best_epoch_are_kept_and_repeatable(cache: Cache) -> None:
    photo, text = cache.encoder("image"), cache.encoder("text")
    train, judged = (select_pairs(cache.table, photo, text, split, "captions") for split in ("train", "test"))
    rows = np.union1d(train.rows, judged.rows), np.union1d(train.texts.values, judged.texts.values)
    vectors = PairVectors.read(photo, text, *rows)
    config = MatchConfig(cache="c", out="o", epochs=6, batch_size=16, learning_rate=0.01)
    training, validation = draw_examples(train, 80, 1, 0), draw_judged(judged, 1, 0)
    (first, fitted), (again, _), (other, _) = (
        fit("concat", vectors.inputs, training, validation, config, seed, "cpu") for seed in (0, 0, 1)
    )
    assert fitted.scores[fitted.best_epoch - 1] == max(fitted.scores)
    scores = scores_of(first, vectors.inputs, validation, "cpu")
    assert ((scores > 0) == validation.labels).mean() == pytest.approx(max(fitted.scores))
    assert fitted.losses[-1] < fitted.losses[0]
    assert np.array_equal(scores, scores_of(again, vectors.inputs, validation, "cpu"))
    assert not np.allclose(scores, scores_of(other, vectors.inputs, validation, "cpu"))
