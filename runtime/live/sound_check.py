"""What is wrong with a microphone, told from a short recording of somebody who speaks."""

from dataclasses import dataclass
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from runtime.audio import decibels

SILENT_DB = -80.0  # peak, of full scale; also a muted microphone's converter makes some noise
QUIET_DB = -50.0  # level of the loudest twentieth of the frames
CLIPPED_LEVEL = 0.985
CLIPPED_SHARE = 0.001  # of the samples: about 2 ms of a recording of two seconds
RATE_TOLERANCE = 0.04  # 44.1 kHz for 48 kHz is 8 %
FRAME_SECONDS = 0.02


@dataclass(frozen=True)
class Finding:
    kind: Literal["ok", "silent", "quiet", "clipped", "rate"]
    text: str  # one line for the person: what was found and what to do
    peak_db: float  # of full scale
    level_db: float  # of the loudest twentieth of the frames

    @property
    def ok(self) -> bool:
        return self.kind == "ok"


def judge_recording(wave: NDArray[np.float32], rate: int, seconds: float | None = None) -> Finding:
    """A recording [n] at `rate` Hz of a person who spoke; `seconds` is how long it took by another clock.

    What makes the microphone useless comes first: silent, then another rate than it says, clipped, too quiet.
    """
    peak = decibels(float(np.abs(wave).max(initial=0.0)))
    level = speech_level(wave, rate)
    found = len(wave) / seconds if seconds else float(rate)
    if peak < SILENT_DB:
        return Finding("silent", f"the microphone gives silence ({peak:.0f} dB): {SILENT_ADVICE}", peak, level)
    if abs(found / rate - 1) > RATE_TOLERANCE:
        text = f"the microphone says {rate} Hz and gives {found:.0f}: set one rate for it in the sound settings"
        return Finding("rate", text, peak, level)
    if float(np.mean(np.abs(wave) >= CLIPPED_LEVEL)) >= CLIPPED_SHARE:
        text = "the microphone is too loud and clips: lower its level in the sound settings, or go farther away"
        return Finding("clipped", text, peak, level)
    if level < QUIET_DB:
        text = f"too quiet ({level:.0f} dB, expected {QUIET_DB:.0f}): speak up, come closer or raise its level"
        return Finding("quiet", text, peak, level)
    return Finding("ok", f"the microphone works: speech at {level:.0f} dB, peaks at {peak:.0f} dB", peak, level)


SILENT_ADVICE = "is it muted, switched off, another one than you speak into, or not permitted to this program?"


def speech_level(wave: NDArray[np.float32], rate: int) -> float:
    """Level in dB of full scale that the loudest twentieth of the frames of 20 ms reach."""
    size = max(1, int(FRAME_SECONDS * rate))
    frames = wave[: len(wave) // size * size].reshape(-1, size)
    if not len(frames):
        return decibels(0.0)
    return decibels(float(np.quantile(np.sqrt(np.square(frames, dtype=np.float64).mean(axis=1)), 0.95)))
