"""GGML's block formats: as float32, and where a value is (code - zero) * scale also as the integers themselves.

The arithmetic is that of ggml's reference `dequantize_row_*`. Blocks of 32 values have a float16 scale and, in the `_1`
formats, a float16 minimum; those of 256 (`_K`) have a scale for each 16 or 32 values, itself a small integer.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import numpy as np

from runtime.integers import Quantized, middle

BLOCK = 32  # values in one block of the older formats
SUPER = 256  # values in one block of the K formats


@dataclass(frozen=True)
class AsIntegers:
    """How the blocks of one format are integers: `split` makes [n, block] codes and [n, groups] scales of n blocks.

    The zero is the middle of `bits`, which may be more bits than the file has: ONNX Runtime knows 2, 4 and 8.
    """

    bits: int
    group_size: int
    scale_bits: Literal[16, 32]
    split: Callable[[np.ndarray], tuple[np.ndarray, np.ndarray]]

    def integers(self, blocks: np.ndarray, columns: int) -> Quantized:
        """uint8 [n, bytes of a block] of whole rows of `columns` values -> those rows."""
        codes, scales = self.split(blocks)
        groups = columns // self.group_size
        return Quantized(codes.reshape(-1, columns), scales.reshape(-1, groups), None, self.bits)


def split_q4_0(blocks: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """uint8 [n, 18]: scale float16, 16 bytes of nibbles; value = (q - 8) * scale."""
    return _nibbles(blocks[:, 2:]), _half(blocks, 0)


def split_q5_0(blocks: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """uint8 [n, 22]: scale float16, 32 fifth bits, 16 bytes of nibbles; value = (q - 16) * scale, here q + 112."""
    return _nibbles(blocks[:, 6:]) + 16 * _fifth_bits(blocks[:, 2:6]) + np.uint8(middle(8) - 16), _half(blocks, 0)


def split_q8_0(blocks: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """uint8 [n, 34]: scale float16, 32 int8; value = q * scale, here q + 128."""
    return blocks[:, 2:] + np.uint8(middle(8)), _half(blocks, 0)


def split_q6_k(blocks: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """uint8 [n, 210]: 128 bytes of low nibbles, 64 of high pairs, 16 int8, float16; value = (q - 32) * (d * s_j)."""
    low = _strips(blocks[:, :128], 64, 4)
    high = _strips(blocks[:, 128:192], 32, 2)
    scales = blocks[:, 192:208].view(np.int8).astype(np.float32)
    return (low | high << 4) + np.uint8(middle(8) - 32), _half(blocks, 208) * scales


def dequantize_q4_1(blocks: np.ndarray) -> np.ndarray:
    """uint8 [n, 20] (scale float16, minimum float16, 16 bytes of nibbles) -> float32 [n, 32] = q * scale + minimum."""
    return _nibbles(blocks[:, 4:]).astype(np.float32) * _half(blocks, 0) + _half(blocks, 2)


def dequantize_q5_1(blocks: np.ndarray) -> np.ndarray:
    """uint8 [n, 24] (scale, minimum, 32 fifth bits, 16 bytes of nibbles) -> float32 [n, 32] = q * scale + minimum."""
    codes = _nibbles(blocks[:, 8:]) + 16 * _fifth_bits(blocks[:, 4:8])
    return codes.astype(np.float32) * _half(blocks, 0) + _half(blocks, 2)


def dequantize_q4_k(blocks: np.ndarray) -> np.ndarray:
    """uint8 [n, 144] (d, dmin, 12 bytes of 6-bit scales and minima, 128 of nibbles) -> float32 [n, 256]."""
    return _with_minima(blocks, _strips(blocks[:, 16:], 32, 4))


def dequantize_q5_k(blocks: np.ndarray) -> np.ndarray:
    """uint8 [n, 176] (as Q4_K, but 32 bytes of fifth bits before the nibbles) -> float32 [n, 256]."""
    return _with_minima(blocks, _strips(blocks[:, 48:], 32, 4) | _strips(blocks[:, 16:48], 32, 1) << 4)


def _with_minima(blocks: np.ndarray, codes: np.ndarray) -> np.ndarray:
    """q * (d * scale_j) - dmin * minimum_j for 8 groups j of 32; the 6-bit scales and minima lie in bytes 4 to 15."""
    first, second, rest = blocks[:, 4:8], blocks[:, 8:12], blocks[:, 12:16]
    scales = np.concatenate([first & 63, (rest & 15) | (first >> 6) << 4], 1).astype(np.float32)
    minima = np.concatenate([second & 63, (rest >> 4) | (second >> 6) << 4], 1).astype(np.float32)
    groups = codes.reshape(-1, 8, 32).astype(np.float32)
    values = groups * (_half(blocks, 0) * scales)[..., None] - (_half(blocks, 2) * minima)[..., None]
    return values.reshape(codes.shape)


def _nibbles(packed: np.ndarray) -> np.ndarray:
    """uint8 [n, 16] -> [n, 32]: the low nibbles are values 0..15, the high ones 16..31."""
    return np.concatenate([packed & 15, packed >> 4], 1)


def _fifth_bits(packed: np.ndarray) -> np.ndarray:
    """uint8 [n, 4] -> [n, 32]: the bits of a little-endian number, lowest first."""
    return np.unpackbits(np.ascontiguousarray(packed), axis=1, bitorder="little")


def _strips(packed: np.ndarray, width: int, bits: int) -> np.ndarray:
    """uint8 [n, bytes] -> [n, bytes * 8 / bits]: the lowest bits of `width` bytes in a row, then their next, ..."""
    shifts = np.arange(0, 8, bits, dtype=np.uint8)
    strips = packed.reshape(len(packed), packed.shape[1] // width, 1, width) >> shifts[:, None]
    return (strips & np.uint8(2**bits - 1)).reshape(len(packed), packed.shape[1] * 8 // bits)


def _half(blocks: np.ndarray, at: int) -> np.ndarray:
    """The float16 at byte `at` of each block as float32 [n, 1]."""
    return np.ascontiguousarray(blocks[:, at : at + 2]).view(np.float16).astype(np.float32)
