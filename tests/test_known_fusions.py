"""Fusions from elsewhere: each against its own formula or another implementation, and the counts that are published.

What all fusions promise (null text, pairing, padding, gradients) is held in test_fusion.py.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any, cast

import numpy as np
import pytest
import torch
import transformers
from drawn import close, unit
from quick_runs import report_of, value
from recipes import install, register
from synthetic_cache import make_cache
from tiny_models import CASES, inputs_of, load_tiny, rand
from torch import nn

from saffe_cache.core.features import BlockWeights, CacheError
from saffe_cache.fusion import registry
from saffe_cache.fusion.base import Blocks, Fusion, Texts
from saffe_cache.fusion.known.correction import CorrectingFusion
from saffe_cache.fusion.known.cross_attention import GatedCrossAttention, Resampler
from saffe_cache.fusion.known.insertion import inserted_tokens
from saffe_cache.fusion.layers import summarize
from saffe_cache.fusion.options import FusionShape
from saffe_cache.fusion.registry import FUSIONS, FusionEntry
from saffe_cache.store.reader import open_cache
from saffe_cache.training.config import TrainConfig
from saffe_cache.training.resolve import resolve_run
from saffe_cache.training.train import train

Models = Callable[[str], Path]
ELSEWHERE = [name for name, entry in FUSIONS.items() if "head" not in entry.options and not entry.is_special]
CORRECTING = [name for name in ELSEWHERE if "pooled_text" in FUSIONS[name].options]
MASK = torch.tensor([[True] * 5, [True] * 3 + [False] * 2, [True] + [False] * 4])


def shape_of(fusion: str, **changes: Any) -> FusionShape:
    values: dict[str, Any] = {"head": "attention", "num_layers": 1, "hidden_size": 32, "num_tokens": 10}
    values |= {"text_hidden_size": 32, "text_size": 32, "num_blocks": 2}
    values["pooled_text"] = "pooled_text" in FUSIONS[fusion].options
    return FusionShape(fusion=fusion, **(values | changes))


def last_blocks(name: str, tiny_model: Models) -> list[BlockWeights]:
    blocks = load_tiny(name, tiny_model(name)).blocks
    return [blocks[1], blocks[2]]


def make(fusion: str, tiny_model: Models, text: str = "bert", **changes: Any) -> Fusion:
    torch.manual_seed(1)
    blocks = Blocks(last_blocks("dinov2", tiny_model), last_blocks(text, tiny_model))
    return FUSIONS[fusion].make(shape_of(fusion, **changes), blocks).eval()


@torch.no_grad()
def wake(fusion: Fusion) -> Fusion:
    generator = torch.Generator().manual_seed(3)
    for parameter in fusion.parameters():
        if parameter.requires_grad:
            parameter += 0.2 * torch.randn(parameter.shape, generator=generator)
    return fusion


def draw_texts(mask: torch.Tensor = MASK, width: int = 32) -> Texts:
    return Texts((rand(*mask.shape, width, seed=11),), mask, rand(len(mask), 32, seed=12))


def num_trained(module: nn.Module) -> int:
    return sum(parameter.numel() for parameter in module.parameters() if parameter.requires_grad)


@pytest.mark.slow
@pytest.mark.parametrize("fusion", CORRECTING)
@torch.no_grad()
def test_all_start_as_the_same_late_fusion(fusion: str, tiny_model: Models) -> None:
    """Of the linear map of the photo's summary and the text's own vector, which its map starts as."""
    model, states, texts = make(fusion, tiny_model), [rand(3, 10, 32)], draw_texts()
    assert isinstance(model, CorrectingFusion)
    photo = unit(model.linear(summarize(states, None)))
    close(model(states), photo)
    close(model(states, None, texts), unit(photo + unit(texts.vectors)))
    wake(model)
    corrected = unit(model.linear(summarize(states, None)))
    late = unit(corrected + model.text_weight * model.text_map(texts.vectors))
    assert torch.allclose(model(states, None, texts), late, atol=1e-4) == (fusion == "late")


@torch.no_grad()
def test_hadamard_is_low_rank_bilinear_pooling(tiny_model: Models) -> None:
    model: Any = wake(make("hadamard", tiny_model, pooled_text=False))
    states, texts = [rand(3, 10, 32)], draw_texts()
    summary = summarize(states, None)
    text = unit(texts.vectors) * 32**0.5
    u, v, p = (part.weight.numpy() for part in (model.of_photo, model.of_text, model.out))
    b_u, b_v, b_p = (part.bias.numpy() for part in (model.of_photo, model.of_text, model.out))
    joint = np.tanh(summary.numpy() @ u.T + b_u) * np.tanh(text.numpy() @ v.T + b_v)
    expected = model.linear(summary) + torch.tensor(joint @ p.T + b_p)
    close(model(states, None, texts), unit(expected))
    of_late_fusion = num_trained(make("late", tiny_model, pooled_text=False))
    assert num_trained(model) - of_late_fusion == 65 * 1200 + 33 * 1200 + 1201 * 32


@torch.no_grad()
def test_two_towers_average_in_their_space(tiny_model: Models) -> None:
    shape = shape_of("two_tower", hidden_size=768, text_size=768)
    with torch.device("meta"):
        assert num_trained(FUSIONS["two_tower"].make(shape, Blocks())) == 393_728  # ALBEF's two heads
    model, states, texts = make("two_tower", tiny_model), [rand(3, 10, 32)], draw_texts()
    alone, beside = model(states), model(states, None, texts)
    close(beside, unit(alone + model.encode_queries(texts.vectors)))
    other = [torch.cat([states[0][:, :1], rand(3, 9, 32, seed=5)], dim=1)]
    close(model(other), alone)  # the first token is all that is read


def modules_of(name: str, tiny_model: Models) -> list[nn.Module]:
    """The last two layers of the model itself."""
    case = CASES[name]
    model = getattr(transformers, case.reference).from_pretrained(tiny_model(name), **case.options).eval()
    layers = model
    for part in case.layers.split("."):
        layers = getattr(layers, part)
    return list(layers)[1:]  # type: ignore[arg-type]


def run_layer(
    layer: nn.Module, hidden: torch.Tensor, mask: torch.Tensor | None = None, *, is_causal: bool = False
) -> torch.Tensor:
    """A model's own layer."""
    bias = None
    if mask is not None:
        length = mask.shape[1]
        allowed = mask[:, None, None] & (torch.ones(length, length).tril() if is_causal else torch.ones(1, 1)).bool()
        bias = torch.zeros(allowed.shape).masked_fill(~allowed, -1e30)
    found = layer(hidden) if mask is None else layer(hidden, bias)
    return found[0] if isinstance(found, tuple) else found


