"""What a live conversation yields: a closed union of small frozen types, matched with `match`. Times are ms heard."""

from dataclasses import dataclass
from typing import Literal

# IDLE: nobody speaks. HEAR: a person does. GATE: they stopped, and whether it was meant for us is being judged.
# THINK: it was, and the answer has no sound yet. SPEAK: it has. R_HEAR, R_GATE: as HEAR and GATE, over an answer.
State = Literal["IDLE", "HEAR", "GATE", "THINK", "SPEAK", "R_HEAR", "R_GATE", "CLOSED"]
Verdict = Literal["QUERY", "NOISE", "BACKCHANNEL", "ECHO", "STOP", "INCOMPLETE"]


@dataclass(frozen=True)
class Transition:
    """A row of the table was followed: one line of the log. `speak`, `listen`: positions read on each branch."""

    t: float
    state: State
    event: str
    next: State
    row: int
    speak: int
    listen: int
    gen: int  # number of the answer that is made or heard
    detail: str = ""


@dataclass(frozen=True)
class Caption:
    """Text as it becomes known: pieces of an answer, or the whole of what a person said."""

    who: Literal["user", "assistant"]
    text: str


@dataclass(frozen=True)
class ReplyEnded:
    """An answer is over; `heard` is what of its text the person heard, `heard_ms` how much sound that was."""

    t: float
    text: str
    heard: str
    heard_ms: float
    interrupted: bool
    finish: str


@dataclass(frozen=True)
class Notice:
    """One line for the person."""

    t: float
    kind: str
    text: str


@dataclass(frozen=True)
class TurnTimes:
    """When things happened in a turn that was answered aloud; first_audio_ms: its first sound could be played."""

    speech_end_ms: float
    soft_ms: float | None
    verdict_ms: float
    end_ms: float
    first_audio_ms: float

    @property
    def after_speech_ms(self) -> float:
        """From the last voiced sample to the first sound."""
        return self.first_audio_ms - self.speech_end_ms


LiveEvent = Transition | Caption | ReplyEnded | Notice | TurnTimes
