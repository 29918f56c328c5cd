"""Blocks rebuilt from cached weights alone, against the layers of the models that they were read from."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from tiny_models import (
    BLOCK_FAMILIES,
    CASES,
    NUM_LAYERS,
    TEXT_FAMILIES,
    WORDS,
    inputs_of,
    load_reference,
    load_tiny,
    rand,
    run_reference,
)
from torch import nn
from transformers.models.mpnet.modeling_mpnet import MPNetEncoder

from saffe_cache.core.features import BlockSpec, BlockWeights
from saffe_cache.encoders.encoder import FrozenEncoder
from saffe_cache.fusion.block import EncoderBlock, relative_position_buckets

Models = Callable[[str], Path]
ROLES = ("query", "key", "value")
every_family = pytest.mark.parametrize("name", BLOCK_FAMILIES)
every_text_family = pytest.mark.parametrize("name", TEXT_FAMILIES)


@torch.no_grad()
def assert_blocks_lead_on(encoder: FrozenEncoder, inputs: dict[str, torch.Tensor], mask: torch.Tensor | None) -> None:
    """Every block takes hidden_states[i] to hidden_states[i + 1], on real tokens."""
    states = encoder.encode(inputs).states
    assert list(encoder.blocks) == list(range(NUM_LAYERS))
    for index, weights in encoder.blocks.items():
        given = torch.tensor(states[index])
        mine, theirs = EncoderBlock(weights)(given, mask), states[index + 1]
        real = slice(None) if mask is None else mask
        np.testing.assert_allclose(mine[real], theirs[real], atol=1e-5, rtol=1e-5, err_msg=f"block {index}")
        assert np.abs(theirs[real] - given[real].numpy()).max() > 0.5, "the layer does too little to be a test"


@every_family
def test_block_gives_the_next_hidden_state(name: str, tiny_model: Models) -> None:
    encoder = load_tiny(name, tiny_model(name))
    assert_blocks_lead_on(encoder, inputs_of(name, encoder, [" ".join(WORDS)] * 2), None)


@every_text_family
def test_block_gives_the_next_hidden_state_of_padded_texts(name: str, tiny_model: Models) -> None:
    encoder = load_tiny(name, tiny_model(name))
    inputs = inputs_of(name, encoder)
    mask = inputs["attention_mask"].bool()
    assert not mask.all()
    assert_blocks_lead_on(encoder, inputs, mask)


@pytest.mark.parametrize("name", ["dinov2-swiglu", "bert", "mpnet", "clip-text"])
def test_a_batch_in_portions_is_the_whole_batch(name: str, tiny_model: Models, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its numbers, and its gradients, with masks and positions; the last portion is a short one."""
    encoder = load_tiny(name, tiny_model(name))
    block, hidden = EncoderBlock(encoder.blocks[1]), rand(5, 6, len(encoder.blocks[1].tensors["output_weight"]))
    mask = torch.arange(6) < torch.tensor([[6], [3], [1], [5], [2]])
    found = []
    for tokens in (10**6, 12):
        monkeypatch.setattr("saffe_cache.fusion.block._PORTION_TOKENS", tokens)
        given = hidden.clone().requires_grad_()
        put_out = block(given, mask)
        (put_out * rand(*put_out.shape, seed=1)).sum().backward()
        assert given.grad is not None
        found.append((put_out.detach(), given.grad))
    for whole, portions in zip(*found, strict=True):
        torch.testing.assert_close(portions, whole, atol=1e-5, rtol=1e-5)


def test_mpnet_positions_reach_far(tiny_model: Models) -> None:
    """180 tokens: beyond the 8 exact distances, and beyond the largest of 128."""
    encoder = load_tiny("mpnet", tiny_model("mpnet"))
    text = " ".join(WORDS[i * 7 % 40] for i in range(178))
    assert_blocks_lead_on(encoder, inputs_of("mpnet", encoder, [text]), None)


def test_relative_position_buckets_are_transformers_own() -> None:
    relative = torch.arange(-600, 601)
    spec = BlockSpec(
        num_attention_heads=1,
        norm_first=False,
        activation="gelu",
        layer_norm_eps=1e-5,
        relative_attention_num_buckets=32,
    )
    expected = MPNetEncoder.relative_position_bucket(relative, num_buckets=32, max_distance=128)
    assert relative_position_buckets(relative, spec).tolist() == expected.tolist()


@every_family
def test_projections_are_those_of_the_layer(name: str, tiny_model: Models) -> None:
    encoder, model = load_tiny(name, tiny_model(name)), load_reference(name, tiny_model(name))
    seen: dict[str, tuple[torch.Tensor, torch.Tensor]] = {}

    def watch(role: str, layer: nn.Module) -> None:
        """Note what enters and leaves a projection, found by its name."""
        names = {role, role[0], f"{role[0]}_proj", "c_attn"}
        found = [module for path, module in layer.named_modules() if path.split(".")[-1] in names]
        assert len(found) == 1

        def note(module: nn.Module, given: tuple[torch.Tensor], output: torch.Tensor) -> None:
            one_of_three = output.chunk(3, dim=-1)[ROLES.index(role)] if name == "gpt2" else output
            seen[role] = given[0], one_of_three

        found[0].register_forward_hook(note)

    for index, weights in encoder.blocks.items():
        for role in ROLES:
            watch(role, model.get_submodule(CASES[name].layers)[index])
        inputs = inputs_of(name, encoder)
        run_reference(name, model, inputs)
        for rebuilt, (entering, output) in zip(
            EncoderBlock(weights).project(seen["query"][0]),
            (seen[role] for role in ROLES),
            strict=True,
        ):
            assert torch.equal(entering, seen["query"][0])
            heads = output.unflatten(-1, (4, -1)).transpose(1, 2)
            torch.testing.assert_close(rebuilt, heads, atol=1e-5, rtol=1e-5)


@every_family
def test_every_tensor_counts(name: str, tiny_model: Models) -> None:
    """A changed tensor changes the output; but for the key's bias, which adds the same to all keys' scores."""
    weights = load_tiny(name, tiny_model(name)).blocks[1]
    width = len(weights.tensors["output_bias"])
    hidden = torch.randn(1, 30, width, generator=torch.Generator().manual_seed(0))
    before = EncoderBlock(weights)(hidden)
    for role in weights.tensors:
        changed = {**weights.tensors, role: weights.tensors[role] * 1.3}
        after = EncoderBlock(BlockWeights(weights.spec, changed))(hidden)
        assert (float((after - before).abs().max()) > 1e-3) == (role != "key_bias"), role


@every_family
def test_blocks_are_frozen_and_complete_for_language_models(name: str, tiny_model: Models) -> None:
    encoder = load_tiny(name, tiny_model(name), layers=(1, NUM_LAYERS))
    assert list(encoder.blocks) == (list(range(NUM_LAYERS)) if name == "gpt2" else [1])
    assert not any(parameter.requires_grad for parameter in EncoderBlock(encoder.blocks[1]).parameters())
    assert {array.dtype for array in encoder.blocks[1].tensors.values()} == {np.dtype(np.float32)}


def test_activations_and_causality_are_told(tiny_model: Models) -> None:
    expected = {
        "clip-text": ("quick_gelu", True),
        "gpt2": ("gelu_new", True),
        "dinov2-swiglu": ("silu", False),
        "bert": ("gelu", False),
    }
    for name, told in expected.items():
        spec = load_tiny(name, tiny_model(name)).blocks[0].spec
        assert (spec.activation, spec.is_causal) == told
        assert dataclasses.replace(spec, num_attention_heads=4) == spec
