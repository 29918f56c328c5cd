"""Published heads on vectors and tokens: each against its formula, its limits, and what must not change it."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from drawn import close, unit, woken
from tiny_models import rand
from torch import nn
from torch.nn import functional

from saffe_cache.core.ranks import Share
from saffe_cache.fusion.base import Blocks, Texts
from saffe_cache.fusion.known.gpo import PoolingOperator, descending, drop_tokens, rank_codes
from saffe_cache.fusion.layers import summarize
from saffe_cache.fusion.losses import Batch, Contrast, siglip
from saffe_cache.fusion.options import FusionShape, ObjectiveOptions
from saffe_cache.fusion.registry import FUSIONS
from saffe_cache.fusion.vectors.freeze_align import FreezeAlignFusion, Projector
from saffe_cache.fusion.vectors.fusemix import Adapter
from saffe_cache.fusion.vectors.sail import Sail, StarHead

LAYERS, WIDTH, TEXT_WIDTH, TOKENS = 2, 8, 6, 5
GALLERY_MASK = torch.tensor([[True] * 5, [True] * 3 + [False] * 2, [True] * 4 + [False]])


def make(fusion: str, **changes: Any) -> Any:
    torch.manual_seed(1)
    values: dict[str, Any] = {"num_layers": LAYERS, "hidden_size": WIDTH, "num_tokens": TOKENS, "pooled_text": False}
    values |= {"head": "attention", "text_hidden_size": TEXT_WIDTH, "text_size": TEXT_WIDTH}
    return FUSIONS[fusion].make(FusionShape(fusion=fusion, **(values | changes)), Blocks()).eval()


def draw_states(count: int = 3, seed: int = 0) -> list[torch.Tensor]:
    return [rand(count, TOKENS, WIDTH, seed=seed + layer) for layer in range(LAYERS)]


def normed(values: torch.Tensor) -> torch.Tensor:
    return functional.layer_norm(values, values.shape[-1:])


def photos_of(model: Any, states: list[torch.Tensor], mask: torch.Tensor | None = None) -> torch.Tensor:
    """As the loader gives them to a fusion that reads summaries."""
    if FUSIONS[model.shape.fusion].reads == "summary":
        summary = summarize(states, mask, has_class_token=model.shape.has_class_token)
        return model([summary[:, None]])  # type: ignore[no-any-return]
    return model(states, mask)  # type: ignore[no-any-return]


HEADS = ("contrastive", "fusemix", "sail", "sharelock", "freeze_align", "gpo", "dino_txt")


@pytest.mark.parametrize("fusion", HEADS)
@torch.no_grad()
def test_paired_text_is_averaged_and_null_text_is_not(fusion: str) -> None:
    model, states = woken(make(fusion)), draw_states()
    if FUSIONS[fusion].reads == "summary":
        states = [summarize(states, None)[:, None]]
    vectors = 5 * rand(3, TEXT_WIDTH, seed=9)
    texts = Texts((), torch.tensor([[True], [False], [True]]), vectors)
    alone, beside, queries = model(states), model(states, None, texts), model.encode_queries(vectors)
    close(beside[1], alone[1])
    close(beside[[0, 2]], unit(alone + queries)[[0, 2]])
    close(queries, model.encode_queries(vectors / 7))  # only the text's direction counts
    close(queries[1:2], model.encode_queries(vectors[1:2]))  # and no text depends on the others


@torch.no_grad()
def test_contrastive_is_one_linear_map_a_side() -> None:
    model, states, vectors = make("contrastive"), draw_states(), rand(4, TEXT_WIDTH)
    summary = summarize(states, None).numpy()
    mapped = summary @ model.photo_linear.weight.numpy().T + model.photo_linear.bias.numpy()
    close(photos_of(model, states), torch.tensor(mapped / np.linalg.norm(mapped, axis=1, keepdims=True)))
    direction = vectors.numpy() / np.linalg.norm(vectors.numpy(), axis=1, keepdims=True) * TEXT_WIDTH**0.5
    mapped = direction @ model.text_linear.weight.numpy().T + model.text_linear.bias.numpy()
    close(model.encode_queries(vectors), torch.tensor(mapped / np.linalg.norm(mapped, axis=1, keepdims=True)))


# FuseMix


@torch.no_grad()
def test_adapter_is_residual_blocks_a_norm_and_a_map() -> None:
    adapter, vectors = woken(Adapter(WIDTH, 3, 0.0)), rand(4, WIDTH)
    expected = vectors
    for block in adapter.blocks:
        norm, first, _, _, last = block
        inner = functional.gelu(first(normed(expected) * norm.weight + norm.bias))
        expected = expected + inner @ last.weight.T + last.bias
    expected = normed(expected) * adapter.norm.weight + adapter.norm.bias
    close(adapter(vectors), expected @ adapter.output.weight.T + adapter.output.bias)


def test_adapter_without_inner_output_is_norm_and_map() -> None:
    adapter, vectors = Adapter(WIDTH, 3, 0.5).train(), rand(4, WIDTH)
    for block in adapter.blocks:
        nn.init.zeros_(block[-1].weight)  # type: ignore[index, union-attr]
        nn.init.zeros_(block[-1].bias)  # type: ignore[index, union-attr]
    close(adapter(vectors), adapter.output(normed(vectors)))


# SAIL


@torch.no_grad()
def test_star_head_is_a_gated_product() -> None:
    head, vectors = woken(StarHead(WIDTH, 3, 0.0)), 20 * rand(4, WIDTH)
    inner = normed(vectors) * head.norm.weight + head.norm.bias
    gate, value = inner @ head.gate.weight.T + head.gate.bias, inner @ head.value.weight.T + head.value.bias
    close(head(vectors), (gate.clamp(0, 6) * value) @ head.output.weight.T + head.output.bias)
    nn.init.zeros_(head.value.weight)
    nn.init.ones_(head.value.bias)
    close(head(vectors), head.output(functional.relu6(gate)))


@torch.no_grad()
def test_star_head_is_not_linear_without_its_norm() -> None:
    head, vectors = woken(StarHead(WIDTH, 3, 0.0)), rand(4, WIDTH)
    head.norm = nn.Identity()
    for part in (head.gate, head.value, head.output):
        nn.init.zeros_(part.bias)
    assert (head(2 * vectors) - 2 * head(vectors)).abs().max() > 0.1
    head.gate.weight.mul_(1e-3)  # far from relu6's bounds it is quadratic in positive directions
    close(head(2 * vectors), 4 * head(vectors))


def contrast(photos: torch.Tensor, queries: torch.Tensor, positives: torch.Tensor) -> Contrast:
    """What an objective sees of these vectors."""
    of_photos, of_texts = Share.of(len(photos)), Share.of(len(queries))
    rows, own = np.arange(len(queries)), positives.float().argmax(dim=1)
    batch = Batch(of_photos, of_texts, [photos], None, None, rows, queries, positives, own)
    return Contrast(batch, photos, queries, lambda one, _: one, lambda one, _: one, lambda states, _: states[0])


def test_sail_loss_is_siglips_by_the_number_of_texts() -> None:
    photos, queries, positives = unit(rand(7, 5)), unit(rand(7, 5, seed=1)), torch.eye(7, dtype=torch.bool)
    loss = Sail(ObjectiveOptions())
    found = loss(contrast(photos, queries, positives))
    scores = 20 * (photos @ queries.T).double() - np.log(7)
    by_hand = [
        np.log1p(np.exp(-score if i == j else score))
        for i, row in enumerate(scores.tolist())
        for j, score in enumerate(row)
    ]
    assert found.item() == pytest.approx(np.mean(by_hand), rel=1e-5)
    expected = siglip(photos, queries, positives, torch.tensor(20.0), torch.tensor(-np.log(7.0)))
    assert found.item() == pytest.approx(expected.item() / 7, rel=1e-5)
    found.backward()
    assert loss.log_scale.grad.abs() > 0  # type: ignore[union-attr]
    assert loss.bias.grad.abs() > 0  # type: ignore[union-attr]


@torch.no_grad()
def test_sail_loss_takes_extra_captions_as_positives() -> None:
    photos, queries, positives = unit(rand(7, 5)), unit(rand(7, 5, seed=1)), torch.eye(7, dtype=torch.bool)
    loss = Sail(ObjectiveOptions())
    once = loss(contrast(photos, queries, positives))
    twice = loss(contrast(photos, queries.repeat(2, 1), positives.repeat(1, 2)))
    close(once, twice)
    other = unit(rand(7, 5, seed=2))
    both = loss(contrast(photos, torch.cat([queries, other]), positives.repeat(1, 2)))
    close(both, (once + loss(contrast(photos, other, positives))) / 2)


@torch.no_grad()
def test_sail_loss_starts_with_the_odds_of_a_positive() -> None:
    """At a cosine of 0 the pairs' probability is 1 in N + 1, whatever N is."""
    for count in (4, 500):
        photos, queries = torch.eye(1, 2).expand(count, -1), torch.eye(2)[1:].expand(count, -1)
        positives = torch.zeros(count, count, dtype=torch.bool)
        found = Sail(ObjectiveOptions())(contrast(photos, queries, positives))
        assert found.item() == pytest.approx(-np.log(1 - 1 / (count + 1)), rel=1e-4)


