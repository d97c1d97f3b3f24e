"""What happens to a clean recording on its way to a microphone: speed, tone, room, noise, level, a bad line."""

from random import Random

import numpy as np
from scipy.signal import fftconvolve, lfilter, resample_poly

RATE = 16000
Alignment = list[tuple[int, str]]


def _draws(rng: Random) -> np.random.Generator:
    return np.random.default_rng(rng.getrandbits(63))


def change_speed(wave: np.ndarray, factor: float) -> np.ndarray:
    """Play `factor` times as fast (pitch goes along), by linear interpolation."""
    return np.interp(np.arange(0, len(wave) - 1, factor), np.arange(len(wave)), wave).astype(np.float32)


def tilt(wave: np.ndarray, amount: float) -> np.ndarray:
    """First-order pre-emphasis (amount > 0) or de-emphasis."""
    return np.append(wave[:1], wave[1:] - amount * wave[:-1]).astype(np.float32)


def reverberate(wave: np.ndarray, rng: Random) -> np.ndarray:
    """A room: a direct path and exponentially decaying noise, 50 to 400 ms."""
    length = rng.randint(800, 6400)
    tail = _draws(rng).standard_normal(length) * np.exp(-np.arange(length) * 5 / length)
    tail[0] = rng.uniform(3, 12)
    return fftconvolve(wave, tail)[: len(wave)].astype(np.float32)


def narrow_band(wave: np.ndarray, rng: Random) -> np.ndarray:
    """A telephone-like line: low-pass by a moving average of a few samples, then 8-bit mu-law steps."""
    width = rng.choice((2, 3, 4))
    smooth = np.convolve(wave, np.ones(width) / width)[: len(wave)]
    peak = max(float(np.abs(smooth).max()), 1e-4)
    squeezed = np.sign(smooth) * np.log1p(255 * np.abs(smooth) / peak) / np.log(256)
    squeezed = np.round(squeezed * 127) / 127
    return (np.sign(squeezed) * (256 ** np.abs(squeezed) - 1) / 255 * peak).astype(np.float32)


def telephone_band(wave: np.ndarray) -> np.ndarray:
    """Nothing above 4 kHz: a telephone line, or a voice that was recorded at 8 kHz."""
    return resample_poly(resample_poly(wave, 1, 2), 2, 1)[: len(wave)].astype(np.float32)


def add_noise(wave: np.ndarray, rng: Random, snr: float) -> np.ndarray:
    """White to brown noise at a signal-to-noise ratio in dB."""
    noise = _draws(rng).standard_normal(len(wave))
    if rng.random() < 0.6:
        noise = np.asarray(lfilter([1], [1, -rng.uniform(0.3, 0.98)], noise))
    power = float((wave * wave).mean()) / max(float((noise * noise).mean()), 1e-12)
    return (wave + noise * np.sqrt(power * 10 ** (-snr / 10))).astype(np.float32)


def talk_over(wave: np.ndarray, other: np.ndarray, rng: Random, ratio: float) -> np.ndarray:
    """Another's speech behind the whole clip or a part of it, `ratio` dB below it: what an echo canceller leaves of the
    assistant's own voice, a television, a person in the room."""
    start = rng.randrange(max(1, len(wave) * 2 // 3))
    part = other[: len(wave) - start]
    power = float((wave * wave).mean()) / max(float((part * part).mean()), 1e-12)
    mixed = wave.copy()
    mixed[start : start + len(part)] += part * np.float32(np.sqrt(power * 10 ** (-ratio / 10)))
    return mixed


def change_level(wave: np.ndarray, rng: Random) -> np.ndarray:
    """28 dB of range below full scale; the official log-mel keeps the absolute level."""
    return (wave * (10 ** rng.uniform(-1.4, 0) / max(float(np.abs(wave).max()), 1e-4))).astype(np.float32)


def disturb(
    wave: np.ndarray, rng: Random, alignment: Alignment, behind: np.ndarray | None = None
) -> tuple[np.ndarray, Alignment]:
    """A random microphone recording of a clean 16 kHz clip, with its alignment moved along; `behind` may speak with it.

    About a third stay clean: the log-mel's floor hangs on the loudest frame, and a model that has only met noise
    does not know the floor of a quiet room.
    """
    factor = rng.uniform(0.88, 1.14) if rng.random() < 0.5 else 1.0
    if factor != 1.0:
        wave = change_speed(wave, factor)
    if behind is not None:
        wave = talk_over(wave, behind, rng, rng.uniform(3, 22))
    if rng.random() < 0.4:
        wave = tilt(wave, rng.uniform(-0.5, 0.6))
    if rng.random() < 0.3:
        wave = reverberate(wave, rng)
    if rng.random() < 0.1:
        wave = narrow_band(wave, rng)
    if rng.random() < 0.15:
        wave = telephone_band(wave)
    before, after = rng.randint(0, 4000), rng.randint(0, 3000)
    wave = np.pad(wave, (before, after)).astype(np.float32)
    if rng.random() < 0.65:
        wave = add_noise(wave, rng, rng.uniform(6, 45))
    if rng.random() < 0.1:
        limit = float(np.abs(wave).max()) * rng.uniform(0.3, 0.8)
        wave = np.clip(wave, -limit, limit)
    return change_level(wave, rng), [(int(start / factor) + before, phone) for start, phone in alignment]
