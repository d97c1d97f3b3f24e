"""How fast and how large a bundle is on this machine: starts, prefill, decode, audio frames; medians and their spread.

All that is timed runs the runtime's own loops. Configurations take turns, round by round, so that what else the
machine does falls on all of them; the load is part of the result.
"""

import os
import platform
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from rich.table import Table

from apps import tables
from apps.bench_audio_head import HeadBench, Spread, Timing, bench_audio_head, spread
from apps.bench_floor import write_floor
from apps.bench_start import Start, start
from apps.doctor import WHEELS, cpu_features, installed
from runtime.bundle import Manifest, Sampling, Step, read_bundle
from runtime.engine import Engine
from runtime.errors import EdgeOmniError
from runtime.prompt import Prompt
from runtime.sampling import sample
from runtime.session import Options

GREEDY = Sampling(greedy=True)
TOKENS = 16  # that one timing of decode generates
FRAMES = 4  # audio frames of one timing
DRAWS = 20  # of one timing of sampling
FLOOR_CONTEXT = 8  # positions behind which the floor is timed: attention over more would be arithmetic
STARTS: tuple[str, ...] = ("packing at each start", "first start, filling the cache", "second start, from the cache")


@dataclass(frozen=True)
class Machine:
    cpu: str
    cores: int
    features: tuple[str, ...]  # those that kernels are chosen by
    onnxruntime: str
    python: str
    load_before: float  # processes that wanted to run in the last minute
    load_after: float


@dataclass(frozen=True)
class Prefill:
    threads: int
    positions: int
    timing: Timing  # of all positions

    @property
    def per_second(self) -> float:
        return 1e3 * self.positions / self.timing.wall_ms.median


@dataclass(frozen=True)
class Decode:
    """One token: embedding, decoder, head, choice and text, greedy. `floor` is the same on matrices of no size."""

    threads: int
    context: int
    timing: Timing
    floor: Timing
    sampling: Timing  # what drawing by the bundle's own settings takes, on this model's scores
    overhead: Spread  # share of a token's time that is ONNX Runtime and Python: (floor + sampling) / all, at most

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


@dataclass(frozen=True)
class Bench:
    bundle: str
    family: str
    recipe: str | None
    random: bool  # weights that were never trained
    weight_bytes: int
    machine: Machine
    starts: dict[str, Start]
    prefill: tuple[Prefill, ...]
    decode: tuple[Decode, ...]
    audio_frames: tuple[AudioFrame, ...]
    audio_head: HeadBench | None

    @property
    def private_share(self) -> float:
        """Private memory of a second start, as a share of the weights."""
        second = self.starts[STARTS[-1]]
        return (second.private_tokenizer + second.private_graphs) / self.weight_bytes


def bench(
    bundle: Path,
    threads: Sequence[int] = (1, 2),
    lengths: Sequence[int] = (32, 128, 512),
    repeats: int = 7,
    audio_head: bool = False,
    progress: Callable[[str], None] = lambda doing: None,
) -> Bench:
    """Measure `bundle` with each number of threads: prefill of each of `lengths` and decode behind it, `repeats` times.

    `audio_head` adds the comparison of the audio head with the official order of work. EdgeOmniError if the bundle
    cannot be opened, is for another provider than the CPU, or its context is too short for a length.
    """
    manifest = read_bundle(bundle)
    refuse(bundle, manifest, threads, lengths, repeats)
    before = os.getloadavg()[0]
    with tempfile.TemporaryDirectory(prefix="edgeomni-bench-") as name:
        cache = Path(name) / "cache"
        progress("starting three times")
        starts = dict(zip(STARTS, (start(bundle, threads[0], kept) for kept in (None, cache, cache)), strict=True))
        progress("opening the bundle and its floor")
        floor = write_floor(bundle, Path(name) / "floor")
        pairs = [
            (Engine(bundle, how), Engine(floor, how)) for how in (Options(n, prepack_cache=cache) for n in threads)
        ]
        cases = [Case(*pair, length) for pair in pairs for length in lengths]
        for index in range(repeats + 1):
            progress(f"round {index} of {repeats}" if index else "warming up")
            for case in cases:
                case.round(keep=index > 0)
    return Bench(
        bundle=str(bundle),
        family=manifest.family,
        recipe=manifest.quantization.recipe if manifest.quantization else None,
        random=manifest.source.random,
        weight_bytes=manifest.weight_bytes,
        machine=machine(before),
        starts=starts,
        prefill=tuple(case.prefill() for case in cases),
        decode=tuple(case.decode() for case in cases),
        audio_frames=tuple(case.audio_frame() for case in cases if case.speech),
        audio_head=bench_audio_head(threads=threads[0]) if audio_head else None,
    )


