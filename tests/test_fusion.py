"""The decoders and the FAM: what they start as, what reaches them, what they must not see. See test_reference.py."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import safetensors.torch
import torch
from tiny_models import TEXT_FAMILIES, inputs_of, load_tiny, rand
from torch import nn
from torch.nn import functional

from saffe_cache.core.features import BlockWeights, hidden_states_index
from saffe_cache.encoders.encoder import FrozenEncoder
from saffe_cache.fusion.base import Blocks, Fused, Pairing, Texts, as_read
from saffe_cache.fusion.block import EncoderBlock
from saffe_cache.fusion.decoders import CrossAttention, PaperDecoder, ReuseDecoder
from saffe_cache.fusion.fam import FusionAlignModule
from saffe_cache.fusion.layers import parameter_groups, summarize
from saffe_cache.fusion.options import FusionShape
from saffe_cache.fusion.registry import FUSIONS

Models = Callable[[str], Path]
Block = tuple[BlockWeights, BlockWeights]
PAIRS = [
    ("dinov2", "bert"),
    ("dinov2-swiglu", "mpnet"),
    ("bert", "roberta"),
    ("mpnet", "clip-text"),
    ("vit", "clip-text"),
]
"""Who asks, pre-LN or post-LN, and who is asked, of its width or (clip-text) not."""
every_pair = pytest.mark.parametrize(("gallery", "text"), PAIRS, ids=["+".join(pair) for pair in PAIRS])
MASK = torch.tensor([[True] * 6, [True] * 3 + [False] * 3, [True] + [False] * 5])

SIDES = ("gallery", "text")
DECODERS = [name for name, entry in FUSIONS.items() if entry.has_decoder]
ELSEWHERE = [name for name, entry in FUSIONS.items() if "head" not in entry.options and not entry.is_special]
OF_TOKENS = [name for name, entry in FUSIONS.items() if entry.reads == "tokens" and not entry.is_special]
CASES = [(name, side) for name in OF_TOKENS for side in (SIDES if name in DECODERS else SIDES[:1])]
every_fusion = pytest.mark.parametrize(("fusion", "side"), CASES, ids=["-".join(case) for case in CASES])


def width_of(block: BlockWeights) -> int:
    return len(block.tensors["output_weight"])


@pytest.fixture
def blocks(gallery: str, text: str, tiny_model: Models) -> Block:
    """Block 1 of both encoders."""
    first, second = (load_tiny(name, tiny_model(name)).blocks[1] for name in (gallery, text))
    return first, second


def make_decoder(kind: type[ReuseDecoder] | type[PaperDecoder], blocks: Block) -> Callable[..., torch.Tensor]:
    """A decoder away from its start, its three steps in one: (hidden, mask, context, context_mask)."""
    torch.manual_seed(5)
    decoder: Any = kind(*blocks).eval()
    layer = kind.layer_of(*blocks)
    with torch.no_grad():
        if kind is ReuseDecoder:
            decoder.gate.fill_(0.7)
        else:
            decoder.norm.weight.copy_(1 + rand(width_of(blocks[0]), seed=8))
            decoder.norm.bias.copy_(rand(width_of(blocks[0]), seed=9))

    def decode(
        hidden: torch.Tensor, mask: torch.Tensor | None, context: torch.Tensor, context_mask: torch.Tensor | None
    ) -> torch.Tensor:
        entered, keys_values = decoder.enter(layer, hidden, mask), decoder.keys_values(layer, context)
        return decoder(layer, hidden, entered, keys_values, context_mask)  # type: ignore[no-any-return]

    decode.decoder = decoder  # type: ignore[attr-defined]
    return decode


def torch_attention(asking: BlockWeights, asked: BlockWeights, heads: int) -> nn.MultiheadAttention:
    """torch's own, with the queries and output of one block, and the keys and values of another."""
    attention = nn.MultiheadAttention(width_of(asking), heads, batch_first=True).eval()
    owners = {"query": asking, "key": asked, "value": asked}
    for part in ("weight", "bias"):
        rows = [owner.tensors[f"{role}_{part}"] for role, owner in owners.items()]
        getattr(attention, f"in_proj_{part}").copy_(torch.tensor(np.concatenate(rows)))
        getattr(attention.out_proj, part).copy_(torch.tensor(asking.tensors[f"output_{part}"]))
    return attention


def block_norm(values: torch.Tensor, block: BlockWeights) -> torch.Tensor:
    """The norm at the block's attention."""
    weight, bias = (torch.tensor(block.tensors[f"attention_norm_{part}"]) for part in ("weight", "bias"))
    return functional.layer_norm(values, values.shape[-1:], weight, bias, block.spec.layer_norm_eps)


def plain_norm(values: torch.Tensor, eps: float) -> torch.Tensor:
    return functional.layer_norm(values, values.shape[-1:], eps=eps)


# The decoders


