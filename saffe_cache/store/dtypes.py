"""Numbers as they are stored, and back. Pure: no file is touched here.

| type | a number takes | error |
|---|---|---|
| `float32` | 4 bytes | none |
| `float16` | 2 bytes | 2⁻¹¹ of its magnitude; at most 65,504 |
| `bfloat16` | 2 bytes, the upper half of a float32, as uint16 | 2⁻⁸ of its magnitude |
| `int8` | 1 byte, and 4 for each token | 1/254 of the token's largest magnitude |
| `float8` | 1 byte (e4m3), and 4 for each token | 2⁻⁴ of its magnitude |

The scaled types, int8 and float8, divide each token (the last axis) by a scale of its own, so that nothing overflows:
largest magnitude / 127, and / 448. The scale, a float32, follows the token's codes, in the same row: who reads the row
has both. Sources: Dettmers et al. 2022 (vector-wise int8); Micikevicius et al. 2022 (e4m3).
"""

from __future__ import annotations

from typing import NamedTuple, get_args

import numpy as np
import torch

from saffe_cache.core.features import StorageType

STORAGE_DTYPES = get_args(StorageType)
_LARGEST_CODE = {"int8": 127.0, "float8": 448.0}
_SCALE_BYTES = 4


class _Half(NamedTuple):
    """A type of two bytes."""

    largest: float
    infinity: int
    """Its bits, without the sign."""


_HALVES = {"float16": _Half(65504.0, 0x7C00), "bfloat16": _Half(3.3895313892515355e38, 0x7F80)}
_BLOCK = 2**15
"""Numbers that torch is given at once: it takes no threads for them, of which the encoder has need."""
_PORTION, _NOT_BIT_14 = 2**17, ~0x4000


def stored_type(dtype: str) -> np.dtype:
    """The little-endian type of what is stored: uint16 for bfloat16, uint8 for scaled types."""
    return np.dtype({"bfloat16": "uint16", "int8": "uint8", "float8": "uint8"}.get(dtype, dtype)).newbyteorder("<")


def is_scaled(dtype: str) -> bool:
    """Whether each token has a scale of its own."""
    return dtype in _LARGEST_CODE


def stored_shape(shape: tuple[int, ...], dtype: str) -> tuple[int, ...]:
    """The shape of what is stored for numbers of a shape: a scaled token is followed by its scale."""
    return (*shape[:-1], shape[-1] + _SCALE_BYTES) if is_scaled(dtype) else shape


def fill_value(dtype: str) -> int | float:
    """What rows hold that were not written: NaN as it is stored; -1 for integers."""
    return {"bfloat16": 0x7FC0, "int8": 0xFF, "float8": 0xFF, "int64": -1}.get(dtype, float("nan"))


def to_storage(values: np.ndarray, dtype: str) -> np.ndarray:
    """Cast float32 numbers to a storage type; bfloat16 and float8 round to nearest even, as torch does.

    NaN and infinities are kept; in the scaled types they make a NaN of their whole token.

    Raises:
        OverflowError: a finite number becomes infinite in the storage type.
    """
    if is_scaled(dtype):
        return _scaled(np.ascontiguousarray(values, dtype=np.float32), dtype)
    if dtype not in _HALVES:
        return np.ascontiguousarray(values, dtype=np.dtype(dtype).newbyteorder("<"))
    stored = _halved(np.ascontiguousarray(values, dtype="<f4"), dtype)
    is_infinite = (stored.view("<u2") & 0x7FFF) == _HALVES[dtype].infinity
    if is_infinite.any() and (lost := np.abs(values[is_infinite & np.isfinite(values)])).size:
        raise OverflowError(f"magnitude {lost.max():.6g} exceeds {dtype}'s {_HALVES[dtype].largest:.6g}")
    return stored


