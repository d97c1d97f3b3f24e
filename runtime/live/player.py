"""The loudspeaker's side: one answer's samples, ducked, paused, rewound or faded out, and how much of it was heard."""

import threading
from collections import deque

import numpy as np
from numpy.typing import NDArray

Wave = NDArray[np.float32]
EMPTY = np.empty(0, np.float32)
RATE = 24_000
LATENCY_MS = 40.0


class Player:
    """Samples of one answer at a time; `take` is called by the device or by a simulation, from any thread.

    The answer is known by its number: what another one writes is dropped and counted, so that nothing stale is played.
    """

    def __init__(self, rate: int = RATE, latency_ms: float = LATENCY_MS):
        self.rate, self.latency_ms = rate, latency_ms
        self.underruns = self.stale = 0
        self._lock = threading.Lock()
        self._taken = 0  # samples since the start, silence among them
        self._gain = self._target = 1.0
        self._slope = 0.0  # gain a sample
        self._tail = EMPTY  # the fading end of an answer before this one
        self._fade_from = 1  # samples that its fade began with
        self._close()

    def _close(self) -> None:
        self.gen: int | None = None
        self._wave = EMPTY  # of the answer, from its beginning
        self._at = 0  # next sample of it to be taken
        self._ended = self._held = self._starved = self._flushed = False
        self._fading = 0  # samples that are still to be faded out
        self._spans: deque[tuple[int, int, int]] = deque()  # taken before, position in the answer, samples

    def open(self, gen: int) -> None:
        """Answer `gen` is the one to be heard from now on."""
        with self._lock:
            tail = self._wave[self._at : self._at + self._fading]
            self._close()
            self.gen, self._tail = gen, tail
            self._gain, self._target = 1.0, 1.0

    def write(self, samples: Wave, gen: int) -> bool:
        """Samples [n] of answer `gen`; False if another one is being heard."""
        with self._lock:
            if gen != self.gen or self._flushed:
                self.stale += 1
                return False
            self._wave = np.concatenate([self._wave, samples.astype(np.float32, copy=False)])
            self._starved = False
            return True

    def end(self, gen: int) -> None:
        """Answer `gen` has no more samples."""
        with self._lock:
            if gen == self.gen:
                self._ended = True

    def take(self, count: int) -> Wave:
        """The next samples [count] for the loudspeaker, silence where there are none."""
        with self._lock:
            out = np.zeros(count, np.float32)
            if len(self._tail):
                tail, self._tail = self._tail[:count], self._tail[count:]
                out[: len(tail)] += tail * _ramp(len(tail), 1.0, 0.0)
            if self.gen is not None and not self._held:
                self._take_into(out)
            self._taken += count
            return out

    def _take_into(self, out: Wave) -> None:
        fading = bool(self._fading)
        count = min(len(out), len(self._wave) - self._at, self._fading if fading else len(out))
        if count:
            piece = self._wave[self._at : self._at + count]
            out[:count] += piece * (self._fade(count) if fading else self._gains(count))
            self._spans.append((self._taken, self._at, count))
            self._at += count
            self._forget_spans()
        if fading and not self._fading:
            self._wave = self._wave[: self._at]
        elif not fading and count < len(out) and not self._ended and self._at and not self._starved:
            self.underruns, self._starved = self.underruns + 1, True

    def _gains(self, count: int) -> Wave:
        if self._gain == self._target:
            return np.full(count, self._gain, np.float32)
        gains = self._gain + self._slope * np.arange(1, count + 1)
        low, high = sorted((self._gain, self._target))
        self._gain = float(np.clip(gains[-1], low, high))
        return np.clip(gains, low, high).astype(np.float32)

    def _fade(self, count: int) -> Wave:
        before, self._fading = self._fading, self._fading - count
        return _ramp(count, self._gain * before / self._fade_from, self._gain * self._fading / self._fade_from)

    def duck(self, db: float, ms: float) -> None:
        """Go to `db` of full gain within `ms`."""
        self._glide(10 ** (db / 20), ms)

    def unduck(self, ms: float) -> None:
        self._glide(1.0, ms)

    def _glide(self, target: float, ms: float) -> None:
        with self._lock:
            self._target = target
            self._slope = (target - self._gain) / max(1.0, ms * self.rate / 1000)

    def pause(self) -> None:
        """Keep what is left; the clock of the answer stands still."""
        with self._lock:
            self._held = True

    def resume(self, rewind_ms: float) -> None:
        """Go on, and hear the last `rewind_ms` again if it had paused."""
        with self._lock:
            if self._held:
                self._at = max(0, min(self._at, self._heard()) - int(rewind_ms * self.rate / 1000))
                self._held, self._starved = False, False

    def flush(self, fade_ms: float) -> float:
        """Fade out and drop the rest; returns the milliseconds of the answer that were heard."""
        with self._lock:
            heard = self._heard() * 1000 / self.rate
            if self._held:
                self._wave = self._wave[: self._at]
            self._fading = self._fade_from = min(len(self._wave) - self._at, int(fade_ms * self.rate / 1000)) or 1
            if len(self._wave) == self._at:
                self._fading = 0
            self._held, self._ended, self._flushed = False, True, True
            return heard

    def silence(self) -> None:
        """Forget the answer at once."""
        with self._lock:
            self._close()
            self._tail = EMPTY

    @property
    def heard_ms(self) -> float:
        """How much of the answer has left the loudspeaker: what was taken one latency ago."""
        with self._lock:
            return self._heard() * 1000 / self.rate

    @property
    def buffered_ms(self) -> float:
        with self._lock:
            return (len(self._wave) - self._at) * 1000 / self.rate

    @property
    def audible(self) -> bool:
        """Something is coming out of the loudspeaker, or is on its way to it."""
        with self._lock:
            return bool(self._spans) and self._spans[-1][0] + self._spans[-1][2] > self._taken - self._latency

    @property
    def done(self) -> bool:
        """All of the answer was written, and all that was written was heard."""
        with self._lock:
            return self._ended and not self._held and self._at >= len(self._wave) and self._heard() >= self._at

    @property
    def _latency(self) -> int:
        return int(self.latency_ms * self.rate / 1000)

    def _heard(self) -> int:
        """Position in the answer of what leaves the loudspeaker now."""
        now = self._taken - self._latency
        for taken, position, count in reversed(self._spans):
            if taken < now:
                return position + min(count, now - taken)
        return 0

    def _forget_spans(self) -> None:
        while len(self._spans) > 2 and self._spans[1][0] < self._taken - self._latency:
            self._spans.popleft()


def _ramp(count: int, start: float, end: float) -> Wave:
    return np.linspace(start, end, count, dtype=np.float32)
