"""Fits and baselines of many episodes against one after the other, and against other people's arithmetic."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from sklearn.linear_model import Ridge
from torch.nn import functional

from saffe_cache.fusion.fam import FusionAlignModule
from saffe_cache.fusion.layers import parameter_groups
from saffe_cache.fusion.losses import info_nce
from saffe_cache.fusion.options import FusionShape
from saffe_cache.fusion.registry import HeadName
from saffe_cache.studies.binding.fitting import (
    TEMPERATURE,
    WEIGHT_DECAY,
    Reading,
    Support,
    class_mean_accuracies,
    fit,
    fit_ridges,
    make_fams,
    name_accuracies,
    photo_vectors,
)

EPISODES, TOKENS, WIDTH, TEXT_WIDTH = 3, 5, 16, 12


def shape_of(head: HeadName) -> FusionShape:
    return FusionShape(
        fusion="linear",
        head=head,
        num_layers=2,
        hidden_size=WIDTH,
        num_tokens=TOKENS,
        text_hidden_size=TEXT_WIDTH,
        text_size=TEXT_WIDTH,
        maps_queries=False,
        dropout=0.0,
    )


def draw_support(ways: int, shots: int) -> Support:
    generator = torch.Generator().manual_seed(1)
    states = [torch.randn(EPISODES, ways, shots, TOKENS, WIDTH, generator=generator) for _ in range(2)]
    return Support(states, functional.normalize(torch.randn(EPISODES, ways, TEXT_WIDTH, generator=generator), dim=-1))


def one_by_one(
    head: HeadName, support: Support, seed: int, episode: int, epochs: int, steps: list[slice]
) -> torch.Tensor:
    """The plain loop: one module, autograd, AdamW. Vectors of its support."""
    torch.manual_seed(seed)
    model = FusionAlignModule(shape_of(head)).eval()
    optimizer = torch.optim.AdamW(parameter_groups(model, 1e-3, WEIGHT_DECAY), betas=(0.9, 0.98))
    names = support.names[episode]
    for _ in range(epochs):
        for step in steps:
            states = [state[episode, :, step].flatten(0, 1) for state in support.states]
            positives = torch.eye(len(names)).repeat_interleave(len(states[0]) // len(names), dim=0).bool()
            optimizer.zero_grad()
            info_nce(model(states), names, positives, torch.tensor(TEMPERATURE)).backward()
            optimizer.step()
    return model([state[episode].flatten(0, 1) for state in support.states]).detach()


@pytest.mark.parametrize("head", ["attention", "mean"])
@pytest.mark.parametrize(("shots", "steps"), [(2, [slice(0, 2)]), (12, [slice(0, 10), slice(10, 12)])])
def test_many_at_once_are_one_after_the_other(head: HeadName, shots: int, steps: list[slice]) -> None:
    """Stacked, and as stacks of one; 36 photos take two steps an epoch."""
    support, seeds = draw_support(3, shots), [5, 6, 7]
    expected = [one_by_one(head, support, seed, number, 2, steps) for number, seed in enumerate(seeds)]
    stacked = fitted(head, seeds, support)
    for number, seed in enumerate(seeds):
        part = slice(number, number + 1)
        alone = fitted(head, [seed], Support([state[part] for state in support.states], support.names[part]))
        for found in (stacked[number], alone[0]):
            torch.testing.assert_close(found, expected[number], atol=2e-4, rtol=2e-3)
    assert not torch.allclose(stacked[0], stacked[1], atol=0.1)


def fitted(head: HeadName, seeds: list[int], support: Support) -> torch.Tensor:
    """Vectors of the support after two epochs."""
    skeleton, weights = make_fams(shape_of(head), seeds)
    readings = fit(skeleton, weights, support, 1e-3, 2)
    [read] = [reading.after for reading in readings if reading.after == 2]
    assert read == 2
    return photo_vectors(skeleton, weights, [state.flatten(1, 2) for state in support.states]).detach()


def converged(seeds: list[int], support: Support) -> list[Reading]:
    skeleton, weights = make_fams(shape_of("attention"), seeds)
    return [reading for reading in fit(skeleton, weights, support, 3e-3, 30) if reading.after is None]


def test_convergence_of_an_episode_knows_nothing_of_the_others() -> None:
    support = draw_support(3, 2)
    together = {int(who): reading for reading in converged([1, 2, 3], support) for who in reading.episodes}
    assert sorted(together) == [0, 1, 2]
    for number, seed in enumerate([1, 2, 3]):
        part = slice(number, number + 1)
        [alone] = converged([seed], Support([state[part] for state in support.states], support.names[part]))
        reading = together[number]
        assert alone.epoch == reading.epoch < 30
        place = reading.episodes.tolist().index(number)
        for name, value in alone.weights.items():
            torch.testing.assert_close(reading.weights[name][place], value[0], atol=2e-3, rtol=1e-2)


def test_starts_follow_from_their_seeds_alone() -> None:
    torch.manual_seed(0)
    before = torch.get_rng_state()
    _, first = make_fams(shape_of("attention"), [3, 4])
    assert torch.equal(torch.get_rng_state(), before)
    _, again = make_fams(shape_of("attention"), [4])
    assert all(torch.equal(first[name][1], again[name][0]) for name in first)
    assert not torch.equal(first["head.linear.weight"][0], first["head.linear.weight"][1])


@pytest.mark.parametrize("strength", [0.01, 10.0])
def test_ridge_is_the_closed_form_of_the_primal(strength: float) -> None:
    generator = np.random.default_rng(0)
    features = generator.normal(size=(2, 3, 4, 20)).astype(np.float32)
    names = generator.normal(size=(2, 3, 7)).astype(np.float32)
    asked = generator.normal(size=(2, 5, 20)).astype(np.float32)
    weight, bias = fit_ridges(torch.from_numpy(features), torch.from_numpy(names), strength)
    found = (torch.from_numpy(asked) @ weight.transpose(1, 2) + bias).numpy()
    for episode in range(2):
        other = Ridge(alpha=strength * 12).fit(features[episode].reshape(12, 20), names[episode].repeat(4, axis=0))
        np.testing.assert_allclose(found[episode], other.predict(asked[episode]), atol=1e-4)


def test_nearest_class_mean_by_hand() -> None:
    generator = np.random.default_rng(0)
    support, queries = generator.normal(size=(4, 3, 2, 6)), generator.normal(size=(4, 3, 5, 6))
    found = class_mean_accuracies(support, queries)
    for episode in range(4):
        center = support[episode].reshape(6, 6).mean(axis=0)
        centred = support[episode] - center
        means = (centred / np.linalg.norm(centred, axis=-1, keepdims=True)).sum(axis=1)
        right = 0
        for way in range(3):
            for query in queries[episode, way] - center:
                right += np.argmax([query @ mean / np.linalg.norm(mean) for mean in means]) == way
        assert found[episode] == pytest.approx(right / 15)


def test_nearest_name_of_each_photo() -> None:
    names = torch.eye(3).expand(2, 3, 3)
    vectors = torch.tensor([[[9.0, 1, 0], [1, 2, 0], [0, 0, 1]], [[0.0, 1, 0], [0, 2, 0], [0, 3, 1]]])
    np.testing.assert_allclose(name_accuracies(vectors, names), [1, 1 / 3])
