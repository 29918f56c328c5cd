"""The SAFFE release's decoder: against a literal re-implementation, what trains in it, and its parameters' number."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest
import torch
from tiny_models import rand
from torch.nn import functional

from saffe_cache.core.features import BlockSpec, BlockWeights
from saffe_cache.fusion.base import Blocks, Texts
from saffe_cache.fusion.fam import ReferenceFusion
from saffe_cache.fusion.options import FusionShape
from saffe_cache.fusion.reference import ReferenceDecoder
from saffe_cache.fusion.registry import FUSIONS

WIDTH, TOKENS, TEXT_TOKENS = 32, 6, 4
Weights = dict[str, torch.Tensor]


def make_block(width: int, seed: int, heads: int = 4) -> BlockWeights:
    """Projections alone: the release takes nothing else from an encoder."""
    generator = np.random.default_rng(seed)
    tensors = {}
    for role in ("query", "key", "value", "output"):
        tensors[f"{role}_weight"] = generator.normal(0, width**-0.5, (width, width)).astype(np.float32)
        tensors[f"{role}_bias"] = generator.normal(size=width).astype(np.float32)
    spec = BlockSpec(num_attention_heads=heads, norm_first=True, activation="gelu", layer_norm_eps=1e-5)
    return BlockWeights(spec, tensors)


def make_fam(**changes: Any) -> ReferenceFusion:
    torch.manual_seed(3)
    shape: dict[str, Any] = {
        "fusion": "reference",
        "head": "flatten",
        "num_layers": 2,
        "hidden_size": WIDTH,
        "num_tokens": TOKENS,
        "text_hidden_size": WIDTH,
        "text_size": WIDTH,
        "share_decoder": True,
        "maps_queries": False,
    }
    blocks = Blocks(*([make_block(WIDTH, 2 * layer + side) for layer in range(2)] for side in range(2)))
    return ReferenceFusion(FusionShape(**(shape | changes)), blocks).eval()


def draw(seed: int = 0, count: int = 3) -> tuple[list[torch.Tensor], Texts]:
    states = [rand(count, TOKENS, WIDTH, seed=seed + layer) for layer in range(2)]
    words = tuple(rand(count, TEXT_TOKENS, WIDTH, seed=seed + 5 + layer) for layer in range(2))
    return states, Texts(words, torch.ones(count, TEXT_TOKENS, dtype=torch.bool), rand(count, WIDTH, seed=seed + 9))


def watch_weights(fam: ReferenceFusion) -> list[Weights]:
    """The decoder's weights as they are in front of each layer."""
    seen: list[Weights] = []

    def note(decoder: torch.nn.Module, _: object) -> None:
        seen.append({name: value.double().clone() for name, value in decoder.state_dict().items()})

    for decoder in fam.decoders:
        decoder.register_forward_pre_hook(note)
    return seen


# Against method and release


def literal_attention(queries: torch.Tensor, keys: torch.Tensor, values: torch.Tensor) -> torch.Tensor:
    """Eight heads, one after the other; the scale is that of their width."""
    size = queries.shape[-1] // 8
    heads = []
    for head in range(8):
        part = slice(head * size, (head + 1) * size)
        scores = queries[..., part] @ keys[..., part].transpose(1, 2) / size**0.5
        heads.append(scores.softmax(dim=-1) @ values[..., part])
    return torch.cat(heads, dim=-1)


def literal_layer(block: BlockWeights, other: BlockWeights, w: Weights, y0: torch.Tensor, x: torch.Tensor) -> Any:
    """One layer as the release computes it, in evaluation, with the matrices `w` that it has just drawn."""

    def project(owner: BlockWeights, role: str, values: torch.Tensor) -> torch.Tensor:
        weight, bias = (torch.tensor(owner.tensors[f"{role}_{part}"]).double() for part in ("weight", "bias"))
        return values @ weight.T + bias

    def linear(name: str, values: torch.Tensor) -> torch.Tensor:
        return values @ w[f"{name}.weight"].T + w[f"{name}.bias"]

    def norm(number: int, values: torch.Tensor) -> torch.Tensor:
        centred = values - values.mean(-1, keepdim=True)
        unit = centred / (centred.square().mean(-1, keepdim=True) + 1e-5).sqrt()
        return unit * w[f"norms.{number}.weight"] + w[f"norms.{number}.bias"]

    queries = project(block, "query", y0)
    own = literal_attention(queries, project(block, "key", y0), project(block, "value", y0))
    y1 = norm(0, linear("self_output", own) + y0)
    crossed = literal_attention(queries, project(other, "key", x), project(other, "value", x))
    y2 = norm(1, linear("cross_output", crossed) + y1)
    return norm(2, linear("outer", linear("inner", y2).relu()) + y2)


