"""pipelines/captions.py: the small language model that it trains, and its table."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest
import torch
from extraction_cases import make_captioned

sys.path.insert(0, str(Path(__file__).parents[1]))  # pipelines/ lies beside the package, not in it

from pipelines import captions
from saffe_cache.core.json_schema import made_of
from saffe_cache.encoders.causal_tokens import CausalTokens
from saffe_cache.encoders.encoder import load_encoder
from saffe_cache.encoders.loading import EncoderRequest
from saffe_cache.studies.captioning.result import CaptionResult


def test_small_language_model_is_trained_and_used_as_encoder(tmp_path: Path) -> None:
    data = make_captioned(tmp_path / "data", {"train": 24, "dev": 2})
    folder = captions.small_gpt2(str(data), tmp_path / "gpt2", epochs=1)
    told = json.loads((tmp_path / "gpt2" / "training.json").read_text())
    assert told["photos"] == 22
    written = (tmp_path / "gpt2" / "model.safetensors").stat().st_mtime_ns
    assert captions.small_gpt2(str(data), tmp_path / "gpt2", epochs=1) == folder
    assert (tmp_path / "gpt2" / "model.safetensors").stat().st_mtime_ns == written
    with pytest.raises(ValueError, match="trained for 1 epochs, expected 2"):
        captions.small_gpt2(str(data), tmp_path / "gpt2", epochs=2)
    encoder = load_encoder(EncoderRequest(modality="text", model_id=folder, position_offset=17))
    assert (encoder.num_layers, encoder.hidden_size, encoder.max_length) == (6, 256, 111)
    weights = encoder.language_model
    assert weights is not None
    ids = encoder.tokenize(["Word1 word2, train 7"])[0]
    assert CausalTokens(weights.tokenizer, weights.spec).decode(ids) == "word1 word2, train 7"
    texts = encoder.tokenize(["word1", "the same for all"])
    total, count = captions._loss(encoder._model, texts, 3)
    alone = [
        encoder._model(one, position_ids=torch.arange(3, 3 + one.shape[1])[None], labels=one).loss * (one.shape[1] - 1)
        for one in (torch.tensor([text]) for text in texts)
    ]
    assert count == sum(map(len, texts)) - 2
    torch.testing.assert_close(total, sum(alone), atol=1e-3, rtol=1e-4)


def run_of(layer: int, loss: float) -> CaptionResult:
    names = ("photo", "photos_shuffled", "no_photo", "plain_model", "unigram")
    content = {
        "title": "T",
        "split": "dev",
        "seconds": {},
        "verdicts": [],
        "epochs": 1,
        "layer": layer,
        "num_layers": 6,
        "photo_tokens": 17,
        "photos": 4,
        "captions": 20,
        "chance": 0.1,
        "measured": {
            "losses": {name: {"value": loss + number, "low": 0.0, "high": 9.0} for number, name in enumerate(names)},
            "differences": {"plain_model": {"value": -3.0, "low": -4.0, "high": -2.0}},
            "own_caption": {
                f"{who}, by {by}": {"value": 0.25, "low": 0.2, "high": 0.3}
                for who in ("photo", "photos_shuffled")
                for by in ("loss", "gain")
            },
        },
        "cost": {
            "trainable_parameters": 99,
            "training_step_flops": 8 * 10**9 // (1 + layer),
            "whole_pass_flops": 4 * 10**9,
            "flops_batch": 64,
            "flops_tokens": 12,
        },
        "training": {
            "best_epoch": 1,
            "seconds_per_step": 0.5 * (1 + layer),
            "training_photos": 9,
            "validation_photos": 1,
            "log": [],
        },
        "examples": [{"id": "one", "caption": f"said at {layer}", "own": ["A dog."]}],
    }
    return made_of(CaptionResult, content)


def test_table_has_means_intervals_and_relative_costs() -> None:
    page = captions.markdown([run_of(0, 1.0), run_of(0, 2.0), run_of(3, 4.0), run_of(3, 4.0)])
    rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in page.splitlines() if line.startswith("|")]
    assert rows[2][:2] == ["0", "1.500 ± 6.353"]  # Student's t of one degree: 12.706 / 2
    assert rows[3][:2] == ["3", "4.000 ± 0.000"]
    assert rows[3][-3:] == ["0.25", "1.00", "4.00"]
    assert len({len(row) for row in rows}) == 1
    assert "said at 0" in page
    assert "said at 3" in page
    assert "Plain language model: 4.000" in page
