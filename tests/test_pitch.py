"""Pitch: glides of known course are followed, noise and silence have none, and a shifted voice is found to be so."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from quant.comparison.pitch import HIGHEST, HOP, LOWEST, WINDOW, f0, pitch_error
from runtime.audio import resample
from tests.recording import beckett

RATE = 24000


def glide(start: float, end: float, seconds: float = 1.0, rate: int = RATE) -> tuple[np.ndarray, np.ndarray]:
    """A tone with eight partials that glides evenly in cents, float32 [n], and its true frequency at each sample."""
    time = np.arange(round(seconds * rate)) / rate
    hertz = start * (end / start) ** (time / seconds)
    phase = 2 * np.pi * np.cumsum(hertz) / rate
    wave = sum(np.sin(partial * phase) / partial for partial in range(1, 9))
    return (0.2 * np.asarray(wave)).astype(np.float32), hertz


@settings(max_examples=25, deadline=None)
@given(st.floats(LOWEST + 5, HIGHEST - 20), st.floats(LOWEST + 5, HIGHEST - 20), st.sampled_from([16000, 22050, RATE]))
def test_a_glide_is_followed_to_a_tenth_of_a_semitone_and_is_voiced_throughout(start: float, end: float, rate: int):
    wave, hertz = glide(start, end, rate=rate)
    found = f0(wave, rate)
    middle = round(WINDOW * rate) // 2 + np.arange(len(found)) * round(HOP * rate)
    assert (found > 0).all()
    late = hertz[np.minimum(middle + round(rate / np.minimum(start, end)), len(hertz) - 1)]
    low, high = np.minimum(hertz[middle], late), np.maximum(hertz[middle], late)
    outside = np.maximum(np.log2(low / found), np.log2(found / high))  # a lag compares now with a period later
    assert 1200 * outside.max() < 10


def test_noise_silence_and_what_is_too_short_have_no_pitch() -> None:
    noise = np.random.default_rng(0).normal(0, 0.1, RATE).astype(np.float32)
    assert not f0(noise, RATE).any()
    assert not f0(np.zeros(RATE, np.float32), RATE).any()
    assert len(f0(noise[:500], RATE)) == 0
    assert not f0(glide(100, 100)[0] * np.float32(1e-3), RATE).any()  # below -50 dB


def test_a_tone_moved_by_a_semitone_is_a_hundred_cents_off() -> None:
    up = 2 ** (1 / 12)
    error = pitch_error(glide(110, 180)[0], glide(110 * up, 180 * up)[0], RATE)
    assert error.cents == pytest.approx(100, abs=1)
    assert error.voicing == 0


def test_a_voice_against_itself_has_no_error_and_against_noise_none_that_could_be_measured() -> None:
    speech = beckett(RATE)
    same = pitch_error(speech, speech, RATE)
    assert (same.cents, same.voicing) == (0, 0)
    assert same.voiced > 100
    noise = np.random.default_rng(0).normal(0, 0.1, len(speech)).astype(np.float32)
    lost = pitch_error(speech, noise, RATE)
    assert np.isnan(lost.cents)
    assert lost.voicing == pytest.approx(same.voiced / len(f0(speech, RATE)))


def test_real_speech_played_faster_is_higher_by_as_much() -> None:
    """The course of the pitch is compared by its median: frames of the two no longer lie at the same time."""
    speech = beckett(RATE)
    slow, fast = f0(speech, RATE), f0(resample(speech, 24000, 20000), RATE)
    cents = 1200 * np.log2(np.median(fast[fast > 0]) / np.median(slow[slow > 0]))
    assert cents == pytest.approx(1200 * np.log2(1.2), abs=60)
