"""Our own voice in the microphone: WebRTC's canceller for what the model hears, and a test of each hop for barge-in."""

import numpy as np
from numpy.typing import NDArray

from runtime.audio import Wave, level_db
from runtime.errors import EdgeOmniError
from runtime.live.settings import HOP, RATE
from runtime.live.vad import heard

TEN_MS = 160  # samples: all that the canceller takes at once
QUEUED = 128  # samples that must wait so that every hop of 512 finds its 512: the largest rest of 512 n by 160
APM_DELAY = 127  # samples that the canceller's filter banks take
LONGEST_DELAY_MS = 500


class EchoCanceller:
    """WebRTC's audio processing module, from livekit: microphone and reference in, the microphone without echo out.

    The reference has to come in every hop, zeros when nothing plays. What comes out is `delay_samples` late.
    """

    delay_samples = QUEUED + APM_DELAY

    def __init__(self, delay_ms: int = 0):
        """delay_ms: from giving samples to the loudspeaker to hearing them, roughly; 0 does for any delay."""
        if not 0 <= delay_ms <= LONGEST_DELAY_MS:
            raise EdgeOmniError(f"an echo delay of {delay_ms} ms, expected 0 to {LONGEST_DELAY_MS}")
        try:
            from livekit.rtc import apm, audio_frame
        except ModuleNotFoundError as error:
            raise EdgeOmniError(
                f"no echo canceller is installed ({error}): pip install 'edgeomni[talk]', or choose --no-aec"
            ) from None
        self._module, self._frame = apm.AudioProcessingModule, audio_frame.AudioFrame
        self._delay_ms = delay_ms
        self.reset()

    def reset(self) -> None:
        self._apm = self._module(echo_cancellation=True)
        self._apm.set_stream_delay_ms(self._delay_ms)
        self._waiting = np.zeros((2, 0), np.int16)  # microphone, reference
        self._done = np.zeros(QUEUED, np.int16)

    def process(self, mic: Wave, reference: Wave) -> Wave:
        """One hop of each, float32 [512] at 16 kHz -> float32 [512]. EdgeOmniError on another length."""
        hop = np.stack([to_int16(heard(mic)), to_int16(heard(reference))])
        self._waiting = np.concatenate([self._waiting, hop], axis=1)
        whole = self._waiting.shape[1] // TEN_MS * TEN_MS
        pieces = np.split(self._waiting[:, :whole], whole // TEN_MS, axis=1)
        done = np.concatenate([self._done, *(self._ten_ms(*piece) for piece in pieces)])
        self._waiting, self._done = self._waiting[:, whole:], done[HOP:]
        return done[:HOP].astype(np.float32) / np.float32(32768)

    def _ten_ms(self, mic: NDArray[np.int16], reference: NDArray[np.int16]) -> NDArray[np.int16]:
        """The native library ends the process on any other length, so nothing else may reach it."""
        assert mic.shape == reference.shape == (TEN_MS,)
        played, said = bytearray(reference.tobytes()), bytearray(mic.tobytes())
        self._apm.process_reverse_stream(self._frame(played, RATE, 1, TEN_MS))
        frame = self._frame(said, RATE, 1, TEN_MS)
        self._apm.process_stream(frame)
        return np.frombuffer(bytes(frame.data), np.int16)


def to_int16(samples: Wave) -> NDArray[np.int16]:
    return np.clip(np.rint(samples * 32768), -32768, 32767).astype(np.int16)


WINDOW = RATE  # samples of the microphone that the delay is looked for in
LAGS = LONGEST_DELAY_MS * RATE // 1000
FOURIER = 1 << 15  # at least WINDOW + LAGS
PEAK = 15.0  # of the correlation over its own spread: an echo has 40 to 90, chance less than 10
STABLE = 16  # samples: a delay is believed when two looks agree so far; where sound begins, the peak is chance
EVERY = 4  # hops between two looks for the delay
FRAME = 256  # samples, 16 ms: of the spectra that are compared
BANDS = 20
FRAMES = HOP // FRAME
KEPT = 8  # hops that the correlation is taken over: shorter tells voices apart badly, longer reacts late
SAME = 0.6  # correlation from which the microphone follows the reference
LOUDER_DB = 6.0  # over the echo that is expected: somebody else
QUIET_DB = -65.0  # a reference below this is not heard
RANGE_DB = 35.0  # below the loudest cell of the window everything counts as equally quiet
DECAY_DB = 1.5  # a frame's fall of the echo that is expected: a room of half a second falls by 2
SUPPRESSED_DB = 16.0  # that the canceller took away: echo, whatever the correlation says
COUPLING_UP, COUPLING_DOWN = 0.3, 0.02  # a hop's share in the coupling: its loud hops tell, its decay says too little


class EchoTest:
    """Whether a hop of the microphone is what the loudspeaker plays: it follows the reference and is no louder.

    Works on the raw microphone, with what the canceller left of it where there is one. The delay is found by GCC-PHAT
    over the last second, up to half a second. While nothing was played for that long, nothing is suspicious.
    """

    def __init__(self) -> None:
        self._window = np.hanning(FRAME + 1)[:FRAME].astype(np.float32)
        self._bands = mel_bands()
        self.reset()

    def reset(self) -> None:
        self._played = np.zeros(WINDOW + LAGS + HOP, np.float32)
        self._mic = np.zeros(WINDOW, np.float32)
        self._logs = np.full((2, KEPT * FRAMES, BANDS), QUIET_DB)  # microphone, expected echo before coupling
        self._coupling: float | None = None
        self.delay: int | None = None  # samples
        self.correlation = 0.0
        self.louder = False  # the newest hop is more than the echo that was expected in it
        self._hops = 0
        self._seen: int | None = None  # what the last look found

    def note_reference(self, chunk: Wave) -> None:
        """The hop that goes to the loudspeaker while the next hop of the microphone is heard; zeros where none does."""
        self._played = np.concatenate([self._played[HOP:], heard(chunk)])

    def suspicious(self, mic: Wave, cleaned: Wave | None = None) -> bool:
        """Whether this hop of the raw microphone looks like our own echo; `cleaned`: what the canceller left of it."""
        mic = heard(mic)
        self._mic = np.concatenate([self._mic[HOP:], mic])
        self._hops += 1
        if level_db(self._played) < QUIET_DB:
            return False
        if self._hops % EVERY == 0 or self.delay is None:
            before, self._seen = self._seen, self._find_delay()
            if before is not None and self._seen is not None and abs(self._seen - before) <= STABLE:
                self.delay = self._seen
        self.louder = False
        if self.delay is None:  # a canceller that has not found an echo either takes the person for one
            return False
        follows, excess = self._compare(mic, self.delay)
        self.louder = excess >= (self._coupling or 0.0) + LOUDER_DB
        if self.louder:
            return False
        return follows or (cleaned is not None and level_db(mic) - level_db(heard(cleaned)) >= SUPPRESSED_DB)

    def _find_delay(self) -> int | None:
        """Where the whitened cross-correlation of the last second peaks, if it does."""
        said = np.fft.rfft(self._mic, FOURIER)
        played = np.fft.rfft(self._played[HOP:], FOURIER)  # begins LAGS before the microphone's window
        cross = said.conj() * played
        correlation = np.fft.irfft(cross / (np.abs(cross) + 1e-9), FOURIER)[: LAGS + 1]
        at = int(np.argmax(correlation))
        spread = float(np.sqrt(np.mean(np.square(correlation)))) + 1e-12
        return LAGS - at if correlation[at] > PEAK * spread else None

    def _compare(self, mic: Wave, delay: int) -> tuple[bool, float]:
        """Note this hop's spectra: whether the last KEPT hops follow the reference, and dB of this one above it."""
        end = len(self._played) - delay
        said, played = self._log_mel(mic), self._log_mel(self._played[end - HOP : end])
        last = self._logs[1, -1]
        for row in played:  # the room's echo falls no faster
            last = np.maximum(row, last - DECAY_DB, out=row)
        self._logs = np.concatenate([self._logs[:, FRAMES:], np.stack([said, played])], axis=1)
        self.correlation = correlation(*self._logs)
        excess = total_db(said) - total_db(played)
        follows = self.correlation >= SAME
        if follows:
            self._learn(excess)
        return follows, excess

    def _learn(self, excess: float) -> None:
        """Follow how much quieter than the reference its echo is."""
        before = excess if self._coupling is None else self._coupling
        self._coupling = before + (COUPLING_UP if excess > before else COUPLING_DOWN) * (excess - before)

    def _log_mel(self, samples: Wave) -> NDArray[np.float64]:
        """float32 [512] -> dB of the power in each band, [FRAMES, BANDS]."""
        spectrum = np.fft.rfft(samples.reshape(FRAMES, FRAME) * self._window)
        return 10 * np.log10(np.square(np.abs(spectrum)) @ self._bands + 1e-12)


def correlation(a: NDArray[np.float64], b: NDArray[np.float64]) -> float:
    """Of two log spectra [frames, bands], after each band's mean: how far they rise and fall together."""
    a, b = (np.maximum(x, x.max() - RANGE_DB) for x in (a, b))
    a, b = a - a.mean(axis=0), b - b.mean(axis=0)
    return float((a * b).sum() / (np.sqrt(np.square(a).sum() * np.square(b).sum()) + 1e-9))


def total_db(logs: NDArray[np.float64]) -> float:
    return float(10 * np.log10(np.sum(10 ** (logs / 10))))


def mel_bands() -> NDArray[np.float64]:
    """Triangles [FRAME / 2 + 1, BANDS] from 100 Hz to 8 kHz, which make a frame's bands add up to its mean power."""
    edges = 700 * (np.exp(np.linspace(np.log1p(100 / 700), np.log1p(8000 / 700), BANDS + 2)) - 1)
    at = np.linspace(0, RATE / 2, FRAME // 2 + 1)[:, None]
    rise, fall = (at - edges[:-2]) / np.diff(edges)[:-1], (edges[2:] - at) / np.diff(edges)[1:]
    return np.maximum(0, np.minimum(rise, fall)) * 2 / (FRAME**2 * 0.375)
