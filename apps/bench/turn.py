"""One turn from question to answer, as a person waits for it: where its time goes, graph by graph, and audio frames.

The question is noise to hear, a picture to look at and a line of text, as far as the bundle takes them; the answer is
spoken where it speaks. Weights do not care what they are multiplied with, so neither is meant to mean anything.
"""

import io
import time
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
from PIL import Image as Pictures

from apps.bench.audio_head import Spread, spread
from apps.bench.rounds import frame_budget_ms
from runtime.bundle import Graph
from runtime.conversation import Choices, Conversation
from runtime.engine import Engine
from runtime.events import AudioChunk, TextDelta
from runtime.prompt import Part, Text
from runtime.reply import Steps
from runtime.session import Bound, Options, Session

HEARD_SECONDS = 2.0
PICTURE = (224, 224)
QUESTION = "What do you hear, and what do you see?"
TEXT_TOKENS = 32  # of a written answer
SPOKEN_FRAMES = 25  # after which a spoken answer is interrupted


@dataclass(frozen=True)
class GraphTime:
    """One graph's part of the turn. A graph that runs on one row and on many has two of these."""

    graph: str
    rows: str | None  # sizes of its first input's free dimension; None where it has none
    calls: int
    ms: Spread  # of one call
    total_ms: float
    share: float  # of the time of the whole turn


@dataclass(frozen=True)
class Turn:
    """Seconds from the question, which counts from its waveform and its picture."""

    threads: int
    spoken: bool
    understood: float  # encoders have run
    first_token: float | None
    first_audio: float | None
    total: float
    audio_seconds: float
    frame_ms: Spread | None  # from asking for an audio frame to having its sound, so far as it is certain
    frames: int
    frames_over_budget: int  # that took longer than they sound
    budget_ms: float | None
    graphs: tuple[GraphTime, ...]
    not_run: tuple[str, ...]  # graphs that this turn had no use for

    @property
    def real_time_factor(self) -> float | None:
        return self.total / self.audio_seconds if self.audio_seconds else None


def measure_turn(engine: "TimedEngine") -> Turn:
    """Ask once for warming up, and once more with the clock running."""
    ask(engine, Clocked())
    engine.runs.clear()
    clocked = Clocked()
    ask(engine, clocked)
    speech, frames = engine.manifest.speech, clocked.frame_ms
    budget = frame_budget_ms(speech) if speech else None
    graphs = tuple(graph_times(engine.runs, 1e3 * clocked.total))
    return Turn(
        threads=engine.options.threads,
        spoken=speech is not None,
        understood=clocked.understood,
        first_token=clocked.first_token,
        first_audio=clocked.first_audio,
        total=clocked.total,
        audio_seconds=clocked.samples / speech.sampling_rate if speech else 0.0,
        frame_ms=spread(frames) if frames else None,
        frames=len(frames),
        frames_over_budget=sum(ms > budget for ms in frames) if budget is not None else 0,
        budget_ms=budget,
        graphs=graphs,
        not_run=tuple(sorted(set(engine.manifest.graphs) - {row.graph for row in graphs})),
    )


@dataclass
class Clocked:
    """When what happened in one turn, in seconds since it began."""

    began: float = field(default_factory=time.perf_counter)
    understood: float = 0.0
    first_token: float | None = None
    first_audio: float | None = None
    total: float = 0.0
    samples: int = 0
    frame_ms: list[float] = field(default_factory=list)

    def now(self) -> float:
        return time.perf_counter() - self.began


def ask(engine: Engine, clocked: Clocked) -> None:
    """Ask and take the answer, noting in `clocked` when what came."""
    parts = question(engine)
    clocked.understood = clocked.now()
    conversation = TimedConversation(engine, clocked)
    choices = Choices(spoken=engine.manifest.speech is not None, mode="prefix", max_new=TEXT_TOKENS, stop_loops=False)
    reply = conversation.reply(parts, choices)
    for event in reply:
        match event:
            case TextDelta():
                clocked.first_token = clocked.first_token or clocked.now()
            case AudioChunk(samples):
                clocked.first_audio = clocked.first_audio or clocked.now()
                clocked.samples += len(samples)
        if len(clocked.frame_ms) >= SPOKEN_FRAMES:
            reply.close()
            break
    clocked.total = clocked.now()


