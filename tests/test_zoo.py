"""The zoo of tiny checkpoints: what it writes is loadable and the same in every run, and each runs as documented."""

from __future__ import annotations

import re
from pathlib import Path

import numpy as np
import pytest
import transformers
import zoo
import zoo_families
import zoo_reference
import zoo_runs
import zoo_sentences
from PIL import Image

from saffe_cache.encoders.encoder import load_encoder
from saffe_cache.encoders.loading import EncoderRequest, load_processor
from saffe_cache.extraction.blocks import checked_blocks

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


def test_truncated_texts_are_counted_where_all_are_padded(tmp_path: Path) -> None:
    """Also beside a lone surrogate, which tokenizers do not accept."""
    zoo.ENTRIES["siglip2"].save(tmp_path)
    encoder = load_encoder(EncoderRequest(modality="text", model_id=str(tmp_path)))
    texts = ["a \ud800 dog", "word1 " * 500, "a dog"]
    ids = encoder.tokenize(texts)
    assert encoder.padding == "max_length"
    assert {len(one) for one in ids} == {encoder.max_length}
    assert encoder.count_truncated(texts, ids) == 1


def test_encoder_of_a_whole_t5gemma_is_found(tmp_path: Path) -> None:
    """The class that transformers names for its encoder takes no whole model's config."""
    zoo.MORE_ENTRIES["t5gemma"].save(tmp_path)
    encoder = load_encoder(EncoderRequest(modality="text", model_id=str(tmp_path)))
    assert encoder.family.layers == "encoder.layers"
    assert checked_blocks(encoder, encoder.block_layers)[1] == {}


KEPT = np.load(zoo_reference.PATH)
REFUSED = {"word_embeddings", "static_embedding"}
"""Layouts without hidden states."""


@pytest.mark.parametrize("key", [key for key in KEPT if key.startswith("sentences/")])
def test_vectors_are_those_that_sentence_transformers_gave(key: str, tmp_path: Path) -> None:
    """Kept from the library itself, so that they are compared where it is not installed, or has changed."""
    _, layout, prompt = key.split("/")
    zoo_sentences.LAYOUTS[layout].save(tmp_path)
    request = EncoderRequest(modality="text", model_id=str(tmp_path), prompt_name=prompt or None)
    if layout in REFUSED:
        with pytest.raises(ValueError, match=r"found modules|has no hidden states|expected"):
            load_encoder(request)
        return
    encoder = load_encoder(request)
    found = encoder.encode(encoder.pad(encoder.tokenize(zoo_reference.TEXTS))).vectors
    mine, kept = found["projected" if "projected" in found else "pooled"], KEPT[key]
    cosines = (mine * kept).sum(axis=1) / np.linalg.norm(mine, axis=1) / np.linalg.norm(kept, axis=1)
    assert cosines.min() > 1 - 1e-5


@pytest.mark.parametrize("name", ["dinov3_vit", "dinov3_convnext"])
def test_pil_prepares_photos_that_need_torchvision(name: str, tmp_path: Path) -> None:
    """Within two of 256 levels, by which resized pixels are rounded otherwise."""
    zoo.ENTRIES[name].save(tmp_path)
    processor = load_processor(EncoderRequest(modality="image", model_id=str(tmp_path)))
    prepared = processor(images=[Image.fromarray(zoo_reference.PICTURE)], return_tensors="np")["pixel_values"]
    level = 1 / 255 / np.array(processor.image_std).reshape(3, 1, 1)
    assert (np.abs(prepared - KEPT[f"pixels/{name}"]) / level).max() < 2.01


@pytest.fixture(scope="module")
def bench(tmp_path_factory: pytest.TempPathFactory) -> zoo_runs.Bench:
    return zoo_runs.Bench(tmp_path_factory.mktemp("zoo"))


@pytest.mark.slow
@pytest.mark.parametrize("name", zoo.ENTRIES | zoo.MORE_ENTRIES)
def test_automodel_loads_every_weight(bench: zoo_runs.Bench, name: str) -> None:
    model, loaded = transformers.AutoModel.from_pretrained(bench.checkpoint(name), output_loading_info=True)
    missing = {weight for weight in loaded["missing_keys"] if not weight.startswith("decoder.")}
    assert not missing - {"pooler.dense.weight", "pooler.dense.bias"}
    assert sum(weight.numel() for weight in model.parameters()) < 2_000_000


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
