"""A matrix as small integers and back: value = (code - zero) * scale, one scale for each group of columns of a row."""

import numpy as np
from numpy.typing import NDArray

from runtime.integers import Codes, Floats, Quantized, dequantize, middle

__all__ = ["Codes", "Floats", "Quantized", "dequantize", "grouped", "middle", "quantize", "reciprocal"]


def quantize(weight: Floats, scales: Floats, zeros: Codes | None, bits: int) -> Quantized:
    """The nearest code to each value of weight [rows, columns] with the scales (and zeros) given. Ties go to even."""
    groups = grouped(weight, scales.shape[1])
    zero = middle(bits) if zeros is None else zeros[..., None].astype(np.float32)
    codes = np.clip(np.rint(groups * reciprocal(scales)[..., None]) + zero, 0, 2**bits - 1)
    return Quantized(codes.astype(np.uint8).reshape(weight.shape), scales, zeros, bits)


def grouped(matrix: NDArray, groups: int) -> NDArray[np.float32]:
    """[rows, columns] -> float32 [rows, groups, columns / groups]."""
    return matrix.astype(np.float32, copy=False).reshape(len(matrix), groups, -1)


def reciprocal(scales: Floats) -> NDArray[np.float32]:
    """1 / scale, and 0 where the scale is 0 (a group of zeros) or so small that its reciprocal overflows."""
    wide = scales.astype(np.float32, copy=False)
    usable = np.abs(wide) > 1 / np.finfo(np.float32).max
    return np.float32(1) / wide if usable.all() else np.divide(1, wide, out=np.zeros_like(wide), where=usable)
