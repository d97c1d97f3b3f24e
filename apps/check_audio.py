"""The first-time check: two seconds are recorded and played, and what is wrong is said together with how to mend it."""

import time
from collections.abc import Callable
from typing import Any, Protocol

from runtime.audio import Wave
from runtime.errors import EdgeOmniError
from runtime.live.audio_device import AudioDevice
from runtime.live.player import Player
from runtime.live.sound_check import Finding

SECONDS = 2.0
PATIENCE = 3.0  # s beyond the recording's length that playing may take
SOUND = 1  # the number by which the player knows the recording


class Checked(Protocol):
    """What the check needs of a sound device."""

    rate: int
    mic_name: str
    speaker_name: str

    def open(self) -> None: ...

    def check(self, seconds: float) -> tuple[Finding, Wave]: ...

    def close(self) -> None: ...


def check_audio(
    mic: str | None,
    speaker: str | None,
    say: Callable[[str], None],
    open_device: Callable[..., Checked] = AudioDevice,
) -> dict[str, Any]:
    """Record, judge, play; each step is told to `say`. Returns a record for machines, `ok` among it."""
    player = Player()
    try:
        device = open_device(player.take, mic, speaker)
        device.open()
    except EdgeOmniError as error:
        say(str(error))
        return {"ok": False, "kind": "device", "text": str(error)}
    try:
        say(f"microphone {device.mic_name}, loudspeaker {device.speaker_name}, at {device.rate} Hz")
        say(f"say something: {SECONDS:.0f} seconds are recorded")
        finding, recording = device.check(SECONDS)
        say("now you should hear it; if not, choose another --speaker or raise its volume")
        play(player, recording)
        say(finding.text)
    except EdgeOmniError as error:  # it went away meanwhile
        say(str(error))
        return {"ok": False, "kind": "device", "text": str(error)}
    finally:
        device.close()
    return {
        "ok": finding.ok,
        "kind": finding.kind,
        "text": finding.text,
        "peak_db": finding.peak_db,
        "level_db": finding.level_db,
        "microphone": device.mic_name,
        "loudspeaker": device.speaker_name,
        "rate": device.rate,
    }


def play(player: Player, recording: Wave) -> None:
    """Until it was heard, or the loudspeaker has had time enough."""
    player.open(SOUND)
    player.write(recording, SOUND)
    player.end(SOUND)
    until = time.monotonic() + len(recording) / player.rate + PATIENCE
    while not player.done and time.monotonic() < until:
        time.sleep(0.02)
