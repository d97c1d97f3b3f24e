"""One number of threads and one length of context, timed round by round by the runtime's own loops."""

import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from apps.bench.audio_head import Spread, Timing, spread
from runtime.bundle import Manifest, Sampling, SpeechLayout, Step
from runtime.engine import Engine
from runtime.prompt import Prompt
from runtime.sampling import sample

GREEDY = Sampling(greedy=True)
TOKENS = 16  # that one timing of decode generates
FRAMES = 4  # audio frames of one timing
DRAWS = 20  # of one timing of sampling
FLOOR_CONTEXT = 8  # positions behind which the floor is timed: attention over more would be arithmetic
MOST_READ = 1 << 30  # bytes that are read to measure bandwidth; what is more is taken to go at the same speed

Clock = tuple[float, float]  # milliseconds by the clock and of processor time


@dataclass(frozen=True)
class Prefill:
    threads: int
    positions: int
    timing: Timing  # of all positions

    @property
    def per_second(self) -> float:
        return 1e3 * self.positions / self.timing.wall_ms.median


@dataclass(frozen=True)
class Roofline:
    """A token's time against that of reading as many bytes with as many threads, measured in the same rounds."""

    moved_bytes: int  # weights of decoder and head, one row of embeddings, and the cache
    bandwidth: Spread  # bytes a second
    share: Spread  # time of reading alone / time of a token


@dataclass(frozen=True)
class Decode:
    """One token: embedding, decoder, head, choice and text, greedy. `floor` is the same on matrices of no size."""

    threads: int
    context: int
    timing: Timing
    floor: Timing
    sampling: Timing  # what drawing by the bundle's own settings takes, on this model's scores
    overhead: Spread  # share of a token's time that is ONNX Runtime and Python: (floor + sampling) / all, at most
    roofline: Roofline

    @property
    def per_second(self) -> float:
        return 1e3 / self.timing.wall_ms.median


@dataclass(frozen=True)
class AudioFrame:
    threads: int
    context: int
    frame: Timing  # decoder and audio head
    head: Timing
    budget_ms: float  # how long a frame sounds


def frame_budget_ms(speech: SpeechLayout) -> float:
    """How long one audio frame sounds."""
    return 1e3 * speech.frames_per_code * speech.samples_per_frame / speech.sampling_rate