def from_storage(stored: np.ndarray, dtype: str) -> np.ndarray:
    """The numbers of stored rows: float32 for bfloat16 and the scaled types, else as they are stored."""
    if dtype == "bfloat16":
        return (stored.astype("<u4") << 16).view("<f4")
    if not is_scaled(dtype):
        return stored
    given = torch.from_numpy(stored if stored.flags.writeable else stored.copy())
    return np.asarray(numbers_of(given, dtype))


def numbers_of(stored: torch.Tensor, dtype: str) -> torch.Tensor:
    """float32 of stored rows, on their device; uint16 is to be given as int16, of which torch knows more."""
    if dtype == "bfloat16":
        return stored.view(torch.bfloat16).float()
    if not is_scaled(dtype):
        return stored.float()
    scales = stored[..., -_SCALE_BYTES:].clone(memory_format=torch.contiguous_format).view(torch.float32)
    if dtype == "float8" and stored.device.type == "cpu":
        return _from_float8(stored[..., :-_SCALE_BYTES], scales)
    codes = stored[..., :-_SCALE_BYTES].view(torch.int8 if dtype == "int8" else torch.float8_e4m3fn)
    return codes.float().mul_(scales)


def _from_float8(codes: torch.Tensor, scales: torch.Tensor) -> torch.Tensor:
    """Three times as fast as torch's own conversion on a CPU.

    A code's sign, exponent and mantissa are put where float16 has its own, which makes it 2⁻⁸ of the number; a portion
    at a time, so that what lies between stays in the processor's cache. NaN has no code: it is the token's scale.
    """
    numbers = torch.empty(codes.shape, dtype=torch.float32)
    of_token, to, scales = codes.reshape(-1, codes.shape[-1]), numbers.view(-1, codes.shape[-1]), scales.view(-1, 1)
    portion = max(1, _PORTION // codes.shape[-1])
    halves = torch.empty(min(portion, len(to)), codes.shape[-1], dtype=torch.int16)
    for start in range(0, len(to), portion):
        here = slice(start, start + portion)
        bits = halves[: len(to[here])]
        bits.copy_(of_token[here].view(torch.int8)).bitwise_left_shift_(7).bitwise_and_(_NOT_BIT_14)
        to[here].copy_(bits.view(torch.float16)).mul_(scales[here] * 256)
    return numbers


def _halved(values: np.ndarray, dtype: str) -> np.ndarray:
    """Rounded by torch, which takes an eighth of numpy's time; a NaN has one form."""
    stored = np.empty(values.shape, stored_type(dtype))
    bits, numbers = stored.reshape(-1).view(np.int16), values.reshape(-1)
    for start in range(0, len(bits), _BLOCK):
        block = numbers[start : start + _BLOCK]
        to = torch.from_numpy(bits[start : start + _BLOCK]).view(getattr(torch, dtype))
        to.copy_(torch.from_numpy(block if block.flags.writeable else block.copy()))
    is_nan = np.isnan(values)
    if is_nan.any():
        stored[is_nan] = fill_value(dtype)
    return stored


def _scaled(values: np.ndarray, dtype: str) -> np.ndarray:
    """Codes of each token, and the bytes of its scale behind them."""
    scales = np.abs(values).max(axis=-1, keepdims=True) / np.float32(_LARGEST_CODE[dtype])
    scales[~np.isfinite(scales)] = np.nan
    codes = values / np.where(scales > 0, scales, np.float32(1))
    stored = np.empty(stored_shape(values.shape, dtype), np.uint8)
    if dtype == "int8":
        stored[..., :-_SCALE_BYTES] = np.nan_to_num(np.rint(codes), posinf=0, neginf=0).astype(np.int8).view(np.uint8)
    else:
        stored[..., :-_SCALE_BYTES] = torch.from_numpy(codes).to(torch.float8_e4m3fn).view(torch.uint8).numpy()
    stored[..., -_SCALE_BYTES:] = scales.astype("<f4").view(np.uint8)
    return stored
