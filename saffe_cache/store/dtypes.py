"""Convert numbers to their storage types and back, and summarise stored numbers. No file I/O.

| type | size of a number | error |
|---|---|---|
| `float32` | 4 bytes | none |
| `float16` | 2 bytes | 2⁻¹¹ of its magnitude; at most 65,504 |
| `bfloat16` | 2 bytes, the upper half of a float32, as uint16 | 2⁻⁸ of its magnitude |
| `int8` | 1 byte, plus 4 bytes per token | 1/254 of the token's largest magnitude |
| `float8` | 1 byte (e4m3), plus 4 bytes per token | 2⁻⁴ of its magnitude |

The scaled types, int8 and float8, divide each token (the last axis) by its own scale, so that nothing overflows: the
largest magnitude / 127 or / 448. The scale, a float32, follows the token's codes in the same row.
Sources: Dettmers et al. 2022 (vector-wise int8); Micikevicius et al. 2022 (e4m3).

Statistics only show people the range of an array, so large shards are sampled: every n-th row, about two million
numbers. Using all numbers would take longer than writing the shard.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import accumulate
from typing import NamedTuple

import numpy as np
import torch

_LARGEST_CODE = {"int8": 127.0, "float8": 448.0}
SCALE_BYTES = 4
"""Bytes of a token's scale, which follow its codes."""
_INFINITY = {"float16": 0x7C00, "bfloat16": 0x7F80}
_NAN = {"float16": 0x7E00, "bfloat16": 0x7FC0}
"""The one form in which NaN is stored."""
_BLOCK = 2**15
"""Numbers that are processed at once on a CPU: they fit into its cache, and torch uses one thread for so few."""
_SAMPLE_NUMBERS = 2**21
_PORTION, _NOT_BIT_14 = 2**17, ~0x4000


def stored_type(dtype: str) -> np.dtype:
    """The little-endian type of stored values: uint16 for bfloat16, uint8 for scaled types."""
    return np.dtype({"bfloat16": "uint16", "int8": "uint8", "float8": "uint8"}.get(dtype, dtype)).newbyteorder("<")


def is_scaled(dtype: str) -> bool:
    """Whether each token has its own scale."""
    return dtype in _LARGEST_CODE


class Stored(NamedTuple):
    """Numbers in a storage type, with the result for each token (the last axis). Made by `convert`."""

    rows: torch.Tensor
    """[..., stored width] of float32, of uint8 for scaled types, or of int16, as torch hardly supports uint16."""
    is_finite: torch.Tensor
    """bool [...]: whether all numbers of the token are finite."""
    lost: torch.Tensor
    """float32 [...]: the token's largest finite magnitude that became infinite; 0 if none did."""

    def select(self, rows: np.ndarray | torch.Tensor) -> Stored:
        """The values of some tokens, chosen by an index or a mask on the first axes."""
        return Stored(*(part[rows] for part in self))

    def to_numpy(self, dtype: str) -> np.ndarray:
        """The rows in their stored type, for tensors on the CPU.

        Raises OverflowError if a finite number became infinite.
        """
        largest = float(self.lost.max()) if self.lost.numel() else 0.0
        if largest:
            most = torch.finfo(getattr(torch, dtype)).max
            raise OverflowError(f"magnitude {largest:.6g} exceeds {dtype}'s {most:.6g}")
        return self.rows.numpy().view(stored_type(dtype))


