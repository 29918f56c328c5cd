"""Repositories of sentence-transformers: their vectors against the library's own, and against sums written out here."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from extraction_cases import make_captioned
from safetensors.torch import load_file, save_file
from tiny_models import CASES, WORDS, bert_tokenizer, load_reference, load_tiny, rand, randomize

from saffe_cache.cli import main
from saffe_cache.encoders.encoder import FrozenEncoder, load_encoder
from saffe_cache.encoders.loading import EncoderRequest
from saffe_cache.extraction.config import ExtractConfig, config_from_json
from saffe_cache.extraction.planning import encoder_request
from saffe_cache.store.reader import open_cache

Models = Callable[[str], Path]
TEXTS = ["word1 word2 word3", "word9", " ".join(WORDS[i * 7 % 40] for i in range(30))]
PROMPTS = {"query": "word39 word38 ", "document": ""}
MODES = ("cls", "max", "mean", "mean_sqrt_len_tokens", "weightedmean", "lasttoken")
OLD = {"mean": "mean_tokens", "cls": "cls_token", "max": "max_tokens", "weightedmean": "weightedmean_tokens"}
OLD |= {"mean_sqrt_len_tokens": "mean_sqrt_len_tokens", "lasttoken": "lasttoken"}
TANH, GELU = "torch.nn.modules.activation.Tanh", "torch.nn.modules.activation.GELU"
OLD_PATHS, NEW_PATHS = "sentence_transformers.models", "sentence_transformers.sentence_transformer.modules.any"


def old_pooling(*modes: str) -> dict[str, Any]:
    flags = {f"pooling_mode_{OLD[mode]}": mode in modes for mode in MODES}
    return {"word_embedding_dimension": 32, **flags}


def new_pooling(mode: str | list[str], **more: Any) -> dict[str, Any]:
    return {"embedding_dimension": 32, "pooling_mode": mode, **more}


def dense(inner: int, outer: int, activation: str | None = TANH, **more: Any) -> tuple[str, dict[str, Any]]:
    config = {"in_features": inner, "out_features": outer, "bias": True, **more}
    return "Dense", config if activation is None else {**config, "activation_function": activation}


NORM: tuple[str, dict[str, Any]] = ("Normalize", {})
LAYOUTS: dict[str, tuple[dict[str, Any], list[tuple[str, dict[str, Any]]]]] = {
    **{f"old {mode}": (old_pooling(mode), []) for mode in MODES},
    **{f"new {mode}": (new_pooling(mode), [NORM]) for mode in MODES},
    "old, several": (old_pooling("mean", "lasttoken", "cls"), [NORM]),
    "new, several": (new_pooling(["mean", "cls", "max"]), [NORM]),
    "old, none": (old_pooling(), []),
    "prompt left out": (new_pooling("mean", include_prompt=False), []),
    "prompt left out of all": (new_pooling(list(MODES), include_prompt=False), []),
    "dense": (new_pooling("mean"), [dense(32, 12), NORM]),
    "dense twice": (old_pooling("mean"), [dense(32, 40, GELU), dense(40, 8, "torch.nn.modules.linear.Identity"), NORM]),
    "dense of several": (old_pooling("mean", "max"), [dense(64, 16, None), ("Dropout", {"dropout": 0.5})]),
    "dense with residual": (new_pooling("cls"), [NORM, dense(32, 32, use_residual=True)]),
    "dense with projected residual": (new_pooling("cls"), [dense(32, 20, use_residual=True)]),
    "layer norm": (new_pooling("weightedmean"), [("LayerNorm", {"dimension": 32}), NORM]),
}
PROMPTED = [*((layout, None) for layout in LAYOUTS), *((layout, "query") for layout in LAYOUTS if "prompt" in layout)]


def make_repository(
    folder: Path,
    pooling: dict[str, Any],
    steps: Sequence[tuple[str, dict[str, Any]]] = (),
    *,
    paths: str = OLD_PATHS,
    settings: dict[str, Any] | None = None,
    config: dict[str, Any] | None = None,
) -> Path:
    """Turn a folder with a model into a repository of sentence-transformers."""
    kinds = [("Transformer", ""), ("Pooling", "1_Pooling")]
    kinds += [(kind, f"{i}_{kind}") for i, (kind, _) in enumerate(steps, 2)]
    modules = [{"idx": i, "name": str(i), "path": to, "type": f"{paths}.{kind}"} for i, (kind, to) in enumerate(kinds)]
    (folder / "modules.json").write_text(json.dumps(modules))
    for i, (kind, content) in enumerate([("Pooling", pooling), *steps], 1):
        (folder / f"{i}_{kind}").mkdir()
        (folder / f"{i}_{kind}" / "config.json").write_text(json.dumps(content))
        weights = weights_of(kind, content, seed=i)
        if weights:
            save_file(weights, folder / f"{i}_{kind}" / "model.safetensors")
    if settings:
        (folder / "sentence_bert_config.json").write_text(json.dumps(settings))
    if config:
        (folder / "config_sentence_transformers.json").write_text(json.dumps(config))
    return folder


def weights_of(kind: str, config: Mapping[str, Any], seed: int) -> dict[str, torch.Tensor]:
    if kind == "LayerNorm":
        return {"norm.weight": 1 + 0.3 * rand(32, seed=seed), "norm.bias": 0.3 * rand(32, seed=seed + 50)}
    if kind != "Dense" or "in_features" not in config:
        return {}
    inner, outer = config["in_features"], config["out_features"]
    weights = {"linear.weight": rand(outer, inner, seed=seed) * inner**-0.5, "linear.bias": rand(outer, seed=seed + 50)}
    if config.get("use_residual") and inner != outer:
        weights["residual.weight"] = rand(outer, inner, seed=seed + 60) * inner**-0.5
    return weights


@pytest.fixture
def copied(tiny_model: Models, tmp_path: Path) -> Models:
    """A copy of a tiny model, which a test may change."""
    return lambda name: Path(shutil.copytree(tiny_model(name), tmp_path / f"tiny-{name}"))


def vectors_of(encoder: FrozenEncoder) -> np.ndarray:
    vectors = encoder.encode(encoder.pad(encoder.tokenize(TEXTS))).vectors["pooled"]
    assert vectors.shape == (len(TEXTS), encoder.vector_widths["pooled"])
    return np.asarray(vectors)


def assert_same_directions(found: np.ndarray, expected: np.ndarray) -> None:
    cosines = (found * expected).sum(1) / np.linalg.norm(found, axis=1) / np.linalg.norm(expected, axis=1)
    np.testing.assert_allclose(cosines, 1, atol=1e-5)


def by_library(folder: Path, **options: Any) -> np.ndarray:
    library = pytest.importorskip("sentence_transformers")
    model = library.SentenceTransformer(str(folder), device="cpu")
    return np.asarray(model.encode(TEXTS, **options))


@torch.no_grad()
def by_hand(name: str, folder: Path, prompt: str, encoder: FrozenEncoder) -> np.ndarray:
    """Each text alone, without padding: sums over its tokens, then the modules as their configs say."""
    model, modules = load_reference(name, folder), json.loads((folder / "modules.json").read_text())
    pooling = json.loads((folder / "1_Pooling" / "config.json").read_text())
    modes = pooling.get("pooling_mode") or [mode for mode in MODES if pooling.get(f"pooling_mode_{OLD[mode]}")]
    modes = [modes] if isinstance(modes, str) else modes or ["mean"]
    start = 1 + len(prompt.split()) if prompt and pooling.get("include_prompt") is False else 0
    vectors = []
    for text in TEXTS:
        ids = encoder._processor(prompt + text, return_tensors="pt")["input_ids"]
        tokens = model.get_submodule(CASES[name].core)(input_ids=ids).last_hidden_state[0].double()[start:]
        places = torch.arange(start + 1, start + 1 + len(tokens))[:, None]
        pools = {
            "cls": tokens[0],
            "max": tokens.max(0).values,
            "mean": tokens.sum(0) / len(tokens),
            "mean_sqrt_len_tokens": tokens.sum(0) / len(tokens) ** 0.5,
            "weightedmean": (tokens * places).sum(0) / places.sum(),
            "lasttoken": tokens[-1],
        }
        vector = torch.cat([pools[mode] for mode in modes])
        for module in modules[2:]:
            vector = step_by_hand(vector, module["type"].rsplit(".", 1)[-1], folder / module["path"])
        vectors.append(vector.numpy())
    return np.array(vectors)


def step_by_hand(vector: torch.Tensor, kind: str, folder: Path) -> torch.Tensor:
    config = json.loads((folder / "config.json").read_text())
    weights = folder / "model.safetensors"
    tensors = {name: values.double() for name, values in load_file(weights).items()} if weights.exists() else {}
    if kind == "Normalize":
        return vector / vector.square().sum().sqrt()
    if kind == "LayerNorm":
        normed = (vector - vector.mean()) / (vector.var(correction=0) + 1e-5).sqrt()
        return normed * tensors["norm.weight"] + tensors["norm.bias"]
    if kind == "Dense":
        linear = tensors["linear.weight"] @ vector + tensors["linear.bias"]
        activation = config.get("activation_function", TANH).rsplit(".", 1)[-1]
        out = {"Tanh": torch.tanh, "GELU": torch.nn.functional.gelu, "Identity": lambda x: x}[activation](linear)
        if config.get("use_residual"):
            out = out + (tensors["residual.weight"] @ vector if "residual.weight" in tensors else vector)
        return out
    return vector


# The vector


@pytest.mark.parametrize(("layout", "prompt_name"), PROMPTED)
def test_vector_agrees_with_sums_written_out(layout: str, prompt_name: str | None, copied: Models) -> None:
    folder = make_repository(copied("bert"), *LAYOUTS[layout], config={"prompts": PROMPTS})
    encoder = load_tiny("bert", folder, prompt_name=prompt_name)
    expected = by_hand("bert", folder, PROMPTS[prompt_name] if prompt_name else "", encoder)
    found = vectors_of(encoder)
    assert_same_directions(found, expected)
    if layout not in ("new mean", "new cls"):  # of which the last Normalize is left out
        np.testing.assert_allclose(found, expected, atol=2e-5)


@pytest.mark.parametrize(("layout", "prompt_name"), PROMPTED)
def test_vector_agrees_with_the_library(layout: str, prompt_name: str | None, copied: Models) -> None:
    folder = make_repository(copied("bert"), *LAYOUTS[layout], config={"prompts": PROMPTS})
    encoder = load_tiny("bert", folder, prompt_name=prompt_name)
    assert_same_directions(vectors_of(encoder), by_library(folder, prompt_name=prompt_name))


@pytest.mark.parametrize("name", ["mpnet", "xlm-roberta", "gpt2"])
@pytest.mark.parametrize("layout", ["old mean", "old weightedmean", "new lasttoken", "dense"])
def test_other_families_agree_with_both(name: str, layout: str, copied: Models) -> None:
    """Language models too, whose texts get no begin and end tokens here."""
    folder = make_repository(copied(name), *LAYOUTS[layout])
    if name == "gpt2":  # the library needs a token to pad with
        path = folder / "tokenizer_config.json"
        path.write_text(json.dumps({**json.loads(path.read_text()), "pad_token": "<|endoftext|>"}))
    encoder = load_tiny(name, folder)
    assert encoder.language_model is None
    found = vectors_of(encoder)
    assert_same_directions(found, by_hand(name, folder, "", encoder))
    assert_same_directions(found, by_library(folder))


DISCOVERED = {
    "distilbert": lambda: transformers.DistilBertModel(
        transformers.DistilBertConfig(vocab_size=44, dim=32, n_heads=4, n_layers=2, hidden_dim=48, pad_token_id=0)
    ),
    "qwen3": lambda: transformers.Qwen3Model(transformers.Qwen3Config(**SHAPE, num_key_value_heads=2, head_dim=8)),
    "t5": lambda: transformers.T5EncoderModel(
        transformers.T5Config(vocab_size=44, d_model=32, d_kv=8, num_heads=4, num_layers=2, d_ff=48)
    ),
}
SHAPE = {"hidden_size": 32, "num_attention_heads": 4, "num_hidden_layers": 2, "intermediate_size": 48}
SHAPE |= {"vocab_size": 44, "pad_token_id": 0}


@pytest.mark.parametrize("name", DISCOVERED)
@pytest.mark.parametrize("layout", ["old mean", "new lasttoken", "dense of several", "prompt left out"])
def test_families_without_an_entry_agree_with_the_library(name: str, layout: str, tmp_path: Path) -> None:
    folder = tmp_path / f"tiny-{name}"
    model = DISCOVERED[name]()
    randomize(model, seed=3)
    model.save_pretrained(folder)
    bert_tokenizer(folder)
    make_repository(folder, *LAYOUTS[layout], config={"prompts": PROMPTS})
    encoder = load_encoder(EncoderRequest(modality="text", model_id=str(folder), prompt_name="query", layers=(1, 2)))
    found = vectors_of(encoder)
    assert encoder.vector_widths == {"pooled": 16 if layout == "dense of several" else 32}
    assert not any("sentence" in key or "steps" in key for block in encoder.blocks.values() for key in block.tensors)
    assert_same_directions(found, by_library(folder, prompt_name="query"))


@pytest.mark.parametrize("include_prompt", [True, False])
def test_repository_that_the_library_saved(include_prompt: bool, tiny_model: Models, tmp_path: Path) -> None:
    library = pytest.importorskip("sentence_transformers")
    models = library.models
    first = models.Transformer(str(tiny_model("bert")))
    pooling = models.Pooling(32, pooling_mode=("mean", "lasttoken"), include_prompt=include_prompt)
    steps = [models.Dense(64, 24), models.LayerNorm(24), models.Normalize()]
    model = library.SentenceTransformer(
        modules=[first, pooling, *steps], prompts={"query": "word5 "}, default_prompt_name="query", device="cpu"
    )
    model.max_seq_length = 9
    model.save(str(tmp_path / "tiny-bert"))
    encoder = load_tiny("bert", tmp_path / "tiny-bert")
    assert (encoder.max_length, encoder.vector_widths) == (9, {"pooled": 24})
    found = vectors_of(encoder)
    np.testing.assert_allclose(found, by_library(tmp_path / "tiny-bert"), atol=1e-5)
    np.testing.assert_allclose(np.linalg.norm(found, axis=1), 1, atol=1e-5)


def test_vector_is_that_of_a_text_alone(copied: Models) -> None:
    folder = make_repository(copied("bert"), *LAYOUTS["prompt left out of all"], config={"prompts": PROMPTS})
    encoder = load_tiny("bert", folder, prompt_name="query")
    together = vectors_of(encoder)
    for text, expected in zip(TEXTS, together, strict=True):
        alone = encoder.encode(encoder.pad(encoder.tokenize([text]))).vectors["pooled"][0]
        np.testing.assert_allclose(alone, expected, atol=1e-5)


def test_first_numbers_alone_are_kept(copied: Models) -> None:
    folder = make_repository(copied("bert"), new_pooling("mean"), [NORM], config={"truncate_dim": 10})
    encoder = load_tiny("bert", folder)
    assert encoder.vector_widths == {"pooled": 10}
    expected = by_hand("bert", folder, "", encoder)[:, :10]
    np.testing.assert_allclose(vectors_of(encoder), expected, atol=1e-5)
    assert_same_directions(expected, by_library(folder))


def test_bfloat16_model_pools_in_float32(copied: Models) -> None:
    folder = make_repository(copied("bert"), *LAYOUTS["dense"])
    vectors = vectors_of(load_tiny("bert", folder, dtype="bfloat16"))
    assert vectors.dtype == np.float32
    np.testing.assert_allclose(np.linalg.norm(vectors, axis=1), 1, atol=1e-6)


# The key


@pytest.mark.parametrize(
    ("pooling", "steps", "name"),
    [
        (old_pooling("mean"), [NORM], "mean of tokens"),
        (new_pooling("mean"), [], "mean of tokens"),
        (new_pooling("cls"), [NORM], "first token"),
    ],
)
def test_plain_pooling_adds_nothing_to_the_key(
    pooling: dict[str, Any], steps: list[Any], name: str, copied: Models, tiny_model: Models
) -> None:
    plain = load_tiny("bert", tiny_model("bert")).fingerprint
    fields = load_tiny("bert", make_repository(copied("bert"), pooling, steps)).fingerprint.fields
    assert fields == {**plain.fields, "pooling": name}


def test_key_holds_the_chain_its_weights_and_the_prompt(copied: Models) -> None:
    folder = make_repository(copied("bert"), *LAYOUTS["dense with residual"], config={"prompts": PROMPTS})
    before = load_tiny("bert", folder).fingerprint
    assert before.fields["pooling"] == ("first token, then unit length, then Dense 32 to 32 (Tanh, added to its input)")
    weights = folder / "3_Dense" / "model.safetensors"
    tensors = load_file(weights)
    tensors["linear.bias"][3] += 1e-3
    save_file(tensors, weights)
    after = load_tiny("bert", folder).fingerprint
    assert [line.split(":")[0] for line in before.differences(after)] == ["pooling_sha256"]
    prompted = load_tiny("bert", folder, prompt_name="query").fingerprint
    assert [line.split(":")[0] for line in after.differences(prompted)] == ["prompt"]


# Folders and settings


def test_model_in_a_subfolder(copied: Models, tiny_model: Models) -> None:
    folder = copied("bert")
    (folder / "0_Transformer").mkdir()
    for path in [path for path in folder.iterdir() if path.is_file()]:
        path.rename(folder / "0_Transformer" / path.name)
    make_repository(folder, old_pooling("max"))
    modules = json.loads((folder / "modules.json").read_text())
    modules[0]["path"] = "0_Transformer"
    (folder / "modules.json").write_text(json.dumps(modules))
    (folder / "0_Transformer" / "sentence_bert_config.json").write_text('{"max_seq_length": 7}')
    encoder = load_tiny("bert", folder)
    assert encoder.max_length == 7
    vectors = vectors_of(encoder)
    tokens = load_reference("bert", tiny_model("bert"))(**encoder.pad(encoder.tokenize(TEXTS[:1]))).last_hidden_state
    np.testing.assert_allclose(vectors[0], tokens[0].detach().amax(0), atol=1e-5)
    assert_same_directions(vectors, by_library(folder))


@pytest.mark.parametrize("file", ["sentence_bert_config.json", "sentence_xlm-roberta_config.json"])
def test_longest_text_of_the_repository_is_kept(file: str, copied: Models) -> None:
    """It replaces the limit of the tokenizer, also where that is shorter."""
    folder = make_repository(copied("bert"), old_pooling("mean"))
    path = folder / "tokenizer_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "model_max_length": 6}))
    assert load_tiny("bert", folder).max_length == 6
    (folder / file).write_text('{"max_seq_length": 9}')
    encoder = load_tiny("bert", folder)
    assert encoder.max_length == 9
    assert load_tiny("bert", folder, max_length=4).max_length == 4
    assert_same_directions(vectors_of(encoder), by_library(folder))


def test_texts_are_lowered_where_the_settings_say_so(copied: Models) -> None:
    folder = make_repository(copied("bert"), old_pooling("mean"), settings={"do_lower_case": True})
    encoder = load_tiny("bert", folder)
    assert encoder.tokenize(["WORD1 Word2"]) == encoder.tokenize(["word1 word2"])
    model = pytest.importorskip("sentence_transformers").SentenceTransformer(str(folder), device="cpu")
    ours = encoder.encode(encoder.pad(encoder.tokenize(["WORD1 Word2"]))).vectors["pooled"]
    assert_same_directions(np.asarray(ours), model.encode(["WORD1 Word2"]))


def test_clip_vector_is_the_projection(copied: Models) -> None:
    folder = copied("clip-text")
    path = "sentence_transformers.models.CLIPModel"
    (folder / "modules.json").write_text(json.dumps([{"idx": 0, "name": "0", "path": "", "type": path}]))
    assert set(load_tiny("clip-text", folder).vector_widths) == {"pooled", "projected"}


# Prompts


@pytest.mark.parametrize(
    ("asked", "template"),
    [
        ({}, "word39 word38 {}"),
        ({"prompt_name": "document"}, "{}"),
        ({"prompt_name": "query"}, "word39 word38 {}"),
        ({"prompt": "{}"}, "{}"),
        ({"prompt": "word1 {}"}, "word1 {}"),
    ],
)
def test_prompt_by_name_by_text_or_by_default(asked: dict[str, Any], template: str, copied: Models) -> None:
    config = {"prompts": PROMPTS, "default_prompt_name": "query"}
    folder = make_repository(copied("bert"), old_pooling("mean"), config=config)
    encoder = load_tiny("bert", folder, **asked)
    assert encoder.fingerprint.fields["prompt"] == template
    texts = [template.replace("{}", text) for text in TEXTS]
    assert encoder.tokenize(TEXTS) == load_tiny("bert", folder, prompt="{}").tokenize(texts)
    options = {"prompt": asked["prompt"][:-2]} if "prompt" in asked else asked
    assert_same_directions(vectors_of(encoder), by_library(folder, **options))


def test_unused_prompts_are_reported(copied: Models, caplog: pytest.LogCaptureFixture) -> None:
    folder = make_repository(copied("bert"), old_pooling("mean"), config={"prompts": PROMPTS})
    load_tiny("bert", folder)
    assert "no prompt is put before texts; --prompt-name chooses one of query." in caplog.text
    caplog.clear()
    load_tiny("bert", folder, prompt_name="query")
    assert "its prompt query, 'word39 word38 ', is put before every text" in caplog.text


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"prompt_name": "query", "prompt": "{}"}, "--prompt-name: found query, expected no --prompt besides it"),
        ({"prompt_name": "query", "encoder": {"image": "x"}}, "--prompt-name: found query, expected an --encoder text"),
    ],
)
def test_prompt_name_that_cannot_be_meant_is_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        ExtractConfig(**{"data": "", "cache": "", "encoder": {"text": "x"}, **options})


def test_history_of_older_releases_means_the_default_prompt() -> None:
    config = {"data": "d", "cache": "c", "encoder": {"text": "x"}}
    for prompt, expected in (("{}", None), ("query: {}", "query: {}")):
        assert encoder_request(config_from_json({**config, "prompt": prompt}), "text").prompt == expected
    assert config_from_json({**config, "prompt": "{}", "prompt_name": None}).prompt == "{}"


def test_prompt_reaches_the_manifest_and_inspect(
    copied: Models, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = make_repository(copied("bert"), *LAYOUTS["dense"], config={"prompts": PROMPTS})
    data, cache = make_captioned(tmp_path / "data", {"train": 4}), str(tmp_path / "cache.zarr")
    command = ["extract", "--data", str(data), "--encoder", f"text={folder}", "--device", "cpu", "--cache", cache]
    assert main([*command, "--prompt-name", "query"]) == 0
    assert main(command) == 0
    assert main([*command, "--prompt-name", "question"]) == 1
    assert "found --prompt-name question, expected one of its prompts (document, query)." in capsys.readouterr().err
    manifests = [encoder.manifest for encoder in open_cache(cache).encoders.values()]
    assert sorted(one.fingerprint.fields["prompt"] for one in manifests) == ["word39 word38 {}", "{}"]
    assert {one.arrays["pooled"].spec.row_shape for one in manifests} == {(12,)}
    assert main(["cache", "inspect", cache]) == 0
    shown = capsys.readouterr().out
    line = "  own vector: mean of tokens, then Dense 32 to 12 (Tanh), then unit length"
    assert f"{line}\n" in shown
    assert f"{line}; prompt 'word39 word38 {{}}'\n" in shown


# What is refused


def refused(folder: Path, match: str, **request: Any) -> None:
    with pytest.raises(ValueError, match=match) as caught:
        load_tiny("bert", folder, **request)
    assert str(caught.value).startswith(f"text encoder {folder}: ")
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("pooling", "steps", "match"),
    [
        (new_pooling("attention"), [], r"found pooling by attention, expected one of cls, max, mean"),
        (
            new_pooling("mean"),
            [dense(32, 8, "torch.nn.functional.tanh")],
            "found a Dense with activation torch.nn.functional.tanh",
        ),
        (new_pooling("mean"), [dense(32, 8, "os.system")], "found a Dense with activation os.system, expected one of"),
        (new_pooling("mean"), [dense(32, 8, module_input_name="token_embeddings")], "a Dense of .*token_embeddings"),
        (new_pooling("mean"), [("CNN", {})], r"found modules Transformer, Pooling, CNN, expected a Transformer"),
        (new_pooling("mean"), [dense(40, 8)], "its modules do not fit together"),
        (new_pooling("mean"), [("Dense", {})], "its 2_Dense cannot be read"),
    ],
)
def test_other_modules_are_refused_by_name(
    pooling: dict[str, Any], steps: list[Any], match: str, copied: Models
) -> None:
    refused(make_repository(copied("bert"), pooling, steps), match)


@pytest.mark.parametrize(
    ("settings", "match"),
    [
        ({"transformer_task": "fill-mask"}, "found transformer_task fill-mask, expected feature-extraction"),
        ({"modality_config": {"message": {}}}, "found texts by None"),
        ({"model_args": {"output_hidden_states": True}}, r"found model arguments \{'output_hidden_states'"),
        ({"processing_kwargs": {"text": {"padding": "max_length"}}}, "found processing_kwargs"),
    ],
)
def test_other_settings_are_refused_by_name(settings: dict[str, Any], match: str, copied: Models) -> None:
    refused(make_repository(copied("bert"), old_pooling("mean"), settings=settings), match)


@pytest.mark.parametrize("kind", ["sentence_transformers.models.StaticEmbedding", "custom_model.Transformer"])
def test_other_first_modules_are_refused_by_name(kind: str, copied: Models) -> None:
    folder = make_repository(copied("bert"), old_pooling("mean"))
    modules = json.loads((folder / "modules.json").read_text())
    modules[0]["type"] = kind
    (folder / "modules.json").write_text(json.dumps(modules))
    refused(folder, f"found {kind.removeprefix('sentence_transformers.models.')} as first module")


@pytest.mark.parametrize("kinds", [["Transformer"], ["Transformer", "Dense"]])
def test_chain_without_a_pooling_is_refused(kinds: list[str], copied: Models) -> None:
    folder = copied("bert")
    modules = [{"path": kind if i else "", "type": f"{OLD_PATHS}.{kind}"} for i, kind in enumerate(kinds)]
    (folder / "modules.json").write_text(json.dumps(modules))
    refused(folder, f"found modules {', '.join(kinds)}, expected a Pooling behind the Transformer")


def test_pooling_without_a_config_is_refused(copied: Models) -> None:
    folder = make_repository(copied("bert"), old_pooling("mean"))
    (folder / "1_Pooling" / "config.json").unlink()
    refused(folder, "found no 1_Pooling/config.json, which modules.json needs")


def test_pickled_weights_of_a_module_are_not_read(copied: Models) -> None:
    folder = make_repository(copied("bert"), *LAYOUTS["dense"])
    (folder / "2_Dense" / "model.safetensors").rename(folder / "2_Dense" / "pytorch_model.bin")
    refused(folder, r"found no 2_Dense/model.safetensors.*pytorch_model.bin, which can run code.*convert it: .*save")


def test_module_weights_of_another_shape_are_refused(copied: Models) -> None:
    folder = make_repository(copied("bert"), *LAYOUTS["dense"])
    save_file(weights_of("Dense", {"in_features": 32, "out_features": 9}, 1), folder / "2_Dense" / "model.safetensors")
    refused(folder, "its 2_Dense cannot be read")


def test_prompt_that_leaves_no_token_is_refused(copied: Models) -> None:
    folder = make_repository(copied("bert"), *LAYOUTS["prompt left out"], config={"prompts": PROMPTS})
    refused(folder, r"its prompt 'word39 word38 ' takes 3 tokens, --max-length 4", prompt_name="query", max_length=4)


def test_unknown_prompt_name_lists_the_names(copied: Models) -> None:
    folder = make_repository(copied("bert"), old_pooling("mean"), config={"prompts": PROMPTS})
    refused(folder, r"found --prompt-name q, expected one of its prompts \(document, query\)", prompt_name="q")


def test_default_prompt_without_a_text_is_refused(copied: Models) -> None:
    folder = make_repository(copied("bert"), old_pooling("mean"), config={"default_prompt_name": "query"})
    refused(folder, "its config_sentence_transformers.json cannot be read")


def test_damaged_list_of_modules_is_refused(copied: Models) -> None:
    folder = make_repository(copied("bert"), old_pooling("mean"))
    (folder / "modules.json").write_text("[{")
    refused(folder, "its modules.json cannot be read")


@pytest.mark.parametrize("path", ["../elsewhere", "/elsewhere"])
def test_module_outside_the_repository_is_refused(path: str, copied: Models) -> None:
    folder = make_repository(copied("bert"), old_pooling("mean"))
    modules = json.loads((folder / "modules.json").read_text())
    modules[1]["path"] = path
    (folder / "modules.json").write_text(json.dumps(modules))
    refused(folder, f"found a module in '{path}', expected one in the repository")
