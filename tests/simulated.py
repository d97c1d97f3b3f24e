"""A model that takes the time of the specification's cost table and says what it is told to, for a virtual clock."""

from collections.abc import Callable, Generator, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from runtime.errors import EdgeOmniError
from runtime.events import AudioChunk, Event, Finish, TextDelta
from runtime.live.clock import VirtualClock
from runtime.live.duplex import Duplex
from runtime.live.events import LiveEvent, ReplyEnded, Transition, Verdict
from runtime.live.player import Player
from runtime.live.settings import DEFAULTS, HOP, HOP_MS, Settings

ENCODE, ENCODE_SECOND, PREFILL, DECODE, FRAME, LOOK = 20.0, 8.0, 0.5, 20.0, 30.0, 60.0
CODE_MS = 80
VOICE = 0.1  # amplitude of a voiced hop


def codes_of(samples: int) -> int:
    """Codes of a wave: log-mel frames, halved by the convolution, four of them a code."""
    return (samples // 160 + 2) // 2 // 4


@dataclass
class Script:
    """What the model answers, turn by turn; the last entry goes for all later ones."""

    verdicts: list[Verdict | None] = field(default_factory=lambda: ["QUERY"])  # None: it never comes
    clauses: list[int] = field(default_factory=lambda: [2])  # of 8 tokens and 12 frames
    captions: list[str | None] = field(default_factory=lambda: [None])
    broken_speech: list[int] = field(default_factory=list)  # numbers of the answers whose vocoder fails
    slow_first: float = 0.0  # ms that the first clause takes beyond the table
    slow_second: float = 0.0  # ms that the second clause takes beyond the table
    broken_hearing: int = 0  # so many hearings fail


class SimulatedModel:
    """Rows are labels; I1 is that both branches begin alike."""

    rate = 24_000

    def __init__(self, clock: VirtualClock, script: Script, context: int = 100_000):
        self.clock, self.script, self.context = clock, script, context
        self.speak: list[str] = ["system"]
        self.listen: list[str] = []
        self.synced = 0
        self.audio_start = 0
        self.judged = self.replies = self.captioned = 0
        self.forks: list[float | None] = []
        self.prefilled: list[int] = []
        self.waves: list[int] = []
        self.answers: list[list[tuple[str, int]]] = []  # of each answer its clauses and frames so far
        self.generated: list[list[str]] = []

    def _piece(self, ms: float) -> Iterator[None]:
        self.clock.spend(ms)
        yield None

    def fork(self, heard_ms: float | None) -> None:
        self.forks.append(heard_ms)
        rows = list(self.speak)
        if heard_ms is not None and "answer" in rows:
            at = len(rows) - rows[::-1].index("answer")
            if heard_ms == 0.0:
                rows = rows[: at - 1]
            else:
                heard = int(np.ceil(heard_ms / CODE_MS))
                seen, cut = 0, at
                for cut in range(at, len(rows)):
                    seen += rows[cut].startswith("code")
                    if seen > heard:
                        break
                else:
                    cut = len(rows)
                rows = [*rows[:cut], "close"]
        self.listen, self.audio_start = [*rows, "user"], 0
        self.synced = self._same()

    def _same(self) -> int:
        pairs = zip(self.speak, self.listen, strict=False)
        return next((i for i, (a, b) in enumerate(pairs) if a != b), min(len(self.speak), len(self.listen)))

    def see(self, frame: Any) -> Generator[None, None, None]:
        yield from self._piece(LOOK)
        yield from self._piece(66 * PREFILL)
        self.listen.append(f"frame {frame}")

    def hear(self, wave: np.ndarray, last: bool) -> Generator[None, None, int]:
        if last:
            self.audio_start = len(self.listen)
        if self.script.broken_hearing:
            self.script.broken_hearing -= 1
            raise EdgeOmniError("the encoder failed")
        yield from self._piece(ENCODE + ENCODE_SECOND * len(wave) / 16_000)
        rows = codes_of(len(wave)) + 4
        yield from self._piece(rows * PREFILL)
        self.waves.append(len(wave))
        self.prefilled.append(rows)
        self.listen += ["heard"] * rows
        return rows

    def unhear(self) -> None:
        if self.audio_start:
            del self.listen[self.audio_start :]
            self.audio_start = 0

    def read(self, text: str) -> Generator[None, None, None]:
        yield from self._piece(10 * PREFILL)
        self.listen += ["typed"] * 10

    def judge(self, speaking: bool) -> Generator[None, None, tuple[Verdict, float]]:
        verdict = self.script.verdicts[min(self.judged, len(self.script.verdicts) - 1)]
        self.judged += 1
        while verdict is None:
            yield from self._piece(DECODE)
        yield from self._piece(DECODE)
        return verdict, 0.9

    def reply(self, spoken: bool) -> Generator[Event | None, None, Finish]:
        return self._reply(self.listen, spoken)

    def reply_in_text(self) -> Generator[Event | None, None, Finish]:
        if "answer" in self.speak:
            del self.speak[len(self.speak) - 1 - self.speak[::-1].index("answer") :]
        return self._reply(self.speak, False)

    def _reply(self, rows: list[str], spoken: bool) -> Generator[Event | None, None, Finish]:
        number = self.replies
        self.replies += 1
        rows.append("answer")
        made: list[str] = []
        self.generated.append(made)
        for clause in range(self.script.clauses[min(number, len(self.script.clauses) - 1)]):
            self.clock.spend(self.script.slow_first * spoken if clause == 0 else 0.0)
            self.clock.spend(self.script.slow_second if clause == 1 else 0.0)
            for token in range(8):
                self.clock.spend(DECODE)
                made.append(f"{number}.{clause}.{token}")
                rows.append(f"token {made[-1]}")
                yield TextDelta(f"w{made[-1]} ")
            if spoken and number in self.script.broken_speech:
                raise EdgeOmniError("the vocoder failed")
            for frame in range(12 if spoken else 0):
                self.clock.spend(FRAME)
                rows.append(f"code {number}.{clause}.{frame}")
                yield AudioChunk(np.full(12 * CODE_MS * 24, 0.2, np.float32), 24_000) if frame == 11 else None
        return "end"

    def accept(self) -> None:
        self.speak, self.listen = self.listen, []

    def reject(self) -> None:
        self.listen = []

    def heard_text(self, heard_ms: float) -> str:
        words = [row for row in self.speak if row.startswith("token")]
        return " ".join(words[: 8 * int(np.ceil(heard_ms / (12 * CODE_MS)))])

    def commit(self, heard_ms: float | None) -> None:
        if heard_ms is not None:
            self.fork(heard_ms)
            self.speak, self.listen = self.listen[:-1], []
        else:
            self.speak.append("close")

    def caption(self, wave: np.ndarray) -> Generator[None, None, str | None]:
        said = self.script.captions[min(self.captioned, len(self.script.captions) - 1)]
        self.captioned += 1
        yield from self._piece(DECODE)
        return said

    def compact(self, reserve: int) -> Generator[None, None, str | None]:
        if self.context - len(self.speak) >= reserve:
            return None
        yield from self._piece(DECODE)
        kept = reserve
        self.speak = [self.speak[0], *self.speak[-kept:]]
        return "the beginning of the conversation was dropped"

    def reset(self) -> None:
        self.speak, self.listen = ["system"], []

    def lengths(self) -> tuple[int, int]:
        return len(self.speak), len(self.listen)

    def check(self) -> None:
        assert self.speak[: self.synced] == self.listen[: self.synced] or not self.listen


class Loud:
    """A hop is speech if its first sample is not zero."""

    def probability(self, chunk: np.ndarray) -> float:
        return float(chunk[0] != 0)

    resets = 0

    def reset(self) -> None:
        self.resets += 1


class EchoOf:
    """Whatever has the amplitude of an echo is one."""

    amplitude = 0.05

    def suspicious(self, chunk: np.ndarray) -> bool:
        return bool(chunk[0] == np.float32(self.amplitude))


@dataclass
class Ran:
    """All that a script of sounds led to."""

    duplex: Duplex
    model: SimulatedModel
    player: Player
    events: list[LiveEvent]
    played: np.ndarray  # what the loudspeaker gave, 24 samples a ms

    def log(self) -> list[tuple[float, str, str, str]]:
        return [(round(e.t, 1), e.state, e.event, e.next) for e in self.events if isinstance(e, Transition)]

    def times(self, event: str) -> list[float]:
        return [t for t, _, name, _ in self.log() if name == event]

    def ended(self) -> list[ReplyEnded]:
        return [event for event in self.events if isinstance(event, ReplyEnded)]

    def loud(self, start: float, end: float) -> bool:
        return bool(np.abs(self.played[int(start * 24) : int(end * 24)]).max(initial=0) > 0)


Spans = Sequence[tuple[float, float]]


def begin(script: Script | None = None, settings: Settings = DEFAULTS, echo: Any = None, context: int = 100_000):
    clock, player = VirtualClock(), Player()
    model = SimulatedModel(clock, script or Script(), context)
    return Duplex(model, Loud(), player, clock, settings, echo), model, player


def run(
    until: float,
    speech: Spans = (),
    script: Script | None = None,
    settings: Settings = DEFAULTS,
    echo: Spans = (),
    frames: Sequence[float] = (),
    acts: Sequence[tuple[float, Callable[[Duplex], None]]] = (),
    context: int = 100_000,
) -> Ran:
    """Hops up to `until` ms, voiced where a span holds their whole length; the loudspeaker takes 32 ms with each."""
    duplex, model, player = begin(script, settings, EchoOf() if echo else None, context)
    events: list[LiveEvent] = []
    played = [np.zeros(int(HOP_MS * 24), np.float32)]  # what is ready within a hop is heard in the next
    waiting, due = sorted(frames), sorted(acts, key=lambda act: act[0])
    for hop in range(1, int(until / HOP_MS) + 1):
        now = hop * HOP_MS
        while due and due[0][0] <= now:
            due.pop(0)[1](duplex)
        frame = waiting.pop(0) if waiting and waiting[0] <= now else None
        amplitude = VOICE if _within(speech, now) else EchoOf.amplitude if _within(echo, now) else 0.0
        played.append(player.take(int(HOP_MS * 24)))
        events += duplex.step(np.full(HOP, amplitude, np.float32), frame, now)
    return Ran(duplex, model, player, events, np.concatenate(played))


def _within(spans: Spans, now: float) -> bool:
    return any(start <= now - HOP_MS and now <= end for start, end in spans)
