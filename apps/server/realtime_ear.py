"""What a realtime client says: 24 kHz samples in pieces of any length -> what the model hears, and where turns end."""

from collections.abc import Iterator

import numpy as np

from apps.server.realtime_wire import SemanticVad, ServerVad
from runtime.audio import Wave, level_db, resample
from runtime.live.endpointer import Endpointer, Found
from runtime.live.settings import HOP, HOP_MS, RATE, Settings
from runtime.live.vad import Detector

SENT_RATE = 24_000
TAKEN = HOP * SENT_RATE // RATE  # samples that give a hop
MARGIN = 198  # samples around them that the resampling filter reaches: whole periods of 3
EAGERNESS = {"high": 400.0, "medium": 608.0, "auto": 608.0, "low": 1_200.0}  # ms of silence that end a turn
KEPT_MS = 3_000.0  # of sound while nobody speaks


class Ear:
    """Samples by the time since the session began, in ms; a session's own."""

    def __init__(self, detector: Detector):
        self._detector = detector
        self._endpointer: Endpointer | None = None
        self._sent = np.zeros(MARGIN, np.float32)  # what comes before and after a hop is there too
        self._hops: list[Wave] = []
        self._first = 0  # number of the first hop that is kept
        self.began: float | None = None  # where the turn that is being said begins

    def detect(self, wanted: ServerVad | SemanticVad | None) -> None:
        """How turns are found; None: the client says where they end."""
        self._endpointer = None if wanted is None else Endpointer(settings(wanted))
        self._detector.reset()
        self.began = None

    @property
    def now(self) -> float:
        """End of what was heard."""
        return (self._first + len(self._hops)) * HOP_MS

    @property
    def held_ms(self) -> float:
        return len(self._hops) * HOP_MS

    def push(self, samples: Wave) -> Iterator[Found]:
        """Samples [n] at 24 kHz; yields where somebody was found to begin or end to speak, before it hears on."""
        self._sent = np.concatenate([self._sent, samples])
        while len(self._sent) >= TAKEN + 2 * MARGIN:
            around, self._sent = self._sent[: TAKEN + 2 * MARGIN], self._sent[TAKEN:]
            yield from self._hop(around)

    def _hop(self, around: Wave) -> list[Found]:
        margin = MARGIN * RATE // SENT_RATE
        hop = resample(around, SENT_RATE, RATE)[margin : margin + HOP]
        self._hops.append(hop)
        if self._endpointer is None:
            return []
        probability = self._detector.probability(hop)
        found = self._endpointer.step(self.now, probability, level_db(hop), False)
        if self.began is None and self.held_ms > KEPT_MS:
            self._forget(self.now - KEPT_MS)
        return found

    def close(self) -> None:
        """The turn is over, wherever it ended."""
        self.began = None
        if self._endpointer is not None:
            self._endpointer.forget()

    def wave(self, start: float, end: float) -> Wave:
        """What was heard from `start` to `end`, as far as it is kept: [n] at 16 kHz."""
        at, to = (round((t - self._first * HOP_MS) * RATE / 1000) for t in (start, end))
        return self._joined()[max(0, at) : max(0, to)]

    def take(self) -> Wave:
        """All that is kept, and what was too short for a hop; nothing is kept then."""
        rest = self._sent[MARGIN:]
        if len(rest):
            margin = MARGIN * RATE // SENT_RATE
            padded = np.concatenate([self._sent, np.zeros(MARGIN, np.float32)])
            self._hops.append(resample(padded, SENT_RATE, RATE)[margin : margin + len(rest) * RATE // SENT_RATE])
        wave = self._joined()
        self.clear()
        return wave

    def clear(self) -> None:
        self._first += len(self._hops)
        self._hops.clear()
        self._sent = np.zeros(MARGIN, np.float32)
        self.close()

    def _joined(self) -> Wave:
        return np.concatenate([np.zeros(0, np.float32), *self._hops])

    def _forget(self, before: float) -> None:
        count = max(0, int(before / HOP_MS) - self._first)
        self._first += count
        del self._hops[:count]


def settings(wanted: ServerVad | SemanticVad) -> Settings:
    """A client's settings in our parameters."""
    if isinstance(wanted, SemanticVad):
        return Settings(t_end=EAGERNESS[wanted.eagerness or "auto"], t_soft=10_000)
    threshold = 0.5 if wanted.threshold is None else wanted.threshold
    padding = 300 if wanted.prefix_padding_ms is None else wanted.prefix_padding_ms
    silence = 500 if wanted.silence_duration_ms is None else wanted.silence_duration_ms
    return Settings(vad_on=threshold, vad_off=max(0.0, threshold - 0.15), preroll=padding, t_end=silence, t_soft=10_000)
