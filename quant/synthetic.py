"""Sounds and pictures made by code, to calibrate on where nobody gave recordings: not speech, but shaped as speech is.

Encoders have learned from real recordings; what these give is a stand-in that moves every codebook and every patch.
"""

import io

import numpy as np
from numpy.typing import NDArray
from PIL import Image

Wave = NDArray[np.float32]
SYLLABLES = 4.0  # a second
FORMANTS = ((730, 1090, 2440), (270, 2290, 3010), (300, 870, 2240), (530, 1840, 2480), (570, 840, 2410))
# of five English vowels, in Hz (Peterson and Barney 1952, men)


def voice(seconds: float, rate: int, seed: int) -> Wave:
    """Syllables float32 [seconds * rate]: harmonics of a gliding pitch shaped by vowels' formants, hiss, and pauses."""
    rng = np.random.default_rng(seed)
    pieces: list[Wave] = []
    while sum(map(len, pieces)) < seconds * rate:
        pieces.append(_syllable(rng, rate))
        if rng.random() < 0.15:
            pieces.append(np.zeros(int(rate * rng.uniform(0.1, 0.4)), np.float32))
    wave = np.concatenate(pieces)[: int(seconds * rate)]
    return (wave + 0.002 * rng.standard_normal(len(wave))).astype(np.float32)


def _syllable(rng: np.random.Generator, rate: int) -> Wave:
    count = int(rate / SYLLABLES * rng.uniform(0.6, 1.4))
    place = np.linspace(0, 1, count)
    pitch = rng.uniform(90, 240) * (1 + rng.uniform(-0.2, 0.2) * place)
    phase = 2 * np.pi * np.cumsum(pitch) / rate
    vowel = FORMANTS[rng.integers(len(FORMANTS))]
    voiced = sum(_gain(h * pitch.mean(), vowel) * np.sin(h * phase) for h in range(1, int(4000 / pitch.mean())))
    hiss = np.diff(rng.standard_normal(count + 1)) * (place < 0.2) * rng.uniform(0, 0.3)
    return ((0.1 * voiced + hiss) * np.sin(np.pi * place) ** 0.5).astype(np.float32)


def _gain(frequency: float, formants: tuple[int, ...]) -> float:
    """How loud a vowel's resonances make a harmonic of this frequency."""
    return sum(1 / (1 + ((frequency - centre) / 90) ** 2) for centre in formants)


def picture(width: int, height: int, seed: int) -> bytes:
    """A PNG: a sky-like gradient, a few plain shapes, lines like print, and some grain."""
    rng = np.random.default_rng(seed)
    down, across = np.mgrid[0:height, 0:width]
    top, bottom = rng.uniform(0, 255, (2, 3))
    pixels = top + (bottom - top) * (down / height)[..., None]
    for _ in range(6):
        x, y, size = rng.uniform(0, width), rng.uniform(0, height), rng.uniform(0.05, 0.3) * min(width, height)
        inside = np.hypot(across - x, down - y) < size if rng.random() < 0.5 else _box(across - x, down - y, size)
        pixels[inside] = rng.uniform(0, 255, 3)
    printed = (down % 14 < 6) & (rng.random((height, width // 4 + 1)).repeat(4, axis=1)[:, :width] < 0.5)
    pixels[printed & (down > 0.7 * height)] = 20
    pixels += rng.normal(0, 4, pixels.shape)
    out = io.BytesIO()
    Image.fromarray(np.clip(pixels, 0, 255).astype(np.uint8)).save(out, "png")
    return out.getvalue()


def _box(across: NDArray[np.floating], down: NDArray[np.floating], size: float) -> NDArray[np.bool_]:
    return (np.abs(across) < size) & (np.abs(down) < size / 2)
