"""Which microphone and which loudspeaker: choosing one, what to try with it, and what to say when it refuses."""

from dataclasses import dataclass
from typing import Literal

from runtime.errors import EdgeOmniError

BUSY = -9985  # PortAudio: device unavailable
REFUSED = {-9998, -9997, -9994}  # PortAudio: number of channels, rate, sample format


class DeviceError(EdgeOmniError):
    """A microphone, loudspeaker or camera is absent, refused or busy."""


@dataclass(frozen=True)
class Device:
    index: int
    name: str
    host: str  # ALSA, Core Audio, Windows WASAPI
    inputs: int  # channels
    outputs: int
    rate: float  # its default, Hz

    @property
    def label(self) -> str:
        return f"{self.index}: {self.name} ({self.host}, {self.inputs} in, {self.outputs} out, {self.rate:.0f} Hz)"


Kind = Literal["input", "output"]


def choose(found: list[Device], wanted: int | str | None, kind: Kind, default: int) -> Device:
    """The device of a number, a name or a part of one; None takes the default. DeviceError lists what there is."""
    word = "microphone" if kind == "input" else "loudspeaker"
    usable = [device for device in found if (device.inputs if kind == "input" else device.outputs)]
    if not usable:
        raise DeviceError(f"there is no {word}: connect one, or start the sound server, and try again")
    wanted = default if wanted is None and default >= 0 else usable[0].index if wanted is None else wanted
    matches = _matching(usable, wanted)
    if len(matches) == 1:
        return matches[0]
    listed = "".join(f"\n  {device.label}" for device in matches or usable)
    if matches:
        raise DeviceError(f"{len(matches)} {word}s are called {wanted}; say which one by its number:{listed}")
    raise DeviceError(f"there is no {word} {wanted}; choose one by number or by a part of its name:{listed}")


def _matching(usable: list[Device], wanted: int | str) -> list[Device]:
    if str(wanted).strip().isdecimal():
        return [device for device in usable if device.index == int(wanted)]
    asked = str(wanted).strip().casefold()
    same = [device for device in usable if device.name.casefold() == asked]
    return same or [device for device in usable if asked in f"{device.name}, {device.host}".casefold()]


def attempts(rate: int, mic: Device, speaker: Device) -> list[tuple[int, tuple[int, int]]]:
    """Rates and channels in the order in which they are tried: what we want, then what the devices want."""
    rates = dict.fromkeys([rate, round(mic.rate), round(speaker.rate)])
    channels = dict.fromkeys([(1, 1), (min(2, mic.inputs), min(2, speaker.outputs))])
    return [(rate, pair) for rate in rates for pair in channels]


def code(error: Exception) -> int:
    """PortAudio's number of the error."""
    return error.args[1] if len(error.args) > 1 and isinstance(error.args[1], int) else 0


def explained(error: Exception | None, mic: Device, speaker: Device) -> str:
    pair = f"microphone {mic.label} with loudspeaker {speaker.label}"
    said = str(error.args[0]) if error is not None and error.args else str(error)
    number = 0 if error is None else code(error)
    if number in REFUSED:
        return f"{pair}: refused every rate and number of channels that was tried ({said}); choose another device"
    if number == BUSY:
        return f"{pair}: busy, another program has it ({said}); close that program or choose another device"
    return f"{pair}: cannot be opened together ({said}); choose others, and see that this user may use sound devices"
