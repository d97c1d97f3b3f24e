"""One spoken answer of each side in numbers: its length, silence, repetition, clicks, spectrum, pitch and words."""

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from quant.answer import Answer
from quant.comparison.defects import clicks, log_mel_distance, log_spectral_distance, silence
from quant.comparison.pitch import pitch_error
from quant.comparison.recognise import Recogniser, language_of
from quant.comparison.wer import Edits, word_errors
from runtime.errors import EdgeOmniError
from runtime.repetition import repetition

Wave = NDArray[np.float32]


@dataclass(frozen=True)
class Heard:
    """What a recogniser heard in the two answers, and how far that is from their own texts; `problem` if it failed."""

    reference: str
    candidate: str
    errors: tuple[Edits, Edits]
    problem: str = ""


@dataclass(frozen=True)
class Spoken:
    """Pairs are reference and candidate, each saying its own answer.

    What compares two sounds with each other does so on the reference's codes, made audible by both, since two answers
    in other words have nothing to be compared moment by moment.
    """

    seconds: tuple[float, float]
    silence: tuple[float, float]  # share of silent frames
    repetition: tuple[float, float]  # share of frames that repeat what came before
    clicks: tuple[int, int]
    log_spectral: float  # dB
    log_mel: float  # dB
    cents: float  # root mean square pitch error; NaN where no frame has a pitch in both
    voicing: float  # share of frames that have a pitch in one of the two only
    voiced: int  # frames with a pitch in both
    streamed: float  # largest difference of the candidate's answer, made as it was spoken, from the same made at once


def spoken(reference: Answer, candidate: Answer, same: Wave, rate: int, streamed: float) -> Spoken:
    """Measure two answers at `rate` samples a second; `same` is the reference's codes as the candidate sounds them."""
    pitch = pitch_error(reference.wave, same, rate)
    return Spoken(
        seconds=(len(reference.wave) / rate, len(candidate.wave) / rate),
        silence=(silence(reference.wave), silence(candidate.wave)),
        repetition=(repetition(reference.codes), repetition(candidate.codes)),
        clicks=(clicks(reference.wave), clicks(candidate.wave)),
        log_spectral=log_spectral_distance(reference.wave, same),
        log_mel=log_mel_distance(reference.wave, same, rate),
        cents=pitch.cents,
        voicing=pitch.voicing,
        voiced=pitch.voiced,
        streamed=streamed,
    )


def heard(recogniser: Recogniser, reference: Answer, candidate: Answer, rate: int) -> Heard:
    """Let a recogniser hear both answers; the reference's text decides for which language it listens."""
    language = language_of(reference.text)
    try:
        ours, theirs = (listen(recogniser, answer.wave, rate, language) for answer in (reference, candidate))
    except EdgeOmniError as error:
        nothing = Edits(0, 0, 0, 0)
        return Heard("", "", (nothing, nothing), str(error))
    return Heard(ours, theirs, (word_errors(reference.text, ours), word_errors(candidate.text, theirs)))


def listen(recogniser: Recogniser, wave: Wave, rate: int, language: str) -> str:
    """Nothing is heard in a wave that is silent or not finite, whatever a recogniser would make of it."""
    if not np.isfinite(wave).all() or silence(wave) == 1.0:
        return ""
    return recogniser.hear(wave, rate, language)
