"""Whether an answer repeats itself, in tokens or codes: one detector, while it is made and when it is judged."""

from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class Loop:
    """What counts as one: a stretch of at most `period` items that stands at least `times` times at the end of the
    sequence, over `shortest` items and this `share` of all of them.
    """

    period: int
    times: int
    shortest: int
    share: float


JUDGED = Loop(period=16, times=4, shortest=12, share=0.5)  # of a complete answer, which should have come to an end
# While an answer is made it may still come out of it, as a table, a refrain or a line of dashes does; but a loop that
# begins late in a long answer is one, too.
ENDLESS = Loop(period=64, times=4, shortest=48, share=0.0)


def loops(items: Sequence[object], loop: Loop = JUDGED) -> bool:
    """Whether a sequence ends in a loop."""
    for period in range(1, loop.period + 1):
        repeated = period
        while repeated < len(items) and items[-1 - repeated] == items[-1 - repeated + period]:
            repeated += 1
        if repeated >= max(loop.times * period, loop.shortest, loop.share * len(items)):
            return True
    return False


def repetition(items: Sequence[object], size: int = 4) -> float:
    """Share of the runs of `size` items that were there before, word for word or code for code; 0 for none."""
    runs = [tuple(items[start : start + size]) for start in range(len(items) - size + 1)]
    return 1 - len(set(runs)) / len(runs) if runs else 0.0