def question(engine: Engine) -> list[Part]:
    rng, parts = np.random.default_rng(0), list[Part]()
    if engine.manifest.audio is not None:
        count = int(HEARD_SECONDS * engine.manifest.audio.sampling_rate)
        parts.append(engine.hear(0.1 * rng.standard_normal(count).astype(np.float32)))
    if engine.manifest.image is not None:
        pixels, file = rng.integers(0, 256, (*PICTURE, 3)).astype(np.uint8), io.BytesIO()
        Pictures.fromarray(pixels).save(file, "PNG")
        parts.append(engine.look(file.getvalue()))
    return [*parts, Text(QUESTION)]


class TimedConversation(Conversation):
    """Notes how long each audio frame takes, its sound included."""

    def __init__(self, engine: Engine, clocked: Clocked):
        super().__init__(engine, engine.format.open_conversation(None, waits=True), seed=0)
        self.clocked = clocked

    def spoken(self, choices: Choices) -> Steps:
        return timed_frames(super().spoken(choices), self.clocked.frame_ms)


def timed_frames(steps: Steps, frame_ms: list[float]) -> Steps:
    """The same steps. A frame ends when the next step is asked for: then its sound has been made."""
    try:
        while True:
            began = time.perf_counter()
            item = next(steps)
            yield item
            if isinstance(item, np.ndarray):
                frame_ms.append(1e3 * (time.perf_counter() - began))
    except StopIteration as stop:
        return stop.value
    finally:
        steps.close()


@dataclass(frozen=True)
class Run:
    graph: str
    size: int | None
    ms: float


class TimedEngine(Engine):
    """An engine that keeps how long every run of every graph took."""

    def __init__(self, folder: Path, options: Options):
        super().__init__(folder, options)
        self.runs: list[Run] = []

    def session(self, name: str) -> Session:
        if name in self.manifest.graphs and name not in self._sessions:
            graph = self.manifest.graphs[name]
            self._sessions[name] = TimedSession(self.folder, graph, self.options, name, self.runs)
        return super().session(name)


class TimedSession(Session):
    def __init__(self, folder: Path, graph: Graph, options: Options, name: str, runs: list[Run]):
        super().__init__(folder, graph, options)
        self.name, self.runs = name, runs

    def run(self, **feeds: np.ndarray) -> dict[str, np.ndarray]:
        began = time.perf_counter()
        results = super().run(**feeds)
        self.note(free_size(self.graph, feeds), began)
        return results

    def bind(self, buffers: Mapping[str, np.ndarray]) -> "TimedBound":
        return TimedBound(self, buffers)

    def note(self, size: int | None, began: float) -> None:
        self.runs.append(Run(self.name, size, 1e3 * (time.perf_counter() - began)))


class TimedBound(Bound):
    def __init__(self, session: TimedSession, buffers: Mapping[str, np.ndarray]):
        self.timed, self.size = session, free_size(session.graph, buffers)
        super().__init__(session, buffers)

    def run(self) -> None:
        began = time.perf_counter()
        super().run()
        self.timed.note(self.size, began)


def free_size(graph: Graph, arrays: Mapping[str, np.ndarray]) -> int | None:
    """The size of the first dimension with a name, in the order of the graph's inputs; caches do not count."""
    for port in graph.inputs:
        for axis, dim in enumerate(port.shape):
            if isinstance(dim, str) and port.name in arrays and not port.name.startswith("past."):
                return arrays[port.name].shape[axis]
    return None


def graph_times(runs: Iterable[Run], whole_ms: float) -> list[GraphTime]:
    """By graph, runs on one row apart from those on more, the longest first."""
    groups: dict[tuple[str, bool], list[Run]] = {}
    for run in runs:
        groups.setdefault((run.graph, run.size == 1), []).append(run)
    rows = []
    for (graph, _), group in groups.items():
        sizes, times = sorted({run.size for run in group if run.size is not None}), [run.ms for run in group]
        span = None if not sizes else str(sizes[0]) if len(sizes) == 1 else f"{sizes[0]} to {sizes[-1]}"
        rows.append(GraphTime(graph, span, len(group), spread(times), sum(times), sum(times) / whole_ms))
    return sorted(rows, key=lambda row: -row.total_ms)
