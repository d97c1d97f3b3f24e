"""GPTQ (Frantar et al. 2022, arXiv 2210.17323): columns are rounded one after the other, and what each lost is taken
up by those that follow, as the Hessian of the layer's output error says.

The error of a row w stored as q is (w - q) H (w - q)^T with H = X^T X over the calibration inputs X [positions,
columns], the same H for each row.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from quant.affine import Quantized, reciprocal
from quant.rtn import best_scales
from quant.scheme import Scheme
from runtime.errors import EdgeOmniError

Floats = NDArray[np.float32]

DAMPING = 0.01  # of the mean of the diagonal, as in the paper
BATCH = 32  # columns whose corrections are applied to the rest at once; the paper's 128 are no quicker here
WIDEST = 5120  # columns of one Hessian; a wider matrix has several, and what parts have to do with each other is lost


def part_width(columns: int, group: int) -> int:
    """Width of the equal parts, of whole groups each, into which the columns are cut so that none is over WIDEST."""
    parts = -(-columns // WIDEST)
    while columns % (parts * group):
        parts += 1
    return columns // parts


class Gram:
    """X^T X of all that was added, in float32: `parts` [columns / width, width, width] along its diagonal."""

    def __init__(self, columns: int, group: int):
        width = part_width(columns, group)
        self.parts = np.zeros((columns // width, width, width), np.float32)

    def add(self, x: NDArray[np.floating]) -> None:
        """x [positions, columns]."""
        width = self.parts.shape[1]
        for place, part in enumerate(self.parts):
            columns = x[:, place * width : (place + 1) * width].astype(np.float32)
            part += columns.T @ columns

    def curvatures(self) -> tuple["Curvature", ...]:
        """What GPTQ asks of each part."""
        return tuple(map(curvature, self.parts))

    def felt(self) -> Floats:
        """The diagonal [columns], damped so that a column that was always zero still counts for something."""
        diagonal = np.einsum("pii->pi", self.parts).ravel()
        return diagonal + np.float32(DAMPING * diagonal.mean() or 1.0)


@dataclass(frozen=True, eq=False)
class Curvature:
    """What GPTQ asks of a Hessian [n, n]: its diagonal [n], and the upper Cholesky factor of its inverse [n, n]."""

    diagonal: Floats
    factor: Floats


def curvature(hessian: NDArray[np.floating]) -> Curvature:
    """Damp, invert and factorise, in float64. A column that was always zero is made independent of the others.

    Where fp32 sums have left it indefinite it is damped ten times as much, and again. EdgeOmniError if it holds NaN or
    infinity.
    """
    if not np.isfinite(hessian).all():
        raise EdgeOmniError(
            "on the calibration turns a matrix met values that are not finite, so no error of it can be weighed; "
            "see what the float model answers to them"
        )
    damped = np.array(hessian, np.float64)
    places = np.diag_indices_from(damped)
    damping = DAMPING * float(damped[places].mean()) or 1.0
    while True:
        damped[places] += damping
        try:
            # With the columns in reverse order, the inverse of H's lower factor is the upper factor of H's inverse.
            lower = np.linalg.cholesky(damped[::-1, ::-1])
            break
        except np.linalg.LinAlgError:
            damping *= 10
    factor = np.linalg.inv(lower)[::-1, ::-1]
    return Curvature(damped[places].astype(np.float32), np.ascontiguousarray(factor, np.float32))


def gptq(weight: NDArray[np.floating], curvatures: Sequence[Curvature], scheme: Scheme) -> Quantized:
    """weight [rows, columns], fp32 or fp16, and the Hessians of its columns, equal parts -> Quantized.

    Scales are searched when a group's turn comes, on what its columns are by then, weighted by the diagonal. Each row
    is by itself.
    """
    parts = np.split(weight, len(curvatures), axis=1)
    solved = [_solve(part, curved, scheme) for part, curved in zip(parts, curvatures, strict=True)]
    codes = np.ascontiguousarray(np.concatenate([codes for codes, _, _ in solved]).T)
    scales, zeros = (np.ascontiguousarray(np.concatenate(side).T) for side in list(zip(*solved, strict=True))[1:])
    stored = None if scheme.symmetric else zeros.astype(np.uint8)
    return Quantized(codes, scales.astype(weight.dtype), stored, scheme.bits)


def _solve(weight: NDArray[np.floating], curved: Curvature, scheme: Scheme) -> tuple[NDArray[np.uint8], Floats, Floats]:
    """weight [rows, n] -> codes [n, rows], scales and zeros [n / group, rows]."""
    size, left = scheme.group_size, np.ascontiguousarray(weight.T, np.float32)  # so that columns run along memory
    codes = np.empty(left.shape, np.uint8)
    scales = np.empty((len(left) // size, left.shape[1]), np.float32)
    zeros = np.empty_like(scales)
    for start in range(0, len(left), BATCH):
        stop = min(start + BATCH, len(left))
        errors = np.empty((stop - start, left.shape[1]), np.float32)
        for at in range(start, stop):
            group, row = at // size, curved.factor[at]
            if at % size == 0:
                found, zeros[group] = best_scales(left[at : at + size], scheme, curved.diagonal[at : at + size, None])
                scales[group] = found.astype(weight.dtype)
            codes[at] = _codes(left[at], scales[group], zeros[group], scheme.bits)
            lost = left[at] - (codes[at] - zeros[group]) * scales[group]
            errors[at - start] = lost / row[at]
            left[at + 1 : stop] -= row[at + 1 : stop, None] * errors[at - start]
        left[stop:] -= curved.factor[start:stop, stop:].T @ errors
    return codes, scales, zeros


def _codes(column: Floats, scale: Floats, zero: Floats, bits: int) -> NDArray[np.uint8]:
    return np.clip(np.rint(column * reciprocal(scale)) + zero, 0, 2**bits - 1).astype(np.uint8)
