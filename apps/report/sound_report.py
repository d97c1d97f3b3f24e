"""A spoken answer in the report: players, spectrograms, what a recogniser heard, and the numbers of its sound."""

import base64
import html
import io
import math
import wave
from collections.abc import Iterator

import numpy as np

from apps.report.spectrogram import loudest, spectrogram
from quant.answer import Answer
from quant.comparison.figures import TurnResult
from quant.comparison.spoken import Spoken
from runtime.audio import pcm16


def sounds(result: TurnResult) -> tuple[str, str]:
    """Reference and candidate: a player, a spectrogram and what was heard."""
    heard = result.recognised
    texts = ("", "") if heard is None else _heard(result)
    waves, rate = (result.reference.wave, result.candidate.wave), result.rate
    top = max(loudest(wave, rate) for wave in waves)
    ours, theirs = (
        player(answer.wave, rate) + spectrogram(answer.wave, rate, f"Spectrogram of the {who}'s answer", top)
        for who, answer in (("reference", result.reference), ("candidate", result.candidate))
    )
    return ours + texts[0], theirs + texts[1]


def player(samples: np.ndarray, rate: int) -> str:
    """An audio player that holds its sound."""
    if not len(samples) or not np.isfinite(samples).all():
        return '<p class="note">no sound</p>'
    file = io.BytesIO()
    with wave.open(file, "wb") as out:
        out.setnchannels(1)
        out.setsampwidth(2)
        out.setframerate(rate)
        out.writeframes(pcm16(samples).tobytes())
    return f'<audio controls src="data:audio/wav;base64,{base64.b64encode(file.getvalue()).decode()}"></audio>'


def _heard(result: TurnResult) -> tuple[str, str]:
    heard = result.recognised
    assert heard is not None
    if heard.problem:
        problem = f'<p class="note">not recognised: {html.escape(heard.problem)}</p>'
        return problem, problem
    ours, theirs = (
        f'<p class="note">heard: {html.escape(text) or "nothing"}<br>{edits.total} of {edits.count} words wrong'
        f"{_unfair(answer)}</p>"
        for text, edits, answer in (
            (heard.reference, heard.errors[0], result.reference),
            (heard.candidate, heard.errors[1], result.candidate),
        )
    )
    return ours, theirs


def _unfair(answer: Answer) -> str:
    return "; its speech was cut by a limit" if answer.cut else ""


def numbers(result: TurnResult) -> list[tuple[str, ...]]:
    """What was measured of the sound: (name, reference, candidate)."""
    return [] if result.speech is None else [*_own(result.speech), *_same(result.speech)]


def _own(found: Spoken) -> Iterator[tuple[str, ...]]:
    yield "seconds", *(f"{value:.2f}" for value in found.seconds)
    yield "silent frames", *(f"{value:.0%}" for value in found.silence)
    yield "frames that repeat", *(f"{value:.0%}" for value in found.repetition)
    yield "clicks", *(str(value) for value in found.clicks)


def _same(found: Spoken) -> Iterator[tuple[str, ...]]:
    """How the candidate makes codes audible: the reference's beside the reference, and its own in two ways."""
    yield "the same codes: log-spectral distance", "", _number(found.log_spectral, " dB")
    yield "the same codes: log-mel distance", "", _number(found.log_mel, " dB")
    yield f"the same codes: pitch error ({found.voiced} voiced frames)", "", _number(found.cents, " cents")
    yield "the same codes: voicing differs", "", _number(100 * found.voicing, " %")
    yield "its own codes: streamed against whole", "", _number(found.streamed, "")


def _number(value: float, unit: str) -> str:
    return "–" if math.isnan(value) else f"{value:.3g}{unit}"
