"""Codes <-> bytes in the layout of ONNX Runtime's MatMulNBits, which GatherBlockQuantized reads as well."""

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from quant.affine import Codes, Floats, Quantized


@dataclass(frozen=True)
class Packed:
    """codes uint8 [rows, groups, group_size * bits / 8]; scales [rows, groups]; zeros uint8 [rows, bytes of a row]."""

    codes: Codes
    scales: Floats
    zeros: Codes | None


def pack_bits(codes: Codes, bits: int) -> NDArray[np.uint8]:
    """[..., n] codes below 2^bits -> [..., n * bits / 8] bytes; the first code is in the lowest bits of its byte."""
    per_byte = 8 // bits
    together = np.zeros((*codes.shape[:-1], codes.shape[-1] // per_byte), np.uint8)
    for place in range(per_byte):
        together |= codes[..., place::per_byte] << (bits * place)
    return together


def unpack_bits(packed: NDArray[np.uint8], bits: int) -> Codes:
    """[..., n] bytes -> [..., n * 8 / bits] codes."""
    shifts = np.arange(0, 8, bits, dtype=np.uint8)
    return ((packed[..., None] >> shifts) & np.uint8(2**bits - 1)).reshape(*packed.shape[:-1], -1)


def pack(matrix: Quantized) -> Packed:
    """To MatMulNBits' inputs B, scales and zero_points. A row's zeros are filled up with 0 to whole bytes."""
    rows, groups = matrix.scales.shape
    codes = pack_bits(matrix.codes, matrix.bits).reshape(rows, groups, -1)
    zeros = None
    if matrix.zeros is not None:
        spare = -groups % (8 // matrix.bits)
        zeros = pack_bits(np.pad(matrix.zeros, ((0, 0), (0, spare))), matrix.bits)
    return Packed(codes, matrix.scales, zeros)


def unpack(packed: Packed, bits: int) -> Quantized:
    rows, groups = packed.scales.shape
    zeros = None if packed.zeros is None else unpack_bits(packed.zeros, bits)[:, :groups]
    return Quantized(unpack_bits(packed.codes.reshape(rows, -1), bits), packed.scales, zeros, bits)
