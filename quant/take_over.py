"""Integers that a checkpoint stores: taken over as they are or, where they cannot be, what rounding again lost."""

import math
from collections.abc import Iterator
from dataclasses import dataclass, replace

import numpy as np

from quant.rewrite import Weight
from quant.scheme import Scheme
from runtime.errors import EdgeOmniError
from runtime.integers import Form, Quantized

STEP = 1 << 20  # codes at once; formats that lie transposed are read slower in smaller steps


def taken_over(weight: Weight, scheme: Scheme) -> Iterator[Quantized]:
    """The rows of a weight in the integers of its checkpoint, some at a time, brought to `scheme` without loss.

    Scales have the weight's type. EdgeOmniError if one is NaN or infinite, or is not exactly a number of that type.
    """
    target = Form(scheme.bits, scheme.group_size, scheme.symmetric)
    step = max(1, STEP // weight.shape[1])
    for start in range(0, weight.shape[0], step):
        rows = weight.integers(start, min(start + step, weight.shape[0])).brought_to(target)
        scales = rows.scales.astype(weight.dtype)
        if not np.array_equal(scales.astype(np.float32), rows.scales) or not np.isfinite(scales).all():
            wrong = rows.scales[(scales.astype(np.float32) != rows.scales) | ~np.isfinite(scales)][0]
            raise EdgeOmniError(
                f"{weight.name} has the scale {wrong}, which no {weight.dtype} is; cannot be taken over"
            )
        yield replace(rows, scales=scales)


@dataclass
class Lost:
    """What rounding took from values, added up over slabs."""

    signal: float = 0.0
    noise: float = 0.0

    def add(self, values: np.ndarray, rounded: np.ndarray) -> None:
        values = values.astype(np.float64)
        self.signal += float(np.square(values).sum())
        self.noise += float(np.square(values - rounded).sum())

    @property
    def sqnr_db(self) -> float | None:
        """Signal to quantization noise in decibels; None where nothing was lost, or nothing added."""
        return 10 * math.log10(self.signal / self.noise) if self.signal and self.noise else None
