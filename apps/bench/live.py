"""How well and how soon a live conversation takes turns: labelled scenes, latency, underruns, idle cost, memory.

Time is simulated: the microphone gives a hop each 32 ms of it, and work costs the wall time that it really takes. The
same scenes are heard by the plain rule, whose answers are recordings.
"""

import os
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from apps.bench.baseline import PlainRule
from apps.bench.bench import Machine, machine
from apps.bench.live_memory import Memory, memory
from apps.bench.scene_sounds import Sounds, recorded_questions
from apps.bench.scenes import MS, Microphone, Scene, Thirds, draw_scene, draw_scenes
from apps.bench.score import Heard, Judged, Share, figures, judge, right_answers
from apps.conversation import Voice, open_live
from apps.options import VadName
from runtime.audio import Wave
from runtime.bundle import read_bundle
from runtime.conversation import Choices, Conversation
from runtime.engine import Engine
from runtime.errors import EdgeOmniError
from runtime.events import AudioChunk
from runtime.files import cache_folder
from runtime.live.clock import MeasuredClock
from runtime.live.echo import EchoCanceller
from runtime.live.events import LiveEvent, State
from runtime.live.player import Player
from runtime.live.settings import HOP, HOP_MS, Settings
from runtime.live.vad import Detector, EnergyDetector, open_detector
from runtime.session import Options

PLAYED = 3 * HOP // 2  # samples at 24 kHz in a hop
AUDIBLE = 1e-4  # of full scale
REST_MS = 2500.0  # after the last sound, for what it may still cause
NEVER_MS = 8000.0  # without an answer there will be none
LONGEST_MS = 15_000.0  # after the last sound
TURNS = 10  # of the conversation in which underruns are counted
IDLE_SECONDS = 30
RECORDED_ANSWERS = 4  # of the plain rule
Progress = Callable[[str], None]


class Party(Protocol):
    """Who listens and answers."""

    player: Player

    @property
    def state(self) -> State: ...

    def hop(self, microphone: Wave, played: Wave, now: float) -> Iterable[LiveEvent]:
        """Take the hop that ends at `now`, and what the loudspeaker played in it at 16 kHz."""
        ...


class Ours:
    """A conversation with a bundle, whose work costs what it takes."""

    def __init__(self, engine: Engine, settings: Settings, vad: VadName, aec: bool, remember: int | None = None):
        voice = Voice(greedy=True, remember=remember)
        self.live = open_live(engine, settings, MeasuredClock(), voice, vad, aec)
        self.player = self.live.player
        self.longest_wait = 0.0  # that a hop had for the work before it

    @property
    def state(self) -> State:
        return self.live.duplex.state

    def hop(self, microphone: Wave, played: Wave, now: float) -> Iterator[LiveEvent]:
        self.live.clock.reach(now)
        yield from self.live.duplex.step(self.live.ear.hear(microphone, played), None, now)
        self.longest_wait = max(self.longest_wait, self.live.clock.now() - now - HOP_MS)


class Ruled:
    """The plain rule, before or behind an echo canceller."""

    def __init__(self, detector: Detector, answers: Sequence[Wave], canceller: EchoCanceller | None):
        self.player, self.canceller = Player(), canceller
        self.rule = PlainRule(detector, self.player, answers)

    @property
    def state(self) -> State:
        return self.rule.state

    def hop(self, microphone: Wave, played: Wave, now: float) -> Iterator[LiveEvent]:
        chunk = microphone if self.canceller is None else self.canceller.process(microphone, played)
        return self.rule.step(chunk, now)


def run_scene(scene: Scene, party: Party, start: float = 0.0) -> Heard:
    """Let `party` hear the scene from `start` ms of its time on, until it has come to rest."""
    microphone, thirds, heard = Microphone(scene), Thirds(), Heard(scene)
    began, underruns = time.perf_counter(), party.player.underruns
    while not _over(microphone, party):
        loudspeaker = party.player.take(PLAYED)
        played = thirds(loudspeaker)
        chunk = microphone.hear(played)
        t = microphone.heard / MS
        if np.abs(loudspeaker).max() > AUDIBLE:
            heard.sounding.append(t)
        for event in party.hop(chunk, played, start + t):
            heard.note(event, start)
    heard.spans, heard.seconds = microphone.spans, microphone.heard / MS / 1000
    heard.underruns, heard.wall_seconds = party.player.underruns - underruns, time.perf_counter() - began
    return heard