def refuse(bundle: Path, manifest: Manifest, threads: Sequence[int], lengths: Sequence[int], repeats: int) -> None:
    wrong = []
    if manifest.profile != "cpu":
        wrong.append(f"it is for {manifest.profile}, and this measures the CPU")
    if not threads or min(threads) < 1 or repeats < 1 or not lengths or min(lengths) < 1:
        wrong.append("threads, lengths and repeats must be 1 or more")
    elif max(lengths) + TOKENS > manifest.cache.max_positions:
        wrong.append(f"{max(lengths)} + {TOKENS} positions do not fit its context of {manifest.cache.max_positions}")
    if wrong:
        raise EdgeOmniError(f"{bundle} cannot be measured: " + "; ".join(wrong))


def machine(load_before: float) -> Machine:
    lines = Path("/proc/cpuinfo").read_text().splitlines() if Path("/proc/cpuinfo").exists() else []
    names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return Machine(
        cpu=names[0] if names else platform.processor() or platform.machine(),
        cores=os.cpu_count() or 1,
        features=cpu_features(),
        onnxruntime=next((found for name in WHEELS.values() if (found := installed(name))), "unknown"),
        python=platform.python_version(),
        load_before=load_before,
        load_after=os.getloadavg()[0],
    )


Clock = tuple[float, float]  # milliseconds by the clock and of processor time


class Case:
    """One number of threads and one length of context, measured round by round."""

    def __init__(self, engine: Engine, floor: Engine, length: int):
        self.threads, self.length, self.speech = engine.options.threads, length, engine.manifest.speech
        self.speaker, self.floor = Speaker(engine, length), Speaker(floor, FLOOR_CONTEXT)
        self.kept: dict[str, list[Clock]] = {}

    def round(self, keep: bool) -> None:
        """Time everything once; a round that only warms up is not kept."""
        timed = {
            "prefill": self.speaker.prefill(),
            "decode": self.speaker.decode(),
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
        decode, floor, sampling = (np.array(self.kept[name])[:, 0] for name in ("decode", "floor", "sampling"))
        return Decode(
            threads=self.threads,
            context=self.length,
            timing=self._timing("decode"),
            floor=self._timing("floor"),
            sampling=self._timing("sampling"),
            overhead=spread((floor + sampling) / (decode + sampling)),
        )

    def audio_frame(self) -> AudioFrame:
        speech = self.speech
        assert speech is not None
        budget = 1e3 * speech.frames_per_code * speech.samples_per_frame / speech.sampling_rate
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


def record(result: Bench) -> dict[str, Any]:
    """The result for machines."""
    return asdict(result) | {"private_share_of_weights": result.private_share}


def show(result: Bench) -> None:
    """The result for people."""
    found = result.machine
    tables.line(f"{result.bundle}: {result.recipe or 'floats'}, {tables.size(result.weight_bytes)} of weights")
    tables.line(
        f"{found.cpu}, {found.cores} cores, ONNX Runtime {found.onnxruntime}, "
        f"load {found.load_before:.1f} before and {found.load_after:.1f} after"
    )
    for shown in (_starts(result), _prefill(result), _decode(result), _frames(result)):
        if shown.row_count:
            tables.OUT.print()
            tables.OUT.print(shown)
    tables.line(f"\nA second start keeps {result.private_share:.2f} of the weights in private memory.")


def _starts(result: Bench) -> Table:
    shown = tables.table("start", "open>", "first token>", "private: graphs>", "tokenizer>", "mapped>", "peak>")
    for name, row in result.starts.items():
        sizes = (row.private_graphs, row.private_tokenizer, row.mapped_after_token, row.peak)
        shown.add_row(
            name, f"{row.seconds:.2f} s", f"{row.first_token_seconds:.2f} s", *(tables.size(max(0, n)) for n in sizes)
        )
    return shown


def _prefill(result: Bench) -> Table:
    shown = tables.table("prefill", "threads>", "ms>", "10 to 90 %>", "processor ms>", "positions/s>")
    for row in result.prefill:
        shown.add_row(f"{row.positions} positions", str(row.threads), *_cells(row.timing), f"{row.per_second:.0f}")
    return shown


def _decode(result: Bench) -> Table:
    shown = tables.table(
        "decode", "threads>", "ms>", "10 to 90 %>", "processor ms>", "tokens/s>", "floor>", "sampling>", "overhead>"
    )
    for row in result.decode:
        parts = (f"{part.wall_ms.median:.2f}" for part in (row.floor, row.sampling))
        shown.add_row(
            f"behind {row.context}", str(row.threads), *_cells(row.timing),
            f"{row.per_second:.1f}", *parts, f"{row.overhead.median:.1%}",
        )  # fmt: skip
    return shown


def _frames(result: Bench) -> Table:
    shown = tables.table("audio frame", "threads>", "ms>", "10 to 90 %>", "processor ms>", "head ms>", "budget ms>")
    for row in result.audio_frames:
        head = f"{row.head.wall_ms.median:.2f}"
        shown.add_row(f"behind {row.context}", str(row.threads), *_cells(row.frame), head, f"{row.budget_ms:.0f}")
    return shown


def _cells(timing: Timing) -> tuple[str, str, str]:
    wall = timing.wall_ms
    return f"{wall.median:.2f}", f"{wall.low:.2f} to {wall.high:.2f}", f"{timing.cpu_ms.median:.2f}"
