"""What `edgeomni talk` does besides the conversation itself: lists, explains, checks, and runs one from files."""

from collections.abc import Callable
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

from apps import tables
from apps.conversation import LiveParts, Voice, open_live
from apps.options import VadName
from apps.simulate import Frames, Simulation, read_frames, simulate, write
from runtime.audio import load_mono
from runtime.engine import Engine
from runtime.errors import EdgeOmniError, PromptError
from runtime.live.clock import Clock, MeasuredClock, WallClock
from runtime.live.events import LiveEvent, Notice, TurnTimes
from runtime.live.settings import RATE, Settings
from runtime.live.turn_taking import TABLE


@dataclass(frozen=True)
class Chosen:
    """Options of the command that shape a conversation."""

    vad: VadName = "auto"
    aec: bool = True
    half_duplex: bool = False
    push_to_talk: bool = False
    system: str | None = None
    seed: int | None = None
    greedy: bool = False
    remember: int | None = None

    def open(self, engine: Engine, clock: Clock, echo: bool, traced: bool = False) -> LiveParts:
        """`echo`: there is a loudspeaker that the microphone may hear."""
        settings = Settings(half_duplex=self.half_duplex)
        voice = Voice(self.system, self.seed, self.greedy, self.remember)
        return open_live(engine, settings, clock, voice, self.vad, aec=self.aec and echo, echo_test=echo, traced=traced)


@dataclass(frozen=True)
class Devices:
    """Each by its number or a part of its name; None: the system's own choice, and no camera until it is asked for."""

    mic: str | None = None
    speaker: str | None = None
    camera: str | None = None


@dataclass(frozen=True)
class Files:
    """What a simulated conversation reads and writes."""

    heard: Path
    frames: Path | None = None
    out: Path | None = None
    log: Path | None = None
    trace: Path | None = None


def check_files(files: Files) -> None:
    """Refuse now what could only fail after the conversation. Raises EdgeOmniError, all of it at once."""
    targets = [path for path in (files.out, files.log, files.trace) if path is not None]
    problems = [f"{path} lies in {path.parent}, which is no folder" for path in targets if not path.parent.is_dir()]
    problems += [f"{path} is a folder" for path in targets if path.is_dir()]
    if len(set(targets)) < len(targets):
        problems.append("two of --out, --log and --trace name the same file")
    if problems:
        raise EdgeOmniError("; ".join(problems) + "; name files in folders that exist")


def from_files(engine: Engine, chosen: Chosen, files: Files, fast: bool, as_json: bool) -> dict[str, Any]:
    """Hold the conversation, write what was asked for, and return its record; without `as_json` also show it."""
    wave = load_mono(files.heard, RATE)
    frames = frames_for(engine, files.frames) if files.frames is not None else ()
    # A recording has no echo of what is answered to it, so that there is nothing to cancel.
    live = chosen.open(engine, MeasuredClock() if fast else WallClock(), echo=False, traced=files.trace is not None)
    found = simulate(live, wave, frames, fast, show=ignored if as_json else show_event)
    write(found, live.trace, files.out, files.log, files.trace)
    if not as_json:
        show_simulation(found, files)
    return found.record()


def frames_for(engine: Engine, path: Path) -> Frames:
    if engine.manifest.image is None:
        raise PromptError(f"{engine.manifest.family} does not see, so it has no use for {path}; leave --frames out")
    return read_frames(path, engine.manifest.image)


def ignored(event: LiveEvent) -> None:
    pass


def show_event(event: LiveEvent) -> None:
    match event:
        case Notice(t, _, text):
            tables.line(f"{t / 1000:7.2f} s  {text}", "yellow")
        case _:
            pass


