"""Mel frames in, final samples out: the vocoder over a sliding window whose inner frames equal a run over the whole."""

from typing import Protocol

import numpy as np

from runtime.bundle import SpeechLayout


class Runs(Protocol):
    """What is asked of an open graph (`runtime.session.Session`)."""

    def run(self, **feeds: np.ndarray) -> dict[str, np.ndarray]: ...


def harmonic_cycles(turn: float, f0: np.ndarray, phases: np.ndarray, layout: SpeechLayout) -> tuple[np.ndarray, float]:
    """The phase of each harmonic at the start of each frame, and where the fundamental ends.

    turn: phase of the fundamental before the first frame; f0 [1, T] in Hz; phases [harmonics] at time 0. All phases are
    in turns. Returns float32 [1, harmonics, T] in [0, 1) and the turn after the last frame. The running sum is float64
    and wraps at each frame: in float32 the ninth harmonic loses its phase within seconds.
    """
    steps = f0[0].astype(np.float64) * (layout.samples_per_frame / layout.sampling_rate)
    starts = np.cumsum(np.concatenate([[turn], steps])) % 1.0
    order = np.arange(1, layout.harmonics + 1)
    cycles = (np.outer(order, starts[:-1]) + phases[:, None]) % 1.0
    return cycles.astype(np.float32)[None] % np.float32(1), float(starts[-1])


class Source:
    """The sine source's state: the turn that the fundamental has reached, and the random draws in the order of frames.

    Without a generator all draws are 0. The fundamental always starts at phase 0.
    """

    def __init__(self, layout: SpeechLayout, rng: np.random.Generator | None):
        self.layout, self.rng, self.turn = layout, rng, 0.0
        self.phases = np.zeros(layout.harmonics)
        if rng is not None:
            self.phases[1:] = rng.uniform(-0.5, 0.5, layout.harmonics - 1)

    def extend(self, f0: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """f0 [1, T] of the next frames -> cycles [1, harmonics, T], noise [1, harmonics, T * samples_per_frame]."""
        cycles, self.turn = harmonic_cycles(self.turn, f0, self.phases, self.layout)
        shape = (f0.shape[1], self.layout.harmonics, self.layout.samples_per_frame)
        drawn = np.zeros(shape, np.float32) if self.rng is None else self.rng.standard_normal(shape, np.float32)
        return cycles, np.moveaxis(drawn, 0, 1).reshape(1, self.layout.harmonics, -1)


class WaveStream:
    """Turns one segment's mel frames into samples as soon as no later frame can change them.

    F0 of a frame waits for `f0_context` more frames, its samples for another `wave_context`; `finish` ends the wait.
    Any chunking gives the samples of a single run over the whole segment, to float rounding.
    """

    def __init__(
        self, f0_session: Runs, vocoder_session: Runs, layout: SpeechLayout, rng: np.random.Generator | None = None
    ):
        self.f0_session, self.vocoder_session, self.layout = f0_session, vocoder_session, layout
        self.source = Source(layout, rng)
        self._first = 0  # the frame that the kept columns begin with
        self._done = 0  # frames whose samples were returned
        self._mel = np.empty((1, layout.mel_bins, 0), np.float32)
        self._f0 = np.empty((1, 0), np.float32)
        self._cycles = np.empty((1, layout.harmonics, 0), np.float32)
        self._noise = np.empty((1, layout.harmonics, 0), np.float32)

    def push(self, mel: np.ndarray) -> np.ndarray:
        """mel float32 [1, mel_bins, T], any T -> the samples [n] that are now final; n may be 0."""
        self._mel = np.concatenate([self._mel, mel], axis=2)
        self._follow_pitch(self._first + self._mel.shape[2] - self.layout.f0_context)
        return self._sound(self._first + self._f0.shape[1] - self.layout.wave_context)

    def finish(self) -> np.ndarray:
        """The samples of the frames that were still waiting for later ones. The segment is over then."""
        self._follow_pitch(self._first + self._mel.shape[2])
        return self._sound(self._first + self._f0.shape[1])

    def _follow_pitch(self, end: int) -> None:
        """Make F0, and what the source needs of it, known up to frame `end`."""
        known = self._f0.shape[1]
        if self._first + known >= end:
            return
        start = max(0, known - self.layout.f0_context)
        f0 = self.f0_session.run(mel=self._mel[:, :, start:])["f0"][:, known - start : end - self._first - start]
        cycles, noise = self.source.extend(f0)
        self._f0 = np.concatenate([self._f0, f0], axis=1)
        self._cycles = np.concatenate([self._cycles, cycles], axis=2)
        self._noise = np.concatenate([self._noise, noise], axis=2)

    def _sound(self, end: int) -> np.ndarray:
        """Samples of frames `_done` to `end`; then forget the columns that no later frame needs."""
        if end <= self._done:
            return np.empty(0, np.float32)
        known, size = self._f0.shape[1], self.layout.samples_per_frame
        feeds = {"f0": self._f0, "cycles": self._cycles, "noise": self._noise}
        wave = self.vocoder_session.run(mel=self._mel[:, :, :known], **feeds)["wave"][0]
        samples = wave[(self._done - self._first) * size : (end - self._first) * size]
        self._done = end
        self._forget(end - max(self.layout.wave_context, self.layout.f0_context))
        return samples

    def _forget(self, before: int) -> None:
        drop = max(0, before - self._first)
        self._first += drop
        self._mel, self._f0, self._cycles = self._mel[:, :, drop:], self._f0[:, drop:], self._cycles[:, :, drop:]
        self._noise = self._noise[:, :, drop * self.layout.samples_per_frame :]
