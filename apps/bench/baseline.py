"""The plain rule that turn-taking has to beat: 0.2 s over a threshold is a person speaking, 0.7 s below it the end."""

from collections.abc import Iterator, Sequence

from runtime.audio import Wave
from runtime.live.events import LiveEvent, ReplyEnded, State, Transition
from runtime.live.player import Player
from runtime.live.settings import HOP_MS
from runtime.live.vad import Detector

THRESHOLD = 0.5
STARTS_MS = 200.0
ENDS_MS = 700.0
THINKS_MS = 300.0  # from the end of a turn to the first sound of its answer; no model is asked
FADE_MS = 20.0


class PlainRule:
    """Listens and answers as the rule says: whatever is heard is a turn, and interrupts the answer before it.

    Its answers are recordings, one after the other, so that its loudspeaker echoes as ours does.
    """

    def __init__(self, detector: Detector, player: Player, answers: Sequence[Wave]):
        self.detector, self.player, self.answers = detector, player, answers
        self.state: State = "IDLE"
        self._over = 0.0  # ms over the threshold without a break
        self._under = 0.0  # ms since it was last over it
        self._answer_at: float | None = None
        self._gen = 0

    def step(self, chunk: Wave, now: float) -> Iterator[LiveEvent]:
        """One hop of 16 kHz audio that ends at `now`."""
        voiced = self.detector.probability(chunk) > THRESHOLD
        self._over = self._over + HOP_MS if voiced else 0.0
        self._under = 0.0 if voiced else self._under + HOP_MS
        if self.state != "HEAR" and self._over >= STARTS_MS:
            yield from self._begin(now)
        elif self.state == "HEAR" and self._under >= ENDS_MS:
            self._answer_at = now + THINKS_MS
            yield self._go(now, "V_END", "THINK")
        elif self.state == "THINK" and self._answer_at is not None and now >= self._answer_at:
            self._play()
            yield self._go(now, "A_RDY", "SPEAK")
        elif self.state == "SPEAK" and self.player.done:
            yield self._end(now, interrupted=False)
            yield self._go(now, "P_DONE", "IDLE")

    def _begin(self, now: float) -> Iterator[LiveEvent]:
        if self.state == "SPEAK":
            self.player.flush(FADE_MS)
            yield self._end(now, interrupted=True)
        yield self._go(now, "V_ON", "HEAR")

    def _play(self) -> None:
        self._gen += 1
        self.player.open(self._gen)
        self.player.write(self.answers[self._gen % len(self.answers)], self._gen)
        self.player.end(self._gen)

    def _end(self, now: float, interrupted: bool) -> ReplyEnded:
        return ReplyEnded(now, "", "", self.player.heard_ms, interrupted, "eos")

    def _go(self, now: float, event: str, to: State) -> Transition:
        before, self.state = self.state, to
        return Transition(now, before, event, to, row=0, speak=0, listen=0, gen=self._gen)
