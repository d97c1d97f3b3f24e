"""A conversation from files: the same loop as at the microphone, its log, its trace, and how it would have sounded."""

import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, field
from itertools import count
from pathlib import Path
from typing import Any

import numpy as np

from apps.captions import Captions
from apps.conversation import LiveParts, silence
from apps.saved import save_json, save_lines, save_two_sides
from runtime.audio import Wave, resample
from runtime.bundle import VideoRules, VisionFrontEnd
from runtime.errors import MediaError
from runtime.image import Rgb, read_image
from runtime.live.clock import Clock
from runtime.live.events import Caption, LiveEvent, Notice, ReplyEnded, State, Transition, TurnTimes
from runtime.live.player import Player
from runtime.live.settings import HOP, HOP_MS, RATE
from runtime.trace import Trace
from runtime.video import read_video

LONGEST_TAIL_MS = 60_000  # that a conversation may take to come to rest after its file has ended
REST_MS = 1000  # of idleness that end it

PICTURES = {".png", ".jpg", ".jpeg", ".webp", ".gif", ".bmp", ".tif", ".tiff", ".ppm", ".avif"}

EACH_SECOND = VideoRules(decode_way="1fps", max_frame_num=3600)

Frames = Sequence[tuple[float, bytes | Rgb]]  # the time from which on it is seen, and a picture


@dataclass
class Loudspeaker:
    """Takes from the player what its clock says has been played, however long the work in between took."""

    player: Player
    clock: Clock
    samples: int = 0
    played: list[Wave] = field(default_factory=list)

    def catch_up(self) -> None:
        due = int(self.clock.now() * self.player.rate / 1000) - self.samples
        if due > 0:
            self.played.append(self.player.take(due))
            self.samples += due

    def wave(self) -> Wave:
        """All that was played, from time 0 on."""
        return np.concatenate([np.zeros(0, np.float32), *self.played])


@dataclass
class Simulation:
    """What happened: the log, line by line, and both sides as they sounded at the player's rate."""

    rate: int
    log: list[dict[str, Any]] = field(default_factory=list)
    captions: Captions = field(default_factory=Captions)
    times: list[TurnTimes] = field(default_factory=list)
    replies: list[ReplyEnded] = field(default_factory=list)
    said: Wave = field(default_factory=silence)
    played: Wave = field(default_factory=silence)
    underruns: int = 0
    late_ms: float = 0.0  # most that a hop had to wait for the work before it
    wall_seconds: float = 0.0

    def record(self) -> dict[str, Any]:
        """For machines."""
        return {
            "seconds": len(self.played) / self.rate,
            "wall_seconds": round(self.wall_seconds, 3),
            "turns": [asdict(one) | {"after_speech_ms": one.after_speech_ms} for one in self.times],
            "replies": [asdict(one) for one in self.replies],
            "captions": self.captions.as_records(),
            "underruns": self.underruns,
            "latest_hop_ms": round(self.late_ms, 1),
        }


def simulate(
    live: LiveParts,
    wave: Wave,
    frames: Frames = (),
    fast: bool = True,
    show: Callable[[LiveEvent], None] = lambda event: None,
) -> Simulation:
    """Let the duplex hear a wave float32 [n] at 16 kHz, see frames at their times, and come to rest."""
    started = time.perf_counter()
    found, speaker = Simulation(live.player.rate), Loudspeaker(live.player, live.clock)
    live.on_work.append(speaker.catch_up)
    log = EventLog(found, live.trace)
    try:
        for t, chunk, frame in _hops(live, wave, frames):
            if not fast:
                _wait(started, t)
            if t > HOP_MS:  # a wall clock is set by the first hop
                found.late_ms = max(found.late_ms, live.clock.now() - t)
            live.clock.reach(t)
            speaker.catch_up()
            for event in live.duplex.step(chunk, frame, t):
                log.take(event, t)
                show(event)
            live.trace.span("hop", "step", t, live.clock.now())
            live.trace.counter("ms to play", t, round(live.player.buffered_ms))
    finally:
        live.duplex.close()
    found.said, found.played = resample(wave, RATE, found.rate), speaker.wave()
    found.underruns, found.wall_seconds = live.player.underruns, time.perf_counter() - started
    return found


