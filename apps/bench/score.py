"""What a scene came to: each sound's outcome, and shares of outcomes with their 95 % intervals."""

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Literal

import numpy as np

from apps.bench.scenes import WHILE_SPEAKING, Part, Scene, Span
from quant.comparison.metrics import proportion_interval
from runtime.live.events import LiveEvent, ReplyEnded, Transition, TurnTimes

# A question is answered, taken before its end, noticed so late that its beginning is lost, or not answered. Another
# sound is ignored, taken for a turn, or has cut an answer short. void: what it should have disturbed never came.
Outcome = Literal["answered", "cut off", "noticed late", "unanswered", "ignored", "taken", "interrupted", "void"]
MISSED: tuple[Outcome, ...] = ("noticed late", "unanswered")
ERRORS: tuple[Outcome, ...] = ("cut off", *MISSED, "taken", "interrupted")

NOTICED_MS = 800.0  # after the beginning of a question it must have been noticed that somebody speaks
EARLY_MS = 50.0  # before the end of a question it may be taken: its last sound is quiet
LATE_MS = 5000.0  # after the end of a sound, what follows is no longer due to it
ECHO = Part("echo", "nothing", np.zeros(0, np.float32), 0.0, True, "own voice")  # what plays is no recording


@dataclass
class Heard:
    """What happened in one scene, in milliseconds of it; `sounding` are the hops in which the loudspeaker played."""

    scene: Scene
    spans: list[Span] = field(default_factory=list)
    taken: list[float] = field(default_factory=list)  # turns that will be answered
    begun: list[float] = field(default_factory=list)  # when it was noticed that somebody speaks
    replies: list[ReplyEnded] = field(default_factory=list)
    times: list[TurnTimes] = field(default_factory=list)
    sounding: list[float] = field(default_factory=list)
    log: list[str] = field(default_factory=list)
    underruns: int = 0
    seconds: float = 0.0
    wall_seconds: float = 0.0

    def note(self, event: LiveEvent, start: float) -> None:
        """One event of a conversation in which the scene began at `start`."""
        match event:
            case Transition():
                self._transition(event, event.t - start)
            case ReplyEnded():
                self.replies.append(event)
                how = "cut short" if event.interrupted else "over"
                self.log.append(f"{event.t - start:.0f} answer {how} at {event.heard_ms:.0f} ms: {event.text!r}")
            case TurnTimes():
                self.times.append(event)
            case _:
                pass

    def _transition(self, event: Transition, t: float) -> None:
        judged = event.event in ("G(QUERY)", "V_END") or (event.event == "G_TO" and event.state == "GATE")
        if judged and event.next in ("THINK", "SPEAK"):
            self.taken.append(t)
        if event.event == "V_ON" and event.next in ("HEAR", "R_HEAR"):
            self.begun.append(t)
        self.log.append(f"{t:.0f} {event.state} {event.event} {event.next} {event.detail}".rstrip())


@dataclass(frozen=True)
class Judged:
    """One sound of one scene."""

    scene: str
    kind: str  # of the scene
    sound: str  # of the part
    must: str
    about: str
    start: float
    end: float
    outcome: Outcome
    expected: str = ""
    said: str | None = None  # in answer to a question

    @property
    def wrong(self) -> bool:
        return self.outcome in ERRORS

    @property
    def right(self) -> bool:
        """Whether the answer is word for word the right one."""
        return self.said is not None and self.said.strip().lower() == self.expected


def judge(heard: Heard, start: float = 0.0) -> list[Judged]:
    """Every sound of a scene that began at `start`: what happens belongs to the sound that began last before it."""
    spans = sorted([*heard.spans, *_own_voice(heard)], key=lambda span: span.start)
    cut_short = [reply.t - start for reply in heard.replies if reply.interrupted]
    found = []
    for number, span in enumerate(spans):
        until = min([span.end + LATE_MS, *(later.start for later in spans[number + 1 :])])
        found.append(_judged(heard, span, _outcome(heard, span, until, cut_short), start))
    never = [part for part in heard.scene.parts if not any(span.part is part for span in heard.spans)]
    return found + [_judged(heard, Span(part, 0.0, 0.0), "void", start) for part in never]


