"""A matrix as small integers and back: value = (code - zero) * scale, one scale for each group of columns of a row."""

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.floating]
Codes = NDArray[np.uint8]


@dataclass(frozen=True)
class Quantized:
    """A matrix [rows, columns]: codes uint8 of the same shape, each below 2^bits; scales [rows, columns / group].

    zeros are uint8 of the scales' shape, or None: then the zero is the middle, 2^(bits - 1). Rows are independent.
    """

    codes: Codes
    scales: Floats
    zeros: Codes | None
    bits: int


def middle(bits: int) -> int:
    """The code of 0 where no zeros are stored; codes then stand for -middle .. middle - 1."""
    return 1 << (bits - 1)


def quantize(weight: Floats, scales: Floats, zeros: Codes | None, bits: int) -> Quantized:
    """The nearest code to each value of weight [rows, columns] with the scales (and zeros) given. Ties go to even."""
    groups = grouped(weight, scales.shape[1])
    zero = middle(bits) if zeros is None else zeros[..., None].astype(np.float32)
    codes = np.clip(np.rint(groups * reciprocal(scales)[..., None]) + zero, 0, 2**bits - 1)
    return Quantized(codes.astype(np.uint8).reshape(weight.shape), scales, zeros, bits)


def dequantize(matrix: Quantized) -> NDArray[np.float32]:
    """The values [rows, columns] that the codes stand for."""
    groups = grouped(matrix.codes, matrix.scales.shape[1])
    zero = middle(matrix.bits) if matrix.zeros is None else matrix.zeros[..., None].astype(np.float32)
    return ((groups - zero) * matrix.scales[..., None].astype(np.float32)).reshape(matrix.codes.shape)


def grouped(matrix: NDArray, groups: int) -> NDArray[np.float32]:
    """[rows, columns] -> float32 [rows, groups, columns / groups]."""
    return matrix.astype(np.float32, copy=False).reshape(len(matrix), groups, -1)


def reciprocal(scales: Floats) -> NDArray[np.float32]:
    """1 / scale, and 0 where the scale is 0 (a group of zeros) or so small that its reciprocal overflows."""
    wide = scales.astype(np.float32)
    usable = np.abs(wide) > 1 / np.finfo(np.float32).max
    return np.divide(1, wide, out=np.zeros_like(wide), where=usable)
