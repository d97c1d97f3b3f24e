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


def _slow(rng: Random, n: int, knots_a_second: float) -> np.ndarray:
    """A smooth random curve between -1 and 1."""
    knots = max(2, int(n / RATE * knots_a_second) + 2)
    values = _draws(rng).uniform(-1, 1, knots)
    return np.interp(np.linspace(0, knots - 1, n), np.arange(knots), values)


def _resonant(rng: Random, wave: np.ndarray, peaks: int) -> np.ndarray:
    """The sound through a few random resonances."""
    out = np.zeros(len(wave))
    for _ in range(peaks):
        centre, r = np.exp(rng.uniform(np.log(150), np.log(6000))), rng.uniform(0.8, 0.99)
        out += np.asarray(lfilter([1 - r], [1, -2 * r * np.cos(2 * np.pi * centre / RATE), r * r], wave))
    return out


def _whistle(rng: Random, n: int, speech: Speech) -> np.ndarray:
    pitch = np.exp(rng.uniform(np.log(300), np.log(3500)) + rng.uniform(0, 0.5) * _slow(rng, n, rng.uniform(1, 6)))
    tone = np.sin(2 * np.pi * np.cumsum(pitch) / RATE)
    return tone * np.clip(_slow(rng, n, rng.uniform(1, 4)) + 0.4, 0, 1)


def _bursts(rng: Random, n: int, speech: Speech) -> np.ndarray:
    """Rustling, scraping, doors: coloured noise in irregular bursts."""
    envelope = np.clip(_slow(rng, n, rng.uniform(2, 15)) - rng.uniform(-0.2, 0.5), 0, 1)
    return _resonant(rng, _draws(rng).standard_normal(n), rng.randint(1, 4)) * envelope


def _engine(rng: Random, n: int, speech: Speech) -> np.ndarray:
    """A motor: pulses at 20 to 200 Hz through resonances, its speed wandering."""
    speed = rng.uniform(20, 200) * (1 + rng.uniform(0, 0.3) * _slow(rng, n, rng.uniform(0.3, 2)))
    turns = np.cumsum(speed) / RATE
    pulses = np.diff(np.floor(turns), prepend=0.0) + 0.03 * _draws(rng).standard_normal(n)
    return _resonant(rng, pulses, rng.randint(2, 5)) * (1 + 0.3 * _slow(rng, n, 1))


def _keys(rng: Random, n: int, speech: Speech) -> np.ndarray:
    """Typing and tapping: short resonant knocks in an uneven rhythm."""
    wave, at = 0.0005 * _draws(rng).standard_normal(n), 0
    while at < n:
        wave[at : at + 60] += rng.uniform(0.3, 1) * _draws(rng).standard_normal(len(wave[at : at + 60]))
        at += int(RATE * rng.uniform(0.05, 0.5))
    return _resonant(rng, wave, 3)


def _wind(rng: Random, n: int, speech: Speech) -> np.ndarray:
    low = np.asarray(lfilter([1], [1, -rng.uniform(0.97, 0.995)], _draws(rng).standard_normal(n)))
    return low * (1.1 + _slow(rng, n, rng.uniform(0.5, 3)))


def _beeps(rng: Random, n: int, speech: Speech) -> np.ndarray:
    t, period = np.arange(n) / RATE, rng.uniform(0.1, 0.8)
    tone = np.sign(np.sin(2 * np.pi * rng.uniform(300, 3000) * t)) if rng.random() < 0.3 else 0
    tone = tone + np.sin(2 * np.pi * rng.uniform(300, 3000) * t)
    return tone * ((t / period) % 1 < rng.uniform(0.2, 0.7))


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
    "whistle": _whistle,
    "bursts": _bursts,
    "engine": _engine,
    "keys": _keys,
    "wind": _wind,
    "beeps": _beeps,
    "sweep": _sweep,
    "modulated": _modulated,
    "drum": _drum,
}


def draw_noise(rng: Random, kinds: Sequence[str], speech: Speech, seconds: float) -> tuple[str, np.ndarray]:
    """Draw one sound of the named kinds: (kind, 16 kHz samples, peak 0.7 except for silence)."""
    kind = rng.choice(kinds)
    wave = _KINDS[kind](rng, int(RATE * seconds), speech).astype(np.float32)
    if kind != "silence":
        wave *= 0.7 / max(float(np.abs(wave).max()), 1e-4)
    return kind, wave
