"""The zoo of tiny checkpoints: what it writes is loadable and the same in every run, and each runs as documented."""

from __future__ import annotations

import re
from pathlib import Path

import numpy as np
import pytest
import torch
import transformers
import zoo
import zoo_families
import zoo_reference
import zoo_runs
import zoo_sentences

from saffe_cache.encoders.encoder import load_encoder
from saffe_cache.encoders.loading import EncoderRequest

KINDS = {"siglip2": "BPE", "bert": "WordPiece", "xlm_roberta": "Unigram", "clip": "BPE with ends of words"}
QUICK = ("dinov3_vit", "siglip2", "fnet", "wav2vec2")
"""Families that run in the quick set as well."""
BY_TOKENIZER = {entry.tokenizer_class: entry.name for entry in zoo.ENTRIES.values() if "text" in entry.modalities}


@pytest.mark.parametrize("name", KINDS)
def test_checkpoint_is_the_same_in_every_run(tmp_path: Path, name: str) -> None:
    for run in ("first", "second"):
        zoo.ENTRIES[name].save(tmp_path / run)
    files = sorted(path.name for path in (tmp_path / "first").iterdir())
    assert "model.safetensors" in files
    assert "tokenizer.json" in files
    for file in files:
        assert (tmp_path / "first" / file).read_bytes() == (tmp_path / "second" / file).read_bytes(), file


@pytest.mark.parametrize("name", BY_TOKENIZER.values())
def test_token_ids_fit_the_embedding(tmp_path: Path, name: str) -> None:
    zoo.ENTRIES[name].save(tmp_path)
    tokenizer = transformers.AutoTokenizer.from_pretrained(tmp_path)
    config = transformers.AutoConfig.from_pretrained(tmp_path).get_text_config()
    ids = [token for text in zoo_reference.TEXTS for token in tokenizer(text)["input_ids"]]
    assert 0 <= min(ids) <= max(ids) < config.vocab_size
    assert len(set(ids)) > 5


def test_kept_vectors_belong_to_these_weights(tmp_path: Path) -> None:
    zoo_sentences.LAYOUTS["mean_old"].save(tmp_path)
    tokenizer = transformers.AutoTokenizer.from_pretrained(tmp_path)
    model = transformers.AutoModel.from_pretrained(tmp_path).eval()
    kept = np.load(zoo_reference.PATH)["sentences/mean_old/"]
    for text, expected in zip(zoo_reference.TEXTS, kept, strict=True):
        with torch.no_grad():
            states = model(**tokenizer(text, return_tensors="pt")).last_hidden_state[0]
        np.testing.assert_allclose(states.mean(0), expected, rtol=1e-4, atol=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize("name", zoo.ENTRIES | zoo.MORE_ENTRIES)
def test_automodel_loads_every_weight(tmp_path: Path, name: str) -> None:
    entry = (zoo.ENTRIES | zoo.MORE_ENTRIES)[name]
    entry.save(tmp_path)
    model, loaded = transformers.AutoModel.from_pretrained(tmp_path, output_loading_info=True)
    missing = {weight for weight in loaded["missing_keys"] if not weight.startswith("decoder.")}
    assert not missing - {"pooler.dense.weight", "pooler.dense.bias"}
    assert sum(weight.numel() for weight in model.parameters()) < 2_000_000


@pytest.fixture(scope="module")
def bench(tmp_path_factory: pytest.TempPathFactory) -> zoo_runs.Bench:
    return zoo_runs.Bench(tmp_path_factory.mktemp("zoo"))


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=() if name in QUICK else pytest.mark.slow) for name in zoo_runs.runnable()]
)
def test_family_runs_as_documented(bench: zoo_runs.Bench, name: str) -> None:
    table, error = zoo_runs.documented(), zoo_runs.HEADER.index("error below")
    for row in zoo_runs.run(bench, name):
        expected, found = list(table[row.key]), list(row.cells)
        bound = expected.pop(error)
        del found[error]
        assert found == expected
        assert bound == "–" if row.error is None else row.error <= float(bound)


@pytest.mark.parametrize(("name", "modality"), zoo_runs.REFUSED)
def test_refused_family_is_told_why(bench: zoo_runs.Bench, name: str, modality: str) -> None:
    assert zoo_runs.REFUSED[name, modality] in zoo_runs.refusal(name, modality, bench.checkpoint(name))


@pytest.mark.parametrize(
    ("name", "modality", "pooling"),
    [("owlvit", "image", "the model's own image features"), ("dpr", "text", "the model's own pooled output")],
)
def test_models_that_declare_less_are_found(bench: zoo_runs.Bench, name: str, modality: str, pooling: str) -> None:
    """OWL-ViT's vision tower does not name its input, and DPR returns a vector without hidden states."""
    encoder = load_encoder(EncoderRequest(modality=modality, model_id=str(bench.checkpoint(name))))
    assert encoder.fingerprint.fields["pooling"] == pooling
    assert (encoder.num_layers, encoder.hidden_size) == (zoo_families.NUM_LAYERS, 32)


def test_table_has_all_families() -> None:
    runnable = set(zoo_runs.runnable())
    rows = {(name, one) for name in runnable for one in zoo.ENTRIES[name].modalities} - zoo_runs.REFUSED.keys()
    assert zoo_runs.documented().keys() == rows
    assert len(runnable) >= 80
    assert int(re.findall(r"^\d+", zoo_runs.PAGE.read_text(), re.MULTILINE)[0]) == len(runnable)