def states_of(name: str, encoder: FrozenEncoder) -> tuple[dict[int, torch.Tensor], torch.Tensor | None]:
    """All hidden states of a batch, and its mask."""
    inputs = inputs_of(name, encoder)
    states = {i: torch.tensor(state) for i, state in encoder.encode(inputs).states.items()}
    return states, inputs["attention_mask"].bool() if "attention_mask" in inputs else None


@torch.no_grad()
def assert_next_hidden_states(asking: str, other: str, side: str, tiny_model: Models) -> None:
    """Layers 1 and 2 through a whole FAM, as it starts, with and without the other modality's input."""
    encoder, other_blocks = load_tiny(asking, tiny_model(asking)), load_tiny(other, tiny_model(other)).blocks
    states, mask = states_of(asking, encoder)
    pairs = [(encoder.blocks[i], other_blocks[i]) for i in (1, 2)]
    fam = make_fam([pair if side == "gallery" else pair[::-1] for pair in pairs], head="mean", query_side=side)
    own, count = [states[1], states[2]], len(states[1])
    others = [rand(count, 5, width_of(other_blocks[1]), seed=i) for i in range(2)]
    if side == "gallery":
        other_mask = torch.ones(count, 5, dtype=torch.bool)
        runs = [fam.decode(own, mask), fam.decode(own, mask, Texts(others, other_mask, rand(count, 10)))]
    else:
        assert mask is not None
        assert not mask.all()
        runs = [fam.decode(others, None, Texts(own, mask, rand(count, 10)))]
    real = slice(None) if mask is None else mask
    for fused, fused_mask in runs:
        assert mask is None if fused_mask is None else torch.equal(fused_mask, mask)
        for i, state in zip((1, 2), fused, strict=True):
            assert torch.equal(state, EncoderBlock(encoder.blocks[i])(states[i], mask))
            np.testing.assert_allclose(state[real], states[i + 1][real], atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("gallery", ["dinov2", "dinov2-swiglu", "clip-vision", "bert", "mpnet", "whisper"])
@pytest.mark.parametrize("text", ["roberta", "clip-text"])
def test_closed_gate_is_the_encoders_own_next_layer(gallery: str, text: str, tiny_model: Models) -> None:
    assert_next_hidden_states(gallery, text, "gallery", tiny_model)


@pytest.mark.parametrize("text", TEXT_FAMILIES)
@pytest.mark.parametrize("gallery", ["dinov2", "clip-vision"])
def test_closed_gate_of_text_queries_is_the_next_text_layer(gallery: str, text: str, tiny_model: Models) -> None:
    assert_next_hidden_states(text, gallery, "text", tiny_model)


@every_pair
@torch.no_grad()
def test_open_gate_adds_attention_to_the_text(blocks: Block) -> None:
    """Against torch's own multi-head attention, put together by the docstring's formula."""
    query_block, context_block = blocks
    decode, d, heads = make_decoder(ReuseDecoder, blocks), width_of(query_block), query_block.spec.num_attention_heads
    cross = decode.decoder.cross_attention  # type: ignore[attr-defined]
    hidden, context = rand(3, 7, d), rand(3, 6, width_of(context_block), seed=1)

    def normed(values: torch.Tensor, block: BlockWeights) -> torch.Tensor:
        return block_norm(values, block) if block.spec.norm_first else plain_norm(values, block.spec.layer_norm_eps)

    keys, same = normed(context, context_block), width_of(context_block) == d
    if not same:
        keys = keys @ cross.context_projection.weight.T + cross.context_projection.bias
    attention = torch_attention(query_block, context_block if same else query_block, heads)
    own = EncoderBlock(query_block)
    attended = own.attend(hidden)
    crossed, _ = attention(normed(attended, query_block), keys, keys, key_padding_mask=~MASK)
    expected = own.feed_forward(attended + math.tanh(0.7) * crossed)
    torch.testing.assert_close(decode(hidden, None, context, MASK), expected, atol=1e-5, rtol=1e-5)
    assert (expected - own(hidden)).abs().max() > 0.1


@pytest.mark.parametrize(
    ("gallery", "text"), [("dinov2", "bert"), ("vit", "clip-text"), ("bert", "roberta"), ("clip-text", "dinov2")]
)
@torch.no_grad()
def test_paper_decoder_is_equations_1_to_4(blocks: Block) -> None:
    """u' = MSA(LN(h_A)) + h_A, Z' = MCA(h_A, h_B) + u', D = LN(Z'): the raw states meet in MCA, and no MLP follows.

    DINOv2 scales its self-attention's output, a post-LN block norms behind its residual, CLIP's text is causal.
    """
    query_block, context_block = blocks
    decode, d, spec = make_decoder(PaperDecoder, blocks), width_of(query_block), query_block.spec
    decoder: Any = decode.decoder  # type: ignore[attr-defined]
    hidden, context = rand(3, 6, d), rand(3, 6, width_of(context_block), seed=1)
    padded = MASK.flip(0)

    entering = block_norm(hidden, query_block) if spec.norm_first else hidden
    causal = torch.ones(6, 6).triu(1).bool() if spec.is_causal else None
    attention = torch_attention(query_block, query_block, spec.num_attention_heads)
    attended, _ = attention(entering, entering, entering, key_padding_mask=~padded, attn_mask=causal)
    attended = attended * torch.tensor(query_block.tensors.get("attention_layer_scale", np.ones(d, np.float32)))
    entered = attended + hidden if spec.norm_first else block_norm(attended + hidden, query_block)
    same = width_of(context_block) == d
    keys = context if same else decoder.cross_attention.context_projection(context)
    attention = torch_attention(query_block, context_block if same else query_block, spec.num_attention_heads)
    crossed, _ = attention(hidden, keys, keys, key_padding_mask=~MASK)
    expected = plain_norm(crossed + entered, spec.layer_norm_eps) * decoder.norm.weight + decoder.norm.bias

    torch.testing.assert_close(decode(hidden, padded, context, MASK)[padded], expected[padded], atol=1e-5, rtol=1e-5)
    assert not any("mlp" in name for name, _ in decoder.named_parameters())
    assert all(parameter.requires_grad for parameter in decoder.parameters())


every_kind = pytest.mark.parametrize("kind", [ReuseDecoder, PaperDecoder])


@every_pair
@every_kind
@torch.no_grad()
def test_padded_text_does_not_count(kind: type[ReuseDecoder], blocks: Block) -> None:
    """Nor does the rest of the batch."""
    decode = make_decoder(kind, blocks)
    hidden, context = rand(3, 7, width_of(blocks[0])), rand(3, 6, width_of(blocks[1]), seed=1)
    together = decode(hidden, None, context, MASK)
    loud = torch.where(MASK[..., None], context, torch.tensor(1e3))
    torch.testing.assert_close(decode(hidden, None, loud, MASK), together, atol=1e-5, rtol=0)
    for row, length in enumerate(MASK.sum(1).tolist()):
        alone = decode(hidden[row : row + 1], None, context[row : row + 1, :length], None)
        torch.testing.assert_close(alone[0], together[row], atol=1e-5, rtol=1e-5)


@every_pair
@every_kind
@torch.no_grad()
def test_padded_tokens_that_ask_do_not_count(kind: type[ReuseDecoder], blocks: Block) -> None:
    decode = make_decoder(kind, blocks)
    hidden, context = rand(3, 6, width_of(blocks[0])), rand(3, 4, width_of(blocks[1]), seed=1)
    together = decode(hidden, MASK, context, None)
    for row, length in enumerate(MASK.sum(1).tolist()):
        alone = decode(hidden[row : row + 1, :length], None, context[row : row + 1], None)
        torch.testing.assert_close(alone[0], together[row, :length], atol=1e-5, rtol=1e-5)


@every_pair
@torch.no_grad()
def test_one_key_takes_all_the_attention(blocks: Block) -> None:
    """The short way for a single key, against the softmax over two equal ones."""
    decode = make_decoder(ReuseDecoder, blocks)
    hidden, token = 3 * rand(3, 7, width_of(blocks[0])), rand(1, 1, width_of(blocks[1]), seed=1)
    short, long = decode(hidden, None, token, None), decode(hidden, None, token.expand(3, 2, -1), None)
    torch.testing.assert_close(short, long, atol=1e-5, rtol=1e-5)


@every_pair
@every_kind
def test_cross_attention_starts_as_the_encoders_projections(kind: type[ReuseDecoder], blocks: Block) -> None:
    cross = kind(*blocks).cross_attention
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
    assert not CrossAttention(block, block, has_norms=True).key.bias.any()


# The FAM


def make_fam(blocks: Sequence[Block] = (), **changes: object) -> Any:
    torch.manual_seed(2)
    gallery, text = (width_of(block) for block in blocks[0]) if blocks else (32, 32)
    values: dict[str, Any] = {"fusion": "reuse", "head": "attention", "num_layers": 2, "num_tokens": 6, "text_size": 10}
    shape = FusionShape(**(values | {"hidden_size": gallery, "text_hidden_size": text} | changes))
    return FUSIONS[shape.fusion].make(shape, Blocks(*zip(*blocks, strict=True))).eval()


@torch.no_grad()
def awake(fam: FusionAlignModule) -> FusionAlignModule:
    """Away from its start, where gates are closed and corrections zero."""
    generator = torch.Generator().manual_seed(6)
    for name, parameter in fam.named_parameters():
        if parameter.requires_grad:
            parameter += 0.1 * torch.randn(parameter.shape, generator=generator)
        if name.endswith(".gate"):
            parameter.fill_(0.7)
        if name == "null_text":
            parameter.copy_(torch.randn(parameter.shape, generator=generator))
    return fam


def fuse(
    fam: FusionAlignModule, states: Sequence[torch.Tensor], mask: torch.Tensor | None = None, *given: Any
) -> Fused:
    """On a copy and with a seed of its own, as the reference draws weights in every forward."""
    torch.manual_seed(0)
    return copy.deepcopy(fam).fuse(*as_read(fam.shape, states, mask), *given)


def blocks_for(tiny_model: Models, fusion: str, gallery: str = "dinov2", text: str = "bert") -> list[Block]:
    if FUSIONS[fusion].blocks == "none":
        return []
    first, second = (load_tiny(name, tiny_model(name)).blocks for name in (gallery, text))
    return [(first[i], second[i]) for i in (1, 2)]


def draw_states(count: int, width: int = 32, tokens: int = 6, seed: int = 0) -> list[torch.Tensor]:
    return [rand(count, tokens, width, seed=seed + layer) for layer in range(2)]


def draw_texts(mask: torch.Tensor, width: int = 32, seed: int = 20) -> Texts:
    states = draw_states(len(mask), width, mask.shape[1], seed)
    return Texts(tuple(states), mask, 3 * rand(len(mask), 10, seed=seed + 9))


def pick(texts: Texts, rows: slice, length: int | None = None) -> Texts:
    states = tuple(state[rows, :length] for state in texts.states)
    return Texts(states, texts.mask[rows, :length], texts.vectors[rows])


def close(actual: torch.Tensor, expected: torch.Tensor) -> None:
    torch.testing.assert_close(actual, expected, atol=1e-5, rtol=0)


HEADS = dict.fromkeys(FUSIONS, "attention") | {"linear": "mean", "paper": "mean"}
WIDTHS = dict.fromkeys(FUSIONS, 10) | {"two_tower": 256, "fromage": 256, "gpo": 256, "sharelock": 128, "dino_txt": 128}
WIDTHS |= dict.fromkeys(("contrastive", "fusemix", "sail", "freeze_align", "structure"), 512) | {"sotalign": 1024}
"""Of the output."""
ADDS_TEXT = {name: "pooled_text" in entry.options for name, entry in FUSIONS.items()}
MIXED = torch.tensor([[True] * 4, [False] * 4, [True] * 2 + [False] * 2, [False] * 4, [True] + [False] * 3])


def mixed_fam(tiny_model: Models, fusion: str, side: str, **changes: object) -> FusionAlignModule:
    given: dict[str, object] = {
        "fusion": fusion,
        "head": HEADS[fusion],
        "query_side": side,
        "pooled_text": ADDS_TEXT[fusion],
    }
    return awake(make_fam(blocks_for(tiny_model, fusion), **(given | changes)))


@every_fusion
@torch.no_grad()
def test_null_text_is_a_row_without_any_token(fusion: str, side: str, tiny_model: Models) -> None:
    """In a mixed batch, whatever its vector and its padding hold, and whatever the other rows are."""
    fam, states, texts = mixed_fam(tiny_model, fusion, side), draw_states(5), draw_texts(MIXED)
    mixed, none = fuse(fam, states, None, texts).vectors, fuse(fam, states).vectors
    is_null = ~MIXED.any(dim=1)
    close(mixed[is_null], none[is_null])
    close(fuse(fam, states, None, texts.without(torch.ones(5, dtype=torch.bool))).vectors, none)
    loud = texts._replace(states=tuple(torch.where(MIXED[..., None], s, 1e3) for s in texts.states))
    loud = loud._replace(vectors=torch.where(is_null[:, None], -9.0, texts.vectors))
    close(fuse(fam, states, None, loud).vectors, mixed)
    assert (mixed - none)[~is_null].norm(dim=-1).min() > 0.01
    assert mixed.isfinite().all()


@every_fusion
@torch.no_grad()
def test_rows_do_not_see_one_another_nor_padding(fusion: str, side: str, tiny_model: Models) -> None:
    fam, states, texts = mixed_fam(tiny_model, fusion, side), draw_states(5), draw_texts(MIXED)
    together = fuse(fam, states, None, texts).vectors
    for row, length in enumerate(MIXED.sum(1).tolist()):
        one = slice(row, row + 1)
        own = pick(texts, one, length) if length else None
        close(fuse(fam, [state[one] for state in states], None, own).vectors, together[one])


PAIRING = Pairing(torch.tensor([0, 0, 1, 3, 2, 3, 3]), torch.tensor([0, 1, 2, 2, 0, 1, 2]))
PAIRED_MASK = torch.tensor([[True] * 4, [False] * 4, [True] * 2 + [False] * 2])
GALLERY_MASK = torch.tensor([[True] * 6, [True] * 2 + [False] * 4, [True] * 5 + [False], [True] * 3 + [False] * 3])


@every_fusion
@pytest.mark.parametrize("mask", [pytest.param(None, marks=pytest.mark.slow), GALLERY_MASK], ids=["whole", "padded"])
@torch.no_grad()
def test_pairing_is_fusing_the_gathered_rows_one_by_one(
    fusion: str, side: str, mask: torch.Tensor | None, tiny_model: Models
) -> None:
    fam, states, texts = mixed_fam(tiny_model, fusion, side), draw_states(4), draw_texts(PAIRED_MASK)
    fused = fuse(fam, states, mask, texts, PAIRING)
    assert fused.vectors.shape == (7, WIDTHS[fusion])
    assert {len(state) for state in fused.states} == {7}
    for row, (g, t) in enumerate(zip(PAIRING.gallery, PAIRING.text, strict=True)):
        one = None if mask is None else mask[g : g + 1]
        alone = fuse(fam, [state[g : g + 1] for state in states], one, pick(texts, slice(t, t + 1)))
        close(fused.vectors[row], alone.vectors[0])
        real = slice(None) if alone.mask is None else alone.mask[0]
        for together, apart in zip(fused.states, alone.states, strict=True):
            close(together[row][real], apart[0][real])


@every_fusion
@torch.no_grad()
def test_pairing_without_texts_repeats_the_gallery(fusion: str, side: str, tiny_model: Models) -> None:
    fam, states = mixed_fam(tiny_model, fusion, side), draw_states(4)
    expected = fuse(fam, states, GALLERY_MASK).vectors[PAIRING.gallery]
    close(fuse(fam, states, GALLERY_MASK, None, PAIRING).vectors, expected)


@pytest.mark.parametrize("side", SIDES)
@pytest.mark.parametrize("fusion", ["reuse", "paper"])
@torch.no_grad()
def test_differing_widths_are_projected_in_both_directions(fusion: str, side: str, tiny_model: Models) -> None:
    """Photos 32 wide, texts 24: what is pooled has the width of who asks."""
    blocks = blocks_for(tiny_model, fusion, "dinov2", "clip-text")
    fam = awake(make_fam(blocks, fusion=fusion, query_side=side, matches=True))
    states, texts = draw_states(5), draw_texts(MIXED, width=24)
    fused = fuse(fam, states, None, texts)
    assert {state.shape[-1] for state in fused.states} == {32 if side == "gallery" else 24}
    assert fam.match(fused, fused.vectors).shape == (5,)
    for decoder in fam.decoders:
        projection = decoder.get_submodule("cross_attention.context_projection")
        assert projection.weight.shape == ((32, 24) if side == "gallery" else (24, 32))
    close(fused.vectors.norm(dim=-1), torch.ones(5))
    other = fuse(fam, states, None, texts._replace(states=texts.states[::-1])).vectors
    assert not torch.allclose(other, fused.vectors, atol=1e-3)


@pytest.mark.parametrize("fusion", DECODERS)
@torch.no_grad()
def test_shared_decoder_is_one_set_of_weights_over_frozen_layers(fusion: str, tiny_model: Models) -> None:
    blocks = blocks_for(tiny_model, fusion)
    shared = make_fam(blocks, fusion=fusion, share_decoder=True)
    apart = make_fam(blocks, fusion=fusion)
    assert (len(shared.decoders), len(apart.decoders)) == (1, 2)
    assert len(shared.layers) == len(apart.layers) == 2

    def num_trainable(part: nn.Module) -> int:
        return sum(parameter.numel() for parameter in part.parameters() if parameter.requires_grad)

    assert num_trainable(apart.decoders) == 2 * num_trainable(shared.decoders) > 0
    assert num_trainable(shared.layers) == 0
    for name, values in shared.layers[0].state_dict().items():
        assert not torch.equal(values, shared.layers[1].state_dict()[name]), name
    if fusion != "reference":  # it starts from random numbers
        last = apart.decoders[1].state_dict()
        assert all(torch.equal(values, last[name]) for name, values in shared.decoders[0].state_dict().items())
    awake(shared)
    states, texts = draw_states(5), draw_texts(MIXED)
    for twin in range(2):
        apart.decoders[twin].load_state_dict(shared.decoders[0].state_dict())
    apart.null_text.copy_(shared.null_text)
    if fusion != "reference":
        both = (fuse(fam, states, None, texts).states for fam in (shared, apart))
        for one, other in zip(*both, strict=True):
            close(one, other)


@pytest.mark.parametrize("shares", [pytest.param(False, marks=pytest.mark.slow), True], ids=["own", "shared"])
@every_fusion
@torch.no_grad()
def test_weights_survive_safetensors(fusion: str, side: str, shares: bool, tiny_model: Models) -> None:
    """Which refuses tensors that share memory."""
    changes: dict[str, Any] = {"query_side": side, "share_decoder": shares, "matches": True, "head": HEADS[fusion]}
    blocks = blocks_for(tiny_model, fusion)
    fam = awake(make_fam(blocks, fusion=fusion, pooled_text=ADDS_TEXT[fusion], **changes))
    stored = safetensors.torch.load(safetensors.torch.save(fam.state_dict()))
    other = make_fam(blocks, fusion=fusion, pooled_text=ADDS_TEXT[fusion], **changes)
    states, texts = draw_states(5), draw_texts(MIXED)
    fused = fuse(fam, states, None, texts)
    assert not torch.allclose(fuse(other, states, None, texts).vectors, fused.vectors, atol=1e-3)
    other.load_state_dict(stored)
    again = fuse(other, states, None, texts)
    assert torch.equal(again.vectors, fused.vectors)
    assert torch.equal(other.match(again, again.vectors), fam.match(fused, fused.vectors))


@pytest.mark.parametrize("side", SIDES)
@pytest.mark.parametrize("fusion", DECODERS)
def test_frozen_decoder_trains_only_head_and_text_maps(fusion: str, side: str, tiny_model: Models) -> None:
    fam = make_fam(
        blocks_for(tiny_model, fusion), fusion=fusion, query_side=side, freeze_decoder=True, pooled_text=True
    )
    fam.freeze_unused(null_only=False)
    trainable = {name.split(".")[0] for name, parameter in fam.named_parameters() if parameter.requires_grad}
    assert trainable == {"head", "query_map", "text_map", "text_weight"}


def backward(fam: FusionAlignModule, *texts: Texts | None) -> None:
    """Of a random direction of all outputs, at each of the texts."""
    states, target = draw_states(5), rand(5, WIDTHS[fam.shape.fusion], seed=4)
    fam.zero_grad()
    searching = draw_texts(torch.ones(5, 3, dtype=torch.bool), fam.shape.text_hidden_size, seed=5)
    loss = (fam.encode_texts(searching) * target).sum()
    for given in texts:
        fused = fam.fuse(*as_read(fam.shape, states, None), given)
        loss = loss + (fused.vectors * target).sum()
        if fam.shape.matches:
            loss = loss + (fam.match(fused, target) * rand(5, seed=7)).sum()
    loss.backward()  # type: ignore[no-untyped-call]


def has_no_effect(name: str) -> bool:
    """A softmax does not see what is added to all its scores: the gradient of a key's bias is zero."""
    return name.endswith((".key.bias", ".key_bias"))


GRADIENT_CASES = [case for case in CASES if case[0] != "reference"]


@pytest.mark.parametrize(("fusion", "side"), GRADIENT_CASES, ids=["-".join(case) for case in GRADIENT_CASES])
@pytest.mark.parametrize("text", ["bert", pytest.param("clip-text", marks=pytest.mark.slow)])
def test_gradient_reaches_all_that_trains_and_nothing_frozen(
    fusion: str, side: str, text: str, tiny_model: Models
) -> None:
    """`reference` is the exception: see test_reference.py."""
    width = 32 if text == "bert" else 24
    blocks = blocks_for(tiny_model, fusion, "dinov2", text)
    head = HEADS[fusion] if fusion != "paper" else "attention"
    fam = awake(
        make_fam(blocks, fusion=fusion, query_side=side, head=head, pooled_text=ADDS_TEXT[fusion], matches=True)
    )
    fam.freeze_unused(null_only=False)
    backward(fam, draw_texts(MIXED, width), None)
    frozen = {name: parameter for name, parameter in fam.named_parameters() if not parameter.requires_grad}
    assert all(name.startswith(("layers.", "photo_blocks.", "text_blocks.")) for name in frozen)
    assert all(parameter.grad is None for parameter in frozen.values())
    for name, parameter in fam.named_parameters():
        if parameter.requires_grad:
            assert parameter.grad is not None, name
            assert (float(parameter.grad.abs().max()) > 1e-6) == (not has_no_effect(name)), name


@pytest.mark.parametrize(("fusion", "side"), GRADIENT_CASES, ids=["-".join(case) for case in GRADIENT_CASES])
def test_what_null_text_cannot_reach_is_frozen(fusion: str, side: str, tiny_model: Models) -> None:
    fam = awake(make_fam(blocks_for(tiny_model, fusion), fusion=fusion, query_side=side))
    fam.freeze_unused(null_only=True)
    backward(fam, None)
    for name, parameter in fam.named_parameters():
        if parameter.requires_grad:
            assert parameter.grad is not None, name
            # Where texts ask, the null text's one token attends to and is pooled by itself alone.
            reached = side == "text" or has_no_effect(name) or float(parameter.grad.abs().max()) > 1e-7
            assert reached, name
    if fusion in DECODERS and side == "gallery":
        frozen = {name for name, parameter in fam.decoders.named_parameters() if not parameter.requires_grad}
        assert {".".join(name.split(".")[:3]) for name in frozen} >= {
            "0.cross_attention.query",
            "1.cross_attention.key",
        }


@every_fusion
@pytest.mark.parametrize("null_only", [False, True])
def test_groups_hold_every_trainable_parameter_once(
    fusion: str, side: str, null_only: bool, tiny_model: Models
) -> None:
    fam = make_fam(
        blocks_for(tiny_model, fusion), fusion=fusion, query_side=side, pooled_text=ADDS_TEXT[fusion], matches=True
    )
    fam.freeze_unused(null_only=null_only)
    groups = parameter_groups(fam, learning_rate=1e-3, weight_decay=0.1)
    grouped = [parameter for group in groups for parameter in group["params"]]  # type: ignore[attr-defined]
    trainable = {name: parameter for name, parameter in fam.named_parameters() if parameter.requires_grad}
    assert sorted(map(id, grouped)) == sorted(map(id, trainable.values()))
    settings = {id(p): (group["lr"], group["weight_decay"]) for group in groups for p in group["params"]}  # type: ignore[attr-defined]
    for name, parameter in trainable.items():
        rate, decay = settings[id(parameter)]
        is_map = name.startswith(("query_map.", "text_map.", "parts."))
        named = {"head.pool_queries": 2.5, "text_weight": 20}
        speed = 0.15 if is_map else 5 if name.endswith(".gate") else named.get(name, 1)
        assert rate == pytest.approx(1e-3 * speed), name
        decays = parameter.ndim > 1 and speed == 1 and name != "null_text"
        assert decay == (0.1 if decays else 0), name
    torch.optim.AdamW(groups)


@pytest.mark.parametrize("head", ["attention", "mean", "flatten"])
@torch.no_grad()
def test_outputs_are_unit_vectors_and_start_without_text(head: str, tiny_model: Models) -> None:
    blocks = blocks_for(tiny_model, "reuse")
    states, texts = draw_states(3), draw_texts(MIXED[[0, 2, 4]])
    fam = make_fam(blocks, head=head)
    vectors = fam(states, None, texts)
    assert vectors.shape == (3, 10)
    torch.testing.assert_close(vectors.norm(dim=-1), torch.ones(3))
    assert torch.equal(vectors, fam(states))
    own = [EncoderBlock(gallery)(state) for (gallery, _), state in zip(blocks, states, strict=True)]
    torch.testing.assert_close(vectors, functional.normalize(fam.head(own, None), dim=-1))
    fam.decoders[1].gate.fill_(0.5)  # type: ignore[union-attr, operator]
    assert not torch.allclose(fam(states, None, texts), fam(states), atol=1e-4)
    swapped = texts._replace(states=texts.states[::-1])
    assert not torch.allclose(fam(states, None, texts), fam(states, None, swapped), atol=1e-4)


@torch.no_grad()
def test_where_texts_ask_the_linear_path_sees_the_photo(tiny_model: Models) -> None:
    """The photo's own tokens, not the text's that are pooled: so it too may start from the ridge."""
    fam = make_fam(blocks_for(tiny_model, "reuse"), query_side="text")
    states, texts = draw_states(4), draw_texts(PAIRED_MASK)
    rows = PAIRING.gallery
    photos = functional.normalize(fam.head.linear(summarize(states, GALLERY_MASK)), dim=-1)  # the MLP starts at zero
    close(fuse(fam, states, GALLERY_MASK, texts, PAIRING).vectors, photos[rows])
    close(fuse(fam, states, GALLERY_MASK).vectors, photos)


# Texts without a decoder


@pytest.mark.parametrize("head", ["attention", "mean", "flatten"])
@torch.no_grad()
def test_linear_fusion_sees_no_text(head: str) -> None:
    fam, states = awake(make_fam(fusion="linear", head=head)), draw_states(3)
    mask = None if head == "flatten" else MASK
    texts = draw_texts(MIXED[:3])
    assert torch.equal(fam(states, mask, texts), fam(states, mask))
    torch.testing.assert_close(fam(states, mask).norm(dim=-1), torch.ones(3))
    assert torch.equal(fam(states, mask), functional.normalize(fam.head(states, mask), dim=-1))


@pytest.mark.parametrize("head", ["attention", "mean", "flatten"])
@torch.no_grad()
def test_added_text_is_late_fusion(head: str) -> None:
    """The photo's unit vector + weight * map(t), and the first alone where the text is null; no token matters."""
    fam, states = awake(make_fam(fusion="linear", head=head, pooled_text=True)), draw_states(5)
    texts = draw_texts(MIXED)._replace(states=())
    fam.text_weight.fill_(0.6)
    mapped = fam.text_map(texts.vectors)
    photos = functional.normalize(fam.head(states, None), dim=-1)
    expected = torch.where(MIXED.any(dim=1)[:, None], photos + 0.6 * mapped, photos)
    close(fam(states, None, texts), functional.normalize(expected, dim=-1))
    close(fam(states), photos)


@torch.no_grad()
def test_concat_shows_the_text_to_the_mlp() -> None:
    """Its unit vector times the root of its size, so that it weighs as much as a normed token; zeros for null."""
    fam, states, texts = awake(make_fam(fusion="concat")), draw_states(5), draw_texts(MIXED)
    beside = functional.normalize(texts.vectors, dim=-1) * math.sqrt(10) * MIXED.any(dim=1, keepdim=True)
    expected = functional.normalize(fam.head(states, None, None, beside), dim=-1)
    close(fam(states, None, texts), expected)
    assert not torch.allclose(fam(states), expected, atol=1e-3)
    without = make_fam(fusion="concat")  # as it starts, the MLP says nothing
    assert torch.equal(without(states, None, texts), without(states))


@pytest.mark.parametrize("side", SIDES)
@torch.no_grad()
def test_reuse_shows_an_added_text_to_the_mlp_too(side: str, tiny_model: Models) -> None:
    """Beside the decoders, whose gates are closed here, and the sum outside the head, whose weight is zero."""
    fam = awake(make_fam(blocks_for(tiny_model, "reuse"), query_side=side, pooled_text=True))
    fam.text_weight.zero_()
    for decoder in fam.decoders:
        decoder.gate.zero_()  # type: ignore[operator, union-attr]
    states, texts = draw_states(5), draw_texts(MIXED)
    other = texts._replace(vectors=texts.vectors.flip(0))
    is_text = MIXED.any(dim=1) & (torch.arange(5) != 2)  # the middle one stays where it is
    apart = (fam(states, None, texts) - fam(states, None, other)).norm(dim=-1)
    assert (apart[is_text] > 1e-3).all()
    close(apart[~is_text], torch.zeros(3))
    for head, adds in (("mean", True), ("attention", False)):
        blind = awake(make_fam(blocks_for(tiny_model, "reuse"), query_side=side, head=head, pooled_text=adds))
        if adds:
            blind.text_weight.zero_()
        assert torch.equal(blind(states, None, texts), blind(states, None, other))


# The maps of text vectors


@pytest.mark.parametrize("name", ["query_map", "text_map"])
@torch.no_grad()
def test_text_maps_start_as_the_identity(name: str) -> None:
    fam = make_fam(fusion="linear", head="mean", pooled_text=True)
    text_map, vectors = fam.get_submodule(name), 5 * rand(4, 10)
    unit = vectors / vectors.norm(dim=-1, keepdim=True)
    torch.testing.assert_close(text_map(vectors), unit)
    text_map.get_submodule("mlp")[-1].weight.normal_()  # type: ignore[index, operator, union-attr]
    moved = text_map(vectors)
    assert not torch.allclose(moved, unit, atol=1e-2)
    torch.testing.assert_close(moved, text_map(0.01 * vectors))


@pytest.mark.parametrize("maps", [True, False])
@torch.no_grad()
def test_queries_are_unit_vectors(maps: bool) -> None:
    fam, vectors = awake(make_fam(fusion="linear", head="mean", maps_queries=maps)), 5 * rand(4, 10)
    queries = fam.encode_queries(vectors)
    torch.testing.assert_close(queries.norm(dim=-1), torch.ones(4))
    torch.testing.assert_close(queries, fam.encode_queries(0.01 * vectors))
    assert torch.allclose(queries, functional.normalize(vectors, dim=-1), atol=1e-3) == (not maps)


def test_matching_affects_retrieval_only_through_the_pooled_part(tiny_model: Models) -> None:
    """The vectors pass no gradient to the match head: the retrieval head and the query map learn nothing from it."""
    fam = awake(make_fam(blocks_for(tiny_model, "reuse"), matches=True))
    queries = fam.encode_queries(rand(5, 10))
    fam.match(fam.fuse(draw_states(5), None, draw_texts(MIXED)), queries).sum().backward()  # type: ignore[no-untyped-call]
    reached = {name.split(".")[0] for name, parameter in fam.named_parameters() if parameter.grad is not None}
    assert reached == {"decoders", "null_text", "match_head"}


# How layers are counted


@pytest.mark.parametrize(("convention", "expected"), [("hidden_states", 9), ("reference", 9), ("paper", 10)])
def test_index_conventions(convention: Any, expected: int) -> None:
    """The paper's layer 9 is what its block 9 puts out: hidden_states[10], whose next layer is block 10."""
    assert hidden_states_index(9, convention) == expected


def test_papers_layer_is_the_output_of_its_block(tiny_model: Models) -> None:
    encoder = load_tiny("dinov2", tiny_model("dinov2"))
    states, _ = states_of("dinov2", encoder)
    output = EncoderBlock(encoder.blocks[1])(states[1])
    np.testing.assert_allclose(output, states[hidden_states_index(1, "paper")], atol=1e-5, rtol=1e-5)