def _own_voice(heard: Heard) -> Iterator[Span]:
    """The assistant's answer, where nothing but its echo can disturb it."""
    if heard.scene.kind == "echo" and heard.sounding:
        yield Span(ECHO, heard.sounding[0], heard.sounding[-1])


def _outcome(heard: Heard, span: Span, until: float, cut_short: Sequence[float]) -> Outcome:
    taken = [t for t in heard.taken if span.start <= t < until]
    if span.part.must == "nothing":
        if any(span.start <= t < until for t in cut_short):
            return "interrupted"
        return "taken" if taken else "ignored"
    if any(t < span.end - EARLY_MS for t in taken):
        return "cut off"
    if not taken or not any(t > taken[0] for t in heard.sounding):
        return "unanswered"
    noticed = any(span.start - NOTICED_MS <= t <= span.start + NOTICED_MS for t in heard.begun)
    return "answered" if noticed else "noticed late"


def _judged(heard: Heard, span: Span, outcome: Outcome, start: float) -> Judged:
    taken = [t for t in heard.taken if t >= span.start]
    texts = [reply.text for reply in heard.replies if taken and reply.t - start > taken[0]]
    part, scene = span.part, heard.scene
    return Judged(
        scene.name, scene.kind, part.kind, part.must, part.about, span.start, span.end, outcome,
        expected=part.answer, said=texts[0] if outcome == "answered" and texts else None,
    )  # fmt: skip


@dataclass(frozen=True)
class Share:
    """So many of n, with the 95 % interval."""

    count: int
    n: int
    low: float
    high: float

    @property
    def share(self) -> float:
        return self.count / self.n if self.n else 0.0


def share(hits: Iterable[bool]) -> Share:
    found = list(hits)
    low, high = proportion_interval(sum(found), len(found)) if found else (0.0, 1.0)
    return Share(sum(found), len(found), low, high)


def figures(judged: Iterable[Judged]) -> dict[str, Share]:
    """The shares that turn-taking is judged by, and the errors in all. Sounds that never came do not count."""
    sounds = [sound for sound in judged if sound.outcome != "void"]
    questions = [sound for sound in sounds if sound.must == "answer"]
    over = [sound for sound in questions if sound.kind in BARGE_INS and sound.start == _last(sounds, sound)]
    others = [sound for sound in sounds if sound.must == "nothing"]
    found = {
        "answered questions": share(sound.outcome == "answered" for sound in questions),
        "cut-off questions": share(sound.outcome == "cut off" for sound in questions),
        "missed barge-ins": share(sound.outcome in MISSED for sound in over),
        "false interruptions by noises and echoes": share(sound.wrong for sound in others if sound.sound in SOUNDLESS),
    }
    for kind in sorted({sound.sound for sound in others}):
        found[f"false interruptions by {kind}"] = share(sound.wrong for sound in others if sound.sound == kind)
    return found | {"errors": share(sound.wrong for sound in sounds)}


def right_answers(judged: Iterable[Judged]) -> dict[str, Share]:
    """How many answers are right word for word, by how their questions were asked."""
    found: dict[str, list[bool]] = {}
    sounds = list(judged)
    for sound in sounds:
        if sound.outcome == "answered":
            first = sound.kind in WHILE_SPEAKING and sound.start < _last(sounds, sound)
            found.setdefault("question" if first or sound.kind == "echo" else sound.kind, []).append(sound.right)
    return {kind: share(rights) for kind, rights in sorted(found.items())}


BARGE_INS = ("barge-in", "double talk")
SOUNDLESS = ("cough", "noise", "echo")  # nobody speaks


def _last(sounds: Sequence[Judged], one: Judged) -> float:
    """When the last sound of the same scene begins."""
    return max(sound.start for sound in sounds if sound.scene == one.scene)
