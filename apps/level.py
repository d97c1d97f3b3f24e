"""How loud the microphone is, as a bar and as advice."""

from dataclasses import dataclass

import numpy as np

from runtime.audio import Wave, decibels, level_db

FLOOR_DB = -60.0  # where the bar begins
CLIPPED = 0.985  # of full scale
CLIPPED_SAMPLES = 3  # in one hop: fewer may be chance
QUIET_DB = -45.0  # the loudest hop of speech below this is hard to understand
MEMORY_HOPS = 94  # 3 s over which advice is given
ADVISED_HOPS = 31  # 1 s of hops are heard before advice
DEAD_DB = -90.0  # below, nothing is connected

CLIPPING_HINT = "too loud, it clips: lower its level"
QUIET_HINT = "too quiet: come closer or raise its level"
DEAD_HINT = "no signal: is it switched off, or another one?"


@dataclass(frozen=True)
class Level:
    """Of one hop, in dB under full scale, with advice where something is wrong."""

    rms_db: float
    peak_db: float
    hint: str = ""


class Meter:
    """Measures hops and advises on the last few seconds of them."""

    def __init__(self) -> None:
        self._peaks: list[float] = []
        self._clipped: list[bool] = []

    def measure(self, chunk: Wave, speaking: bool) -> Level:
        """One hop; `speaking` says whether a person is being heard in it: silence is no reason to advise."""
        size = np.abs(chunk)
        level = Level(level_db(chunk), decibels(float(size.max())))
        self._peaks = [*self._peaks, level.peak_db][-MEMORY_HOPS:]
        self._clipped = [*self._clipped, np.count_nonzero(size >= CLIPPED) >= CLIPPED_SAMPLES][-MEMORY_HOPS:]
        return Level(level.rms_db, level.peak_db, self._hint(speaking))

    def _hint(self, speaking: bool) -> str:
        if any(self._clipped):
            return CLIPPING_HINT
        if len(self._peaks) < ADVISED_HOPS:
            return ""
        loudest = max(self._peaks)
        if loudest <= DEAD_DB:
            return DEAD_HINT
        return QUIET_HINT if speaking and loudest < QUIET_DB else ""


def bar(level: Level, width: int = 30) -> str:
    """The level as blocks, with a mark where the peak is."""
    filled, peak = (_cells(db, width) for db in (level.rms_db, level.peak_db))
    cells = ["█" if cell < filled else "·" for cell in range(width)]
    if peak > filled:
        cells[peak - 1] = "▏"
    return "".join(cells)


def _cells(db: float, width: int) -> int:
    return round(width * min(1.0, max(0.0, (db - FLOOR_DB) / -FLOOR_DB)))
