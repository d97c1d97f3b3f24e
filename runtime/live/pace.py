"""How much of a prompt is read at once, so that nothing else waits long: by what the last pieces took."""

import time
from collections.abc import Generator

import numpy as np

from runtime.context import Context

LIMIT_MS = 40.0  # of one piece
SIZES = (16, 32, 48, 64)  # positions; smaller pieces cost about as much as 16, since all weights are read for each
SHARE = 0.2  # of the newest measurement in the running mean


class Pace:
    """The running mean of what a position costs, in ms; None before the first piece was measured."""

    def __init__(self) -> None:
        self.cost: float | None = None

    @property
    def piece(self) -> int:
        """Positions of the next piece."""
        if self.cost is None:
            return SIZES[1]
        return max((size for size in SIZES if size * self.cost <= LIMIT_MS), default=SIZES[0])

    def note(self, count: int, ms: float) -> None:
        """Count a piece; the smallest are left out, whose cost is not that of their positions."""
        if count >= SIZES[0]:
            each = ms / count
            self.cost = each if self.cost is None else (1 - SHARE) * self.cost + SHARE * each

    def read(self, context: Context) -> Generator[None, None, np.ndarray | None]:
        """Read a context's tail, with a pause after each piece; returns the hidden state of the last position."""
        hidden = None
        while context.tail:
            count, start = min(self.piece, len(context.tail)), time.perf_counter()
            hidden = next(context.read(keep=len(context.tail) - count, piece=count))
            self.note(count, 1000 * (time.perf_counter() - start))
            yield
        return hidden
