"""Fundamental frequency of clean speech by normalised autocorrelation: the teacher of the vocoder's F0 predictor."""

import numpy as np

LOWEST, HIGHEST = 60.0, 200.0  # Hz, a man's speech
_WINDOW = 1200  # samples: 50 ms at 24 kHz, three periods of the lowest voice
_VOICED = 0.45  # normalised correlation above which a frame counts as voiced
_SHORTEST = 3  # frames; a shorter stretch with a pitch is chance
_STICKY = 0.08  # bonus for staying near the pitch of the frame before


def frame_f0(wave: np.ndarray, rate: int, hop: int) -> np.ndarray:
    """F0 in Hz of each hop, 0 where unvoiced: [len(wave) // hop].

    The normalised cross-correlation of Talkin's RAPT (1995), with a greedy preference for continuity instead of its
    dynamic programming.
    """
    shortest, longest = int(rate / HIGHEST), int(rate / LOWEST)
    frames = len(wave) // hop
    padded = np.pad(wave, (_WINDOW // 2, _WINDOW + longest + hop)).astype(np.float64)
    starts = np.arange(frames) * hop + hop // 2
    pieces = np.stack([padded[s : s + _WINDOW + longest] for s in starts])
    pieces -= pieces.mean(1, keepdims=True)
    scores = _correlations(pieces, shortest, longest)
    loud = np.sqrt((pieces[:, :_WINDOW] ** 2).mean(1))
    return _track(scores, loud > 0.02 * loud.max(), rate, shortest)


def _correlations(pieces: np.ndarray, shortest: int, longest: int) -> np.ndarray:
    """Normalised correlation of each piece's head with itself `lag` later, lags shortest..longest: [frames, lags]."""
    size = 1 << int(np.ceil(np.log2(pieces.shape[1] + _WINDOW)))
    head = np.fft.rfft(pieces[:, :_WINDOW], size)
    cross = np.fft.irfft(np.fft.rfft(pieces, size) * head.conj(), size)[:, shortest : longest + 1]
    energy = np.cumsum(np.pad(pieces**2, ((0, 0), (1, 0))), 1)
    lagged = energy[:, shortest + _WINDOW : longest + _WINDOW + 1] - energy[:, shortest : longest + 1]
    return cross / np.sqrt(lagged * energy[:, _WINDOW : _WINDOW + 1] + 1e-9)


def _track(scores: np.ndarray, loud: np.ndarray, rate: int, shortest: int) -> np.ndarray:
    """Pick a lag a frame; short lags are preferred a little, for a multiple of the period correlates as well."""
    lags = np.arange(shortest, shortest + scores.shape[1])
    scores = scores - 0.1 * lags / lags[-1]
    f0, before = np.zeros(len(scores)), 0
    for i, row in enumerate(scores):
        near = np.abs(lags - before) < 0.15 * before if before else np.zeros(len(lags), bool)
        best = int(np.argmax(row + _STICKY * near))
        voiced = loud[i] and row[best] > _VOICED
        f0[i] = rate / _refined(row, best, shortest) if voiced else 0.0
        before = shortest + best if voiced else 0
    return _without_short_stretches(f0).astype(np.float32)


def _without_short_stretches(f0: np.ndarray) -> np.ndarray:
    """Unvoice every stretch of fewer than `_SHORTEST` voiced frames."""
    edges = np.flatnonzero(np.diff(np.pad(f0 > 0, 1).astype(int)))
    for start, end in edges.reshape(-1, 2):
        if end - start < _SHORTEST:
            f0[start:end] = 0
    return f0


def _refined(row: np.ndarray, best: int, shortest: int) -> float:
    """Lag of the parabola through the best score and its neighbours."""
    if not 0 < best < len(row) - 1:
        return float(shortest + best)
    left, middle, right = row[best - 1 : best + 2]
    bend = left - 2 * middle + right
    return float(shortest + best + (0.5 * (left - right) / bend if bend < 0 else 0.0))
