"""The decoder and the FAM: what they start as, what reaches them, what they must not see."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import pytest
import torch
from tiny_models import inputs_of, load_tiny, rand
from torch import nn
from torch.nn import functional

from saffe_cache.features import BlockWeights
from saffe_cache.fusion.block import CrossAttention, DecoderBlock, EncoderBlock
from saffe_cache.fusion.fam import FamShape, FusionAlignModule

Models = Callable[[str], Path]
PAIRS = [
    ("dinov2", "bert"),
    ("dinov2-swiglu", "mpnet"),
    ("bert", "roberta"),
    ("mpnet", "clip-text"),
    ("vit", "clip-text"),
]
"""A gallery encoder, pre-LN or post-LN, and a text encoder, of its width or (clip-text) not."""
every_pair = pytest.mark.parametrize(("gallery", "text"), PAIRS, ids=["+".join(pair) for pair in PAIRS])
MASK = torch.tensor([[True] * 6, [True] * 3 + [False] * 3, [True] + [False] * 5])


def width_of(block: BlockWeights) -> int:
    return len(block.tensors["output_weight"])


@pytest.fixture
def blocks(gallery: str, text: str, tiny_model: Models) -> tuple[BlockWeights, BlockWeights]:
    """Block 1 of both encoders."""
    first, second = (load_tiny(name, tiny_model(name)).blocks[1] for name in (gallery, text))
    return first, second


def make_decoder(blocks: tuple[BlockWeights, BlockWeights], gate: float) -> DecoderBlock:
    torch.manual_seed(5)
    decoder = DecoderBlock(*blocks)
    with torch.no_grad():
        decoder.gate.fill_(gate)
        decoder.null_token.copy_(rand(*decoder.null_token.shape, seed=9))
    return decoder


# The decoder


@pytest.mark.parametrize("gallery", ["dinov2", "dinov2-swiglu", "clip-vision", "bert", "mpnet", "whisper"])
@pytest.mark.parametrize("text", ["roberta", "clip-text"])
def test_closed_gate_is_the_encoders_own_next_layer(
    gallery: str, text: str, blocks: tuple[BlockWeights, BlockWeights], tiny_model: Models
) -> None:
    decoder = DecoderBlock(*blocks)
    encoder = load_tiny(gallery, tiny_model(gallery))
    inputs = inputs_of(gallery, encoder)
    states = encoder.encode(inputs).states
    hidden = torch.tensor(states[1])
    mask = inputs["attention_mask"].bool() if "attention_mask" in inputs else None
    real = slice(None) if mask is None else mask
    context = rand(len(hidden), 5, width_of(blocks[1]))
    with torch.no_grad():
        own = EncoderBlock(blocks[0])(hidden, mask)
        for given in (None, context):
            fused = decoder(hidden, mask, given, None)
            assert torch.equal(fused, own)
            np.testing.assert_allclose(fused[real], states[2][real], atol=1e-5, rtol=1e-5)


@every_pair
@torch.no_grad()
def test_open_gate_adds_attention_to_the_text(blocks: tuple[BlockWeights, BlockWeights]) -> None:
    """Against torch's own multi-head attention, put together by the docstring's formula."""
    query_block, context_block = blocks
    decoder, d = make_decoder(blocks, gate=0.7), width_of(query_block)
    cross, tensors = decoder.cross_attention, {**query_block.tensors}
    hidden, context = rand(3, 7, d), rand(3, 6, width_of(context_block), seed=1)

    def normed(values: torch.Tensor, block: BlockWeights) -> torch.Tensor:
        names = ("attention_norm_weight", "attention_norm_bias") if block.spec.norm_first else ()
        return functional.layer_norm(
            values,
            values.shape[-1:],
            *(torch.tensor(block.tensors[name]) for name in names),
            eps=block.spec.layer_norm_eps,
        )

    keys = normed(context, context_block)
    if width_of(context_block) == d:
        for role in ("key", "value"):
            tensors[f"{role}_weight"] = context_block.tensors[f"{role}_weight"]
            tensors[f"{role}_bias"] = context_block.tensors[f"{role}_bias"]
    else:
        keys = keys @ cross.context_projection.weight.T + cross.context_projection.bias
    attention = nn.MultiheadAttention(d, query_block.spec.num_attention_heads, batch_first=True).eval()
    for part in ("weight", "bias"):
        rows = [tensors[f"{role}_{part}"] for role in ("query", "key", "value")]
        getattr(attention, f"in_proj_{part}").copy_(torch.tensor(np.concatenate(rows)))
        getattr(attention.out_proj, part).copy_(torch.tensor(tensors[f"output_{part}"]))
    own = EncoderBlock(query_block)
    attended = own.attend(hidden)
    crossed, _ = attention(normed(attended, query_block), keys, keys, key_padding_mask=~MASK)
    expected = own.feed_forward(attended + math.tanh(0.7) * crossed)
    torch.testing.assert_close(decoder(hidden, None, context, MASK), expected, atol=1e-5, rtol=1e-5)
    assert (expected - own(hidden)).abs().max() > 0.1


@every_pair
@torch.no_grad()
def test_padded_text_does_not_count(blocks: tuple[BlockWeights, BlockWeights]) -> None:
    """Nor does the rest of the batch."""
    decoder = make_decoder(blocks, gate=0.7)
    hidden, context = rand(3, 7, width_of(blocks[0])), rand(3, 6, width_of(blocks[1]), seed=1)
    together = decoder(hidden, None, context, MASK)
    loud = torch.where(MASK[..., None], context, torch.tensor(1e3))
    torch.testing.assert_close(decoder(hidden, None, loud, MASK), together, atol=1e-5, rtol=0)
    for row, length in enumerate(MASK.sum(1).tolist()):
        alone = decoder(hidden[row : row + 1], None, context[row : row + 1, :length], None)
        torch.testing.assert_close(alone[0], together[row], atol=1e-5, rtol=1e-5)


@every_pair
@torch.no_grad()
def test_padded_gallery_tokens_do_not_count(blocks: tuple[BlockWeights, BlockWeights]) -> None:
    decoder = make_decoder(blocks, gate=0.7)
    hidden, context = rand(3, 6, width_of(blocks[0])), rand(3, 4, width_of(blocks[1]), seed=1)
    together = decoder(hidden, MASK, context, None)
    for row, length in enumerate(MASK.sum(1).tolist()):
        alone = decoder(hidden[row : row + 1, :length], None, context[row : row + 1], None)
        torch.testing.assert_close(alone[0], together[row, :length], atol=1e-5, rtol=1e-5)


@every_pair
@torch.no_grad()
def test_null_text_is_attention_to_one_token(blocks: tuple[BlockWeights, BlockWeights]) -> None:
    decoder = make_decoder(blocks, gate=0.7)
    hidden = 3 * rand(3, 7, width_of(blocks[0]))
    token = decoder.null_token.expand(3, -1, -1)
    short = decoder.cross_attention.to_one_key(decoder.null_token).expand_as(hidden)
    torch.testing.assert_close(decoder.cross_attention(hidden, token, None), short, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(
        decoder(hidden, None, None, None), decoder(hidden, None, token, None), atol=1e-5, rtol=1e-5
    )


@every_pair
def test_cross_attention_starts_as_the_encoders_projections(blocks: tuple[BlockWeights, BlockWeights]) -> None:
    cross = CrossAttention(*blocks)
    same = width_of(blocks[0]) == width_of(blocks[1])
    owners = {"query": blocks[0], "key": blocks[same], "value": blocks[same], "output": blocks[0]}
    for role, block in owners.items():
        for part in ("weight", "bias"):
            np.testing.assert_array_equal(
                getattr(getattr(cross, role), part).detach(), block.tensors[f"{role}_{part}"], err_msg=role
            )
    if same:
        assert isinstance(cross.context_projection, nn.Identity)
    else:
        assert cross.context_projection.weight.shape == (width_of(blocks[0]), width_of(blocks[1]))


def test_absent_bias_starts_at_zero(tiny_model: Models) -> None:
    """Whisper's keys have none."""
    block = load_tiny("whisper", tiny_model("whisper")).blocks[0]
    assert "key_bias" not in block.tensors
    assert not CrossAttention(block, block).key.bias.any()


