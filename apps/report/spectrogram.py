"""Spectrograms as pictures inside a page: what a voice looks like, time to the right and pitch upwards."""

import base64
import io

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from quant.comparison.defects import FRAME, power
from runtime.audio import mel_filters

Wave = NDArray[np.float32]

BANDS, HIGH = 80, 120  # mel bands, and pixels they are drawn with
WIDEST = 480  # pixels
LEVELS = 32  # of loudness: more would only make the page heavier
QUIET = -30.0  # dB that are drawn lightest at least, so that silence is dark
RANGE = 60.0  # dB below the loudest that are still seen
# Black, blue, red, yellow, white at even steps of loudness: light enough of it to be read by those who see no colours.
COLOURS = np.array([[8, 10, 28], [48, 30, 120], [190, 50, 90], [250, 170, 60], [255, 250, 225]], np.float64)


def spectrogram(wave: Wave, rate: int, label: str, top: float | None = None) -> str:
    """An <img> that holds a wave [n] as a log-mel spectrogram; "" for one without samples or with broken ones.

    `top` is the loudness in dB that is drawn lightest, by default the wave's own: two that are compared share one.
    """
    if not len(wave) or not np.isfinite(wave).all():
        return ""
    file = io.BytesIO()
    picture(loudness(wave, rate), loudest(wave, rate) if top is None else top).save(file, "PNG", optimize=True)
    data = base64.b64encode(file.getvalue()).decode()
    return f'<img class="spectrogram" alt="{label}" src="data:image/png;base64,{data}">'


def loudest(wave: Wave, rate: int) -> float:
    """dB of the loudest band of a wave at any time; what is not heard counts as QUIET."""
    if not len(wave) or not np.isfinite(wave).all():
        return QUIET
    return max(QUIET, float(loudness(wave, rate).max()))


def loudness(wave: Wave, rate: int) -> NDArray[np.float64]:
    """dB of each band over time, [frames, BANDS]."""
    return 10 * np.log10(np.maximum(power(wave) @ mel_filters(rate, FRAME, BANDS), 1e-10))


def picture(loud: NDArray[np.float64], top: float) -> Image.Image:
    """[frames, BANDS] in dB -> LEVELS colours, HIGH rows, at most WIDEST columns."""
    seen = np.clip(1 + (loud - top) / RANGE, 0, 1).T[::-1]
    levels = Image.fromarray(((LEVELS - 1) * seen).round().astype(np.uint8))
    drawn = levels.resize((min(WIDEST, max(1, seen.shape[1])), HIGH), Image.Resampling.BILINEAR)
    drawn.putpalette(palette().tobytes())
    return drawn


def palette() -> NDArray[np.uint8]:
    """Red, green and blue of each level, [LEVELS, 3]."""
    at, steps = np.linspace(0, 1, LEVELS), np.linspace(0, 1, len(COLOURS))
    return np.stack([np.interp(at, steps, channel) for channel in COLOURS.T], axis=-1).round().astype(np.uint8)