@pytest.mark.parametrize(("name", "width"), [("bert", 32), ("clip-text", 24)])
@torch.no_grad()
def test_bottlenecks_are_mbts_equations(name: str, width: int, tiny_model: Models) -> None:
    """With the models' own layers: both run over their tokens and the bottlenecks, which are then averaged."""
    model: Any = wake(make("mbt", tiny_model, name, pooled_text=False, text_hidden_size=width))
    photo, texts = rand(3, 10, 32), draw_texts(width=width)
    text, z = texts.states[0], model.bottlenecks.expand(3, -1, -1)
    seen = torch.cat([MASK, torch.ones(3, 4, dtype=torch.bool)], dim=1)  # behind, which BERT's layers do not notice
    for photo_layer, text_layer in zip(modules_of("dinov2", tiny_model), modules_of(name, tiny_model), strict=True):
        of_photo = run_layer(photo_layer, torch.cat([photo, z], dim=1))
        given = torch.cat([text, model.to_text(z)], dim=1)
        of_text = run_layer(text_layer, given, seen, is_causal=name == "clip-text")
        photo, text = of_photo[:, :10], of_text[:, :5]
        z = (of_photo[:, 10:] + model.to_photo(of_text[:, 5:])) / 2
    summaries = torch.cat([summarize([photo], None), summarize([text], MASK)], dim=-1)
    start = rand(3, 10, 32)
    expected = unit(model.linear(summarize([start], None)) + model.out(summaries))
    torch.testing.assert_close(model([start], None, texts), expected, atol=1e-4, rtol=1e-4)


