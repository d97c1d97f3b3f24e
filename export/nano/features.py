"""Log-mels in torch: what the encoder hears (16 kHz, Whisper's) and what decoder and vocoder speak (24 kHz, 50 Hz)."""

from functools import cache

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

HEARD_RATE = 16000
SPOKEN_RATE = 24000
SPOKEN_HOP = 480
_HEARD_FFT, _HEARD_HOP, _SPOKEN_FFT = 400, 160, 1920
# The spoken mel is stored normalised; nothing in the official layout knows, the vocoder is trained on this form.
SPOKEN_MEAN, SPOKEN_SCALE = -7.0, 3.8


def _mel_of_hertz(f: np.ndarray) -> np.ndarray:
    """Slaney's scale: linear below 1 kHz, logarithmic above."""
    return np.where(f < 1000, 3 * f / 200, 15 + 27 * np.log(np.maximum(f, 1e-9) / 1000) / np.log(6.4))


def _hertz_of_mel(m: np.ndarray) -> np.ndarray:
    return np.where(m < 15, 200 * m / 3, 1000 * np.exp((m - 15) * np.log(6.4) / 27))


@cache
def mel_filters(rate: int, n_fft: int, bins: int, highest: float = 8000.0) -> Tensor:
    """Slaney-normalised triangular filters [bins, n_fft / 2 + 1]."""
    frequencies = np.linspace(0, rate / 2, n_fft // 2 + 1)
    edges = _hertz_of_mel(np.linspace(_mel_of_hertz(np.array(0.0)), _mel_of_hertz(np.array(highest)), bins + 2))
    rise = (frequencies - edges[:-2, None]) / np.diff(edges)[:-1, None]
    fall = (edges[2:, None] - frequencies) / np.diff(edges)[1:, None]
    triangles = np.maximum(0, np.minimum(rise, fall)) * (2 / (edges[2:] - edges[:-2]))[:, None]
    return torch.from_numpy(triangles).float()


def heard_mel(waves: Tensor, bins: int) -> Tensor:
    """Waves [batch, samples] at 16 kHz, zero-padded right -> log-mel [batch, bins, samples / 160 + 1].

    Equal to the official front end on each item as long as the padding is at least 400 samples: the maximum that
    limits the dynamic range is the item's own.
    """
    window = torch.hann_window(_HEARD_FFT)
    power = torch.stft(waves, _HEARD_FFT, _HEARD_HOP, window=window, return_complex=True).abs().square()
    level = (mel_filters(HEARD_RATE, _HEARD_FFT, bins) @ power).clamp(min=1e-10).log10()
    level = torch.maximum(level, level.amax((1, 2), keepdim=True) - 8)
    return (level + 4) / 4


def heard_lengths(samples: Tensor, pool: int) -> tuple[Tensor, Tensor, Tensor]:
    """Sample counts -> (mel frames, encoder frames, codes) of each item."""
    mel = samples // _HEARD_HOP + 1
    encoder = (mel - 1) // 2 + 1
    return mel, encoder, encoder // pool


def spoken_mel(waves: Tensor, bins: int) -> Tensor:
    """Waves [batch, samples] at 24 kHz -> normalised log-mel [batch, bins, samples / 480] at 50 Hz."""
    pad = (_SPOKEN_FFT - SPOKEN_HOP) // 2
    padded = F.pad(waves[:, None], (pad, pad), mode="reflect")[:, 0]
    window = torch.hann_window(_SPOKEN_FFT)
    spectrum = torch.stft(padded, _SPOKEN_FFT, SPOKEN_HOP, window=window, center=False, return_complex=True)
    magnitude = (spectrum.real.square() + spectrum.imag.square() + 1e-9).sqrt()
    level = (mel_filters(SPOKEN_RATE, _SPOKEN_FFT, bins) @ magnitude).clamp(min=1e-5).log()
    return (level - SPOKEN_MEAN) / SPOKEN_SCALE