@pytest.mark.parametrize("shares", [True, False], ids=["shared", "own"])
@torch.no_grad()
def test_it_is_what_the_release_computes(shares: bool) -> None:
    """Two layers, each with the matrices drawn for it; norms and biases away from their start."""
    fam = make_fam(share_decoder=shares)
    for name, parameter in fam.decoders.named_parameters():
        if "norms" in name or name.endswith(".bias"):
            parameter += 0.3 * rand(*parameter.shape, seed=len(name))
    fam.head.linear.bias.copy_(rand(WIDTH))  # type: ignore[union-attr, operator]
    seen = watch_weights(fam)
    states, texts = draw()
    actual = fam(states, None, texts)
    fused = [
        literal_layer(make_block(WIDTH, 2 * i), make_block(WIDTH, 2 * i + 1), seen[i], state.double(), words.double())
        for i, (state, words) in enumerate(zip(states, texts.states, strict=True))
    ]
    flat = torch.cat(fused, dim=1).flatten(1)
    head = {name: value.double() for name, value in fam.head.state_dict().items()}
    vectors = (flat @ head["linear.weight"].T + head["linear.bias"]).relu()
    expected = vectors / vectors.norm(dim=-1, keepdim=True)
    torch.testing.assert_close(actual.double(), expected, atol=1e-5, rtol=1e-5)
    assert not torch.equal(seen[0]["outer.weight"], seen[1]["outer.weight"])


@torch.no_grad()
def test_weights_are_redrawn_by_every_forward_pass() -> None:
    """Two equal calls differ; the matrices are Xavier's, whatever they were before."""
    fam, (states, texts) = make_fam(), draw()
    first, second = fam(states, None, texts), fam(states, None, texts)
    assert (first - second).norm(dim=-1).min() > 0.05
    other = copy.deepcopy(fam)
    drawn = ("self_output", "cross_output", "inner", "outer")
    for name in drawn:
        other.decoders[0].get_submodule(name).weight.fill_(7.0)  # type: ignore[union-attr, operator]
    for one in (fam, other):
        torch.manual_seed(11)
        one(states, None, texts)
    for name in drawn:
        weight, replaced = (one.decoders[0].get_submodule(name).weight for one in (fam, other))
        assert isinstance(weight, torch.Tensor)
        assert torch.equal(weight, replaced)  # type: ignore[arg-type]
        limit = (6 / sum(weight.shape)) ** 0.5
        assert 0.98 * limit < weight.abs().max() <= limit


@torch.no_grad()
def test_it_ends_in_a_relu() -> None:
    fam, (states, texts) = make_fam(), draw()
    vectors = fam(states, None, texts)
    assert 0 <= vectors.min() < 1e-6
    assert 0.2 < (vectors < 1e-6).float().mean() < 0.8


def test_only_head_norms_and_one_bias_train() -> None:
    """Six tensors of norms, the MLP's second bias, and its second weight, which does not outlive the next forward."""
    fam, (states, texts) = make_fam().train(), draw()
    target = rand(3, WIDTH, seed=4)
    fam.freeze_unused(null_only=False)
    (fam(states, None, texts) * target).sum().backward()
    reached = {name for name, parameter in fam.named_parameters() if parameter.grad is not None}
    norms = {f"decoders.0.norms.{number}.{part}" for number in range(3) for part in ("weight", "bias")}
    outer = {"decoders.0.outer.weight", "decoders.0.outer.bias"}
    assert reached == {"head.linear.weight", "head.linear.bias"} | norms | outer
    assert all(float(fam.get_parameter(name).grad.abs().max()) > 0 for name in reached)  # type: ignore[union-attr]
    before = {name: parameter.detach().clone() for name, parameter in fam.named_parameters()}
    torch.optim.AdamW(fam.parameters(), lr=0.1).step()
    changed = {name for name, parameter in fam.named_parameters() if not torch.equal(parameter, before[name])}
    assert changed == reached
    updated = fam.decoders[0].get_submodule("outer").weight.detach().clone()  # type: ignore[union-attr, operator]
    fam(states, None, texts)
    now = fam.decoders[0].get_submodule("outer").weight.detach()  # type: ignore[union-attr, operator]
    correlation = np.corrcoef(updated.flatten(), now.flatten())[0, 1]
    assert abs(correlation) < 0.03


@torch.no_grad()
def test_a_wrong_text_changes_less_than_drawing_again() -> None:
    fam = make_fam()
    states, texts = draw(count=16)
    wrong = texts._replace(states=tuple(state.roll(1, 0) for state in texts.states))

    def run(given: Texts, seed: int) -> torch.Tensor:
        torch.manual_seed(seed)
        return copy.deepcopy(fam)(states, None, given)  # type: ignore[no-any-return]

    by_text = torch.stack([(run(texts, seed) - run(wrong, seed)).norm(dim=-1).mean() for seed in range(10)]).mean()
    by_draw = torch.stack([(run(texts, seed) - run(texts, seed + 50)).norm(dim=-1).mean() for seed in range(10)]).mean()
    assert by_text < by_draw


@torch.no_grad()
def test_frozen_projections_are_those_of_both_encoders() -> None:
    fam = make_fam()
    for number, layer in enumerate(fam.layers):
        assert not list(layer.parameters())
        for owner, seed in (("own", 2 * number), ("other", 2 * number + 1)):
            for role in ("query", "key", "value"):
                stored = layer.state_dict()[f"{owner}_{role}_weight"]
                np.testing.assert_array_equal(stored, make_block(WIDTH, seed).tensors[f"{role}_weight"])


