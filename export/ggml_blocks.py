"""GGML's block formats as float32: 32 consecutive values share a scale, and in Q4_1 an offset.

The arithmetic is that of ggml's reference `dequantize_row_*`: one float32 product (and sum) a value.
"""

import numpy as np

BLOCK = 32  # values in one block of each of these formats


def dequantize_q4_0(blocks: np.ndarray) -> np.ndarray:
    """uint8 [n, 18] (scale float16, 16 bytes of nibbles) -> float32 [n, 32] = (q - 8) * scale."""
    values = _nibbles(blocks[:, 2:])
    values -= 8
    values *= _half(blocks, 0)
    return values


def dequantize_q4_1(blocks: np.ndarray) -> np.ndarray:
    """uint8 [n, 20] (scale float16, minimum float16, 16 bytes of nibbles) -> float32 [n, 32] = q * scale + minimum."""
    values = _nibbles(blocks[:, 4:])
    values *= _half(blocks, 0)
    values += _half(blocks, 2)
    return values


def dequantize_q8_0(blocks: np.ndarray) -> np.ndarray:
    """uint8 [n, 34] (scale float16, 32 int8) -> float32 [n, 32] = q * scale."""
    values = blocks[:, 2:].view(np.int8).astype(np.float32)
    values *= _half(blocks, 0)
    return values


def _nibbles(packed: np.ndarray) -> np.ndarray:
    """uint8 [n, 16] -> float32 [n, 32]: the low nibbles are values 0..15, the high ones 16..31."""
    values = np.empty((len(packed), BLOCK), np.float32)
    values[:, : BLOCK // 2] = packed & 15
    values[:, BLOCK // 2 :] = packed >> 4
    return values


def _half(blocks: np.ndarray, at: int) -> np.ndarray:
    """The float16 at byte `at` of each block as float32 [n, 1]."""
    return np.ascontiguousarray(blocks[:, at : at + 2]).view(np.float16).astype(np.float32)
