"""Stored numbers against numpy's casts and torch's quantisation."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from store_cases import make_spec

from saffe_cache.store import dtypes
from saffe_cache.store.dtypes import convert, from_storage, numbers_of, to_storage
from saffe_cache.store.layout import STORAGE_DTYPES

pytestmark = pytest.mark.filterwarnings("error")
quick = settings(deadline=None, max_examples=60, derandomize=True)
tokens = hnp.arrays(
    np.float32, st.tuples(st.integers(1, 8), st.integers(1, 40)), elements=st.floats(-(2.0**100), 2.0**100, width=32)
)


def upper_half(values: np.ndarray) -> np.ndarray:
    """float32 rounded to the nearest number whose lower 16 bits are zero, ties to even; of finite numbers."""
    bits = values.view(np.uint32).astype(np.uint64)
    rounded = (bits + 0x7FFF + ((bits >> 16) & 1)) & 0xFFFF0000
    return np.where(np.isfinite(values), rounded.astype(np.uint32).view(np.float32), values)


def numpy_half(values: np.ndarray) -> np.ndarray:
    with np.errstate(over="ignore"):
        return values.astype(np.float16).astype(np.float32)


@quick
@pytest.mark.parametrize(("dtype", "rounded"), [("bfloat16", upper_half), ("float16", numpy_half)])
@given(values=hnp.arrays(np.float32, hnp.array_shapes(max_dims=2, max_side=40), elements=st.floats(width=32)))
def test_numbers_are_rounded_to_nearest_even(dtype: str, rounded: Any, values: np.ndarray) -> None:
    expected = rounded(values)
    if (np.isinf(expected) & np.isfinite(values)).any():
        with pytest.raises(OverflowError, match=f"exceeds {dtype}'s"):
            to_storage(values, dtype)
        return
    found = from_storage(to_storage(values, dtype), dtype).astype(np.float32)
    np.testing.assert_array_equal(found, expected)  # NaN equals NaN
    np.testing.assert_array_equal(np.signbit(found[~np.isnan(found)]), np.signbit(values[~np.isnan(values)]))


def test_many_numbers_are_rounded_block_by_block() -> None:
    values = np.random.default_rng(0).normal(scale=1e-6, size=(5, 2**14 + 3)).astype(np.float32)
    values.setflags(write=False)
    np.testing.assert_array_equal(to_storage(values, "float16"), values.astype(np.float16))


def test_bfloat16_ties_go_to_even() -> None:
    bits = np.array([0x3F808000, 0x3F818000, 0x3F808001, 0x3F807FFF, 0xBF818000], np.uint32)
    expected = np.array([0x3F80, 0x3F82, 0x3F81, 0x3F80, 0xBF82], np.uint16)
    np.testing.assert_array_equal(to_storage(bits.view(np.float32), "bfloat16"), expected)


@pytest.mark.parametrize("others", [[1.0], [np.inf], [np.nan, -np.inf]])
@pytest.mark.parametrize(("dtype", "number"), [("float16", 65520.0), ("float16", -1e6), ("bfloat16", 3.4e38)])
def test_overflow_raises_among_any_other_numbers(dtype: str, number: float, others: list[float]) -> None:
    with pytest.raises(OverflowError, match=f"magnitude .* exceeds {dtype}'s"):
        to_storage(np.array([*others, number], np.float32), dtype)


@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float32"])
def test_nan_and_infinities_are_kept(dtype: str) -> None:
    values = np.array([np.nan, np.inf, -np.inf, 65519.0, 0.0], np.float32)
    found = from_storage(to_storage(values, dtype), dtype).astype(np.float32)
    np.testing.assert_array_equal(np.isnan(found), np.isnan(values))
    np.testing.assert_array_equal(found[1:3], values[1:3])
    assert np.isfinite(found[3:]).all()


def numpy_scaled(values: np.ndarray, dtype: str) -> np.ndarray:
    """The scaled types in numpy. A token that is not finite has a scale of NaN, and its numbers themselves as codes."""
    largest = {"int8": 127.0, "float8": 448.0}[dtype]
    scales = np.abs(values).max(axis=-1, keepdims=True) / np.float32(largest)
    scales[~np.isfinite(scales)] = np.nan
    codes = values / np.where(scales > 0, scales, np.float32(1))
    if dtype == "int8":
        last_bytes = np.nan_to_num(np.rint(codes), nan=0, posinf=0, neginf=0).astype(np.int64).astype(np.uint8)
    else:
        last_bytes = torch.from_numpy(codes).to(torch.float8_e4m3fn).view(torch.uint8).numpy()
    return np.concatenate([last_bytes, scales.astype("<f4").view(np.uint8)], axis=-1)


def adversarial_tokens() -> Iterator[np.ndarray]:
    """Random bits, zeros, subnormal numbers, ties between codes, the largest numbers, and numbers beside NaN."""
    generator = np.random.default_rng(0)
    bits = generator.integers(0, 2**32, (300, 256), dtype=np.uint64).astype(np.uint32)
    yield bits.view(np.float32)[np.isfinite(bits.view(np.float32)).all(axis=1)]
    yield (generator.normal(size=(300, 300)) * 10.0 ** generator.integers(-44, 30, (300, 1))).astype(np.float32)
    odd = np.zeros((5, 16), np.float32)
    odd[1], odd[2, 3], odd[3], odd[4] = -0.0, 1e-45, 3.4e38, np.float32(1e-40) * np.arange(16)
    yield odd
    codes = torch.arange(127, dtype=torch.uint8).view(torch.float8_e4m3fn).float().numpy()
    ties = (codes[1:] + codes[:-1]) / 2
    beside = [np.nextafter(ties, np.float32(sign * np.inf)) for sign in (-1, 1)]
    tied = np.concatenate([codes, ties, *beside]).astype(np.float32)
    yield np.stack([tied, -tied, tied * np.float32(2**-20), 3 * tied])
    broken = (1000 * generator.normal(size=(200, 64))).astype(np.float32)
    broken[::3, 5], broken[::5, 2], broken[::7, 9] = np.nan, np.inf, -np.inf
    yield broken


@pytest.mark.parametrize("block", [2**7, 2**15, 2**20])
@pytest.mark.parametrize("dtype", ["int8", "float8"])
@pytest.mark.filterwarnings("ignore::RuntimeWarning")
def test_scaled_types_have_the_bits_of_numpy(dtype: str, block: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(dtypes, "_BLOCK", block)
    for values in adversarial_tokens():
        np.testing.assert_array_equal(to_storage(values, dtype), numpy_scaled(values, dtype))


@pytest.mark.parametrize("dtype", STORAGE_DTYPES)
def test_conversion_of_a_bfloat16_pass_is_that_of_its_float32(dtype: str) -> None:
    for values in adversarial_tokens():
        rough = torch.from_numpy(values).to(torch.bfloat16)
        for found, expected in zip(convert(rough, dtype), convert(rough.float(), dtype), strict=True):
            assert found.numpy().tobytes() == expected.numpy().tobytes()


@pytest.mark.parametrize("dtype", STORAGE_DTYPES)
def test_conversion_reports_each_token(dtype: str) -> None:
    values = np.ones((2, 3, 8), np.float32)
    values[0, 1, 2], values[1, 0, 3], values[1, 0, 4], values[1, 2, 0] = np.nan, -1e9, np.inf, 7e4
    stored = convert(torch.from_numpy(values), dtype)
    assert stored.is_finite.tolist() == [[True, False, True], [False, True, True]]
    overflow = dtype == "float16"
    assert stored.lost.tolist() == [[0, 0, 0], [1e9 if overflow else 0, 0, 7e4 if overflow else 0]]
    chosen = stored.select(np.array([[True, True, False], [False, True, False]]))
    np.testing.assert_array_equal(chosen.to_numpy(dtype), to_storage(values[[0, 0, 1], [0, 1, 1]], dtype))


def test_nan_has_one_form_in_two_bytes() -> None:
    bits = np.array([[0x7FC00001, 0xFFC00000, 0x7F800001, 0xFFFFFFFF]], np.uint32)
    assert to_storage(bits.view(np.float32), "bfloat16").tolist() == [[0x7FC0] * 4]
    assert to_storage(bits.view(np.float32), "float16").view(np.uint16).tolist() == [[0x7E00] * 4]


# Scaled types: each token has a scale of its own


@quick
@given(tokens)
def test_int8_is_torchs_quantisation_with_a_scale_for_each_token(values: np.ndarray) -> None:
    values[np.abs(values).max(axis=1) < 1e-30] = 1  # torch multiplies by 1 / scale, which must be finite
    scales = torch.from_numpy(np.abs(values).max(axis=1) / np.float32(127))
    zeros = torch.zeros(len(values), dtype=torch.int32)
    expected = torch.fake_quantize_per_channel_affine(torch.from_numpy(values), scales, zeros, 0, -127, 127).numpy()
    found = from_storage(to_storage(values, "int8"), "int8")
    # a quotient that lies between two codes may be rounded either way
    assert (np.abs(found - expected) <= 1.001 * scales.numpy()[:, None]).all()
    assert (np.abs(found - values) <= 0.5001 * scales.numpy()[:, None]).all()


@quick
@given(tokens)
def test_float8_is_torchs_cast_of_the_token_over_its_scale(values: np.ndarray) -> None:
    scales = np.abs(values).max(axis=1, keepdims=True) / np.float32(448)
    divided = torch.from_numpy(values / np.where(scales > 0, scales, 1).astype(np.float32))
    expected = divided.to(torch.float8_e4m3fn).float().numpy() * scales
    np.testing.assert_array_equal(from_storage(to_storage(values, "float8"), "float8"), expected)


def test_every_float8_code_is_torchs_number() -> None:
    codes = torch.arange(256, dtype=torch.uint8)
    codes = codes[~codes.view(torch.float8_e4m3fn).float().isnan()].repeat(700, 1)  # more than one portion
    scales = torch.logspace(-42, 35, len(codes))[:, None]
    expected = codes.view(torch.float8_e4m3fn).float() * scales
    assert torch.equal(numbers_of(torch.cat([codes, scales.view(torch.uint8)], dim=1), "float8"), expected)


@pytest.mark.parametrize("dtype", ["int8", "float8"])
def test_a_large_token_does_not_coarsen_the_others(dtype: str) -> None:
    generator = np.random.default_rng(0)
    values = generator.normal(size=(3, 5, 64)).astype(np.float32)
    values[:, 0] *= 1e6
    found = from_storage(to_storage(values, dtype), dtype)
    error = np.abs(found - values).max(axis=(0, 2)) / np.abs(values).max(axis=(0, 2))
    assert error.max() < 0.04
    assert error.max() / error.min() < 3


@pytest.mark.parametrize("dtype", ["int8", "float8"])
def test_token_that_is_not_finite_becomes_nan(dtype: str) -> None:
    values = np.ones((5, 4), np.float32)
    values[0, 2], values[1, 0], values[2, 1], values[3] = np.nan, np.inf, -np.inf, 0.0
    found = from_storage(to_storage(values, dtype), dtype)
    assert np.isnan(found[:3]).all()
    np.testing.assert_array_equal(found[3:], values[3:])


@pytest.mark.parametrize("dtype", STORAGE_DTYPES)
def test_stored_shape_and_type_are_as_declared(dtype: str) -> None:
    stored, spec = to_storage(np.ones((2, 3, 5), np.float32), dtype), make_spec(dtype, (3, 5), 1, 1)
    assert (stored.shape, stored.dtype) == ((2, *spec.stored_shape), spec.numpy_dtype)
    np.testing.assert_array_equal(from_storage(stored, dtype), np.ones((2, 3, 5)))
