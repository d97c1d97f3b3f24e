"""How fast and how large a bundle is on this machine: starts, prefill, decode, audio frames; medians and their spread.

All that is timed runs the runtime's own loops. Configurations take turns, round by round, so that what else the
machine does falls on all of them; the load is part of the result.
"""

import os
import platform
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from apps.bench.audio_head import HeadBench, bench_audio_head
from apps.bench.floor import write_floor
from apps.bench.rounds import TOKENS, AudioFrame, Case, Decode, Prefill, Reader, moved_bytes
from apps.bench.start import Start, start
from apps.bench.turn import TimedEngine, Turn, measure_turn
from apps.doctor import WHEELS, cpu_features, installed
from runtime.bundle import Manifest, read_bundle
from runtime.engine import Engine
from runtime.errors import EdgeOmniError
from runtime.session import Options

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
    turns: tuple[Turn, ...]
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
        reader = Reader(moved_bytes(manifest, max(lengths)))
        cases = [Case(*pair, length, reader) for pair in pairs for length in lengths]
        for index in range(repeats + 1):
            progress(f"round {index} of {repeats}" if index else "warming up")
            for case in cases:
                case.round(keep=index > 0)
        progress("asking a question")
        turns = tuple(measure_turn(TimedEngine(bundle, Options(n, prepack_cache=cache))) for n in threads)
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
        turns=turns,
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


def record(result: Bench) -> dict[str, Any]:
    """The result for machines."""
    return asdict(result) | {"private_share_of_weights": result.private_share}