def moved_bytes(manifest: Manifest, positions: int) -> int:
    """Bytes that a token behind so many positions cannot do without reading."""
    graphs = manifest.graphs
    weights = sum(graphs[name].weight_bytes for name in ("decoder", "lm_head"))
    floats = next(port.dtype for port in graphs["decoder"].inputs if port.name == "inputs_embeds")
    rotary = 2 * manifest.cache.max_positions * (manifest.cache.head_dim // 2) * np.dtype(floats).itemsize
    row = graphs["embed_tokens"].weight_bytes // manifest.vocab_size
    return weights - rotary + row + positions * manifest.cache.bytes_per_position


class Reader:
    """Reads bytes and does next to nothing with them, with as many threads as it is asked for."""

    def __init__(self, nbytes: int):
        self.bytes = np.ones(min(nbytes, MOST_READ), np.uint8)

    def read(self, nbytes: int, threads: int) -> Clock:
        """The time of `nbytes`."""
        part = min(nbytes, len(self.bytes))
        with ThreadPoolExecutor(threads) as pool:
            slices: list[NDArray[np.uint8]] = np.array_split(self.bytes[:part], threads)
            list(pool.map(len, slices))  # starts the threads
            found = timed(lambda: list(pool.map(np.max, slices)))
        return found[0] * nbytes / part, found[1] * nbytes / part


class Case:
    """One number of threads and one length of context, measured round by round."""

    def __init__(self, engine: Engine, floor: Engine, length: int, reader: Reader):
        self.threads, self.length, self.speech = engine.options.threads, length, engine.manifest.speech
        self.speaker, self.floor = Speaker(engine, length), Speaker(floor, FLOOR_CONTEXT)
        self.reader, self.moved = reader, moved_bytes(engine.manifest, length + TOKENS // 2)
        self.kept: dict[str, list[Clock]] = {}

    def round(self, keep: bool) -> None:
        """Time everything once; a round that only warms up is not kept."""
        timed = {
            "prefill": self.speaker.prefill(),
            "decode": self.speaker.decode(),
            "reading": self.reader.read(self.moved, self.threads),
            "floor": (self.floor.prefill(), self.floor.decode())[1],
            "sampling": self.speaker.sampling(),
        }
        if self.speech:
            timed["frame"], timed["head"] = self.speaker.audio_frame()
        for name, clock in timed.items() if keep else ():
            self.kept.setdefault(name, []).append(clock)

    def prefill(self) -> Prefill:
        return Prefill(self.threads, self.length, self._timing("prefill"))

    def decode(self) -> Decode:
        decode, reading, floor, sampling = (
            np.array(self.kept[name])[:, 0] for name in ("decode", "reading", "floor", "sampling")
        )
        return Decode(
            threads=self.threads,
            context=self.length,
            timing=self._timing("decode"),
            floor=self._timing("floor"),
            sampling=self._timing("sampling"),
            overhead=spread((floor + sampling) / (decode + sampling)),
            roofline=Roofline(self.moved, spread(1e3 * self.moved / reading), spread(reading / decode)),
        )

    def audio_frame(self) -> AudioFrame:
        assert self.speech is not None
        budget = frame_budget_ms(self.speech)
        return AudioFrame(self.threads, self.length, self._timing("frame"), self._timing("head"), budget)

    def _timing(self, name: str) -> Timing:
        wall, processor = zip(*self.kept[name], strict=True)
        return Timing(spread(list(wall)), spread(list(processor)))


class Speaker:
    """An open bundle with a context of random tokens, which every timing leaves as it found it."""

    def __init__(self, engine: Engine, length: int):
        self.engine, manifest = engine, engine.manifest
        self.manifest = replace(manifest, tokens=replace(manifest.tokens, eos=()))  # nothing ends an answer early
        self.rng = np.random.default_rng(0)
        ids = self.rng.integers(0, manifest.known_tokens, length)
        self.prompt = Prompt(ids, np.empty((0, 0), np.int64), np.empty((0, 0), np.float32))
        self.context = self.engine.context()

    def prefill(self) -> Clock:
        """Read the prompt from nothing."""
        self.context.truncate(0)
        self.context.append(self.prompt)
        return timed(self.context.hidden)

    def decode(self) -> Clock:
        """Generate TOKENS behind the prompt; the time of one."""
        self._rewind()
        writer = replace(self.engine.writer(self.rng, greedy=True), manifest=self.manifest)
        step = Step(GREEDY, max_new=TOKENS)
        return per(TOKENS, timed(lambda: list(writer.step(self.context, step))))

    def sampling(self) -> Clock:
        """What a draw by the bundle's own settings takes longer than the likeliest token."""
        self._rewind()
        logits = self.engine.session("lm_head").run(hidden=self.context.hidden())["logits"][0]
        seen = np.array(self.context.ids)
        own, greedy = (
            timed(lambda how=how: [sample(logits, seen, how, self.rng) for _ in range(DRAWS)])
            for how in (self.manifest.generation.text.sampling, GREEDY)
        )
        return per(DRAWS, (max(0.0, own[0] - greedy[0]), max(0.0, own[1] - greedy[1])))

    def audio_frame(self) -> tuple[Clock, Clock]:
        """Generate FRAMES audio frames; the time of one, and the audio head's part of it."""
        self._rewind()
        voice, pad = self.engine.voice(greedy=True), self.manifest.tokens.audio_pad
        assert pad is not None
        head = (0.0, 0.0)

        def frames() -> None:
            nonlocal head
            for _ in range(FRAMES):
                hidden, began = self.context.hidden(), now()
                _, row = voice.frame(hidden, self.rng)
                head = (head[0] + now()[0] - began[0], head[1] + now()[1] - began[1])
                self.context.push(pad, row)

        return per(FRAMES, timed(frames)), per(FRAMES, head)

    def _rewind(self) -> None:
        """The context as the prompt left it, but for its last position, which is not read yet."""
        self.context.truncate(len(self.prompt.ids) - 1)
        self.context.push(int(self.prompt.ids[-1]))


def now() -> Clock:
    return 1e3 * time.perf_counter(), 1e3 * time.process_time()


def timed(work: Callable[[], Any]) -> Clock:
    wall, processor = now()
    work()
    after = now()
    return after[0] - wall, after[1] - processor


def per(count: int, clock: Clock) -> Clock:
    return clock[0] / count, clock[1] / count
