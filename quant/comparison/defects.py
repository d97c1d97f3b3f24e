"""What is plainly wrong with an answer, and how two waveforms differ: found before any average can hide it."""

import numpy as np
from numpy.typing import NDArray

from quant.answer import Answer
from quant.comparison.scripts import foreign
from runtime.audio import mel_filters
from runtime.repetition import loops

Wave = NDArray[np.float32]

FRAME, HOP = 1024, 256  # samples of a spectrum, and between two
SILENT = 10 ** (-50 / 20)  # root mean square below which a frame is silent
FLOOR = 1e-10  # of a power, so that silence has a logarithm
RANGE = 1e-8  # of a power, below the loudest
BANDS = 80
CLICK = 12.0  # second difference over the root mean square of those around it; a voice stays below 11, 17.9 is most
AROUND = 480  # samples: 20 ms at 24 kHz
AUDIBLE = 0.01  # second difference below which nothing is a click


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


def lapses(question: str, reference: Answer, candidate: Answer) -> tuple[str, ...]:
    """What is plainly wrong with the candidate's answer beside the reference's: another language, or no end in sight.

    The language is told by the script, and expected to be the reference's, or the question's where that said nothing.
    """
    if candidate.failure:
        return ()
    found = []
    if other := foreign(reference.text if any(map(str.isalpha, reference.text)) else question, candidate.text):
        found.append(f"wrong language: {other}")
    if reference.ending == "end" != candidate.ending and length(candidate) >= 2 * length(reference):
        found.append(
            f"truncated: a limit ended it after {length(candidate)} steps, the reference took {length(reference)}"
        )
    return tuple(found)


def length(answer: Answer) -> int:
    """Tokens and frames of an answer."""
    return len(answer.ids) + len(answer.codes)


def silence(wave: Wave) -> float:
    """Share of frames below -50 dB of full scale; 1 for a wave without samples."""
    if not len(wave):
        return 1.0
    return float(np.mean(np.sqrt(np.mean(np.square(_frames(wave)), axis=-1)) < SILENT))


def clicks(wave: Wave) -> int:
    """How often a wave jumps: its second difference sticks out of those around it, as no voice makes it.

    Set on eight minutes of synthetic voices and a recording, in which none is found; of twelve jumps of one sample by
    0.05 that were put into the recording at full scale, ten are.
    """
    bend = np.abs(np.diff(np.asarray(wave, np.float64), 2))
    if len(bend) < AROUND or not np.isfinite(bend).all():
        return 0
    power_before = np.cumsum(np.pad(np.square(bend), (1 + AROUND // 2, AROUND // 2), mode="reflect"))
    around = np.sqrt(np.maximum(power_before[AROUND:] - power_before[:-AROUND], 0.0) / AROUND)[: len(bend)]
    places = np.flatnonzero((bend > AUDIBLE) & (bend > CLICK * around))
    return int(np.count_nonzero(np.diff(places, prepend=-AROUND) >= AROUND // 2))


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


def log_spectral_distance(ref: Wave, cand: Wave) -> float:
    """Mean over frames of the root mean square difference of two power spectra in dB, over the shorter; NaN for none.

    Rabiner and Juang, Fundamentals of Speech Recognition, 4.5.1. Both are floored 80 dB below the reference's loudest.
    """
    shortest = min(len(ref), len(cand))
    if not shortest:
        return float("nan")
    before, after = power(ref[:shortest]), power(cand[:shortest])
    lowest = max(RANGE * float(before.max()), FLOOR)
    lost = 10 * np.log10(np.maximum(before, lowest) / np.maximum(after, lowest))
    return float(np.mean(np.sqrt(np.mean(np.square(lost), axis=-1))))


def power(wave: Wave) -> NDArray[np.float64]:
    """Power spectra [frames, FRAME / 2 + 1] of a wave [n]."""
    return np.square(np.abs(np.fft.rfft(_frames(wave) * np.hanning(FRAME), axis=-1)))


def _frames(wave: Wave) -> NDArray[np.float64]:
    padded = np.pad(np.asarray(wave, np.float64), (0, max(0, FRAME - len(wave))))
    return np.lib.stride_tricks.sliding_window_view(padded, FRAME)[::HOP]