def test_sail_scale_stays_in_its_bounds() -> None:
    loss, vectors = Sail(ObjectiveOptions()), unit(rand(4, 5))
    for start, kept in ((9.0, np.log(100)), (-2.0, 0.0)):
        loss.log_scale.data.fill_(start)
        loss(contrast(vectors, vectors, torch.eye(4, dtype=torch.bool)))
        assert loss.log_scale.item() == pytest.approx(kept)


# ShareLock


@torch.no_grad()
def test_sharelock_photos_are_the_normalised_cache() -> None:
    model, states = make("sharelock"), draw_states()
    assert torch.equal(photos_of(model, states), unit(summarize(states, None)))
    assert [name for name, _ in model.named_parameters() if not name.startswith("text_mlp.")] == []


def test_sharelock_step_of_rate_0_changes_statistics_alone() -> None:
    model, vectors = make("sharelock").train(), rand(16, TEXT_WIDTH)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    step = torch.optim.AdamW(model.parameters(), lr=0.0)
    model.encode_queries(vectors).sum().backward()
    step.step()
    changed = {name for name, value in model.state_dict().items() if not torch.equal(value, before[name])}
    parts = ("running_mean", "running_var", "num_batches_tracked")
    assert changed == {f"text_mlp.{number}.{part}" for number in (1, 5, 9) for part in parts}