@torch.no_grad()
def test_bottlenecks_are_the_only_way_between_the_encoders(tiny_model: Models) -> None:
    """After one block the photo's tokens know nothing of the text; after two they do."""
    for count, differs in ((1, False), (2, True)):
        torch.manual_seed(1)
        blocks = Blocks(last_blocks("dinov2", tiny_model)[:count], last_blocks("bert", tiny_model)[:count])
        model = wake(FUSIONS["mbt"].make(shape_of("mbt"), blocks).eval())
        texts = draw_texts()
        other = texts._replace(states=(rand(3, 5, 32, seed=77),))
        first, second = (model.fuse([rand(3, 10, 32)], None, given).states[0] for given in (texts, other))
        assert bool((first - second).abs().max() > 1e-4) == differs


@pytest.mark.parametrize("fusion", ["mbt", "flamingo", "limber", "albef"])
@torch.no_grad()
def test_padding_does_not_move_what_counts_places(fusion: str, tiny_model: Models) -> None:
    """MPNet's attention has a bias of relative positions."""
    model, photo = wake(make(fusion, tiny_model, "mpnet")), [rand(1, 10, 32)]
    texts = draw_texts(torch.tensor([[True] * 3 + [False] * 9]))
    short = Texts((texts.states[0][:, :3],), texts.mask[:, :3], texts.vectors)
    close(model(photo, None, texts), model(photo, None, short))


def test_flamingos_published_parameters() -> None:
    """As the Perceiver resampler and gated block of the common re-implementation count, which has 4 media positions."""
    with torch.device("meta"):
        assert num_trained(Resampler(768)) == 12_645_888 - 3 * 768
        assert num_trained(Resampler(768, depth=6)) == 37_830_144 - 3 * 768
        assert num_trained(GatedCrossAttention(768, 768)) == 6_294_530


@torch.no_grad()
def test_gated_cross_attention_is_torchs_attention_behind_gates() -> None:
    torch.manual_seed(0)
    gated: Any = GatedCrossAttention(32, 24).eval()
    tokens, media = rand(3, 5, 32), rand(3, 7, 24)
    close(gated(tokens, media), tokens)  # closed
    gated.attention_gate.gate.fill_(0.5)
    gated.feed_forward_gate.gate.fill_(-0.3)
    attention = nn.MultiheadAttention(512, 8, batch_first=True, bias=False, kdim=24, vdim=24).eval()
    attention.q_proj_weight.copy_(torch.eye(512))
    keys, values = gated.attention.key_value.weight.chunk(2)
    attention.k_proj_weight.copy_(keys)
    attention.v_proj_weight.copy_(values)
    attention.out_proj.weight.copy_(torch.eye(512))
    attended, _ = attention(gated.attention.query(gated.attention.norm(tokens)), media, media)
    y = tokens + np.tanh(0.5) * gated.attention.output(attended)
    norm, first, _, last = gated.feed_forward
    close(gated(tokens, media), y + np.tanh(-0.3) * last(nn.functional.gelu(first(norm(y)))))


@torch.no_grad()
def test_resampler_looks_at_the_photo_and_itself() -> None:
    """One layer of it, by a loop over heads; padded tokens do not count."""
    torch.manual_seed(0)
    resampler: Any = Resampler(16, num_latents=3, depth=1).eval()
    mask = torch.tensor([[True] * 4, [True, True, False, False]])
    tokens = rand(2, 4, 16)
    layer = resampler.layers[0]
    for row, length in enumerate((4, 2)):
        x, z = tokens[row, :length] + resampler.photo_position, resampler.latents
        asked = layer["attention"].norm(z)
        context = torch.cat([layer["attention"].context_norm(x), asked])
        queries = layer["attention"].query(asked)
        keys, values = layer["attention"].key_value(context).chunk(2, dim=-1)
        heads = []
        for head in range(8):
            part = slice(64 * head, 64 * head + 64)
            weights = (queries[:, part] @ keys[:, part].T / 8).softmax(dim=-1)
            heads.append(weights @ values[:, part])
        z = z + layer["attention"].output(torch.cat(heads, dim=-1))
        close(resampler(tokens, mask)[row], resampler.norm(z + layer["feed_forward"](z)))