def _hops(live: LiveParts, wave: Wave, frames: Frames) -> Iterator[tuple[float, Wave, bytes | Rgb | None]]:
    """Each hop's end, its samples and what the camera sees: the file, then silence until nothing goes on any more.

    A frame is seen until the next one comes, as through a camera in front of which nothing moves.
    """
    waiting, rested, frame = list(frames), 0.0, None
    for number in count():
        t = (number + 1) * HOP_MS
        chunk = np.zeros(HOP, np.float32)
        part = wave[number * HOP : (number + 1) * HOP]
        chunk[: len(part)] = part
        while waiting and waiting[0][0] <= t:
            frame = waiting.pop(0)[1]
        yield t, chunk, frame
        over = t - 1000 * len(wave) / RATE
        rested = rested + HOP_MS if live.duplex.state in ("IDLE", "CLOSED") and not live.player.audible else 0.0
        if over >= LONGEST_TAIL_MS or (over >= REST_MS and rested >= REST_MS):
            return


def _wait(started: float, t: float) -> None:
    """Until the sample at t would have come from a device."""
    time.sleep(max(0.0, started + t / 1000 - time.perf_counter()))


@dataclass
class EventLog:
    """Writes events into a simulation and its trace."""

    found: Simulation
    trace: Trace
    state: State = "IDLE"
    since: float = 0.0  # when this state began
    newest: float = 0.0  # time of a transition

    def take(self, event: LiveEvent, t: float) -> None:
        """One event, which a step that ended at t yielded."""
        self.found.captions.take(event)
        match event:
            case Transition():
                self._transition(event)
            case ReplyEnded():
                self.found.replies.append(event)
                self._note("REPLY_ENDED", event.t, asdict(event))
            case TurnTimes():
                self.found.times.append(event)
                self._note(
                    "TURN_TIMES", event.first_audio_ms, asdict(event) | {"after_speech_ms": event.after_speech_ms}
                )
            case Notice(at, kind, text):
                self._note("NOTICE", at, {"kind": kind, "text": text})
            case Caption("user", text):
                self._note("CAPTION", t, {"who": "user", "text": text})
            case _:
                pass  # an answer's text is logged once, when it is over

    def _transition(self, event: Transition) -> None:
        self.found.log.append(asdict(event))
        self.trace.instant("events", event.event, event.t, row=event.row, detail=event.detail, gen=event.gen)
        if event.next != event.state:
            self.trace.span("state", event.state, self.since, event.t)
            self.since = event.t
        self.state, self.newest = event.next, event.t

    def _note(self, name: str, t: float, details: dict[str, Any]) -> None:
        t = max(t, self.newest)
        self.found.log.append({"t": t, "state": self.state, "event": name, "next": self.state} | details)
        self.trace.instant("events", name, t, **details)


def read_frames(path: Path, front: VisionFrontEnd) -> Frames:
    """A folder's pictures in the order of their names, or a video's frames: one a second.

    Raises MediaError: there is no picture, or one that cannot be read.
    """
    frames = pictures(path) if path.is_dir() else read_video(path, EACH_SECOND, front)
    return [(1000.0 * number, frame) for number, frame in enumerate(frames)]


def pictures(folder: Path) -> list[bytes]:
    files = [file for file in sorted(folder.iterdir()) if file.suffix.lower() in PICTURES]
    if not files:
        raise MediaError(f"{folder} holds no pictures; expected files that end in one of {', '.join(sorted(PICTURES))}")
    for file in files:
        read_image(file)  # what cannot be used is said now, not in the middle of the conversation
    return [file.read_bytes() for file in files]


def write(found: Simulation, trace: Trace, out: Path | None, log: Path | None, trace_file: Path | None) -> None:
    """Write what was asked for. Raises SaveError."""
    if out is not None:
        save_two_sides(out, found.said, found.played, found.rate)
    if log is not None:
        save_lines(log, found.log)
    if trace_file is not None:
        save_json(trace_file, trace.record())
