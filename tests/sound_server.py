"""A private PulseAudio with a virtual loudspeaker and a virtual microphone, for tests with real sound devices."""

import os
import shutil
import subprocess
import sys
import time
from ctypes.util import find_library
from pathlib import Path
from types import TracebackType

SPEAKER, VOICE = "loudspeaker", "voice"  # what is played on VOICE is heard by the virtual microphone
START_SECONDS = 10


def missing() -> str | None:
    """What this machine lacks, or None."""
    if not sys.platform.startswith("linux"):
        return "virtual sound devices need PulseAudio on Linux"
    lacking = [name for name in ("pulseaudio", "paplay", "parec", "pactl") if shutil.which(name) is None]
    lacking += ["PortAudio"] if find_library("portaudio") is None else []
    if not any(Path("/usr/lib").rglob("libasound_module_pcm_pulse.so")):
        lacking.append("ALSA's pulse plugin")
    if not lacking:
        return None
    return f"{', '.join(lacking)} missing: apt-get install libportaudio2 libasound2-plugins pulseaudio pulseaudio-utils"


class SoundServer:
    """`environment` sends every client to it, PortAudio too, if it is set before PortAudio starts.

    norewinds=1 makes the null sinks work in blocks of 50 ms; without it full-duplex streams stall for two seconds.
    """

    def __init__(self, folder: Path):
        self.socket = folder / "sock"
        self.environment = {
            "XDG_RUNTIME_DIR": str(folder),
            "PULSE_SERVER": f"unix:{self.socket}",
            "PULSE_SINK": SPEAKER,
            "PULSE_SOURCE": f"{VOICE}.monitor",
        }
        self._all = {**os.environ, **self.environment, "HOME": str(folder)}
        self._server: subprocess.Popen[bytes] | None = None

    def __enter__(self) -> "SoundServer":
        self.start()
        return self

    def __exit__(
        self, _type: type[BaseException] | None, _error: BaseException | None, _: TracebackType | None
    ) -> None:
        self.kill()

    def start(self) -> None:
        modules = [f"module-native-protocol-unix socket={self.socket} auth-anonymous=1"]
        modules += [f"module-null-sink sink_name={name} rate=48000 norewinds=1" for name in (SPEAKER, VOICE)]
        options = "-n --daemonize=no --exit-idle-time=-1 --use-pid-file=no --high-priority=no --realtime=no".split()
        loads = [part for module in modules for part in ("-L", module)]
        self._server = subprocess.Popen(
            ["pulseaudio", *options, *loads], env=self._all, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
        )
        until = time.monotonic() + START_SECONDS
        while not self.socket.exists() or not self._sinks() >= {SPEAKER, VOICE}:
            assert self._server.poll() is None and time.monotonic() < until, "pulseaudio did not start"
            time.sleep(0.02)

    def kill(self) -> None:
        """As a crash would: the clients are not told."""
        if self._server is not None:
            self._server.kill()
            self._server.wait()
            self.socket.unlink(missing_ok=True)
            self._server = None

    def play(self, path: Path) -> "subprocess.Popen[bytes]":
        """Speak a sound file into the virtual microphone."""
        return subprocess.Popen(["paplay", "--latency-msec=50", "-d", VOICE, str(path)], env=self._all)

    def record(self, path: Path) -> "subprocess.Popen[bytes]":
        """Record the virtual loudspeaker as wav, 24 kHz mono, until it is terminated."""
        arguments = ["-d", f"{SPEAKER}.monitor", "--rate=24000", "--channels=1", "--latency-msec=50"]
        return subprocess.Popen(["parec", *arguments, "--file-format=wav", str(path)], env=self._all)

    def _sinks(self) -> set[str]:
        """The names of the virtual sinks that are there."""
        done = subprocess.run(["pactl", "list", "short", "sinks"], env=self._all, capture_output=True, text=True)
        return {line.split("\t")[1] for line in done.stdout.splitlines()}
