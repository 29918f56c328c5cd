"""Every loss against an independent one, its gradient and its ends; and the sum of them over a batch."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from sklearn.metrics import roc_auc_score
from synthetic_cache import make_cache
from torch.nn import functional

from saffe_cache.fusion.base import Fused, Fusion
from saffe_cache.fusion.fam import FusionAlignModule
from saffe_cache.fusion.losses import (
    Batch,
    SigmoidScale,
    Temperature,
    draw_negatives,
    info_nce,
    matching,
    pair_info_nce,
    siglip,
    soft_target,
)
from saffe_cache.fusion.options import ObjectiveOptions
from saffe_cache.inputs.feature_loader import FeatureLoader
from saffe_cache.inputs.pairs import training_pairs
from saffe_cache.store.reader import open_cache
from saffe_cache.training.batches import TrainingData
from saffe_cache.training.config import TrainConfig
from saffe_cache.training.objective import Objective
from saffe_cache.training.resolve import resolve_run
from saffe_cache.training.runs import build_fusion


def unit_vectors(count: int, seed: int, width: int = 6) -> torch.Tensor:
    drawn = torch.randn(count, width, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    return functional.normalize(drawn, dim=1)


def several_positives(num_gallery: int, num_queries: int, seed: int) -> torch.Tensor:
    positives = torch.rand(num_gallery, num_queries, generator=torch.Generator().manual_seed(seed)) < 0.3
    for i in range(max(num_gallery, num_queries)):  # at least one in each row and column
        positives[i % num_gallery, i % num_queries] = True
    return positives


def plain_info_nce(
    gallery: list[list[float]], queries: list[list[float]], positives: list[list[bool]], temperature: float
) -> float:
    def direction(rows: list[list[float]], columns: list[list[float]], is_positive: list[list[bool]]) -> float:
        total = 0.0
        for row, of_row in zip(rows, is_positive, strict=True):
            scores = [sum(a * b for a, b in zip(row, column, strict=True)) / temperature for column in columns]
            normal = math.log(sum(math.exp(score) for score in scores))
            chosen = [score - normal for score, positive in zip(scores, of_row, strict=True) if positive]
            total -= sum(chosen) / len(chosen)
        return total / len(rows)

    flipped = [list(column) for column in zip(*positives, strict=True)]
    return (direction(gallery, queries, positives) + direction(queries, gallery, flipped)) / 2


@pytest.mark.parametrize("temperature", [0.05, 0.5])
@pytest.mark.parametrize(("num_gallery", "num_queries"), [(4, 9), (9, 4), (1, 1)])
def test_info_nce_equals_a_plain_loop(num_gallery: int, num_queries: int, temperature: float) -> None:
    gallery, queries = unit_vectors(num_gallery, 1), unit_vectors(num_queries, 2)
    positives = several_positives(num_gallery, num_queries, 3)
    expected = plain_info_nce(gallery.tolist(), queries.tolist(), positives.tolist(), temperature)
    scalar = torch.tensor(temperature, dtype=torch.float64)
    assert info_nce(gallery, queries, positives, scalar).item() == pytest.approx(expected, rel=1e-12, abs=1e-12)
    low = info_nce(gallery.float(), queries.float(), positives, scalar.float())
    assert low.dtype == torch.float32
    assert low.item() == pytest.approx(expected, rel=1e-4, abs=1e-6)


def test_info_nce_with_one_positive_is_clips_loss() -> None:
    photos, texts, temperature = unit_vectors(7, 1), unit_vectors(7, 2), torch.tensor(0.07, dtype=torch.float64)
    logits, targets = photos @ texts.T / temperature, torch.arange(7)
    expected = (functional.cross_entropy(logits, targets) + functional.cross_entropy(logits.T, targets)) / 2
    torch.testing.assert_close(info_nce(photos, texts, torch.eye(7, dtype=torch.bool), temperature), expected)


def test_info_nce_is_symmetric_and_blind_to_order() -> None:
    gallery, queries, positives = unit_vectors(5, 1), unit_vectors(8, 2), several_positives(5, 8, 3)
    temperature = torch.tensor(0.1, dtype=torch.float64)
    loss = info_nce(gallery, queries, positives, temperature)
    torch.testing.assert_close(info_nce(queries, gallery, positives.T, temperature), loss)
    order = torch.randperm(8, generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(info_nce(gallery, queries[order], positives[:, order], temperature), loss)


def test_info_nce_at_its_ends() -> None:
    one = torch.eye(4, dtype=torch.float64)
    positives = torch.eye(4, dtype=torch.bool)
    assert info_nce(one, one, positives, torch.tensor(0.01)).item() == pytest.approx(0, abs=1e-12)
    same = unit_vectors(1, 0).expand(4, -1)
    assert info_nce(same, same, positives, torch.tensor(0.01)).item() == pytest.approx(math.log(4))


def test_info_nce_survives_the_lowest_temperature_in_float32() -> None:
    gallery = unit_vectors(6, 1).float()
    loss = info_nce(gallery, -gallery, torch.eye(6, dtype=torch.bool), torch.tensor(0.01))
    assert torch.isfinite(loss)
    assert loss > 50


def test_gradient_of_info_nce() -> None:
    inputs = [unit_vectors(3, 1).requires_grad_(), unit_vectors(5, 2).requires_grad_()]
    temperature = torch.tensor(0.2, dtype=torch.float64, requires_grad=True)
    positives = several_positives(3, 5, 3)
    assert torch.autograd.gradcheck(lambda g, q, t: info_nce(g, q, positives, t), (*inputs, temperature))


def test_temperature_starts_as_told_and_has_a_gradient() -> None:
    temperature = Temperature(0.1)
    value = temperature()
    value.backward()
    assert value.item() == pytest.approx(0.1)
    assert temperature.log.grad is not None
    assert temperature.log.grad.item() == pytest.approx(0.1)  # d exp(x) / dx = exp(x)
    assert Temperature()().item() == pytest.approx(0.07)


@pytest.mark.parametrize(("start", "bound", "direction"), [(0.001, 0.01, 1), (9.0, 0.5, -1)])
def test_temperature_stays_in_range_and_can_come_back(start: float, bound: float, direction: int) -> None:
    temperature = Temperature(start)
    assert temperature().item() == pytest.approx(bound)
    optimizer = torch.optim.SGD(temperature.parameters(), lr=1.0)
    loss = -direction * temperature()  # wants the temperature back within its range
    loss.backward()
    optimizer.step()
    assert (temperature().item() - bound) * direction > 1e-6


def plain_siglip(
    gallery: list[list[float]], queries: list[list[float]], positives: list[list[bool]], scale: float, bias: float
) -> float:
    total = 0.0
    for row, of_row in zip(gallery, positives, strict=True):
        for column, positive in zip(queries, of_row, strict=True):
            logit = scale * sum(a * b for a, b in zip(row, column, strict=True)) + bias
            total -= math.log(1 / (1 + math.exp(-logit if positive else logit)))
    return total / len(gallery)


@pytest.mark.parametrize(("scale", "bias"), [(10.0, -10.0), (3.0, 0.5)])
@pytest.mark.parametrize(("num_gallery", "num_queries"), [(4, 9), (9, 4)])
def test_siglip_equals_a_plain_double_loop(num_gallery: int, num_queries: int, scale: float, bias: float) -> None:
    gallery, queries = unit_vectors(num_gallery, 1), unit_vectors(num_queries, 2)
    positives = several_positives(num_gallery, num_queries, 3)
    expected = plain_siglip(gallery.tolist(), queries.tolist(), positives.tolist(), scale, bias)
    found = siglip(gallery, queries, positives, torch.tensor(scale), torch.tensor(bias))
    assert found.item() == pytest.approx(expected, rel=1e-6)


def test_siglip_pulls_positives_and_pushes_all_others() -> None:
    """With the axes for a gallery, the gradient of the queries is that of the cosines."""
    queries, positives = unit_vectors(9, 2).requires_grad_(), several_positives(6, 9, 3)
    one = torch.eye(6, dtype=torch.float64)
    siglip(one, queries, positives, torch.tensor(10.0), torch.tensor(-10.0)).backward()
    assert queries.grad is not None
    torch.testing.assert_close(queries.grad.T < 0, positives)
    assert (queries.grad != 0).all()


def test_gradient_of_siglip() -> None:
    inputs = [unit_vectors(3, 1).requires_grad_(), unit_vectors(5, 2).requires_grad_()]
    scalars = [torch.tensor(value, dtype=torch.float64, requires_grad=True) for value in (4.0, -2.0)]
    positives = several_positives(3, 5, 3)
    assert torch.autograd.gradcheck(lambda g, q, s, b: siglip(g, q, positives, s, b), (*inputs, *scalars))


def test_siglip_is_finite_for_large_logits() -> None:
    gallery = unit_vectors(4, 1).float()
    loss = siglip(gallery, -gallery, torch.eye(4, dtype=torch.bool), torch.tensor(1e4), torch.tensor(-10.0))
    assert torch.isfinite(loss)


def learned_positives(start_bias: float, *, trains_bias: bool) -> torch.Tensor:
    """Logits of the 64 positives, after 300 steps of a linear map, at the rate that runs train with."""
    photos, texts = unit_vectors(64, 1, width=16).float(), unit_vectors(64, 2, width=16).float()
    weight, sigmoid = torch.eye(16).requires_grad_(), SigmoidScale(bias=start_bias)
    sigmoid.bias.requires_grad_(trains_bias)
    trained = [weight, *(parameter for parameter in sigmoid.parameters() if parameter.requires_grad)]
    optimizer, positives = torch.optim.Adam(trained, lr=0.003), torch.eye(64, dtype=torch.bool)
    targets = functional.normalize(texts + 0.1 * photos, dim=1)
    for _ in range(300):
        vectors = functional.normalize(texts @ weight, dim=1)
        loss = siglip(vectors, targets, positives, *sigmoid())
        optimizer.zero_grad()
        loss.backward()  # type: ignore[no-untyped-call]
        optimizer.step()
    scale, bias = sigmoid()
    return (scale * (vectors * targets).sum(dim=1) + bias).detach()


def test_siglip_needs_its_learned_bias() -> None:
    """A bias that is wrong and frozen leaves all pairs negative for long; only the scale, slowly, makes up for it."""
    assert (learned_positives(-60.0, trains_bias=False) < 0).all()
    assert (learned_positives(-10.0, trains_bias=True) > 0).float().mean() > 0.95


@pytest.mark.parametrize("smoothing", [0.0, 0.1, 0.5])
def test_soft_target_is_cross_entropy_with_label_smoothing(smoothing: float) -> None:
    vectors, targets = unit_vectors(5, 1, 32), unit_vectors(5, 2, 32)
    expected = functional.cross_entropy(vectors, targets, label_smoothing=smoothing)
    torch.testing.assert_close(soft_target(vectors, targets, smoothing), expected)


def test_soft_target_is_a_pull_on_the_cosine_without_negatives() -> None:
    """S ln d - 0.9 cos + O(1/d), S = 0.9 sum t + 0.1, so that among vectors for one target only the cosine counts."""
    width = 768
    target, others = unit_vectors(1, 0, width), unit_vectors(400, 1, width)
    mixed = functional.normalize(torch.linspace(-1, 1, 400)[:, None] * target + others, dim=1)
    for vectors, least in ((others, -0.99), (mixed, -0.9999)):
        losses = torch.stack([soft_target(vector[None], target) for vector in vectors])
        cosines = (vectors @ target.T).squeeze(1)
        total = 0.9 * target.sum() + 0.1
        remainder = losses - (total * math.log(width) - 0.9 * cosines)
        assert remainder.abs().max() < 5 / width * max(1.0, float(total.abs()))
        assert torch.corrcoef(torch.stack([losses, cosines]))[0, 1] < least


def test_pair_info_nce_is_cross_entropy_with_target_0() -> None:
    scores, temperature = unit_vectors(7, 1, 12), torch.tensor(0.07, dtype=torch.float64)
    expected = functional.cross_entropy(scores / temperature, torch.zeros(7, dtype=torch.int64))
    torch.testing.assert_close(pair_info_nce(scores, temperature), expected)
    scores[:, 9:] = -math.inf  # no candidate
    torch.testing.assert_close(pair_info_nce(scores, temperature), pair_info_nce(scores[:, :9], temperature))
    assert pair_info_nce(torch.zeros(3, 10), torch.tensor(0.07)).item() == pytest.approx(math.log(10))


def test_matching_equals_the_plain_formula() -> None:
    logits, is_match = 3 * unit_vectors(1, 1, 9).squeeze(0), torch.arange(9) < 3
    terms = [
        math.log(1 + math.exp(logit)) - logit * match
        for logit, match in zip(logits.tolist(), is_match.tolist(), strict=True)
    ]
    assert matching(logits, is_match).item() == pytest.approx(sum(terms) / 9)


def test_constant_matching_answer_ranks_nothing() -> None:
    is_match = torch.arange(300) < 100
    logit = torch.zeros((), requires_grad=True)
    optimizer = torch.optim.Adam([logit], lr=0.1)
    for _ in range(200):
        optimizer.zero_grad()
        matching(logit.expand(300), is_match).backward()  # type: ignore[no-untyped-call]
        optimizer.step()
    answers = logit.detach().expand(300)
    assert logit.item() == pytest.approx(math.log(1 / 2), abs=1e-3)  # the odds, nothing else
    assert ((answers > 0) == is_match).float().mean().item() == pytest.approx(2 / 3)
    assert roc_auc_score(is_match, answers) == 0.5


def test_negatives_are_never_positives_and_hard_ones_score_best() -> None:
    scores, positives = torch.randn(20, 30, generator=torch.Generator().manual_seed(0)), several_positives(20, 30, 1)
    torch.manual_seed(0)
    drawn = draw_negatives(scores, positives, num_hard=4, num_random=6)
    assert drawn.shape == (20, 10)
    assert drawn.dtype == torch.int64
    assert not positives.gather(1, drawn).any()
    for row in range(20):
        wrong = [column for column in range(30) if not positives[row, column]]
        best = sorted(wrong, key=lambda column, row=row: -scores[row, column].item())[:4]
        assert drawn[row, :4].tolist() == best


def test_random_negatives_take_every_wrong_column_alike() -> None:
    positives = torch.eye(5, dtype=torch.bool)
    torch.manual_seed(0)
    drawn = draw_negatives(torch.zeros(5, 5), positives, num_hard=0, num_random=8000)
    assert drawn.shape == (5, 8000)
    for row in range(5):
        counts = torch.bincount(drawn[row], minlength=5) / 8000
        expected = torch.full((5,), 0.25)
        expected[row] = 0
        torch.testing.assert_close(counts, expected, atol=0.025, rtol=0)


def test_negatives_of_a_row_with_few_wrong_columns_come_again() -> None:
    positives = torch.ones(2, 6, dtype=torch.bool)
    positives[0, 3] = positives[1, 1] = positives[1, 4] = False
    scores = torch.arange(6.0).expand(2, 6)
    drawn = draw_negatives(scores, positives, num_hard=3, num_random=5)
    assert drawn[0].tolist() == [3] * 8
    assert drawn[1, :3].tolist() == [4, 1, 4]
    assert set(drawn[1, 3:].tolist()) <= {1, 4}
    assert draw_negatives(scores, positives, num_hard=9, num_random=0).shape == (2, 6)  # there are no more
    with pytest.raises(AssertionError, match="no wrong column"):
        draw_negatives(scores, torch.ones(2, 6, dtype=torch.bool), 1, 1)


def test_torchs_seed_decides_the_negatives() -> None:
    scores, positives = torch.zeros(9, 40), several_positives(9, 40, 1)
    found = []
    for seed in (0, 0, 1):
        torch.manual_seed(seed)
        found.append(draw_negatives(scores, positives, 3, 5))
    assert torch.equal(found[0], found[1])
    assert not torch.equal(found[0], found[2])


def test_sigmoid_scale_starts_as_in_the_paper_and_has_gradients() -> None:
    sigmoid = SigmoidScale()
    scale, bias = sigmoid()
    assert (scale.item(), bias.item()) == pytest.approx((10.0, -10.0))
    (scale + bias).backward()
    assert sigmoid.log_scale.grad is not None
    assert sigmoid.log_scale.grad.item() == pytest.approx(10.0)  # d exp(x) / dx = exp(x)
    assert sigmoid.bias.grad is not None
    assert sigmoid.bias.grad.item() == 1
    given = SigmoidScale(20.0, -2.71)()
    assert [value.item() for value in given] == pytest.approx([20.0, -2.71])


@dataclass(frozen=True)
class Prepared:
    """A model that looks at texts, and a batch for it."""

    model: Fusion
    batch: Batch
    data: TrainingData

    def objective(self, terms: dict[str, float], **options: Any) -> Objective:
        usual = {"negatives": 5, "pair_photos": 12, "text_dropout": 0.0}
        return Objective(ObjectiveOptions(objective=terms, **(usual | options)), self.data.inputs.texts)

    def loss(self, terms: dict[str, float], *, seed: int = 0, **options: Any) -> float:
        torch.manual_seed(seed)
        return float(self.objective(terms, **options)(self.model, self.batch).detach())


@pytest.fixture(scope="module", params=["captions", "classes"])
def prepared(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Prepared:
    folder = tmp_path_factory.mktemp("objective")
    classes = 4 if request.param == "classes" else 0
    path = make_cache(folder / "cache.zarr", {"train": 80, "test": 20}, classes=classes)
    config = TrainConfig(cache=path, out=str(folder), gallery_text="matched", objective={"matching": 1.0}, device="cpu")
    cache = open_cache(path)
    spec = resolve_run(config, cache)
    training, validation, _ = training_pairs(spec, cache)
    torch.manual_seed(0)
    model = build_fusion(spec, cache).eval()
    with torch.no_grad():
        for decoder in model.decoders:
            decoder.gate.fill_(0.7)  # at 0 no text passes
        for linear in (model.head.mlp[-1], model.query_map.mlp[-1]):
            torch.nn.init.normal_(linear.weight, std=0.1)  # at 0 there is no MLP
    data = TrainingData(FeatureLoader(cache, spec), training, validation, 32, 0)
    return Prepared(model, next(data.batches(0, 1)), data)


def test_objective_is_the_weighted_sum_of_its_terms(prepared: Prepared) -> None:
    terms = {"info_nce": 1.0, "siglip": 0.5, "soft_target": 2.0}
    parts = [weight * prepared.loss({name: 1.0}) for name, weight in terms.items()]
    assert prepared.loss(terms) == pytest.approx(sum(parts), rel=1e-5)
    assert len({round(part, 3) for part in parts}) == 3


def test_terms_on_a_batch_equal_the_losses_of_its_vectors(prepared: Prepared) -> None:
    model, batch = prepared.model, prepared.batch
    with torch.no_grad():
        photos, queries = model(batch.states, batch.mask, batch.paired_texts), model.encode_queries(batch.vectors)
        own = functional.normalize(batch.vectors[batch.own], dim=1)
        expected = {
            "info_nce": info_nce(photos, queries, batch.positives, torch.tensor(0.07)),
            "siglip": siglip(photos, queries, batch.positives, torch.tensor(10.0), torch.tensor(-10.0)),
            "soft_target": soft_target(photos, own),
        }
    for name, loss in expected.items():
        assert prepared.loss({name: 1.0}) == pytest.approx(loss.item(), rel=1e-5)


def fused_one_by_one(prepared: Prepared, photos: torch.Tensor, columns: torch.Tensor) -> Fused:
    """Each pair in a forward pass of its own."""
    model, batch = prepared.model, prepared.batch
    found = []
    for photo, column in zip(photos.tolist(), columns.tolist(), strict=True):
        texts = prepared.data.inputs.texts(batch.text_rows[[column]])
        found.append(model.fuse([state[[photo]] for state in batch.states], None, texts))
    states = [torch.cat([one.states[layer] for one in found]) for layer in range(len(found[0].states))]
    return Fused(torch.cat([one.vectors for one in found]), states, None)


def test_pair_loss_equals_one_forward_pass_for_each_pair(prepared: Prepared) -> None:
    model, batch = prepared.model, prepared.batch
    found = prepared.loss({"pair": 1.0}, seed=5)
    with torch.no_grad():
        photos, queries = model(batch.states, batch.mask, batch.paired_texts), model.encode_queries(batch.vectors)
        torch.manual_seed(5)
        chosen = torch.randperm(len(photos))[:12]
        wrong = draw_negatives(photos[chosen] @ queries.T, batch.positives[chosen], 3, 2)
        assert not batch.positives[chosen].gather(1, wrong).any()
        columns = torch.cat([batch.own[chosen, None], wrong], dim=1)
        fused = fused_one_by_one(prepared, chosen.repeat_interleave(6), columns.flatten())
        scores = (fused.vectors * queries[columns.flatten()]).sum(dim=1).view(12, 6)
        expected = pair_info_nce(scores, torch.tensor(0.07))
    assert found == pytest.approx(expected.item(), rel=1e-4)


def test_matching_loss_equals_one_forward_pass_for_each_pair(prepared: Prepared) -> None:
    model, batch = prepared.model, prepared.batch
    found = prepared.loss({"matching": 1.0}, seed=5)
    with torch.no_grad():
        photos, queries = model(batch.states, batch.mask, batch.paired_texts), model.encode_queries(batch.vectors)
        torch.manual_seed(5)
        chosen = torch.randperm(len(photos))[:12]
        own, scores = batch.own[chosen], photos @ queries.T
        likely = (20 * scores[chosen]).masked_fill(batch.positives[chosen], -math.inf).softmax(dim=1)
        wrong_texts = torch.multinomial(likely, 1).squeeze(1)
        likely = (20 * scores.T[own]).masked_fill(batch.positives.T[own], -math.inf).softmax(dim=1)
        wrong_photos = torch.multinomial(likely, 1).squeeze(1)
        assert not batch.positives[chosen, wrong_texts].any()
        assert not batch.positives[wrong_photos, own].any()
        texts = torch.cat([own, wrong_texts, own])
        fused = fused_one_by_one(prepared, torch.cat([chosen, chosen, wrong_photos]), texts)
        expected = matching(model.match(fused, queries[texts]), torch.arange(36) < 12)
    assert found == pytest.approx(expected.item(), rel=1e-4)


@pytest.mark.parametrize("term", ["pair", "matching"])
def test_each_side_of_the_pairs_is_computed_once(
    prepared: Prepared, term: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[tuple[int, int, int, int, int]] = []
    fuse = FusionAlignModule.fuse

    def counting(
        self: FusionAlignModule, states: Any, mask: Any = None, texts: Any = None, pairing: Any = None
    ) -> Fused:
        if pairing.gallery is not None:
            distinct = len({tuple(row.flatten().tolist()) for row in states[0]})
            different = len({tuple(row.tolist()) for row in texts.vectors})
            seen.append((len(states[0]), distinct, len(texts.vectors), different, len(pairing.gallery)))
        return fuse(self, states, mask, texts, pairing)

    monkeypatch.setattr(FusionAlignModule, "fuse", counting)
    prepared.loss({term: 1.0})
    ((photos, distinct, texts, different, pairs),) = seen
    assert photos == distinct <= 32
    assert texts == different <= len(prepared.batch.text_rows)
    assert pairs == {"pair": 12 * 6, "matching": 12 * 3}[term]


@pytest.mark.parametrize(("share", "spread"), [(0.0, 0.0), (0.3, 0.06), (0.5, 0.06)])
def test_text_dropout_replaces_its_share_of_the_texts(
    prepared: Prepared, share: float, spread: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    dropped: list[bool] = []
    forward = Fusion.forward

    def watching(self: Fusion, states: Any, mask: Any, texts: Any) -> torch.Tensor:
        dropped.extend((~texts.mask.any(dim=1)).tolist())
        return forward(self, states, mask, texts)

    monkeypatch.setattr(Fusion, "forward", watching)
    for seed in range(20):
        prepared.loss({"info_nce": 1.0}, seed=seed, text_dropout=share)
    assert len(dropped) == 20 * 32
    assert abs(sum(dropped) / len(dropped) - share) <= spread


def test_a_dropped_text_is_the_null_text(prepared: Prepared) -> None:
    model, batch = prepared.model, prepared.batch
    assert batch.paired_texts is not None
    is_dropped = torch.arange(32) % 2 == 0
    with torch.no_grad():
        whole, none = model(batch.states, batch.mask, batch.paired_texts), model(batch.states, batch.mask)
        half = model(batch.states, batch.mask, batch.paired_texts.without(is_dropped))
    torch.testing.assert_close(half[is_dropped], none[is_dropped], atol=1e-5, rtol=0)
    torch.testing.assert_close(half[~is_dropped], whole[~is_dropped], atol=1e-5, rtol=0)
    assert (whole - none).norm(dim=1).min() > 0.01


def test_learned_scalars_are_those_of_the_terms(prepared: Prepared) -> None:
    every = prepared.objective({"info_nce": 1.0, "siglip": 1.0, "pair": 1.0, "matching": 1.0, "soft_target": 1.0})
    assert set(every.scalars()) == {
        "info_nce.temperature.log", "siglip.sigmoid.log_scale", "siglip.sigmoid.bias", "pair.temperature.log"
    }  # fmt: skip
    assert prepared.objective({"soft_target": 1.0, "matching": 1.0}).scalars() == {}


@pytest.mark.parametrize("term", ["info_nce", "siglip", "soft_target", "pair", "matching"])
def test_every_term_trains_the_model(prepared: Prepared, term: str) -> None:
    torch.manual_seed(0)
    prepared.model.zero_grad()
    objective = prepared.objective({term: 1.0})
    objective(prepared.model, prepared.batch).backward()
    assert objective.scalars() == {} or all(
        parameter.grad is not None and parameter.grad.abs() > 0 for parameter in objective.parameters()
    )
    reached = {name for name, value in prepared.model.named_parameters() if value.grad is not None and value.grad.any()}
    assert any("cross_attention.value" in name for name in reached)
    assert any("match_head" in name for name in reached) == (term == "matching")
    assert any(name.startswith("head.") for name in reached) == (term != "matching")  # matching sets no retrieval back
