"""The loop of a live conversation: the one thread that owns the duplex, its devices and the recording."""

import queue
import time
from collections import deque
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, Protocol

import numpy as np

from apps.captions import Captions
from apps.conversation import LiveParts, silence
from apps.level import Level, Meter
from apps.saved import SaveError, save_json, save_pcm, save_text, two_sides
from runtime.audio import Wave, pcm16
from runtime.errors import EdgeOmniError
from runtime.live.events import Caption, LiveEvent, Notice, State
from runtime.live.settings import HOP_MS, RATE

LATE_SECONDS = 0.1  # after which keys are looked at although no hop has come
RETRY_MS = 2000  # between attempts to open a device again
RECORDED_HOPS = round(600_000 / HOP_MS)  # ten minutes are kept for saving, about 50 MB
SHOWN_EVERY = 3  # hops, between two levels that are shown
SETTLED_HOPS = 15  # what a device loses while it starts is nobody's
LOOKED_EVERY = 3  # hops, between two frames
OLDEST_FRAME_MS = 500.0  # an older one shows what is no longer there
FAULTS_IN_A_ROW = 5  # of the model, after which the conversation cannot go on

What = Literal["mute", "push", "interrupt", "camera", "snapshot", "new", "save", "say", "quit"]


@dataclass(frozen=True)
class Order:
    """A key that was pressed, or a line that was typed."""

    what: What
    text: str = ""


@dataclass(frozen=True)
class Status:
    """What a person has to see at every moment."""

    state: State = "IDLE"
    muted: bool = False
    push_to_talk: bool = False
    pushed: bool = False
    camera: bool = False
    hearing: bool = True  # there is a sound device
    text_only: bool = False
    half_duplex: bool = False
    underruns: int = 0


Shown = LiveEvent | Level | Status


class Sound(Protocol):
    """A microphone and a loudspeaker: `runtime.live.audio_device.AudioDevice`, or a stand-in."""

    xruns: int
    trouble: str

    @property
    def lost(self) -> bool: ...

    @property
    def latency(self) -> Any: ...

    def reopen(self) -> bool: ...

    def next_chunk(self, timeout: float) -> tuple[Wave, float, Wave] | None:
        """The next hop, when it ended, and what was played meanwhile; None where none came."""
        ...

    def close(self) -> None: ...


class Sight(Protocol):
    """A camera that is on: `runtime.live.camera.Camera`, or a stand-in. It looks for itself when it is lost."""

    lost: bool

    def newest(self) -> tuple[Any, float] | None:
        """The newest frame and its age in ms."""
        ...

    def close(self) -> None: ...


