"""Microphone and loudspeaker: one full-duplex PortAudio stream, hops of 16 kHz in, 24 kHz pulled for playing."""

import ctypes
import sys
import time
from collections import deque
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from functools import cache
from typing import Any, Literal

import numpy as np

from runtime.live.devices import REFUSED, Device, DeviceError, Kind, attempts, choose, code, explained
from runtime.live.rates import PLAYED_RATE, Intake, Outlet, Samples, cleaned, follow, whole
from runtime.live.ring import Ring
from runtime.live.settings import HOP_MS
from runtime.live.sound_check import Finding, judge_recording

RATE = 48_000  # asked of the device first: at it a sound server adds the least delay
BLOCKS_PER_SECOND = 50  # 100 would be 24 ms sooner and cost 0.03 of a core more
RING_SECONDS = 4
STAMP_LIMIT = 10.0  # seconds
STAMPS = 50  # blocks, one second
BEHIND_MS = 40  # more than at the start of the stream, at the median of a second; mended when nobody speaks
MUCH_BEHIND_MS = 200  # mended at once
RECONNECT_MS = 5_000  # at the most once in this time
QUIET = 0.003  # -50 dB: nobody speaks
STALLED_MS = 2_000  # without a callback the device counts as lost
INSTALL = "on Debian and Ubuntu: sudo apt-get install libportaudio2 libasound2-plugins"


def devices() -> list[Device]:
    """Every microphone and loudspeaker that PortAudio has found; EdgeOmniError where it is not installed."""
    sd = portaudio()
    hosts = [host["name"] for host in sd.query_hostapis()]
    return [
        Device(
            index, found["name"], hosts[found["hostapi"]],
            found["max_input_channels"], found["max_output_channels"], found["default_samplerate"],
        )
        for index, found in enumerate(sd.query_devices())
    ]  # fmt: skip


def default_index(kind: Kind) -> int:
    """The system's own choice, -1 where it has none."""
    return portaudio().default.device[kind == "output"]


@dataclass(frozen=True)
class Latency:
    """In ms, medians of the newest blocks."""

    heard: float  # from the microphone to the callback
    played: float  # from `player_take` to the loudspeaker
    round_trip: float  # from the microphone to the sample that is played in answer by the same callback


