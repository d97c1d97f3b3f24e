"""Sounds that are not a question: made of arithmetic, or of speech that is no speech any more (16 kHz)."""

from collections.abc import Callable, Sequence
from random import Random

import numpy as np
from scipy.signal import lfilter

RATE = 16000
Speech = Callable[[], np.ndarray]  # gives one random clip of speech, 16 kHz


def _draws(rng: Random) -> np.random.Generator:
    return np.random.default_rng(rng.getrandbits(63))


def _silence(rng: Random, n: int, speech: Speech) -> np.ndarray:
    return _draws(rng).standard_normal(n) * 10 ** rng.uniform(-5, -3)


def _white(rng: Random, n: int, speech: Speech) -> np.ndarray:
    return _draws(rng).standard_normal(n)


def _coloured(rng: Random, n: int, speech: Speech) -> np.ndarray:
    return np.asarray(lfilter([1], [1, -rng.uniform(0.5, 0.99)], _draws(rng).standard_normal(n)))


def _hum(rng: Random, n: int, speech: Speech) -> np.ndarray:
    t, f = np.arange(n) / RATE, rng.choice((50, 60, 100, 120))
    tones = [np.sin(2 * np.pi * f * h * t + rng.uniform(0, 6.3)) * rng.random() / h for h in range(1, 20)]
    return np.sum(tones, 0) + 0.02 * _draws(rng).standard_normal(n)


def _clicks(rng: Random, n: int, speech: Speech) -> np.ndarray:
    draws = _draws(rng)
    wave = 0.003 * draws.standard_normal(n)
    for _ in range(rng.randint(2, 20)):
        start = rng.randint(0, n - 400)
        wave[start : start + 400] += draws.standard_normal(400) * np.exp(-np.arange(400) / rng.uniform(10, 100))
    return wave


def _tone(rng: Random, t: np.ndarray, semitone: int, tilt: float) -> np.ndarray:
    f = 220 * 2 ** (semitone / 12)
    partials = [np.sin(2 * np.pi * f * h * t) / h**tilt for h in range(1, 7)]
    return np.sum(partials, 0) * np.exp(-t * rng.uniform(0, 6))


def _music(rng: Random, n: int, voices: int) -> np.ndarray:
    notes = rng.randint(2, 10)
    length = n // notes
    wave = np.zeros(n)
    t, tilt = np.arange(length) / RATE, rng.uniform(0.7, 2)
    for i in range(notes):
        for _ in range(rng.randint(1, voices)):
            wave[i * length : (i + 1) * length] += _tone(rng, t, rng.randint(-12, 24), tilt)
    return wave + 0.01 * _draws(rng).standard_normal(n)


def _chord(rng: Random, n: int, speech: Speech) -> np.ndarray:
    return _music(rng, n, 4)


def _melody(rng: Random, n: int, speech: Speech) -> np.ndarray:
    return _music(rng, n, 1)


def _babble(rng: Random, n: int, speech: Speech) -> np.ndarray:
    wave = np.zeros(n)
    for _ in range(rng.randint(3, 7)):
        start = rng.randint(0, max(1, n - 4000))
        clip = speech()[: n - start]
        wave[start : start + len(clip)] += clip * rng.uniform(0.5, 1)
    return wave


def _reversed(rng: Random, n: int, speech: Speech) -> np.ndarray:
    return speech()[::-1].copy()


def _cough(rng: Random, n: int, speech: Speech) -> np.ndarray:
    """One or two bursts of noise through a few broad resonances, with a sharp start and a slow end."""
    draws, wave = _draws(rng), 0.001 * _draws(rng).standard_normal(n)
    for _ in range(rng.randint(1, 3)):
        length = rng.randint(1600, 5600)
        burst = draws.standard_normal(length)
        for centre in (rng.uniform(300, 700), rng.uniform(900, 1800), rng.uniform(2200, 3500)):
            r = rng.uniform(0.85, 0.96)
            burst = burst + lfilter([1 - r], [1, -2 * r * np.cos(2 * np.pi * centre / RATE), r * r], burst)
        shape = np.minimum(1, np.arange(length) / 80) * np.exp(-np.arange(length) / (length / rng.uniform(3, 7)))
        start = rng.randint(0, max(1, n - length))
        wave[start : start + length] += (burst * shape)[: n - start]
    return wave


def _sweep(rng: Random, n: int, speech: Speech) -> np.ndarray:
    t = np.arange(n) / RATE
    return np.sin(2 * np.pi * (200 * t + rng.uniform(50, 900) * t * t / 2 * np.sin(3 * t)))


def _modulated(rng: Random, n: int, speech: Speech) -> np.ndarray:
    t = np.arange(n) / RATE
    return _coloured(rng, n, speech) * (1 + np.sin(2 * np.pi * rng.uniform(2, 8) * t))


def _drum(rng: Random, n: int, speech: Speech) -> np.ndarray:
    draws, wave = _draws(rng), np.zeros(n)
    period = rng.randint(3000, 8000)
    t = np.arange(period) / RATE
    for start in range(0, n - period, period):
        beat = np.sin(2 * np.pi * rng.uniform(60, 180) * t * np.exp(-4 * t)) * np.exp(-t * 18)
        wave[start : start + period] += beat + 0.3 * draws.standard_normal(period) * np.exp(-t * rng.uniform(20, 80))
    return wave + 0.001 * draws.standard_normal(n)


_KINDS: dict[str, Callable[[Random, int, Speech], np.ndarray]] = {
    "silence": _silence,
    "white": _white,
    "coloured": _coloured,
    "hum": _hum,
    "clicks": _clicks,
    "chord": _chord,
    "melody": _melody,
    "babble": _babble,
    "reversed": _reversed,
    "cough": _cough,
    "sweep": _sweep,
    "modulated": _modulated,
    "drum": _drum,
}


def draw_noise(rng: Random, kinds: Sequence[str], speech: Speech, seconds: float) -> tuple[str, np.ndarray]:
    """Draw one sound of the named kinds: (kind, 16 kHz samples, peak 0.7 except for silence)."""
    kind = rng.choice([k for k in kinds if k in _KINDS])
    wave = _KINDS[kind](rng, int(RATE * seconds), speech).astype(np.float32)
    if kind != "silence":
        wave *= 0.7 / max(float(np.abs(wave).max()), 1e-4)
    return kind, wave