@dataclass
class AudioLoop:
    """`open_sight` raises EdgeOmniError where there is no camera; `show` is called in this thread."""

    live: LiveParts
    sound: Sound
    open_sight: Callable[[], Sight]
    show: Callable[[Shown], None]
    push_to_talk: bool = False
    folder: Path = field(default_factory=Path)
    orders: "queue.Queue[Order]" = field(default_factory=queue.Queue)
    captions: Captions = field(default_factory=Captions)
    sight: Sight | None = None
    filming: bool = False  # frames are shown as they come, not one of them for a snapshot
    snapping: bool = False
    snapshot: Any | None = None
    muted: bool = False
    pushed: bool = False
    leaving: bool = False
    hearing: bool = False  # the sound device is open
    t: float = 0.0  # ms on the clock of the conversation: the end of the newest hop

    def __post_init__(self) -> None:
        self.meter, self.recording = Meter(), deque[tuple[Any, Any]](maxlen=RECORDED_HOPS)
        self._shift: float | None = None  # from the device's clock to that of the conversation
        self._retry_at, self._faults, self._hops = 0.0, 0, 0
        self._heard_at = time.perf_counter()  # on the wall clock
        self._xruns = 0  # while the device was being opened
        self._blind = False  # the camera is on, and lost
        self._raw = silence()  # the newest hop as the microphone gave it

    def run(self) -> None:
        """Until the order to quit: hop by hop. Leaves no device open and no work begun."""
        try:
            while not self.leaving:
                self.hop()
        finally:
            for part in (self.sound, self.sight, self.live.duplex):
                with suppress(EdgeOmniError, OSError):
                    if part is not None:
                        part.close()

    def hop(self) -> None:
        """One hop: sound in, orders, one step, what came of it."""
        chunk = self._listen()
        self._obey()
        if chunk is None:
            return
        self._step(chunk, self._look())
        self._hops += 1
        if self._hops == SETTLED_HOPS:
            self._xruns = self.sound.xruns
        if self._hops % SETTLED_HOPS == 0 and self.live.duplex.state == "IDLE" and self.sound.latency.played > 0:
            self.live.player.latency_ms = self.sound.latency.played
        if self._hops % SHOWN_EVERY == 0:
            if self.hearing:
                self.show(self.meter.measure(self._raw, self.live.duplex.state in ("HEAR", "R_HEAR")))
            self.show(self.status())

    def status(self) -> Status:
        duplex = self.live.duplex
        return Status(
            duplex.state,
            muted=self.muted,
            push_to_talk=self.push_to_talk,
            pushed=self.pushed,
            camera=self.sight is not None,
            hearing=self.hearing,
            text_only=duplex.text_only or not self.hearing,
            half_duplex=duplex.half_duplex,
            underruns=self.live.player.underruns + self.sound.xruns - self._xruns,
        )

    def _listen(self) -> Wave | None:
        """What the duplex hears of this hop; silence without a microphone or while it is off; None: it is late."""
        if not self.hearing and self.t >= self._retry_at:
            self._open_sound()
        if not self.hearing:
            return self._no_sound()
        heard = self.sound.next_chunk(LATE_SECONDS)
        if heard is None:
            if self.sound.lost:
                self._lose_sound("the sound device is gone; type meanwhile, it is tried again every two seconds")
            return None
        self._raw, t, reference = heard
        passed = self._passed()
        if self._shift is None:
            self._shift = self.t + passed - t
        self.t = max(self.t, t + self._shift)
        chunk = self.live.ear.hear(self._raw, reference)
        if self.muted or (self.push_to_talk and not self.pushed):
            chunk = silence()
        self.recording.append((pcm16(chunk), pcm16(reference)))
        return chunk

    def _no_sound(self) -> Wave:
        """Without a device the wall clock keeps time: a hop is as long as its work took, or as it should."""
        time.sleep(max(0.0, self._heard_at + HOP_MS / 1000 - time.perf_counter()))
        self.t += self._passed()
        return silence()

    def _passed(self) -> float:
        """Milliseconds since the hop before, by the wall clock."""
        before, self._heard_at = self._heard_at, time.perf_counter()
        return max(HOP_MS, 1000 * (self._heard_at - before))

    def _open_sound(self) -> None:
        if self.sound.reopen():
            self.hearing, self._shift = True, None
            if self._retry_at > 0:
                self._notice("device", "microphone and loudspeaker are back")
                self._tell_duplex("_back")
        else:
            self._lose_sound(f"{self.sound.trouble}; type meanwhile")

    def _lose_sound(self, why: str) -> None:
        if self.hearing or self._retry_at == 0:
            self._notice("device", why)
            self._tell_duplex("")
        self.sound.close()
        self.hearing, self._retry_at = False, self.t + RETRY_MS

    def _tell_duplex(self, back: str) -> None:
        """One stream carries both, so both go and come together."""
        for kind in ("capture", "playback"):
            self.live.duplex.fail(f"{kind}{back}")

    def _look(self) -> Any | None:
        """The newest frame, ten times a second; a snapshot comes before, once, with the next speech."""
        frame = self._frame() if self.sight is not None and self._hops % LOOKED_EVERY == 0 else None
        if self.snapping and frame is not None:
            self.snapshot, self.snapping = frame, False
            if not self.filming:
                self._close_sight()
            self._notice("snapshot", "a picture was taken; it is shown with what you say next")
        if self.snapshot is None:
            return frame if self.filming else None
        if self.live.duplex.state not in ("HEAR", "R_HEAR"):
            return None
        frame, self.snapshot = self.snapshot, None
        return frame

    def _frame(self) -> Any | None:
        assert self.sight is not None
        if self.sight.lost != self._blind:
            self._blind = self.sight.lost
            self._notice("camera", "the camera is gone; it is looked for" if self._blind else "the camera is back")
        newest = self.sight.newest()
        return newest[0] if newest is not None and newest[1] <= OLDEST_FRAME_MS else None

    def _step(self, chunk: Wave, frame: Any | None) -> None:
        """What a model can do wrong ends the turn, not the conversation."""
        try:
            for event in self.live.duplex.step(chunk, frame, self.t):
                self.captions.take(event)
                if not (isinstance(event, Notice) and event.kind.split("_")[0] in ("capture", "playback")):
                    self.show(event)  # what is known here of a device says more
            self._faults = 0
        except Exception as error:
            self._faults += 1
            self._notice("model", f"the model failed ({type(error).__name__}: {error}); the conversation begins anew")
            if self._faults >= FAULTS_IN_A_ROW:
                self._notice("model", "it fails each time, so the conversation ends; what was said can be saved")
                raise
            self.live.duplex.reset()

    def _obey(self) -> None:
        with suppress(queue.Empty):
            while True:
                order = self.orders.get_nowait()
                try:
                    self._one(order)
                except EdgeOmniError as error:
                    self._notice(order.what, str(error))
                self.show(self.status())

    def _one(self, order: Order) -> None:
        match order.what:
            case "mute":
                self.muted = not self.muted
            case "push":
                self.push_to_talk, self.pushed = True, not self.pushed
            case "interrupt":
                self.live.duplex.interrupt()
            case "camera":
                self._close_sight() if self.filming else self._open_sight()
                self.filming = self.sight is not None
            case "snapshot":
                self._open_sight()
                self.snapping = True
            case "new":
                self.live.duplex.reset()
                self.captions.lines.clear()
            case "save":
                self.save()
            case "say":
                self._say(order.text)
            case "quit":
                self.leaving = True

    def _say(self, text: str) -> None:
        typed = Caption("user", text)
        self.captions.take(typed)
        self.show(typed)
        self.live.duplex.say(text)

    def _open_sight(self) -> None:
        if self.sight is None:
            self.sight = self.open_sight()

    def _close_sight(self) -> None:
        with suppress(EdgeOmniError, OSError):
            if self.sight is not None:
                self.sight.close()
        self.sight, self.filming, self._blind = None, False, False

    def save(self) -> None:
        """Text, record and sound of the conversation so far, side by side in `folder`."""
        stem = time.strftime("talk-%Y%m%d-%H%M%S")
        paths = {ending: self.folder / f"{stem}.{ending}" for ending in ("txt", "json", "wav")}
        sides = [np.concatenate([np.zeros(0, np.int16), *side]) for side in zip(*self.recording, strict=True)]
        try:
            save_text(paths["txt"], self.captions.as_text())
            save_json(paths["json"], {"captions": self.captions.as_records()})
            if sides:
                save_pcm(paths["wav"], two_sides(*sides), RATE)
        except SaveError as error:
            self._notice("save", str(error))
        else:
            self._notice("save", f"saved as {self.folder / stem}.txt, .json" + (" and .wav" if sides else ""))

    def _notice(self, kind: str, text: str) -> None:
        self.show(Notice(self.t, kind, text))
