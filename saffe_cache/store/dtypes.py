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


_NAN_BITS = {"float16": 0x7E00, "bfloat16": 0x7FC0}
"""Of the types of two bytes: the one form in which they store NaN."""
_BLOCK = 2**15
"""Numbers that torch is given at once on a CPU. It uses one thread for them; the encoder needs the others."""
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


class Stored(NamedTuple):
    """Numbers as they are stored, and what became of each token (the last axis). Made by `convert`."""

    rows: torch.Tensor
    """[..., stored width] of float32, or of uint8 for scaled types, or of int16: torch knows little of uint16."""
    is_finite: torch.Tensor
    """bool [...]: are all numbers of the token finite?"""
    lost: torch.Tensor
    """float32 [...]: the largest finite magnitude of the token that became infinite; 0 if there is none."""

    def select(self, rows: np.ndarray | torch.Tensor) -> Stored:
        """The same of some tokens, chosen by an index or a mask on the first axes."""
        return Stored(*(part[rows] for part in self))

    def to_numpy(self, dtype: str) -> np.ndarray:
        """The rows in their stored type, for tensors on the CPU.

        Raises:
            OverflowError: a finite number became infinite.
        """
        largest = float(self.lost.max()) if self.lost.numel() else 0.0
        if largest:
            most = torch.finfo(getattr(torch, dtype)).max
            raise OverflowError(f"magnitude {largest:.6g} exceeds {dtype}'s {most:.6g}")
        return self.rows.numpy().view(stored_type(dtype))


def convert(values: torch.Tensor, dtype: str) -> Stored:
    """Convert floating-point numbers to a storage type, on their device; the same bits on every device.

    bfloat16, float16 and float8 round to nearest even. NaN and infinities are kept; in the scaled types they make a NaN
    of their whole token. On a CPU a block of tokens at a time, which stays in the processor's cache.
    """
    tokens = values.reshape(-1, values.shape[-1])
    is_cpu = tokens.device.type == "cpu"
    block = max(1, _BLOCK // tokens.shape[1] if is_cpu else len(tokens))
    magnitudes = torch.cat([part.abs().amax(dim=1) for part in torch.split(tokens, block)]).float()
    is_finite = magnitudes.isfinite()
    lost = torch.zeros_like(magnitudes)
    if is_scaled(dtype):
        rows = _scaled(tokens, magnitudes.masked_fill(~is_finite, torch.nan), dtype, block)
    elif dtype == "float32":
        rows = tokens.float()
    else:
        rows = _halved(tokens, dtype, block)
        if not is_cpu or not is_finite.all():  # elsewhere to ask would mean to wait
            rows.masked_fill_(tokens.isnan(), _NAN_BITS[dtype])
            magnitudes = tokens.nan_to_num(0.0, 0.0, 0.0).abs().amax(dim=1).float()
        lost = torch.where(magnitudes.to(getattr(torch, dtype)).isinf(), magnitudes, 0.0)
    shape = values.shape[:-1]
    return Stored(rows.view(*shape, rows.shape[1]), is_finite.view(shape), lost.view(shape))


def to_storage(values: np.ndarray, dtype: str) -> np.ndarray:
    """Cast float32 numbers to a storage type, as `convert` does; of integers only the order of bytes changes.

    Raises:
        OverflowError: a finite number becomes infinite in the storage type.
    """
    if dtype not in STORAGE_DTYPES or dtype == "float32":
        return np.ascontiguousarray(values, dtype=np.dtype(dtype).newbyteorder("<"))
    numbers = np.ascontiguousarray(values, dtype=np.float32)
    return convert(as_tensor(numbers), dtype).to_numpy(dtype)


def as_tensor(values: np.ndarray) -> torch.Tensor:
    """A tensor of the same memory, or of a copy if that is read-only, of which torch warns."""
    return torch.from_numpy(values if values.flags.writeable else values.copy())


def from_storage(stored: np.ndarray, dtype: str) -> np.ndarray:
    """The numbers of stored rows: float32 for bfloat16 and the scaled types, else as they are stored."""
    if dtype == "bfloat16":
        return (stored.astype("<u4") << 16).view("<f4")
    if not is_scaled(dtype):
        return stored
    return np.asarray(numbers_of(as_tensor(stored), dtype))


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


def _halved(tokens: torch.Tensor, dtype: str, block: int) -> torch.Tensor:
    """The bits of the rounded numbers; NaN in any form."""
    rows = torch.empty(tokens.shape, dtype=torch.int16, device=tokens.device)
    for to, part in zip(torch.split(rows, block), torch.split(tokens, block), strict=True):
        to.view(getattr(torch, dtype)).copy_(part)
    return rows


def _scaled(tokens: torch.Tensor, magnitudes: torch.Tensor, dtype: str, block: int) -> torch.Tensor:
    """Codes of each token, and the bytes of its scale behind them; tokens that are not finite have magnitude NaN."""
    largest_code = magnitudes.new_full((), _LARGEST_CODE[dtype])  # a GPU multiplies by the reciprocal of a plain number
    scales = (magnitudes / largest_code)[:, None]
    divisors = torch.where(scales > 0, scales, 1.0)
    rows = torch.empty(len(tokens), tokens.shape[1] + _SCALE_BYTES, dtype=torch.uint8, device=tokens.device)
    rows[:, -_SCALE_BYTES:] = scales.view(torch.uint8)
    codes = rows[:, :-_SCALE_BYTES].view(torch.int8 if dtype == "int8" else torch.float8_e4m3fn)
    room = torch.empty(min(block, len(tokens)), tokens.shape[1], device=tokens.device)
    for to, part, divisor in zip(
        torch.split(codes, block), torch.split(tokens, block), torch.split(divisors, block), strict=True
    ):
        divided = torch.div(part.float(), divisor, out=room[: len(part)])
        if dtype == "int8":
            divided = divided.round_().nan_to_num_(0.0, 0.0, 0.0).to(torch.int32)  # of which int8 takes the last byte
        to.copy_(divided)
    return rows
