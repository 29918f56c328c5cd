"""CIDEr-D against a plain double loop over the paper's formula, values by hand, and the baselines beside it."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from saffe_cache.studies.captioning.cider import CiderD, score_captions

REFERENCES = [
    ["A dog runs.", "The brown dog runs on the grass"],
    ["A cat sleeps", "a cat is asleep on a sofa", "cat!"],
    ["Two people walk a dog on the beach"],
]


def by_the_formula(caption: str, own: Sequence[str], references: Sequence[Sequence[str]]) -> float:
    """Eqs. 2, 3 and 10 of the paper, one pair of captions and one n at a time; `own` are one photo's references."""

    def split(text: str) -> list[str]:
        return "".join(one if one.isalnum() else " " for one in text.lower()).split()

    def counted(words: list[str], n: int) -> Counter[tuple[str, ...]]:
        return Counter(zip(*(words[at:] for at in range(n)), strict=False))

    def weighted(words: list[str], n: int) -> dict[tuple[str, ...], float]:
        found = {}
        for ngram, count in counted(words, n).items():
            photos = sum(any(ngram in counted(split(one), n) for one in some) for some in references)
            found[ngram] = count * math.log(len(references) / max(1, photos))
        return found

    total, words = 0.0, split(caption)
    for n in range(1, 5):
        for reference in own:
            ours, theirs = weighted(words, n), weighted(split(reference), n)
            norms = math.hypot(*ours.values()) * math.hypot(*theirs.values())
            if norms:
                product = sum(min(ours[one], theirs[one]) * theirs[one] for one in ours.keys() & theirs.keys())
                penalty = math.exp(-((len(words) - len(split(reference))) ** 2) / (2 * 6**2))
                total += 10 * penalty * product / norms / len(own)
    return total / 4


def test_value_by_hand() -> None:
    """ "dog" is said of both photos and weighs nothing; "red" and "red dog" of one, so both weigh log 2.

    Of one word in two, and of the only pair, all weight agrees; of three and four words there are none. The second
    caption says "red" twice: clipped to one, over a norm of two; "red red" is nowhere and divides the cosine by √2.
    """
    cider = CiderD([["red dog"], ["dog"]])
    assert cider.of("Red dog.") == pytest.approx([10 * (1 + 1) / 4, 0])
    penalty = math.exp(-1 / 72)
    assert cider.of("red red dog") == pytest.approx([10 * penalty * (1 / 2 + 1 / math.sqrt(2)) / 4, 0])
    assert cider.of("") == pytest.approx([0, 0])


def test_a_reference_itself_has_ten() -> None:
    references = [["a brown dog runs on grass"], ["two people walk by the sea"]]
    assert CiderD(references).of("A brown dog runs on grass!") == pytest.approx([10, 0])


@settings(max_examples=60, deadline=None)
@given(st.data())
def test_values_equal_the_formula(data: st.DataObject) -> None:
    words = st.lists(st.sampled_from(["a", "dog", "Cat", "runs", "on,", "9", "ü"]), max_size=9).map(" ".join)
    references = data.draw(st.lists(st.lists(words, min_size=1, max_size=3), min_size=1, max_size=4))
    caption = data.draw(words)
    expected = [by_the_formula(caption, own, references) for own in references]
    assert CiderD(references).of(caption) == pytest.approx(expected, abs=1e-9)


def test_people_are_scored_against_the_other_captions() -> None:
    expected = [
        np.mean([by_the_formula(one, [*own[:place], *own[place + 1 :]], REFERENCES) for place, one in enumerate(own)])
        for own in REFERENCES[:2]
    ]
    assert CiderD(REFERENCES).of_people == pytest.approx([*expected, np.nan], nan_ok=True)


def test_scores_have_their_controls_beside_them() -> None:
    references, generated = REFERENCES[:2], ["a dog runs", "a cat sleeps on grass"]
    constants = ["two people", "a cat runs", "sofa"]
    found = score_captions(generated, references, np.array([1, 0]), plain="What a dog is", constants=constants)

    def mean(*captions: str) -> float:
        pairs = zip(captions, references, strict=True)
        return float(np.mean([by_the_formula(caption, own, references) for caption, own in pairs]))

    values = {name: one.value for name, one in found.cider.items()}
    assert values.pop("people") == pytest.approx(CiderD(references).of_people.mean())
    assert values == pytest.approx(
        {
            "photo": mean(*generated),
            "photos_shuffled": mean(*generated[::-1]),
            "plain_model": mean("What a dog is", "What a dog is"),
            "constant": max(mean(one, one) for one in constants),
            "people_shuffled": mean(REFERENCES[1][0], REFERENCES[0][0]),
        }
    )
    assert found.said == {"plain_model": "What a dog is", "constant": "a cat runs"}
    for name, difference in found.differences.items():
        assert difference.value == pytest.approx(found.cider["photo"].value - found.cider[name].value)
    alone = [own[:1] for own in references]
    assert "people" not in score_captions(generated, alone, np.array([1, 0]), plain="", constants=constants).cider