def show_simulation(found: Simulation, files: Files) -> None:
    """What was said, and when each answer came."""
    for line in found.captions.as_text().splitlines():
        tables.line(line)
    if found.times:
        tables.OUT.print(times_table(found.times))
    seconds = len(found.played) / found.rate
    tables.line(
        f"{seconds:.1f} s of conversation in {found.wall_seconds:.1f} s · {len(found.replies)} answers, "
        f"{sum(reply.interrupted for reply in found.replies)} interrupted · {found.underruns} underruns · "
        f"no hop waited longer than {found.late_ms:.0f} ms"
    )
    for what, path in (("both sides", files.out), ("the log", files.log), ("the trace", files.trace)):
        if path is not None:
            tables.line(f"{what} in {path}")


def times_table(times: list[TurnTimes]):
    shown = tables.table(
        "speech ended at>", "pause noticed +ms>", "understood +ms>", "turn over +ms>", "first sound +ms>",
        title="answered turns, after the last voiced sample",
    )  # fmt: skip
    for one in times:
        stages = (one.soft_ms, one.verdict_ms, one.end_ms, one.first_audio_ms)
        after = ("" if at is None else f"{at - one.speech_end_ms:.0f}" for at in stages)
        shown.add_row(f"{one.speech_end_ms / 1000:.2f} s", *after)
    return shown


def explanation() -> dict[str, Any]:
    """The table of who speaks when, and the parameters, as `--explain` shows them."""
    return {"table": [asdict(row) for row in TABLE], "settings": asdict(Settings())}


def explain() -> None:
    """Print how turns are taken."""
    shown = tables.table("row>", "in", "when", "if", "do", "then", title="Who speaks when: the first row that fits")
    for row in TABLE:
        actions = ", ".join(row.actions).replace("_", " ")
        shown.add_row(str(row.number), " ".join(row.states), row.event, row.guard, actions, row.next)
    tables.OUT.print(shown)
    settings = tables.table("parameter", "value>", title="Parameters, in milliseconds unless their name says otherwise")
    for field in fields(Settings):
        settings.add_row(field.name.replace("_", " "), str(getattr(Settings(), field.name)))
    tables.OUT.print(settings)


def list_devices() -> dict[str, Any]:
    """Microphones, loudspeakers and cameras of this machine, for machines; DeviceError without PortAudio."""
    from runtime.live.audio_device import devices

    cameras = sorted(path.name.removeprefix("video") for path in Path("/dev").glob("video*"))
    return {"sound": [asdict(device) for device in devices()], "cameras": cameras}


def show_devices(found: dict[str, Any]) -> None:
    sound = tables.table("number>", "name", "system", "microphone>", "loudspeaker>", "Hz>", title="Sound")
    for one in found["sound"]:
        channels = (str(one["inputs"] or ""), str(one["outputs"] or ""))
        sound.add_row(str(one["index"]), one["name"], one["host"], *channels, f"{one['rate']:.0f}")
    tables.OUT.print(sound)
    if not found["sound"]:
        tables.line("no sound device was found: connect one, or start the sound server")
    tables.line(f"cameras: {', '.join(found['cameras']) or 'none is known; --camera takes its number all the same'}")


def talk(engine: Engine, chosen: Chosen, devices: Devices) -> None:
    """The conversation at the terminal, until the person leaves."""
    from apps.audio_loop import AudioLoop, Order, Shown
    from apps.talk import TalkApp
    from runtime.live.audio_device import AudioDevice
    from runtime.live.camera import Camera

    with tables.waiting("opening the model", quiet=False):
        live = chosen.open(engine, WallClock(), echo=True)

    def open_camera() -> Camera:
        camera = Camera(devices.camera or 0)
        camera.start()
        return camera

    def open_loop(show: Callable[[Shown], None]) -> AudioLoop:
        device = AudioDevice(live.player.take, devices.mic, devices.speaker)
        return AudioLoop(live, device, open_camera, show, chosen.push_to_talk)

    app = TalkApp(open_loop, engine.folder.name)
    if devices.camera is not None:
        app.loop.orders.put(Order("camera"))
    app.run()
