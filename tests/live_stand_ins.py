"""Stand-ins for a model, a detector, a sound device and a camera: scripted, nothing is computed."""

import threading
import time
from collections.abc import Generator
from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import Any, cast

import numpy as np

from apps.conversation import Ear, LiveParts, Metered
from runtime.audio import Wave
from runtime.errors import EdgeOmniError
from runtime.events import AudioChunk, Event, Finish, TextDelta
from runtime.live.clock import Clock, VirtualClock
from runtime.live.duplex import Duplex
from runtime.live.events import Verdict
from runtime.live.model import Model
from runtime.live.player import Player
from runtime.live.settings import HOP, HOP_MS, RATE, Settings
from runtime.trace import Trace

WORD_MS = 400  # of sound for each word of an answer


@dataclass
class ScriptedModel:
    """Answers `words` aloud to whatever was said; `verdicts` are given in turn, then QUERY for ever."""

    words: list[str] = field(default_factory=lambda: ["the ", "light ", "is ", "on"])
    verdicts: list[Verdict] = field(default_factory=list)
    transcript: str | None = "is the light on"
    seen: list[Any] = field(default_factory=list)
    read_texts: list[str] = field(default_factory=list)
    failing: bool = False
    hanging: bool = False  # an answer's first piece of work lasts until it is halted
    halted: threading.Event = field(default_factory=threading.Event)
    resets: int = 0
    rate: int = 24_000

    def fork(self, heard_ms: float | None) -> None:
        if self.failing:
            raise RuntimeError("the scripted model is broken")

    def see(self, frame: Any) -> Generator[None, None, None]:
        self.seen.append(frame)
        yield

    def hear(self, wave: Wave, last: bool) -> Generator[None, None, int]:
        yield
        return 10

    def unhear(self) -> None: ...

    def read(self, text: str) -> Generator[None, None, None]:
        self.read_texts.append(text)
        yield

    def judge(self, speaking: bool) -> Generator[None, None, tuple[Verdict, float]]:
        yield
        return (self.verdicts.pop(0) if self.verdicts else "QUERY"), 0.9

    def reply(self, spoken: bool) -> Generator[Event | None, None, Finish]:
        if self.hanging:
            self.halted.wait(30)
            raise EdgeOmniError("the scripted model was halted")
        for word in self.words:
            yield TextDelta(word)
            if spoken:
                yield AudioChunk(tone(WORD_MS, self.rate), self.rate)
        return "end"

    def reply_in_text(self) -> Generator[Event | None, None, Finish]:
        return self.reply(False)

    def accept(self) -> None: ...

    def reject(self) -> None: ...

    def heard_text(self, heard_ms: float) -> str:
        return "".join(self.words[: int(heard_ms / WORD_MS)])

    def commit(self, heard_ms: float | None) -> None: ...

    def caption(self, wave: Wave) -> Generator[None, None, str | None]:
        yield
        return self.transcript

    def compact(self, reserve: int) -> Generator[None, None, str | None]:
        yield
        return None

    def reset(self) -> None:
        self.resets += 1

    def lengths(self) -> tuple[int, int]:
        return 0, 0

    def check(self) -> None: ...


class LoudnessDetector:
    """Whatever is not silent is speech."""

    def probability(self, chunk: Wave) -> float:
        return float(np.abs(chunk).max() > 0.01)

    def reset(self) -> None: ...


@dataclass
class ScriptedSound:
    """Gives `wave` hop by hop, then silence, and takes what is played; `broken` is a device that is not there."""

    player: Player
    wave: Wave = field(default_factory=lambda: np.zeros(0, np.float32))
    broken: bool = False
    trouble: str = ""
    xruns: int = 0
    pause: float = 0.0  # seconds a hop takes
    hops: int = 0
    opened: bool = False
    closed: int = 0
    latency: Any = field(default_factory=lambda: SimpleNamespace(played=0.0))

    @property
    def lost(self) -> bool:
        return self.broken

    def reopen(self) -> bool:
        self.opened = not self.broken
        self.trouble = "there is no microphone: connect one" if self.broken else ""
        return self.opened

    def next_chunk(self, timeout: float) -> tuple[Wave, float, Wave] | None:
        if self.broken:
            return None
        time.sleep(self.pause)  # lets the interface's thread run
        chunk = np.zeros(HOP, np.float32)
        part = self.wave[self.hops * HOP : (self.hops + 1) * HOP]
        chunk[: len(part)] = part
        self.hops += 1
        played = self.player.take(int(HOP_MS * self.player.rate / 1000))
        return chunk, self.hops * HOP_MS, played[:HOP]

    def close(self) -> None:
        self.opened = False
        self.closed += 1


@dataclass
class ScriptedSight:
    """A camera whose frames are numbered, until it is lost."""

    frames: int = 0
    lost: bool = False
    closed: bool = False

    def newest(self) -> tuple[bytes, float] | None:
        if self.lost:
            return None
        self.frames += 1
        return f"frame {self.frames}".encode(), 10.0

    def close(self) -> None:
        self.closed = True


def scripted(model: ScriptedModel, settings: Settings = Settings(), clock: Clock | None = None) -> LiveParts:  # noqa: B008
    """A conversation with the scripted model, on a clock that stands still between hops."""
    clock, player, trace, on_work = clock or VirtualClock(), Player(), Trace(), []
    ear = Ear(LoudnessDetector(), None, None)
    metered = cast(Model, Metered(model, clock, trace, on_work))
    duplex = Duplex(metered, ear, player, clock, settings, ear)
    return LiveParts(duplex, player, clock, trace, ear, on_work, model.halted.set)


def tone(ms: float, rate: int = RATE, amplitude: float = 0.3) -> Wave:
    return (amplitude * np.sin(2 * np.pi * 220 * np.arange(int(ms * rate / 1000)) / rate)).astype(np.float32)


def scene(*parts: tuple[str, float]) -> Wave:
    """A wave at 16 kHz of ("speech", ms) and ("silence", ms)."""
    waves = (tone(ms) if kind == "speech" else np.zeros(int(ms * RATE / 1000), np.float32) for kind, ms in parts)
    return np.concatenate(list(waves))