@torch.no_grad()
def test_sharelock_text_depends_on_the_batch_in_training_alone() -> None:
    model, vectors = make("sharelock", dropout=0.0), rand(16, TEXT_WIDTH)
    close(model.encode_queries(vectors)[:4], model.encode_queries(vectors[:4]))
    model.train()
    assert not torch.allclose(model.encode_queries(vectors)[:4], model.encode_queries(vectors[:4]), atol=1e-3)


# Freeze-Align


@torch.no_grad()
def test_projector_is_the_mean_of_a_linear_map_and_an_mlp() -> None:
    projector, states = woken(Projector(LAYERS * WIDTH, 3, 0.0)), draw_states()
    tokens = torch.cat([normed(state) for state in states], dim=-1)
    each = projector.linear(tokens) + projector.outer(functional.gelu(projector.inner(tokens)))
    close(projector(states, None), each.mean(dim=1))
    by_row = [each[row, :count].mean(dim=0) for row, count in enumerate(GALLERY_MASK.sum(1))]
    close(projector(states, GALLERY_MASK), torch.stack(by_row))
    garbage = [torch.where(GALLERY_MASK[..., None], state, 1e3) for state in states]
    close(projector(garbage, GALLERY_MASK), torch.stack(by_row))


@torch.no_grad()
def test_projectors_without_inner_map_are_linear_in_the_means() -> None:
    """Only then the forms on tokens and on their means agree."""
    model, states = woken(make("freeze_align")), draw_states()
    parts = summarize(states, None).unflatten(1, (LAYERS, 2, WIDTH))
    class_token, mean = parts[:, :, 0].flatten(1), parts[:, :, 1].flatten(1)

    def of_means() -> torch.Tensor:
        both = ((model.of_class, class_token), (model.of_patches, mean))
        return sum(of.linear(seen) + of.outer(functional.gelu(of.inner(seen))) for of, seen in both)  # type: ignore[return-value]

    assert (model.photo_summary(states, None) - of_means()).abs().max() > 0.01
    for projector in (model.of_class, model.of_patches):
        nn.init.zeros_(projector.inner.weight)
        nn.init.zeros_(projector.inner.bias)
    close(model.photo_summary(states, None), of_means())