def test_differing_widths_are_refused() -> None:
    with pytest.raises(ValueError, match=r"--fusion reference: the encoders are 32 and 16 wide.*Use --fusion reuse"):
        ReferenceDecoder.layer_of(make_block(32, 0), make_block(16, 1))


# How many parameters

COUNTS = [
    ("B/32 P=1", 1, 50, 768, 29_491_968, 37_369_856, 37_369_856),
    ("B/32 P=2", 2, 50, 768, 58_983_168, 66_861_056, 74_738_944),
    ("B/32 P=3", 3, 50, 768, 88_474_368, 96_352_256, 112_108_032),
    ("B/32 P=4", 4, 50, 768, 117_965_568, 125_843_456, 149_477_120),
    ("B/16 P=2", 2, 197, 768, 232_391_424, 240_269_312, 248_147_200),
    ("L/14 P=2", 2, 257, 1024, 538_969_088, 551_569_408, 564_169_728),
    ("MAE-base, 197 tokens", 2, 197, 768, 232_391_424, 240_269_312, 248_147_200),
    ("MAE-base, 50 tokens", 2, 50, 768, 58_983_168, 66_861_056, 74_738_944),
]
"""Name, layers, tokens, width; parameters of linear, and of reference with one decoder for all layers and one each."""


def count_parameters(
    fusion: str, blocks: Sequence[BlockWeights], layers: int, tokens: int, width: int, shares: bool
) -> int:
    """Of decoders and head, on no device."""
    shape = FusionShape(
        fusion=fusion,
        head="flatten",
        num_layers=layers,
        hidden_size=width,
        num_tokens=tokens,
        text_hidden_size=width,
        text_size=width,
        share_decoder=shares,
        maps_queries=False,
    )
    given = Blocks([blocks[0]] * layers, [blocks[1]] * layers) if shape.entry.has_decoder else Blocks()
    with torch.device("meta"):
        fam = FUSIONS[fusion].make(shape, given)
    return sum(parameter.numel() for part in (fam.decoders, fam.head) for parameter in part.parameters())


@pytest.mark.parametrize(("layers", "tokens", "width", "linear", "shared", "apart"), [case[1:] for case in COUNTS])
def test_parameters_are_as_many_as_the_papers(
    layers: int, tokens: int, width: int, linear: int, shared: int, apart: int
) -> None:
    """The SAFFE paper's 67 M (CLIP B/32) and 240 M (B/16) are those of one decoder for two layers, to the digit.

    Its other two numbers cannot be explained: 351 M for 1024 wide encoders fits no natural configuration (551.6 M is
    what one decoder gives), and 264 M for MAE is neither 240 M (197 tokens) nor 67 M (50 tokens).
    """
    blocks = [BlockWeights(_SPEC, dict.fromkeys(_ROLES, np.zeros((width, width), np.float32))) for _ in range(2)]
    size = (layers, tokens, width)
    assert count_parameters("linear", blocks, *size, shares=False) == linear
    assert count_parameters("reference", blocks, *size, shares=True) == shared
    assert count_parameters("reference", blocks, *size, shares=False) == apart


def test_unused_layers_count_too() -> None:
    """3,543,552 of a decoder's 7,877,888 parameters, at a width of 768."""
    block = BlockWeights(_SPEC, dict.fromkeys(_ROLES, np.zeros((768, 768), np.float32)))
    with torch.device("meta"):
        decoder = ReferenceDecoder(block, block)
    sizes = {name: sum(p.numel() for p in part.parameters()) for name, part in decoder.named_children()}
    assert sum(sizes.values()) == 7_877_888
    assert sizes["qkv_layer"] + sizes["kv_layer"] + sizes["q_layer"] == 3_543_552
    assert sizes["norms"] == 4_608


_ROLES = [f"{role}_weight" for role in ("query", "key", "value", "output")]
_SPEC = BlockSpec(num_attention_heads=12, norm_first=True, activation="gelu", layer_norm_eps=1e-5)


def test_dropout_is_off_in_evaluation_alone() -> None:
    fam, (states, texts) = make_fam(), draw()

    def run(*, training: bool, seed: int) -> torch.Tensor:
        """Different dropout, but the same matrices: the first layer's, before anything is drawn anew."""
        torch.manual_seed(seed)
        one = copy.deepcopy(fam).train(training)
        decoder: Any = one.decoders[0]
        layer: Any = one.layers[0]
        entered = decoder.enter(layer, states[0], None)
        return decoder(layer, states[0], entered, decoder.keys_values(layer, texts.states[0]), None).detach()

    assert torch.equal(run(training=False, seed=1), run(training=False, seed=2))
    assert not torch.allclose(run(training=True, seed=1), run(training=True, seed=2), atol=1e-3)
    difference = functional.mse_loss(run(training=True, seed=1), run(training=False, seed=1))
    assert difference > 1e-4