@pytest.mark.parametrize("fusion", ["flamingo", "albef"])
@torch.no_grad()
def test_closed_cross_attention_is_the_text_encoder_itself(fusion: str, tiny_model: Models) -> None:
    """The text's tokens, from layer 1 on, end as the model's own last hidden state."""
    encoder = load_tiny("bert", tiny_model("bert"))
    inputs = inputs_of("bert", encoder)
    states = encoder.encode(inputs).states
    mask = inputs["attention_mask"].bool()
    texts = Texts((torch.tensor(states[1]),), mask, rand(len(mask), 32))
    model = make(fusion, tiny_model)
    fused = model.fuse([rand(len(mask), 10, 32)], None, texts)
    last = torch.tensor(states[3])
    torch.testing.assert_close(fused.states[0][mask], last[mask], atol=1e-4, rtol=1e-4)
    opened = wake(model).fuse([rand(len(mask), 10, 32)], None, texts)
    assert (opened.states[0] - last)[mask].abs().max() > 0.1


@torch.no_grad()
def test_albef_asks_the_photo_between_the_halves_of_each_block(tiny_model: Models) -> None:
    """BERT's own halves, and a loop over heads between them; some of the photo's tokens are padding."""
    model: Any = wake(make("albef", tiny_model, pooled_text=False, matches=True))
    photo, texts = rand(3, 10, 32), draw_texts()
    photo_mask = torch.tensor([[True] * 10, [True] * 4 + [False] * 6, [True] * 9 + [False]])
    bias = torch.zeros(3, 1, 1, 5).masked_fill(~MASK[:, None, None], -1e30)
    tokens = texts.states[0]
    for layer, cross in zip(modules_of("bert", tiny_model), model.cross_attentions, strict=True):
        own: Any = layer
        tokens = own.attention(tokens, bias)[0]
        weights, biases = cross.attention.in_proj_weight.chunk(3), cross.attention.in_proj_bias.chunk(3)
        asked = cross.context_norm(photo)
        given = (cross.norm(tokens), asked, asked)
        q, k, v = (x @ w.T + b for x, w, b in zip(given, weights, biases, strict=True))
        heads = []
        for part in (slice(8 * head, 8 * head + 8) for head in range(4)):
            scores = (q[..., part] @ k[..., part].transpose(1, 2) / 8**0.5).masked_fill(~photo_mask[:, None], -1e30)
            heads.append(scores.softmax(dim=-1) @ v[..., part])
        tokens = tokens + cross.attention.out_proj(torch.cat(heads, dim=-1))
        tokens = own.output(own.intermediate(tokens), tokens)
    means = torch.stack([row[kept].mean(dim=0) for row, kept in zip(tokens, MASK, strict=True)])
    fused = model.fuse([photo], photo_mask, texts)
    expected = unit(model.linear(summarize([photo], photo_mask)) + model.out(means))
    torch.testing.assert_close(fused.vectors, expected, atol=1e-4, rtol=1e-4)
    chances = model.match_head(tokens[:, 0])
    torch.testing.assert_close(model.match(fused, fused.vectors), chances[:, 1] - chances[:, 0], atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize(("name", "width"), [("bert", 32), ("clip-text", 24)])
@torch.no_grad()
def test_albefs_matching_sees_the_whole_text(name: str, width: int, tiny_model: Models) -> None:
    """In a causal text encoder the last token alone knows all of it."""
    model = wake(make("albef", tiny_model, name, text_hidden_size=width, matches=True))
    texts, photo = draw_texts(width=width), [rand(3, 10, 32)]
    other = texts.states[0].clone()
    other[:2, 1:] = rand(2, 4, width, seed=5)  # the third text has one token
    first, second = (
        model.match(model.fuse(photo, None, texts._replace(states=(states,))), texts.vectors)
        for states in (texts.states[0], other)
    )
    assert (first - second)[:2].abs().min() > 1e-3
    close(first[2], second[2])


def test_albefs_matching_head() -> None:
    with torch.device("meta"):
        model = FUSIONS["albef"].make(shape_of("albef", text_hidden_size=768, matches=True), Blocks())
    assert num_trained(model.match_head) == 1_538


def test_limbers_map() -> None:
    shape = shape_of("limber", hidden_size=768, text_hidden_size=768)
    with torch.device("meta"):
        model: Any = FUSIONS["limber"].make(shape, Blocks())
    assert num_trained(model.project) == 590_592


@pytest.mark.parametrize("fusion", ["limber", "magma", "deep_insert", "frozen"])
@torch.no_grad()
def test_inserted_photos_are_tokens_in_front_of_the_text(fusion: str, tiny_model: Models) -> None:
    """With the text encoder's own layers."""
    model: Any = wake(make(fusion, tiny_model, pooled_text=False, text_rms=3.0))
    texts, photo = draw_texts(), rand(3, 10, 32)
    summary = summarize([photo], None)
    inserted = model.project(summary).view(3, 2, 32) if fusion == "frozen" else model.insert(photo)
    count = inserted.shape[1]
    tokens = torch.cat([inserted, texts.states[0]], dim=1)
    seen = torch.cat([torch.ones(3, count, dtype=torch.bool), MASK], dim=1)
    for number, layer in enumerate(modules_of("bert", tiny_model)):
        tokens = run_layer(layer, tokens, seen)
        if fusion == "magma":
            tokens = tokens + model.adapters[number](tokens)
    text = torch.stack([row[count:][kept].mean(dim=0) for row, kept in zip(tokens, MASK, strict=True)])
    read = torch.cat([tokens[:, :count].mean(dim=1), text], dim=-1)
    expected = unit(model.linear(summary) + model.out(read))
    torch.testing.assert_close(model([photo], None, texts), expected, atol=1e-4, rtol=1e-4)


@torch.no_grad()
def test_deep_insertion_starts_at_the_size_of_the_texts_tokens(tiny_model: Models) -> None:
    model: Any = make("deep_insert", tiny_model, text_rms=3.0)
    inserted = model.insert(100 * rand(3, 10, 32))
    assert float(inserted.square().mean().sqrt()) == pytest.approx(3.0, rel=0.01)


@pytest.mark.parametrize("count", [65, 50, 197, 31])
@torch.no_grad()
def test_a_photos_many_tokens_are_averaged_over_a_grid(count: int, tiny_model: Models) -> None:
    """17 stay, and each patch has its cell."""
    model = wake(make("limber", tiny_model))
    state = rand(1, 1, 32).expand(1, count, 32).clone()
    tokens = model.fuse([state]).states[0]
    assert tokens.shape[1] == 17
    if count == 65:  # 8 by 8 patches, 2 by 2 of them a cell
        other = state.clone()
        other[0, 1 + 8 * 3 + 6] += 1  # row 3, column 6: cell 1, 3
        inserted, before = (inserted_tokens(given, None)[0] for given in (other, state))
        changed = (inserted - before).abs().sum(dim=-1)[0].nonzero().flatten().tolist()
        assert changed == [1 + 4 * 1 + 3]


IMPORTS = """
from __future__ import annotations
import torch
from torch import nn
from saffe_cache.fusion.base import Blocks
from saffe_cache.fusion.known.correction import Correction, CorrectingFusion, masked
from saffe_cache.fusion.layers import zero_linear
from saffe_cache.fusion.options import FusionShape
"""


@torch.no_grad()
def test_documented_fusion_is_one_class_and_one_entry(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Null text changes nothing, and a text changes the vector as the code says."""
    install("saffe_cache/fusion/known/gated.py", tmp_path, monkeypatch)
    register("gated", registry, "FUSIONS", monkeypatch)
    entry = FUSIONS["gated"]
    shape = shape_of("gated", pooled_text=False)
    model = wake(entry.make(shape, Blocks()).eval())
    states, texts = [rand(3, 10, 32)], draw_texts()
    summary = summarize(states, None)
    close(model(states), unit(model.linear(summary)))
    close(model(states, None, texts.without(torch.ones(3, dtype=torch.bool))), model(states))
    gated = torch.sigmoid(model.gate(summary)) * texts.vectors
    close(model(states, None, texts), unit(model.linear(summary) + model.out(gated)))
    idle = {name.split(".")[0] for name, _ in model.named_parameters() if name.startswith(model.idle_with_null)}
    assert idle == {"gate", "out"}


@pytest.mark.slow
def test_added_fusion_trains_and_is_evaluated(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """One class and one registry entry are all that training, evaluation and the command line need."""
    (tmp_path / "added_fusion.py").write_text(f"{IMPORTS}\n{ADDED_FUSION}\n")
    monkeypatch.syspath_prepend(tmp_path)
    entry = FusionEntry(made_by="added_fusion:Added", summary="For this test.", objective={"siglip": 1.0})
    monkeypatch.setitem(cast(dict[str, FusionEntry], FUSIONS), "added", entry)
    cache = make_cache(tmp_path / "cache.zarr", {"train": 60, "dev": 20, "test": 20}, captions=3, joint=True)
    options: dict[str, Any] = {"fusion": "added", "gallery_text": "first_caption", "batch_size": 16, "epochs": 2}
    run = train(TrainConfig(cache=cache, out=str(tmp_path / "run"), device="cpu", log=("none",), **options))
    report = report_of(cache, run)
    assert report["run"]["shape"]["fusion"] == "added"
    assert report["run"]["objective"] == {"siglip": 1.0}
    assert 0 < value(report, "map") <= 1
    with pytest.raises(ValueError, match="--query-side: found text, expected nothing: added has no such option"):
        resolve_run(config_for(cache, fusion="added", query_side="text"), open_cache(cache))


ADDED_FUSION = """
class Added(CorrectingFusion):
    idle_with_null = ("out.",)

    def __init__(self, shape, blocks):
        super().__init__(shape)
        self.out = zero_linear(shape.text_size, shape.text_size)

    def correct(self, states, mask, texts, summary):
        vectors = None if texts is None else masked(self.out(texts.vectors), texts.is_text)
        return Correction(vectors, states[-1], mask)
"""


# In a training


@pytest.fixture(scope="module")
def notes_path(tmp_path_factory: pytest.TempPathFactory) -> str:
    return make_cache(tmp_path_factory.mktemp("known") / "cache", {"train": 120, "test": 30}, captions=3)


def config_for(cache: str, **changes: Any) -> TrainConfig:
    return TrainConfig(cache=cache, out="unused", **changes)


def test_what_each_reads_and_runs(notes_path: str) -> None:
    """The cache holds layers 2 and 3 of 3, and block 2, of both encoders."""
    cache = open_cache(notes_path)
    for fusion in ("late", "two_tower"):
        spec = resolve_run(config_for(notes_path, fusion=fusion), cache)
        assert (spec.gallery_layers, spec.text_layers, spec.shape.num_blocks) == ((2, 3), (), 0)
    for fusion in ("flamingo", "limber", "magma", "deep_insert", "albef"):
        spec = resolve_run(config_for(notes_path, fusion=fusion), cache)
        assert (spec.gallery_layers, spec.text_layers, spec.shape.num_blocks) == ((2, 3), (2,), 1)
    numbers = cache.encoder("text").array("hidden_states/2").read(np.arange(20))
    everything = cache.encoder("text").statistics("hidden_states/2")
    assert spec.shape.text_rms == pytest.approx(float(np.sqrt((numbers**2).mean())), rel=0.3)
    assert spec.shape.text_rms == pytest.approx(np.hypot(everything.mean, everything.std))
    assert resolve_run(config_for(notes_path, fusion="albef"), cache).shape.matches
    unsorted = resolve_run(config_for(notes_path, fusion="limber", layers={"image": (3, 2)}), cache)
    assert unsorted.gallery_layers == (2, 3)  # the last of which is inserted


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"fusion": "mbt"}, ValueError, "found image=2 and text=2, expected layers followed by two blocks or more"),
        ({"fusion": "hadamard"}, ValueError, "found hadamard with null text"),
        ({"fusion": "limber", "layers": {"text": (1,)}}, CacheError, r"can use layers \[2\].*requested \[1\]"),
        ({"fusion": "limber", "layers": {"text": (3,)}}, CacheError, r"requested \[3\]"),
        ({"fusion": "late", "layers": {"text": (2,)}}, ValueError, "late takes no tokens"),
        ({"fusion": "flamingo", "head": "mean"}, ValueError, "flamingo has no such option"),
        (
            {"fusion": "two_tower", "gallery_text": "first_caption", "pooled_text": True},
            ValueError,
            "two_tower has no such option",
        ),
        ({"fusion": "plus"}, ValueError, "--fusion: found plus, expected auto or reuse or paper"),
    ],
)
def test_what_does_not_fit_is_named(
    notes_path: str, changes: dict[str, Any], error: type[Exception], message: str
) -> None:
    with pytest.raises(error, match=message):
        resolve_run(config_for(notes_path, **changes), open_cache(notes_path))
