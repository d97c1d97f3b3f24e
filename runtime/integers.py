"""A matrix as small integers, value = (code - zero) * scale: what `export` finds in a checkpoint and `quant` makes.

What ways of storing differ in (bits, group sizes, zeros, the order of columns) is told by a Form. What several have in
common is a Form again, to which the rows of all can be brought without loss.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.floating]
Codes = NDArray[np.uint8]

GROUP_SIZES = (256, 128, 64, 32, 16)  # that ONNX Runtime's operators know
WIDEST = {2: 128, 4: 256, 8: 256}  # by bits; 2 bits in groups of 256 would multiply in slow fp32


@dataclass(frozen=True)
class Form:
    """How a matrix [rows, columns] is stored: codes of `bits` bits, one scale for `group_size` columns of a row.

    `symmetric`: the zero is the middle code, else each group has one. `scale_bits`: the float that holds the scales.
    `order` (GPTQ's act-order): the stored columns are the matrix's columns order[0], order[1], ...; None where they are
    in place.
    """

    bits: int
    group_size: int
    symmetric: bool
    scale_bits: Literal[16, 32] = 16
    order: tuple[int, ...] | None = None


@dataclass(frozen=True)
class Quantized:
    """A matrix [rows, columns]: codes uint8 of the same shape, each below 2^bits; scales [rows, columns / group].

    zeros are uint8 of the scales' shape, or None: then the zero is the middle, 2^(bits - 1). Rows are independent.
    """

    codes: Codes
    scales: Floats
    zeros: Codes | None
    bits: int

    def brought_to(self, form: Form) -> "Quantized":
        """The same values in another form: more bits, smaller groups, zeros where there were none; columns as they lie.

        ValueError if that form cannot hold them.
        """
        times, rest = divmod(self.codes.shape[1], self.scales.shape[1] * form.group_size)
        if rest or form.bits < self.bits or (form.symmetric and self.zeros is not None):
            raise ValueError(f"{self.bits} bits in {self.scales.shape[1]} groups cannot be stored as {form}")
        codes, zeros = self.codes, self.zeros
        if form.symmetric:
            codes = codes + np.uint8(middle(form.bits) - middle(self.bits))
        elif zeros is None:
            zeros = np.full(self.scales.shape, middle(self.bits), np.uint8)
        repeated = None if zeros is None else zeros.repeat(times, axis=1)
        return Quantized(codes, self.scales.repeat(times, axis=1), repeated, form.bits)


def middle(bits: int) -> int:
    """The code of 0 where no zeros are stored; codes then stand for -middle .. middle - 1."""
    return 1 << (bits - 1)


def dequantize(matrix: Quantized) -> NDArray[np.float32]:
    """The values [rows, columns] that the codes stand for: one float32 product each, exact if scales are float16."""
    rows, groups = matrix.scales.shape
    zero = middle(matrix.bits) if matrix.zeros is None else matrix.zeros[..., None].astype(np.float32)
    codes = matrix.codes.astype(np.float32).reshape(rows, groups, matrix.codes.shape[1] // max(1, groups))
    return ((codes - zero) * matrix.scales[..., None].astype(np.float32)).reshape(matrix.codes.shape)


def common_form(forms: Sequence[Form | None]) -> Form | None:
    """The form to which matrices that are stacked by rows can all be brought.

    None if there is none: one of them is not stored as integers, or they differ in the order of their columns.
    """
    known = [form for form in forms if form is not None]
    if not known or len(known) < len(forms) or len({form.order for form in known}) > 1:
        return None
    return Form(
        bits=max(form.bits for form in known),
        group_size=min(form.group_size for form in known),
        symmetric=all(form.symmetric for form in known),
        scale_bits=max(form.scale_bits for form in known),
        order=known[0].order,
    )


def even_groups(group_of: NDArray[np.integer], bits: int) -> int | None:
    """The widest group size that keeps columns of different groups apart; group_of [columns], equal ones adjacent.

    None if no size does: the columns are not a multiple of it, or too few lie in one group.
    """
    for size in GROUP_SIZES:
        if size <= WIDEST[bits] and len(group_of) % size == 0:
            blocks = group_of.reshape(-1, size)
            if (blocks == blocks[:, :1]).all():
                return size
    return None
