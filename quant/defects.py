"""What is plainly wrong with an answer, and how two waveforms differ: found before any average can hide it."""

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from quant.observe import Answer
from runtime.audio import mel_filters

Wave = NDArray[np.float32]

FRAME, HOP = 1024, 256  # samples of a spectrum, and between two
SILENT = 10 ** (-50 / 20)  # root mean square below which a frame is silent
FLOOR = 1e-10  # of a power, so that silence has a logarithm
BANDS = 80
CLICK = 0.6  # second difference of neighbouring samples; a 24 kHz voice at full scale stays below it
LONGEST_PERIOD, FEWEST_REPEATS, SHORTEST_LOOP = 16, 4, 12


def degeneracies(answer: Answer, spoken: bool) -> tuple[str, ...]:
    """Everything that makes an answer useless, whatever its words: failed, empty, looping, silent."""
    if answer.failure:
        return (f"failed: {answer.failure}",)
    found = []
    if not answer.text.strip():
        found.append("empty")
    if loops(answer.ids):
        found.append("text loops")
    if loops(answer.codes):
        found.append("speech loops")
    if spoken and not np.isfinite(answer.wave).all():
        found.append("waveform is not finite")
    elif spoken and silence(answer.wave) > 0.99:
        found.append("silent")
    return tuple(found)


def loops(items: Sequence[object]) -> bool:
    """Whether a sequence ends in one stretch of at most 16 items, 4 times or more, over half of it and 12 items."""
    for period in range(1, LONGEST_PERIOD + 1):
        repeated = period
        while repeated < len(items) and items[-1 - repeated] == items[-1 - repeated + period]:
            repeated += 1
        if repeated >= max(FEWEST_REPEATS * period, SHORTEST_LOOP, len(items) / 2):
            return True
    return False


def silence(wave: Wave) -> float:
    """Share of frames below -50 dB of full scale; 1 for a wave without samples."""
    if not len(wave):
        return 1.0
    return float(np.mean(np.sqrt(np.mean(np.square(_frames(wave)), axis=-1)) < SILENT))


def clicks(wave: Wave) -> int:
    """Samples that jump: their second difference is larger than a voice makes it."""
    return int(np.count_nonzero(np.abs(np.diff(wave, 2)) > CLICK))


def log_mel_distance(ref: Wave, cand: Wave, rate: int) -> float:
    """Root mean square difference of two log-mel spectrograms, in dB, over the shorter; NaN where there is none.

    80 bands (`runtime.audio.mel_filters`), Hann windows of 1024 samples; bands are floored at -100 dB.
    """
    shortest = min(len(ref), len(cand))
    if not shortest:
        return float("nan")
    bands = mel_filters(rate, FRAME, BANDS)
    a, b = (10 * np.log10(np.maximum(power(wave[:shortest]) @ bands, FLOOR)) for wave in (ref, cand))
    return float(np.sqrt(np.mean(np.square(a - b))))


def power(wave: Wave) -> NDArray[np.float64]:
    """Power spectra [frames, FRAME / 2 + 1] of a wave [n]."""
    return np.square(np.abs(np.fft.rfft(_frames(wave) * np.hanning(FRAME), axis=-1)))


def _frames(wave: Wave) -> NDArray[np.float64]:
    padded = np.pad(np.asarray(wave, np.float64), (0, max(0, FRAME - len(wave))))
    return np.lib.stride_tricks.sliding_window_view(padded, FRAME)[::HOP]