def _over(microphone: Microphone, party: Party) -> bool:
    quiet = microphone.heard / MS - microphone.last
    if microphone.waiting:
        return quiet > NEVER_MS
    resting = party.state in ("IDLE", "CLOSED") and not party.player.audible
    return quiet > LONGEST_MS or (quiet > REST_MS and resting)


@dataclass(frozen=True)
class Quality:
    """What one way to take turns made of the scenes."""

    shares: dict[str, Share]
    sounds: tuple[Judged, ...]
    right: dict[str, Share] = field(default_factory=dict)  # answers word for word, of those to questions of each kind
    logs: dict[str, list[str]] = field(default_factory=dict)  # what happened in the scenes that went wrong


@dataclass(frozen=True)
class Waits:
    """Milliseconds over the turns that were answered aloud."""

    median: float
    p95: float
    worst: float


@dataclass(frozen=True)
class Latency:
    """From the end of a spoken question to the first sound of its answer, each question a conversation of its own."""

    questions: int
    answered: int
    after_hard_end: Waits | None  # the moment at which the turn was over for certain
    after_speech: Waits | None  # the last sample that is louder than a hundredth of the question's peak


@dataclass(frozen=True)
class Talk:
    """A conversation of several turns."""

    turns: int
    answered: int
    seconds: float
    underruns: int
    longest_wait_ms: float  # of a hop, for the work before it


@dataclass(frozen=True)
class How:
    """What to measure, and with what."""

    scenes: int = 300
    questions: int = 100
    seed: int = 0
    threads: int = 0  # of each graph; 0: as many as there are cores
    vad: VadName = "auto"
    aec: bool = True
    remember: int | None = None  # turns before the newest one; None: all that there is room for


@dataclass(frozen=True)
class LiveBench:
    bundle: str
    recipe: str | None
    machine: Machine
    how: How
    left_out: str | None
    ours: Quality
    rules: dict[str, Quality]
    latency: Latency
    talk: Talk
    idle_share: float  # of one core, while nobody speaks: detector, echo canceller, ring
    memory: Memory
    wall_seconds: float


def bench_live(bundle: Path, how: How = How(), progress: Progress = lambda doing: None) -> LiveBench:
    """Measure everything. EdgeOmniError where the bundle cannot hold a spoken conversation."""
    manifest = read_bundle(bundle)
    if manifest.audio is None or manifest.speech is None:
        raise EdgeOmniError(f"{bundle} ({manifest.family}) cannot both listen and speak, so it holds no conversation")
    began, load, sounds = time.perf_counter(), os.getloadavg()[0], Sounds()
    cache = cache_folder()
    engine = Engine(bundle, Options(threads=how.threads, prepack_cache=cache))

    def party() -> Ours:
        return Ours(engine, Settings(), how.vad, how.aec, how.remember)

    drawn = list(draw_scenes(how.scenes, how.seed, sounds))
    ours = _quality([run_scene(scene, party()) for scene in _counted(drawn, "scene", progress)], answers=True)
    rules = {
        name: _quality([run_scene(scene, rule()) for scene in _counted(drawn, f"scene by {name}", progress)])
        for name, rule in plain_rules(engine, how.vad).items()
    }
    latency = measure_latency(party, how.questions, how.seed + 1, sounds, progress)
    progress(f"a conversation of {TURNS} turns")
    talk = measure_talk(party(), how.seed + 2, sounds)
    progress("idle")
    return LiveBench(
        bundle=str(bundle),
        recipe=manifest.quantization.recipe if manifest.quantization else None,
        machine=machine(load),
        how=how,
        left_out=sounds.lacks,
        ours=ours,
        rules=rules,
        latency=latency,
        talk=talk,
        idle_share=idle_share(party(), IDLE_SECONDS),
        memory=memory(bundle, how.threads, cache),
        wall_seconds=time.perf_counter() - began,
    )


