"""The device's rate to the conversation's and back, piece by piece: 16 kHz heard, 24 kHz played."""

from collections.abc import Callable

import numpy as np
from numpy.typing import NDArray

from runtime.errors import EdgeOmniError
from runtime.live.ring import Ring
from runtime.live.settings import HOP

Samples = NDArray[np.float32]

HEARD_RATE = 16_000
PLAYED_RATE = 24_000
GAP_MS = 100  # between what was counted and what the device's clock says: samples are missing


def resampler(rate: int, wanted: int, channels: int):
    """soxr's stream for float32; in pieces it gives the same as in one."""
    try:
        import soxr
    except ImportError:
        raise EdgeOmniError("the microphone needs soxr, which is not installed: pip install edgeomni[talk]") from None
    return soxr.ResampleStream(rate, wanted, channels, dtype="float32")


class Outlet:
    """What is played, pulled at 24 kHz and handed out at the device's rate.

    The resampler works in bursts. The first calls pull ahead until its longest burst is bridged; from then on every
    block pulls as much as it plays, so that the delay in here stays the same.
    """

    def __init__(self, take: Callable[[int], Samples], rate: int):
        self.take, self.rate = take, rate
        self.broken = 0  # samples that were no numbers
        self._stream = None if rate == PLAYED_RATE else resampler(PLAYED_RATE, rate, 1)
        self._ready = np.empty(0, np.float32)
        self._ahead = 0  # samples pulled to bridge bursts
        self._pulled = self._given = 0

    @property
    def delay_ms(self) -> float:
        """From `take` to the device."""
        return 1000 * (self._pulled / PLAYED_RATE - self._given / self.rate)

    def __call__(self, count: int) -> Samples:
        """The next `count` samples for the device."""
        self._pull(-(-(self._given + count) * PLAYED_RATE // self.rate) + self._ahead - self._pulled)
        while (short := count - len(self._ready)) > 0:
            more = -(-short * PLAYED_RATE // self.rate)
            self._ahead += more
            self._pull(more)
        given, self._ready = self._ready[:count], self._ready[count:]
        self._given += count
        return given

    def _pull(self, count: int) -> None:
        if count <= 0:
            return
        self._pulled += count
        samples, broken = cleaned(self.take(count))
        self.broken += broken
        fresh = samples if self._stream is None else self._stream.resample_chunk(samples)
        self._ready = np.concatenate([self._ready, np.clip(fresh, -1, 1)])


def cleaned(samples: Samples) -> tuple[Samples, int]:
    """The samples with 0 for NaN and infinity, and how many those were."""
    good = np.isfinite(samples)
    if good.all():
        return samples, 0
    return np.where(good, samples, np.float32(0)), int(samples.size - np.count_nonzero(good))


def follow(t: float, step: float, stamp: float) -> float:
    """The time one step after t: counted, drawn to the device's stamp little by little, never backwards, all in ms."""
    error = stamp - (t + step)
    if abs(error) > GAP_MS:
        return max(t, stamp)
    return t + step + float(np.clip(0.02 * error, -1, 1))


class Intake:
    """What the device wrote into the ring -> hops of 16 kHz: the microphone, and what was played in the same block.

    The played reference comes before its echo by the delay from loudspeaker to microphone, which is the stream's
    round trip and the air: constant, and never negative.
    """

    def __init__(self, ring: Ring):
        self.ring = ring
        self.broken = 0
        self._stream = None if ring.rate == HEARD_RATE else resampler(ring.rate, HEARD_RATE, 2)
        self._ready = np.empty((0, 2), np.float32)
        self._fed = self._made = 0  # samples of the device, hops
        self._newest = 0  # position of the newest sample that was fed

    @property
    def missing(self) -> int:
        """How many samples of the device the next hop needs at least."""
        return max(1, (HOP - len(self._ready)) * self.ring.rate // HEARD_RATE)

    def pull(self) -> None:
        """Move what is in the ring."""
        if (got := self.ring.read()) is None:
            return
        block, start = got
        block, broken = cleaned(block)
        self.broken += broken
        self._fed += len(block)
        self._newest = start + len(block)
        fresh = block if self._stream is None else self._stream.resample_chunk(block)
        self._ready = np.concatenate([self._ready, fresh])

    def hop(self) -> tuple[Samples, Samples, float] | None:
        """Microphone [512], reference [512] and when the last sample of them was heard; None before they are whole."""
        if len(self._ready) < HOP:
            return None
        hop, self._ready = self._ready[:HOP], self._ready[HOP:]
        self._made += 1
        waiting = self._fed - self._made * HOP * self.ring.rate / HEARD_RATE
        ended = self.ring.heard_at(self._newest) - 1000 * waiting / self.ring.rate
        return np.ascontiguousarray(hop[:, 0]), np.ascontiguousarray(hop[:, 1]), ended


def whole(wave: Samples, rate: int, wanted: int) -> Samples:
    """A recording [n] at another rate."""
    if rate == wanted:
        return wave
    return resampler(rate, wanted, 1).resample_chunk(wave, last=True)