# The FAM


def make_fam(fusion: str, head: str, blocks: Sequence[tuple[BlockWeights, BlockWeights]] = ()) -> FusionAlignModule:
    torch.manual_seed(2)
    return FusionAlignModule(
        FamShape(fusion=fusion, head=head, num_layers=2, hidden_size=32, num_tokens=6, text_size=10),
        blocks,  # type: ignore[arg-type]
    ).eval()


def pairs_of(tiny_model: Models, gallery: str, text: str) -> list[tuple[BlockWeights, BlockWeights]]:
    first, second = (load_tiny(name, tiny_model(name)).blocks for name in (gallery, text))
    return [(first[i], second[i]) for i in (1, 2)]


@pytest.mark.parametrize("text", ["bert", "clip-text"])
def test_gradient_reaches_all_that_trains_and_nothing_frozen(text: str, tiny_model: Models) -> None:
    """The key's bias gets one, but of zero: a softmax does not see what is added to all its scores."""
    pairs = pairs_of(tiny_model, "dinov2", text)
    fam = make_fam("decoder", "attention", pairs)
    with torch.no_grad():  # away from the start, where gates and corrections are zero
        for decoder in fam.decoders:
            decoder.gate.fill_(0.5)  # type: ignore[operator, union-attr]
        fam.query_map.mlp[-1].weight.normal_()
        fam.head.get_submodule("mlp")[-1].weight.normal_()  # type: ignore[index, operator]
    states = [rand(3, 6, 32, seed=seed) for seed in range(2)]
    texts = [rand(3, 4, width_of(pairs[0][1]), seed=seed) for seed in (2, 3)]
    target = rand(3, 10, seed=4)
    outputs = (fam(states, None, texts), fam(states), fam.encode_queries(rand(3, 10, seed=5)))
    sum((output * target).sum() for output in outputs).backward()
    trainable = {name: parameter for name, parameter in fam.named_parameters() if parameter.requires_grad}
    frozen = {name: parameter for name, parameter in fam.named_parameters() if not parameter.requires_grad}
    assert all(".block.weights." in name for name in frozen)
    assert len(frozen) == sum(len(gallery.tensors) for gallery, _ in pairs)
    assert all(parameter.grad is None for parameter in frozen.values())
    for name, parameter in trainable.items():
        assert parameter.grad is not None, name
        assert (float(parameter.grad.abs().max()) > 1e-6) == (not name.endswith(".key.bias")), name