def _counted(scenes: Sequence[Scene], what: str, progress: Progress) -> Iterator[Scene]:
    for number, scene in enumerate(scenes, 1):
        progress(f"{what} {number} of {len(scenes)}")
        yield scene


def _quality(heard: Iterable[Heard], answers: bool = False) -> Quality:
    found = [(one, judge(one)) for one in heard]
    sounds = tuple(sound for _, judged in found for sound in judged)
    logs = {one.scene.name: one.log for one, judged in found if answers and any(sound.wrong for sound in judged)}
    return Quality(figures(sounds), sounds, right_answers(sounds) if answers else {}, logs)


def plain_rules(engine: Engine, vad: VadName) -> dict[str, Callable[[], Ruled]]:
    """The rule by energy, by the detector that we use, and by that behind the echo canceller that we use."""
    answers = recorded_answers(engine)
    return {
        "energy": lambda: Ruled(EnergyDetector(), answers, None),
        "detector": lambda: Ruled(open_detector(vad, engine), answers, None),
        "detector behind the canceller": lambda: Ruled(open_detector(vad, engine), answers, EchoCanceller()),
    }


def recorded_answers(engine: Engine) -> list[Wave]:
    """What the bundle says to the first questions that have long answers."""
    answers = []
    for sound in sorted(recorded_questions(), key=lambda sound: -len(sound.answer))[:RECORDED_ANSWERS]:
        events = Conversation.open(engine, seed=0).reply([engine.hear(sound.wave)], Choices(spoken=True, greedy=True))
        pieces = [event.samples for event in events if isinstance(event, AudioChunk)]
        answers.append(np.concatenate([*pieces, np.zeros(1, np.float32)]))
    return answers


def measure_latency(
    party: Callable[[], Ours], questions: int, seed: int, sounds: Sounds, progress: Progress
) -> Latency:
    """Ask `questions` one by one, each in a conversation of its own."""
    after_end, after_speech, answered = [], [], 0
    scenes = [draw_scene("question", number, seed, sounds) for number in range(questions)]
    for scene in _counted(scenes, "question", progress):
        heard = run_scene(scene, party())
        answered += sum(sound.outcome == "answered" for sound in judge(heard))
        if heard.times:
            after_end.append(heard.times[0].first_audio_ms - heard.times[0].end_ms)
            after_speech.append(heard.times[0].first_audio_ms - heard.spans[0].end)
    return Latency(questions, answered, waits(after_end), waits(after_speech))


def waits(found: Sequence[float]) -> Waits | None:
    if not found:
        return None
    median, p95 = np.percentile(found, [50, 95])
    return Waits(float(median), float(p95), max(found))


def measure_talk(party: Ours, seed: int, sounds: Sounds) -> Talk:
    """Ten questions in one conversation, each when the answer before it is over."""
    t, heard = 0.0, list[Heard]()
    outcomes = []
    for number in range(TURNS):
        heard.append(run_scene(draw_scene("question", number, seed, sounds), party, t))
        outcomes += [sound.outcome for sound in judge(heard[-1], t)]
        t += 1000 * heard[-1].seconds
    return Talk(TURNS, outcomes.count("answered"), t / 1000, sum(h.underruns for h in heard), party.longest_wait)


def idle_share(party: Party, seconds: float) -> float:
    """Processor time a second while a quiet room is heard."""
    noise, silent = np.random.default_rng(0), np.zeros(HOP, np.float32)
    hops = int(seconds * 1000 / HOP_MS)
    chunks = (1e-3 * noise.standard_normal((hops, HOP))).astype(np.float32)
    began = time.process_time()
    for number, chunk in enumerate(chunks, 1):
        party.player.take(PLAYED)
        for _ in party.hop(chunk, silent, number * HOP_MS):
            pass
    return (time.process_time() - began) / (hops * HOP_MS / 1000)


def record(result: LiveBench) -> dict[str, Any]:
    """The result for machines."""
    found = asdict(result)
    found["memory"]["ratio"] = result.memory.ratio
    return found