@torch.no_grad()
def test_freeze_align_text_passes_projector_and_head() -> None:
    model, vectors = woken(make("freeze_align")), rand(4, TEXT_WIDTH)
    inner = normed(unit(vectors))
    of_text, head = model.of_text, model.text_head
    projected = head.linear(of_text.linear(inner) + of_text.outer(functional.gelu(of_text.inner(inner))))
    expected = head.norm(head.mlp[1](functional.gelu(projected)) + projected)
    torch.testing.assert_close(model.encode_queries(vectors), unit(expected), atol=1e-3, rtol=1e-3)  # eps of norms


# GPO


def pooling(seed: int = 0) -> PoolingOperator:
    torch.manual_seed(seed)
    return PoolingOperator()


def test_pooling_operator_has_the_published_size() -> None:
    assert sum(one.numel() for one in pooling().parameters()) == 12_704


def test_descending_order_and_its_gradient_are_those_of_torch() -> None:
    values = torch.randint(-9, 9, (3, 4, 20), generator=torch.Generator().manual_seed(0)).float()  # with ties
    values[0, 0, :5] = torch.finfo(torch.float32).min
    weights = torch.repeat_interleave(rand(3, 4, 5), 4, dim=2)
    found = []
    for order in (descending, lambda one: one.sort(dim=-1, descending=True).values):
        given = (values + rand(3, 4, 20, seed=1) * torch.tensor([1.0, 1.0, 0.0])[:, None, None]).requires_grad_()
        ordered = order(given)
        (ordered[:2] * weights[:2]).sum().backward()
        found.append((ordered.detach(), given.grad))
    torch.testing.assert_close(found[0], found[1], rtol=0, atol=0)


def test_rank_codes_are_sines_and_cosines() -> None:
    codes = rank_codes(50, 32)
    for rank, column in ((0, 0), (7, 3), (49, 30)):
        angle = rank / 10_000 ** ((column - column % 2) / 32)
        assert codes[rank, column].item() == pytest.approx((np.cos if column % 2 else np.sin)(angle), abs=1e-4)


@torch.no_grad()
def test_pooling_without_scores_is_the_mean() -> None:
    operator, channels = pooling(), rand(3, 4, TOKENS)
    nn.init.zeros_(operator.score.weight)
    close(operator(channels, None), channels.mean(dim=-1))
    counts = GALLERY_MASK.sum(dim=1)
    means = torch.stack([channels[row, :, :count].mean(dim=-1) for row, count in enumerate(counts)])
    close(operator(channels, GALLERY_MASK), means)


@torch.no_grad()
def test_pooling_with_all_weight_on_rank_1_is_the_maximum() -> None:
    operator, channels = pooling(), rand(3, 4, TOKENS)
    operator.weights = lambda lengths, most: functional.one_hot(torch.zeros(1, dtype=torch.long), most).float()  # type: ignore[method-assign]
    close(operator(channels, None), channels.max(dim=-1).values)


@torch.no_grad()
def test_pooling_ignores_order_and_padding() -> None:
    operator, channels = pooling(), rand(3, 4, TOKENS)
    nn.init.normal_(operator.score.weight)
    close(operator(channels[..., [3, 0, 4, 1, 2]], None), operator(channels, None))
    masked = operator(channels, GALLERY_MASK)
    close(operator(channels.masked_fill(~GALLERY_MASK[:, None], 1e4), GALLERY_MASK), masked)
    for row, count in enumerate(GALLERY_MASK.sum(dim=1)):
        close(operator(channels[row : row + 1, :, :count], None), masked[row : row + 1])