@pytest.mark.parametrize("head", ["attention", "mean", "flatten"])
@torch.no_grad()
def test_outputs_are_unit_vectors_and_start_without_text(head: str, tiny_model: Models) -> None:
    pairs = pairs_of(tiny_model, "dinov2", "bert")
    states = [rand(3, 6, 32, seed=seed) for seed in range(2)]
    texts = [rand(3, 4, 32, seed=seed) for seed in (2, 3)]
    fam = make_fam("decoder", head, pairs)
    vectors = fam(states, None, texts)
    assert vectors.shape == (3, 10)
    torch.testing.assert_close(vectors.norm(dim=-1), torch.ones(3))
    assert torch.equal(vectors, fam(states))
    own = [EncoderBlock(gallery)(state) for (gallery, _), state in zip(pairs, states, strict=True)]
    torch.testing.assert_close(vectors, functional.normalize(fam.head(own, None), dim=-1))
    fam.decoders[1].gate.fill_(0.5)
    assert not torch.allclose(fam(states, None, texts), fam(states), atol=1e-4)
    assert not torch.allclose(fam(states, None, texts), fam(states, None, texts[::-1]), atol=1e-4)


@torch.no_grad()
def test_linear_fusion_sees_no_text() -> None:
    fam = make_fam("linear", "attention")
    states, texts = [rand(3, 6, 32, seed=seed) for seed in range(2)], [rand(3, 4, 32)] * 2
    assert torch.equal(fam(states, MASK, texts), fam(states, MASK))
    torch.testing.assert_close(fam(states, MASK).norm(dim=-1), torch.ones(3))
    assert torch.equal(fam(states, MASK), functional.normalize(fam.head(states, MASK), dim=-1))


@torch.no_grad()
def test_query_map_starts_as_the_identity() -> None:
    fam = make_fam("linear", "mean")
    vectors = 5 * rand(4, 10)
    torch.testing.assert_close(fam.encode_queries(vectors), vectors / vectors.norm(dim=-1, keepdim=True))
    fam.query_map.mlp[-1].weight.normal_()
    moved = fam.encode_queries(vectors)
    assert not torch.allclose(moved, vectors / vectors.norm(dim=-1, keepdim=True), atol=1e-2)
    torch.testing.assert_close(moved.norm(dim=-1), torch.ones(4))
    torch.testing.assert_close(moved, fam.encode_queries(0.01 * vectors))


@pytest.mark.parametrize("fusion", ["linear", "decoder"])
def test_groups_hold_every_trainable_parameter_once(fusion: str, tiny_model: Models) -> None:
    fam = make_fam(fusion, "attention", pairs_of(tiny_model, "dinov2", "clip-text") if fusion == "decoder" else ())
    groups = fam.parameter_groups(learning_rate=1e-3, weight_decay=0.1)
    grouped = [parameter for group in groups for parameter in group["params"]]  # type: ignore[attr-defined]
    trainable = {name: parameter for name, parameter in fam.named_parameters() if parameter.requires_grad}
    assert sorted(map(id, grouped)) == sorted(map(id, trainable.values()))
    settings = {id(p): (group["lr"], group["weight_decay"]) for group in groups for p in group["params"]}  # type: ignore[attr-defined]
    for name, parameter in trainable.items():
        rate, decay = settings[id(parameter)]
        speed = 0.15 if name.startswith("query_map.") else 2.5 if name == "head.pool_queries" else 1
        assert rate == pytest.approx(1e-3 * speed), name
        assert decay == (0.1 if parameter.ndim > 1 and speed == 1 else 0), name
    torch.optim.AdamW(groups)