class AudioDevice:
    """The microphone and the loudspeaker of this machine.

    `player_take(n)` gives the next n samples at 24 kHz, float32; it is called from the device's thread and must not
    wait. `mic` and `speaker` are a number, a name or a part of one. Only `open` and `check` raise: `lost` says that
    the device is gone, and `reopen` tries to have it back. PortAudio is one for the whole process: `reopen` would end
    another stream that is open.
    """

    def __init__(
        self,
        player_take: Callable[[int], Samples],
        mic: int | str | None = None,
        speaker: int | str | None = None,
        on_chunk: Callable[[], object] | None = None,  # called by the device's thread whenever samples came
        *,
        rate: int = RATE,
        latency: Literal["low", "high"] | float = "low",  # or seconds
    ):
        self.player_take, self.mic, self.speaker, self.on_chunk = player_take, mic, speaker, on_chunk
        self.asked_rate, self.asked_latency = rate, latency
        self.trouble = ""  # why the last `reopen` failed
        self.xruns = 0  # blocks before which the device lost samples, or had none to play
        self.reconnects = 0  # times that samples had piled up before the callback
        self.failures = 0  # exceptions in the callback, all of them
        self.dropped = 0  # samples that `next_chunk` was too late for
        self.broken = 0  # samples that were no numbers
        self._errors: deque[Exception] = deque(maxlen=16)
        self._stamps: deque[tuple[float, float, float]] = deque(maxlen=STAMPS)
        self._stream: Any = None
        self._open = self._finished = False
        self._called = 0.0  # when the callback was, last
        self._t = 0.0  # where the last hop ended
        self._zero: float | None = None  # of the clock of `next_chunk`

    def __enter__(self) -> "AudioDevice":
        self.open()
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def open(self) -> None:
        """Start to hear and to play. DeviceError: no PortAudio, no such device, refused or busy."""
        self.close()
        found = devices()
        mic = choose(found, self.mic, "input", default_index("input"))
        speaker = choose(found, self.speaker, "output", default_index("output"))
        problem: Exception | None = None
        for rate, channels in attempts(self.asked_rate, mic, speaker):
            try:
                self._start(mic, speaker, rate, channels)
                return
            except portaudio().PortAudioError as error:
                problem = error
                if code(error) not in REFUSED:
                    break
        raise DeviceError(explained(problem, mic, speaker))

    def _start(self, mic: Device, speaker: Device, rate: int, channels: tuple[int, int]) -> None:
        ring = Ring(RING_SECONDS * rate, rate, 2)
        self._intake, self._outlet = Intake(ring), Outlet(self._taken, rate)
        self._choice = {
            "samplerate": rate, "blocksize": rate // BLOCKS_PER_SECOND, "device": (mic.index, speaker.index),
            "channels": channels, "dtype": "float32", "latency": self.asked_latency,
        }  # fmt: skip
        self._connect()
        self._open = True
        self.rate, self.mic_name, self.speaker_name, self.trouble = rate, mic.name, speaker.name, ""

    def _connect(self) -> None:
        self._finished, self._called, self._connected = False, _now(), _now()
        self._stamps.clear()
        self._soonest, self._xruns_before = np.inf, self.xruns
        stream = portaudio().Stream(**self._choice, callback=self._callback, finished_callback=self._finish)
        try:
            stream.start()
        except portaudio().PortAudioError:
            stream.close()
            raise
        self._stream = stream

    def _callback(self, heard: Samples, played: Samples, _frames: int, stamps: Any, status: Any) -> None:
        now = _now()
        self._called = now
        self.xruns += bool(status)
        played[:] = self._outlet(len(played))[:, None]
        both = np.empty((len(heard), 2), np.float32)
        both[:, 0], both[:, 1] = heard[:, 0], played[:, 0]
        late = plausible(stamps.currentTime - stamps.inputBufferAdcTime)
        ahead = plausible(stamps.outputBufferDacTime - stamps.currentTime)
        self._stamps.append((late, ahead, late + ahead))
        self._soonest = min(self._soonest, late)
        self._intake.ring.write(both, now - late)
        if self.on_chunk is not None:
            try:
                self.on_chunk()
            except Exception as error:
                self._note(error)

    def _taken(self, count: int) -> Samples:
        """What the player gives; silence where it fails, since in the device's thread nobody would see why."""
        try:
            samples = np.asarray(self.player_take(count), np.float32)
            if samples.shape != (count,):
                raise ValueError(f"player_take({count}) gave samples of shape {samples.shape}, expected ({count},)")
            return samples
        except Exception as error:
            self._note(error)
            return np.zeros(count, np.float32)

    def _note(self, error: Exception) -> None:
        self.failures += 1
        self._errors.append(error)

    def _finish(self) -> None:
        self._finished = True
        self._intake.ring.wake()

    def _behind(self) -> float:
        """By how many ms samples have piled up before the callback since the stream began.

        After it was late once they stay, since it takes blocks of one size: everything is heard late from then on, and
        PortAudio asks for more without pause, which takes a whole core.
        """
        if self.xruns == self._xruns_before or len(self._stamps) < STAMPS:
            return 0.0
        return self.latency.heard - self._soonest if _now() - self._connected > RECONNECT_MS else 0.0

    def _reconnect(self) -> None:
        """Forget what has piled up; what is in the ring, and what waits to be played, stays."""
        self._disconnect()
        with suppress(portaudio().PortAudioError):
            self._connect()
            self.reconnects += 1

    @property
    def lost(self) -> bool:
        """Whether the device that was open has gone, or is silent for two seconds."""
        gone = self._stream is None or self._finished or _now() - self._called > STALLED_MS
        return self._open and gone

    @property
    def latency(self) -> Latency:
        """As the device states it block by block; zeros before the first."""
        if not self._stamps:
            return Latency(0.0, 0.0, 0.0)
        late, ahead, trip = np.median(np.array(self._stamps), axis=0)
        return Latency(float(late), float(ahead) + self._outlet.delay_ms, float(trip))

    def errors(self) -> list[Exception]:
        """What was raised in the callback since the last call, the newest 16; silence was played instead."""
        return [self._errors.popleft() for _ in range(len(self._errors))]

    def next_chunk(self, timeout: float) -> tuple[Samples, float, Samples] | None:
        """The next hop: microphone [512], when it ended, and what was played meanwhile [512], both at 16 kHz.

        Time is in ms since the first sample that was heard, by the device's clock; time in which the device was lost
        counts. None after `timeout` seconds, and once as soon as the device is lost.
        """
        until, was_lost = _now() + 1000 * timeout, self.lost
        while self._stream is not None:
            if (hop := self._next_hop()) is not None:
                if self._behind() > (BEHIND_MS if np.abs(hop[0]).max() < QUIET else MUCH_BEHIND_MS):
                    self._reconnect()
                return hop
            if self.lost and not was_lost:
                return None
            if (left := until - _now()) <= 0:
                return None
            self._intake.ring.wait(left / 1000, self._intake.missing)
        time.sleep(max(0.0, until - _now()) / 1000)
        return None

    def _next_hop(self) -> tuple[Samples, float, Samples] | None:
        intake = self._intake
        before = intake.ring.dropped, intake.broken
        intake.pull()
        self.dropped += intake.ring.dropped - before[0]
        self.broken += intake.broken - before[1]
        if (got := intake.hop()) is None:
            return None
        heard, played, ended = got
        if self._zero is None:
            self._zero = ended - HOP_MS
        self._t = follow(self._t, HOP_MS, ended - self._zero)
        return heard, self._t, played

    def reopen(self) -> bool:
        """Look at what is connected now and open again; False leaves the reason in `trouble`."""
        self.close()
        try:
            sd = portaudio()
            sd._terminate()
            sd._initialize()
            self.open()
        except DeviceError as error:
            self.trouble = str(error)
        except portaudio().PortAudioError as error:
            self.trouble = f"the sound system does not answer ({error}); is the sound server running?"
        self._open = True  # lost, where it failed
        return self._stream is not None

    def close(self) -> None:
        """Let the devices go. What was heard and not read is forgotten."""
        self._open = False
        if self._stream is not None:
            self._disconnect()
            self._intake.ring.wake()

    def _disconnect(self) -> None:
        stream, self._stream = self._stream, None
        with suppress(portaudio().PortAudioError):  # the device is gone
            stream.close()

    def check(self, seconds: float = 2.0) -> tuple[Finding, Samples]:
        """Record and judge; also the recording at 24 kHz, to be played. Opens the device where it is closed.

        Not while another thread is in `next_chunk`. DeviceError as `open`, or where the device gives nothing.
        """
        was_open = self._stream is not None
        if not was_open:
            self.open()
        try:
            wave, passed = self._record(seconds)
            rate = self.rate
        finally:
            if not was_open:
                self.close()
        return judge_recording(wave, rate, passed), whole(wave, rate, PLAYED_RATE)

    def _record(self, seconds: float) -> tuple[Samples, float]:
        """What the microphone gives from now on, at the device's rate, and the time that it took by our clock."""
        ring, blocks, until = self._intake.ring, [], _now() + 1000 * (seconds + STALLED_MS / 1000)
        ring.read()
        begun = _now()
        while sum(map(len, blocks)) < seconds * self.rate and not self.lost and _now() < until:
            ring.wait(0.1)
            blocks += [got[0][:, 0] for got in [ring.read()] if got is not None]
        if not blocks:
            raise DeviceError(f"{self.mic_name} is open and gives no samples: connect it again, or choose another one")
        return cleaned(np.concatenate(blocks))[0], (_now() - begun) / 1000


def plausible(seconds: float) -> float:
    """A difference of the device's time stamps in ms; 0 where the device does not set them."""
    return 1000 * seconds if abs(seconds) < STAMP_LIMIT else 0.0


def _now() -> float:
    return 1000 * time.monotonic()


def portaudio():
    """The module sounddevice, ALSA told not to print; DeviceError where it or PortAudio is not installed."""
    _quiet_alsa()
    try:
        import sounddevice
    except ImportError:
        raise DeviceError(
            "the microphone needs sounddevice, which is not installed: pip install edgeomni[talk]"
        ) from None
    except OSError:
        raise DeviceError(
            f"the PortAudio library, which microphone and loudspeaker need, is missing: {INSTALL}"
        ) from None
    return sounddevice


@cache
def _quiet_alsa() -> Any:
    """ALSA prints a line on the terminal for each device that it tries in vain; returns what has to stay alive."""
    if not sys.platform.startswith("linux"):
        return None
    handler = ctypes.CFUNCTYPE(None)(lambda: None)
    with suppress(OSError, AttributeError):
        ctypes.CDLL("libasound.so.2").snd_lib_error_set_handler(handler)
    return handler
