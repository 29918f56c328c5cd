"""Encoders against the models themselves: what is captured, what is run, and that nothing else is."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from tiny_models import (
    CASES,
    NUM_LAYERS,
    TEXT_FAMILIES,
    TEXTS,
    inputs_of,
    load_reference,
    load_tiny,
    run_reference,
)

Models = Callable[[str], Path]
IMAGE_FAMILIES = [name for name, case in CASES.items() if case.modality == "image"]
every_family = pytest.mark.parametrize("name", CASES)


def expected_vectors(name: str, model: Any, output: Any, lengths: list[int]) -> dict[str, torch.Tensor]:
    """The encoder's own vectors, from the reference's last layer."""
    last = output.last_hidden_state
    if name == "clip-vision":
        pooled = model.vision_model.post_layernorm(output.hidden_states[-1][:, 0])
        return {"pooled": pooled, "projected": pooled @ model.visual_projection.weight.T}
    if name == "clip-text":
        normed = model.text_model.final_layer_norm(output.hidden_states[-1])
        pooled = torch.stack([row[length - 1] for row, length in zip(normed, lengths, strict=True)])
        return {"pooled": pooled, "projected": pooled @ model.text_projection.weight.T}
    if CASES[name].modality == "text" or name == "whisper":
        return {"pooled": torch.stack([row[:length].mean(0) for row, length in zip(last, lengths, strict=True)])}
    if name == "resnet":
        return {"pooled": last.mean(dim=(2, 3))}
    if name == "convnext":
        return {"pooled": model.layernorm(last.mean(dim=(2, 3)))}
    return {"pooled": (last[:, 0] + last[:, 1]) / 2 if name == "ast" else last[:, 0]}


def row_by_row(maps: torch.Tensor) -> np.ndarray:
    """[batch, places, channels] of feature maps [batch, channels, height, width], one place after the other."""
    height, width = maps.shape[2:]
    return np.stack([maps[:, :, row, column].numpy() for row in range(height) for column in range(width)], axis=1)


def assert_is_reference(name: str, encoder: Any, folder: Path) -> None:
    inputs = inputs_of(name, encoder)
    encoded, model = encoder.encode(inputs), load_reference(name, folder)
    output = run_reference(name, model, inputs)
    expected = list(output.hidden_states)
    if name in ("whisper", "gpt2"):  # transformers gives its last hidden state behind the final norm only
        final_norm = model.encoder.layer_norm if name == "whisper" else model.ln_f
        after_norm = final_norm(torch.tensor(encoded.states[NUM_LAYERS]))
        np.testing.assert_allclose(after_norm.detach(), expected.pop(), atol=1e-5)
    assert len(encoded.states) == NUM_LAYERS + 1
    if CASES[name].is_convolutional:
        expected = [row_by_row(state) for state in expected]
    for index, states in enumerate(expected):
        np.testing.assert_allclose(encoded.states[index], states, atol=1e-5, err_msg=f"hidden_states[{index}]")
    with torch.no_grad():
        vectors = expected_vectors(name, model, output, encoded.lengths.tolist())
    assert encoder.vector_widths == {key: value.shape[1] for key, value in vectors.items()}
    assert set(encoded.vectors) == set(vectors)
    for key, value in vectors.items():
        np.testing.assert_allclose(encoded.vectors[key], value, atol=1e-5, err_msg=key)


@every_family
def test_states_and_vectors_are_the_models_own(name: str, tiny_model: Models) -> None:
    assert_is_reference(name, load_tiny(name, tiny_model(name)), tiny_model(name))


@pytest.mark.parametrize("name", IMAGE_FAMILIES)
def test_another_picture_size_interpolates_the_positions(name: str, tiny_model: Models) -> None:
    encoder = load_tiny(name, tiny_model(name), image_size=48)
    assert inputs_of(name, encoder)["pixel_values"].shape[2:] == (48, 48)
    assert_is_reference(name, encoder, tiny_model(name))


@every_family
def test_truncated_pass_is_equal_and_runs_nothing_deeper(name: str, tiny_model: Models) -> None:
    encoder = load_tiny(name, tiny_model(name))
    inputs = inputs_of(name, encoder)
    full = encoder.encode(inputs)
    finished: list[str] = []
    handle = torch.nn.modules.module.register_module_forward_hook(
        lambda module, arguments, output: finished.append(type(module).__name__)
    )
    try:
        for layers in [(0,), (1,), (0, 2), (NUM_LAYERS,)]:
            encoder.select(layers, vectors=False)
            finished.clear()
            encoded = encoder.encode(inputs)
            assert finished.count(CASES[name].layer) == max(layers)
            assert encoded.vectors == {}
            assert tuple(encoded.states) == layers
            expected = full.states[min(layers)].shape[1] if CASES[name].is_convolutional else full.lengths
            np.testing.assert_array_equal(encoded.lengths, expected)
            for index in layers:
                np.testing.assert_array_equal(encoded.states[index], full.states[index])
    finally:
        handle.remove()
    encoder.select((1,), vectors=True)
    assert encoder.encode(inputs).vectors.keys() == full.vectors.keys()


@every_family
def test_an_encoding_does_not_depend_on_its_batch(name: str, tiny_model: Models) -> None:
    encoder = load_tiny(name, tiny_model(name))
    inputs = inputs_of(name, encoder)
    together = encoder.encode(inputs)
    assert len(set(together.lengths.tolist())) == (len(TEXTS) if name in TEXT_FAMILIES else 1)
    for row, length in enumerate(together.lengths.tolist()):
        width = length if name in TEXT_FAMILIES else None
        alone = encoder.encode({key: value[row : row + 1, :width] for key, value in inputs.items()})
        for index, states in together.states.items():
            np.testing.assert_allclose(states[row, :length], alone.states[index][0], atol=1e-5)
        for key, values in together.vectors.items():
            np.testing.assert_allclose(values[row], alone.vectors[key][0], atol=1e-5)


def test_vit_mae_keeps_all_patches_in_their_order(tiny_model: Models) -> None:
    encoder = load_tiny("vit-mae", tiny_model("vit-mae"))
    inputs = inputs_of("vit-mae", encoder)
    states = encoder.encode(inputs).states
    weights = load_file(tiny_model("vit-mae") / "model.safetensors")
    kernel, bias = (weights[f"embeddings.patch_embeddings.projection.{part}"] for part in ("weight", "bias"))
    positions = weights["embeddings.position_embeddings"][0]
    for number in range(16):
        top, left = number // 4 * 8, number % 4 * 8
        patch = inputs["pixel_values"][:, :, top : top + 8, left : left + 8]
        expected = torch.einsum("bchw,dchw->bd", patch, kernel) + bias + positions[1 + number]
        np.testing.assert_allclose(states[0][:, 1 + number], expected, atol=1e-5)


def test_bfloat16_runs_in_it_and_returns_float32(tiny_model: Models) -> None:
    exact, rough = (load_tiny("dinov2", tiny_model("dinov2"), dtype=dtype) for dtype in ("float32", "bfloat16"))
    inputs = inputs_of("dinov2", exact)
    for index, states in rough.encode(inputs).states.items():
        expected = exact.encode(inputs).states[index]
        assert states.dtype == np.float32
        assert 0 < np.abs(states - expected).max() < 0.1 * np.abs(expected).max()


def test_texts_are_prompted_truncated_and_padded(tiny_model: Models) -> None:
    encoder = load_tiny("roberta", tiny_model("roberta"), prompt="word39 {}", max_length=5)
    ids = encoder.tokenize(["word0", "word0 word1 word2 word3"])
    assert ids == [[0, 43, 4, 2], [0, 43, 4, 5, 2]]
    padded = encoder.pad(ids)
    assert padded["input_ids"].tolist() == [[0, 43, 4, 2, 1], [0, 43, 4, 5, 2]]
    assert padded["attention_mask"].tolist() == [[1, 1, 1, 1, 0], [1, 1, 1, 1, 1]]


@pytest.mark.parametrize(
    ("name", "positions"), [("bert", 202), ("roberta", 200), ("mpnet", 200), ("clip-text", 77), ("gpt2", 202)]
)
def test_text_may_use_all_positions_but_no_more(name: str, positions: int, tiny_model: Models) -> None:
    encoder = load_tiny(name, tiny_model(name))
    assert encoder.max_length == positions
    long = inputs_of(name, encoder, [" ".join(["word5"] * 300)])
    assert encoder.encode(long).lengths.tolist() == [positions]


@pytest.mark.parametrize("name", ["dinov2", "bert", "clip-vision"])
def test_launched_batch_keeps_its_own_results(name: str, tiny_model: Models) -> None:
    """Converted after others were launched, in the type of the pass; a selection that changes meanwhile is not its."""
    encoder = load_tiny(name, tiny_model(name), dtype="bfloat16")
    inputs = inputs_of(name, encoder)
    alone = {key: value[:1] for key, value in inputs.items()}
    expected, launched = encoder.encode(inputs), encoder.launch(inputs)
    encoder.select((1,), vectors=False)
    encoder.launch(alone).wait()
    encoded = launched.encoded()
    assert encoded.states.keys() == expected.states.keys()
    for index, states in expected.states.items():
        np.testing.assert_array_equal(encoded.states[index], states)
    for key, values in expected.vectors.items():
        np.testing.assert_array_equal(encoded.vectors[key], values)
    numbers = sum(states.size for states in encoded.states.values()) + sum(v.size for v in encoded.vectors.values())
    assert launched.num_bytes == 2 * numbers
