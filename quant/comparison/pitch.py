"""The pitch of a voice, and how far two utterances of the same words lie apart in it.

YIN: A. de Cheveigné and H. Kawahara, "YIN, a fundamental frequency estimator for speech and music", J. Acoust. Soc.
Am. 111(4), 2002: difference function, cumulative mean normalisation, absolute threshold and parabolic interpolation
(steps 2 to 5 of the paper).
"""

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float64]

LOWEST, HIGHEST = 60.0, 500.0  # Hz
HOP = 0.01  # seconds between frames
WINDOW = 0.025  # seconds that are compared with themselves later
THRESHOLD = (
    0.25  # of the normalised difference: a frame above it has no pitch. 0.1 in the paper, which old recordings fail
)
SILENT = 10 ** (-50 / 20)  # root mean square of a frame that has none either
BLOCK = 500  # frames in memory at a time


@dataclass(frozen=True)
class PitchError:
    """`cents` over `voiced` frames that have a pitch in both; the share of all frames that has one in only one."""

    cents: float  # root mean square, 100 a semitone; NaN where no frame has a pitch in both
    voicing: float
    voiced: int


def pitch_error(ref: NDArray[np.float32], cand: NDArray[np.float32], rate: int) -> PitchError:
    """Compare the pitch of two waves [n], [m] frame by frame, over the shorter; both say the same at the same time."""
    a, b = f0(ref, rate), f0(cand, rate)
    shortest = min(len(a), len(b))
    a, b = a[:shortest], b[:shortest]
    both = (a > 0) & (b > 0)
    cents = 1200 * np.log2(b[both] / a[both])
    rms = float(np.sqrt(np.mean(np.square(cents)))) if both.any() else float("nan")
    voicing = float(np.mean((a > 0) != (b > 0))) if shortest else float("nan")
    return PitchError(rms, voicing, int(both.sum()))


def f0(wave: NDArray[np.float32], rate: int) -> Floats:
    """Fundamental frequency in Hz every 10 ms, 0 where there is none: [frames], none for less than one frame."""
    size, longest, hop = round(WINDOW * rate), int(rate / LOWEST) + 1, round(HOP * rate)
    if len(wave) < size + longest or not np.isfinite(wave).all():
        return np.empty(0)
    frames = np.lib.stride_tricks.sliding_window_view(np.asarray(wave, np.float64), size + longest)[::hop]
    blocks = (frames[start : start + BLOCK] for start in range(0, len(frames), BLOCK))
    return np.concatenate([_block(block, size, rate) for block in blocks])


def _block(frames: Floats, size: int, rate: int) -> Floats:
    """[n, size + longest] -> Hz [n]."""
    difference = normalised_difference(frames, size)
    lags = np.array([_period(row, int(rate / HIGHEST)) for row in difference])
    loud = np.sqrt(np.mean(np.square(frames[:, :size]), axis=1)) >= SILENT
    return np.where(loud & (lags > 0), rate / np.maximum(lags, 1), 0.0)


def normalised_difference(frames: Floats, size: int) -> Floats:
    """[n, size + longest] -> d'(lag) for lags 0 to longest - 1, [n, longest]: equations 6 and 8 of the paper."""
    longest = frames.shape[1] - size
    length = 1 << int(np.ceil(np.log2(frames.shape[1] + size)))
    head = np.fft.rfft(frames[:, :size], length)
    cross = np.fft.irfft(np.fft.rfft(frames, length) * head.conj(), length)[:, :longest]
    energy = np.cumsum(np.pad(np.square(frames), ((0, 0), (1, 0))), axis=1)
    lagged = energy[:, size : size + longest] - energy[:, :longest]
    difference = np.maximum(lagged[:, :1] + lagged - 2 * cross, 0.0)
    lags = np.arange(1, longest)
    mean = np.cumsum(difference[:, 1:], axis=1) / lags
    return np.pad(difference[:, 1:] / np.maximum(mean, 1e-12), ((0, 0), (1, 0)), constant_values=1.0)


def _period(row: Floats, shortest: int) -> float:
    """The first lag below the threshold, on to where its dip is deepest, between samples; 0 for none."""
    below = np.flatnonzero(row[shortest:-1] < THRESHOLD)
    if not len(below):
        return 0.0
    lag = shortest + int(below[0])
    while lag + 1 < len(row) - 1 and row[lag + 1] < row[lag]:
        lag += 1
    left, middle, right = row[lag - 1 : lag + 2]
    bend = left - 2 * middle + right
    return lag + (0.5 * (left - right) / bend if bend > 0 else 0.0)
