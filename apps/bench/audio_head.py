"""How long the audio head takes for a frame, against the whole head run once for each code as the official code does.

`python -m apps.bench.audio_head` prints one JSON object.
"""

import json
import tempfile
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np

from export.audio_head import HeadShape, score_sizes, unrolled
from export.parity.full_audio_head import FeedForward, RandomWeights, full_audio_head, official_frame
from runtime.errors import EdgeOmniError
from runtime.session import Options, Session

SHAPE = HeadShape(hidden_size=1024, layers=3, codebook_sizes=(8192, 4096, 2048, 1024, 1024, 1024, 1024, 1024))
OFFICIAL: tuple[FeedForward, ...] = ("sliced", "einsum")
OURS = "unrolled"


@dataclass(frozen=True)
class Spread:
    """First decile, median and last decile."""

    low: float
    median: float
    high: float


@dataclass(frozen=True)
class Timing:
    """Milliseconds a frame: by the clock, and of processor time, which other programs disturb less."""

    wall_ms: Spread
    cpu_ms: Spread


@dataclass(frozen=True)
class HeadBench:
    """`speedup` is official / ours, frame by frame. The last two are what it can be where arithmetic alone costs, and
    where reading weights alone does."""

    shape: HeadShape
    threads: int
    frames: int
    seed: int
    timings: dict[str, Timing]
    speedup_wall: dict[str, Spread]
    speedup_cpu: dict[str, Spread]
    multiplications_saved: float
    weights_saved: float


def bench_audio_head(shape: HeadShape = SHAPE, frames: int = 10, seed: int = 0, threads: int = 1) -> HeadBench:
    """Time greedy frames of random hidden states, ours and the official order of work in turn.

    EdgeOmniError if they choose different codes.
    """
    with tempfile.TemporaryDirectory(prefix="edgeomni-bench-") as name:
        frame_of = _open_all(shape, seed, Options(threads=threads), Path(name))
        rng = np.random.default_rng(seed)
        hidden = rng.standard_normal((frames + 1, 1, shape.hidden_size), np.float32)
        rounds = [_time_frame(frame_of, row) for row in hidden][1:]  # the first warms up
    wall, cpu = ({name: [r[name][clock] for r in rounds] for name in frame_of} for clock in (0, 1))
    return HeadBench(
        shape,
        threads,
        frames,
        seed,
        timings={name: Timing(spread(wall[name]), spread(cpu[name])) for name in frame_of},
        speedup_wall={name: spread(np.divide(wall[name], wall[OURS])) for name in OFFICIAL},
        speedup_cpu={name: spread(np.divide(cpu[name], cpu[OURS])) for name in OFFICIAL},
        multiplications_saved=float(shape.depths),
        weights_saved=weights_read(shape, official=True) / weights_read(shape, official=False),
    )


FrameOf = dict[str, Callable[[np.ndarray], np.ndarray]]  # hidden [1, hidden] -> codes [depths]


def _open_all(shape: HeadShape, seed: int, options: Options, folder: Path) -> FrameOf:
    weights = RandomWeights(seed)
    head = weights.open(unrolled(shape, "cpu"), folder, options)
    frame_of: FrameOf = {OURS: lambda hidden: greedy_frame(head, shape, hidden)}
    for kind in OFFICIAL:
        full = weights.open(full_audio_head(shape, kind), folder, options)
        frame_of[kind] = lambda hidden, full=full: official_frame(full, shape.depths, hidden)
    return frame_of


def greedy_frame(head: Session, shape: HeadShape, hidden: np.ndarray) -> np.ndarray:
    count = sum(score_sizes(shape.codebook_sizes))
    results = head.run(
        hidden=hidden,
        noise=np.zeros(count, np.float32),
        temperature=np.array(1.0, np.float32),
        top_k=np.array(1, np.int64),
        top_p=np.array(1.0, np.float32),
        repetition_penalty=np.array(1.0, np.float32),
        seen=np.zeros(count, np.bool_),
        forced=np.full(shape.depths, -1, np.int64),
    )
    return results["codes"]


def _time_frame(frame_of: FrameOf, hidden: np.ndarray) -> dict[str, tuple[float, float]]:
    """Milliseconds by the clock and of processor time for one frame, each way."""
    times, chosen = {}, {}
    for name, codes_of in frame_of.items():
        wall, cpu = time.perf_counter(), time.process_time()
        chosen[name] = codes_of(hidden)
        times[name] = (1e3 * (time.perf_counter() - wall), 1e3 * (time.process_time() - cpu))
    for name, codes in chosen.items():
        if not np.array_equal(codes, chosen[OURS]):
            raise EdgeOmniError(f"the audio head chose {chosen[OURS]}, the official order of work ({name}) {codes}")
    return times


def spread(values: list[float] | np.ndarray) -> Spread:
    return Spread(*(float(value) for value in np.quantile(values, (0.1, 0.5, 0.9))))


def weights_read(shape: HeadShape, official: bool) -> int:
    """Values of matrices that one frame reads; an official run reads the feed-forwards of all depths, and all heads."""
    width, depths = shape.hidden_size, shape.depths
    attention, feed_forward = 4 * width * width, 2 * width * shape.inner
    heads = width * sum(size + 1 for size in shape.codebook_sizes)
    if official:
        return depths * (shape.layers * (attention + depths * feed_forward) + heads)
    return depths * shape.layers * (attention + feed_forward) + heads


if __name__ == "__main__":
    print(json.dumps(asdict(bench_audio_head()), indent=1))