@torch.no_grad()
def test_rank_weights_depend_on_the_length_alone() -> None:
    """A GRU that runs over the codes of these ranks, by torch's own cells."""
    operator = pooling()
    nn.init.normal_(operator.score.weight)
    weights = operator.weights(torch.tensor([3, 5, 3]), 5)
    close(weights[0], weights[2])
    close(weights.sum(dim=1), torch.ones(3))
    assert weights[0, 3:].tolist() == [0, 0]
    cells = [nn.GRUCell(32, 32), nn.GRUCell(32, 32)]
    for cell, ending in zip(cells, ("", "_reverse"), strict=True):
        for part in ("weight_ih", "weight_hh", "bias_ih", "bias_hh"):
            getattr(cell, part).copy_(getattr(operator.gru, f"{part}_l0{ending}"))
    codes, states = rank_codes(3, 32), torch.zeros(2, 3, 32)
    for direction, order in enumerate(((0, 1, 2), (2, 1, 0))):
        hidden = torch.zeros(1, 32)
        for rank in order:
            hidden = cells[direction](codes[rank : rank + 1], hidden)
            states[direction, rank] = hidden[0]
    close(weights[0, :3], (operator.score(states.mean(dim=0)).squeeze(1) / 0.1).softmax(dim=0))


def test_gradient_reaches_tokens_through_the_sorting() -> None:
    operator, channels = pooling(), rand(2, 4, TOKENS).requires_grad_()
    operator(channels, None)[0, 0].backward()
    assert channels.grad is not None
    order = channels[0, 0].argsort(descending=True)
    close(channels.grad[0, 0][order], operator.weights(None, TOKENS)[0])
    assert channels.grad[1:].abs().max() == 0


@torch.no_grad()
def test_gpo_pools_mapped_tokens_of_each_layer() -> None:
    model, states = woken(make("gpo")), draw_states()
    maps = model.photo_linear.weight.split(WIDTH, dim=1)
    pooled = [
        operator((normed(state) @ one.T).transpose(1, 2), None)
        for operator, state, one in zip(model.operators, states, maps, strict=True)
    ]
    close(model(states), unit(sum(pooled) + model.photo_linear.bias))
    assert not torch.allclose(model(states, GALLERY_MASK), model(states), atol=1e-3)


def test_size_augmentation_drops_tokens_in_training_alone() -> None:
    torch.manual_seed(0)
    states, mask = torch.zeros(20_000, 6, 1), torch.ones(20_000, 6, dtype=torch.bool)
    mask[:, 5] = False
    kept = drop_tokens(states, mask)
    assert kept[:, 0].all()
    assert not kept[:, 5].any()
    expected = 0.2 * (1 - 0.2**2) / 2  # of 0.2 u over u from 0.2 to 1
    assert (~kept[:, 1:5]).float().mean().item() == pytest.approx(expected, abs=0.003)
    model, some = make("gpo", dropout=0.0), draw_states()
    assert torch.equal(model(some), model(some))
    model.train()
    assert not torch.equal(torch.stack([model(some) for _ in range(9)]).std(dim=0), torch.zeros(3, model.WIDTH))


# dino.txt


@torch.no_grad()
def test_dino_txt_starts_as_the_cached_tokens_side_by_side() -> None:
    """Made a unit vector together: both halves keep their lengths."""
    model, states = make("dino_txt"), draw_states()
    tokens = torch.stack([normed(state) for state in states], dim=1)
    both = torch.cat([tokens[:, :, 0].flatten(1), tokens[:, :, 1:].mean(dim=2).flatten(1)], dim=1)
    close(photos_of(model, states), unit(both))
    other = [torch.cat([state[:, :1], rand(3, 4, WIDTH, seed=7)], dim=1) for state in states]
    half = LAYERS * WIDTH
    close(model.photo_side(summarize(other, None))[:, :half], both[:, :half])


@torch.no_grad()
def test_heads_without_class_token_see_the_mean_of_all_tokens() -> None:
    states = draw_states()
    close(
        photos_of(make("dino_txt", has_class_token=False), states),
        unit(torch.cat([normed(state).mean(dim=1) for state in states], dim=1)),
    )
    model: FreezeAlignFusion = make("freeze_align", has_class_token=False)
    close(photos_of(model, states), unit(model.of_patches(states, None)))
    assert model.of_class is None
