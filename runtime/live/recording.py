"""What the microphone gave, by the time at which it was heard; a turn is cut out of it."""

from collections import deque

import numpy as np
from numpy.typing import NDArray

from runtime.live.settings import RATE

Wave = NDArray[np.float32]
PER_MS = RATE // 1000


class Recording:
    """Pieces of sound with the time of their first sample in ms; what is between them is missing."""

    def __init__(self) -> None:
        self._pieces: deque[tuple[float, Wave]] = deque()

    def push(self, wave: Wave, ends: float) -> None:
        """wave [n] whose last sample was heard at `ends`."""
        self._pieces.append((ends - len(wave) / PER_MS, wave))

    def wave(self, start: float, end: float) -> Wave:
        """All sound there is from `start` to `end`."""
        parts = [_within(at, wave, start, end) for at, wave in self._pieces]
        return np.concatenate([np.empty(0, np.float32), *parts])

    def drop(self, start: float, end: float) -> None:
        """Forget the sound from `start` to `end`."""
        kept: deque[tuple[float, Wave]] = deque()
        for at, wave in self._pieces:
            ends = at + len(wave) / PER_MS
            for low, high in ((at, min(ends, start)), (max(at, end), ends)):
                if len(part := _within(at, wave, low, high)):
                    kept.append((low, part))
        self._pieces = kept

    def forget_before(self, start: float) -> None:
        """Forget the pieces that end before `start`."""
        while self._pieces and self._pieces[0][0] + len(self._pieces[0][1]) / PER_MS <= start:
            self._pieces.popleft()

    def clear(self) -> None:
        self._pieces.clear()


def _within(at: float, wave: Wave, start: float, end: float) -> Wave:
    low, high = (round((edge - at) * PER_MS) for edge in (start, end))
    return wave[max(0, low) : max(0, high)]
