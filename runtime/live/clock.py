"""Where the time of a conversation comes from: milliseconds on the scale of the samples that were heard."""

import time
from typing import Protocol

LEAK = 0.05  # ms a hop by which a wall clock may be slower than the sound device's, or 1.5 in a thousand


class Clock(Protocol):
    def now(self) -> float:
        """How far the work has come."""
        ...

    def reach(self, t: float) -> None:
        """The sample at `t` was heard: no work can begin before it."""
        ...


class VirtualClock:
    """Time that passes only when somebody says so: work costs what `spend` is told."""

    def __init__(self) -> None:
        self._now = 0.0

    def now(self) -> float:
        return self._now

    def reach(self, t: float) -> None:
        self._now = max(self._now, t)

    def spend(self, ms: float) -> None:
        self._now += ms


class MeasuredClock:
    """Work costs what it really takes, but nobody waits for samples: for files that run as fast as they can."""

    def __init__(self) -> None:
        self._base = self._last = 0.0
        self._mark = time.perf_counter()

    def now(self) -> float:
        self._last = self._base + 1000 * (time.perf_counter() - self._mark)
        return self._last

    def reach(self, t: float) -> None:
        self._base, self._mark = max(self._last, t), time.perf_counter()


class WallClock:
    """Real time, laid so that the hop which arrived with the least delay arrived in time.

    A hop that is late finds less time for work before the next one, and so the loop catches up.
    """

    def __init__(self) -> None:
        self._offset: float | None = None

    def now(self) -> float:
        return _wall() - (self._offset or 0.0)

    def reach(self, t: float) -> None:
        offset = _wall() - t
        self._offset = offset if self._offset is None else min(self._offset + LEAK, offset)


def _wall() -> float:
    return 1000 * time.perf_counter()