def convert(values: torch.Tensor, dtype: str) -> Stored:
    """Convert floating-point numbers to a storage type, on their device; the same bits on every device.

    bfloat16, float16 and float8 round to nearest even. NaN and infinities are kept; in the scaled types they turn their
    whole token into NaN. On a CPU, tokens are processed in blocks that fit into its cache.
    """
    tokens = values.reshape(-1, values.shape[-1])
    block = max(1, _BLOCK // tokens.shape[1] if tokens.device.type == "cpu" else len(tokens))
    lost = torch.zeros(len(tokens), device=tokens.device)
    if is_scaled(dtype):
        magnitudes = torch.cat([part.abs().amax(dim=1) for part in torch.split(tokens, block)]).float()
        is_finite = magnitudes.isfinite()
        rows = _scaled(tokens, magnitudes.masked_fill(~is_finite, torch.nan), dtype, block)
    elif dtype == "float32":
        rows = tokens.float()
        if rows.device.type == "cpu":  # numpy is thirty times as fast as torch here
            is_finite = torch.from_numpy(np.isfinite(rows.numpy()).all(axis=1))
        else:
            is_finite = rows.isfinite().all(dim=1)
    else:
        rows, all_finite = _halved(tokens, dtype, block)
        is_finite = torch.ones(len(tokens), dtype=torch.bool, device=tokens.device)
        if not all_finite:
            is_finite = tokens.isfinite().all(dim=1)
            rows.masked_fill_(tokens.isnan(), _NAN[dtype])
            largest = tokens.nan_to_num(0.0, 0.0, 0.0).abs().amax(dim=1).float()
            lost = torch.where(largest.to(getattr(torch, dtype)).isinf(), largest, 0.0)
    shape = values.shape[:-1]
    return Stored(rows.view(*shape, rows.shape[1]), is_finite.view(shape), lost.view(shape))


def to_storage(values: np.ndarray, dtype: str) -> np.ndarray:
    """Convert float32 numbers to a storage type, as `convert` does; integers only change their byte order.

    Raises OverflowError if a finite number becomes infinite in the storage type.
    """
    if dtype not in _NAN and not is_scaled(dtype):
        return np.ascontiguousarray(values, dtype=np.dtype(dtype).newbyteorder("<"))
    numbers = np.ascontiguousarray(values, dtype=np.float32)
    return convert(as_tensor(numbers), dtype).to_numpy(dtype)


def as_tensor(values: np.ndarray) -> torch.Tensor:
    """A tensor that shares the array's memory; a copy if that is read-only, as torch warns about it."""
    return torch.from_numpy(values if values.flags.writeable else values.copy())


def from_storage(stored: np.ndarray, dtype: str) -> np.ndarray:
    """The numbers of stored rows: float32 for bfloat16 and the scaled types, otherwise unchanged."""
    if dtype == "bfloat16":
        return (stored.astype("<u4") << 16).view("<f4")
    if not is_scaled(dtype):
        return stored
    return np.asarray(numbers_of(as_tensor(stored), dtype))


def numbers_of(stored: torch.Tensor, dtype: str) -> torch.Tensor:
    """The float32 numbers of stored rows, on their device; bfloat16 must be passed as int16, not uint16."""
    if dtype == "bfloat16":
        return stored.view(torch.bfloat16).float()
    if not is_scaled(dtype):
        return stored.float()
    scales = stored[..., -SCALE_BYTES:].clone(memory_format=torch.contiguous_format).view(torch.float32)
    if dtype == "float8" and stored.device.type == "cpu":
        return _from_float8(stored[..., :-SCALE_BYTES], scales)
    codes = stored[..., :-SCALE_BYTES].view(torch.int8 if dtype == "int8" else torch.float8_e4m3fn)
    return codes.float().mul_(scales)


def _from_float8(codes: torch.Tensor, scales: torch.Tensor) -> torch.Tensor:
    """Decode float8 three times as fast as torch's own conversion on a CPU.

    A code's sign, exponent and mantissa are moved to their places in float16, which gives 2⁻⁸ of the number. This works
    on portions so that intermediate results stay in the processor's cache. NaN has no code: the token's scale is NaN.
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


def _halved(tokens: torch.Tensor, dtype: str, block: int) -> tuple[torch.Tensor, bool]:
    """The bits of the rounded numbers, with NaN in any form, and whether all are known to be finite.

    That is unknown on other devices than the CPU, where checking would block.
    """
    rows = torch.empty(tokens.shape, dtype=torch.int16, device=tokens.device)
    all_finite = tokens.device.type == "cpu"
    for to, part in zip(torch.split(rows, block), torch.split(tokens, block), strict=True):
        to.view(getattr(torch, dtype)).copy_(part)
        if all_finite and to.numel():  # numpy is three times as fast as torch here
            all_finite = bool((to.numpy() & 0x7FFF).max() < _INFINITY[dtype])
    return rows, all_finite


def _scaled(tokens: torch.Tensor, magnitudes: torch.Tensor, dtype: str, block: int) -> torch.Tensor:
    """Each token's codes, followed by the bytes of its scale; tokens that are not finite have magnitude NaN."""
    # a GPU would multiply by the reciprocal of a Python number
    largest_code = magnitudes.new_full((), _LARGEST_CODE[dtype])
    scales = (magnitudes / largest_code)[:, None]
    divisors = torch.where(scales > 0, scales, 1.0)
    rows = torch.empty(len(tokens), tokens.shape[1] + SCALE_BYTES, dtype=torch.uint8, device=tokens.device)
    rows[:, -SCALE_BYTES:] = scales.view(torch.uint8)
    codes = rows[:, :-SCALE_BYTES].view(torch.int8 if dtype == "int8" else torch.float8_e4m3fn)
    room = torch.empty(min(block, len(tokens)), tokens.shape[1], device=tokens.device)
    for to, part, divisor in zip(
        torch.split(codes, block), torch.split(tokens, block), torch.split(divisors, block), strict=True
    ):
        divided = torch.div(part.float(), divisor, out=room[: len(part)])
        if dtype == "int8":
            divided = divided.round_().nan_to_num_(0.0, 0.0, 0.0).to(torch.int32)  # int8 takes the last byte
        to.copy_(divided)
    return rows


@dataclass(frozen=True, kw_only=True)
class Moments:
    """Moments of finite numbers; all 0 if there are none."""

    mean: float = 0.0
    m2: float = 0.0
    """Sum of squared differences from the mean."""
    count: int = 0
    max_magnitude: float = 0.0

    @property
    def std(self) -> float:
        return math.sqrt(self.m2 / self.count) if self.count else 0.0


def sampled_moments(portions: Sequence[np.ndarray], dtype: str) -> Moments:
    """Moments of every n-th row of a shard; they do not depend on how the stored rows are cut into portions."""
    n = max(1, sum(rows.size for rows in portions) // _SAMPLE_NUMBERS)
    starts = accumulate(map(len, portions), initial=0)
    sample = np.concatenate([rows[-start % n :: n] for start, rows in zip(starts, portions, strict=False)])
    tokens = sample.reshape(-1, math.prod(sample.shape[1:][-1:]))
    block = max(1, _BLOCK // tokens.shape[1])
    blocks = (tokens[start : start + block] for start in range(0, len(tokens), block))
    return combine_moments(_moments(from_storage(numbers, dtype)) for numbers in blocks)


def _moments(numbers: np.ndarray) -> Moments:
    """Moments of the finite values among [tokens, d], in float64 because a float32's square may overflow."""
    if numbers.dtype == np.float16:  # torch is eight times as fast as numpy
        numbers = as_tensor(numbers).float().numpy()
    values = numbers.astype(np.float64)
    total = float(np.einsum("ij->", values))  # twice as fast as sum(), and without warnings for infinities
    if not math.isfinite(total):
        is_finite = np.isfinite(numbers)
        numbers, values = numbers[is_finite][None], values[is_finite][None]
        total = float(np.einsum("ij->", values))
    if not values.size:
        return Moments()
    mean = total / values.size
    squares = _sum_of_squares(values)
    m2 = squares - mean * total
    if m2 < squares / 1000:  # too many digits cancelled
        values -= mean
        m2 = _sum_of_squares(values)
    return Moments(mean=mean, m2=m2, count=values.size, max_magnitude=float(max(numbers.max(), -numbers.min())))


def _sum_of_squares(values: np.ndarray) -> float:
    """Token by token: for longer products numpy's linear algebra would use every core without being faster."""
    return float((values[:, None, :] @ values[:, :, None]).sum())


def combine_moments(parts: Iterable[Moments]) -> Moments:
    """The moments of all parts together. Source: Chan, Golub, LeVeque 1979, eq. 2.1."""
    count, mean, m2, largest = 0, 0.0, 0.0, 0.0
    for part in parts:
        if part.count:
            total, delta = count + part.count, part.mean - mean
            mean += delta * part.count / total
            m2 += part.m2 + delta * delta * count * part.count / total
            count, largest = total, max(largest, part.max_magnitude)
    return Moments(mean=mean, m2=m2, count=count, max_magnitude=largest)
