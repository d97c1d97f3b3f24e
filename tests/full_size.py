"""Full size, really: a checkpoint of the real architecture's 11 billion random weights, and what it costs here.

`python -m tests.full_size FOLDER` takes 22 GB for the checkpoint and 40 GB in all, up to an hour or two, and prints a
Markdown table. Each stage's result is kept in FOLDER/measured.json, so that a run that was stopped goes on with the
next one; large files go as soon as no later stage reads them. `--one-layer` does the same with one layer of each kind
at full width, `--recipe` with another recipe. Weights are random, so that only sizes and times mean anything.
"""

import shutil
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated, TypeVar

import onnx_ir as ir
import typer
from pydantic import TypeAdapter

from apps.bench.audio_head import Timing, spread
from apps.bench.bench import Machine, machine
from apps.bench.rounds import Clock, Reader, Speaker
from apps.bench.start import Start, start
from runtime.bundle import read_bundle
from runtime.engine import Engine
from runtime.errors import EdgeOmniError
from runtime.session import Options
from tests.full_size_checkpoint import FULL, ONE_LAYER, merged, write_checkpoint
from tests.full_size_gptq import CALIBRATION, Matrices
from tests.watched import Watched, watched

T = TypeVar("T")

NEEDED = {True: 12e9, False: 45e9}  # bytes of disk at the worst moment, with one layer of each kind or with all
CONTEXT = 128  # positions behind which decoding is timed
ROUNDS = 5


@dataclass(frozen=True)
class Written:
    parameters: int
    nbytes: int
    seconds: float


@dataclass(frozen=True)
class GraphSize:
    name: str
    parameters: int
    nbytes: int
    precision: str

    @property
    def bits(self) -> float:
        return 8 * self.nbytes / max(1, self.parameters)


@dataclass(frozen=True)
class Bundle:
    nbytes: int
    graphs: tuple[GraphSize, ...]


@dataclass(frozen=True)
class Starts:
    """The first start packs the weights for this CPU and stores them; the second maps what was stored."""

    first: Start
    second: Start
    cache: int  # bytes on disk of what the first stored


@dataclass(frozen=True)
class Pace:
    """What something takes, and what reading the `nbytes` of weights that it reads takes, in the same rounds."""

    nbytes: int
    taken: Timing
    reading: Timing

    @property
    def share(self) -> float:
        """How near it comes to what memory allows; of processor time, since other programs disturb that less."""
        return self.reading.cpu_ms.median / self.taken.cpu_ms.median


@dataclass(frozen=True)
class Speed:
    threads: int
    token: Pace
    frame: Pace
    head: Timing  # the audio head's part of a frame


@dataclass(frozen=True)
class Solved:
    """GPTQ of one decoder layer and of the audio head, some rows of each kind of matrix timed."""

    run: Watched
    matrices: tuple[Matrices, ...]

    def seconds(self, graph: str) -> float:
        return sum(row.seconds for row in self.matrices if row.graph == graph)


@dataclass(frozen=True)
class Measured:
    machine: Machine
    recipe: str
    layers: int
    checkpoint: Written | None = None
    export: Watched | None = None
    bundle: Bundle | None = None
    starts: Starts | None = None
    speeds: tuple[Speed, ...] | None = None
    solved: Solved | None = None


RESULT = TypeAdapter(Measured)
MATRICES = TypeAdapter(tuple[Matrices, ...])


class Run:
    """The stages in a folder, one after the other."""

    def __init__(self, folder: Path, recipe: str, one_layer: bool):
        self.folder, self.one_layer = folder, one_layer
        self.checkpoint, self.bundle, self.cache = folder / "checkpoint", folder / "bundle", folder / "cache"
        self.kept = folder / "measured.json"
        self.changes = merged(FULL, ONE_LAYER) if one_layer else FULL
        fresh = Measured(machine(0.0), recipe, self.changes["num_hidden_layers"])
        self.result = RESULT.validate_json(self.kept.read_bytes()) if self.kept.exists() else fresh
        if (self.result.recipe, self.result.layers) != (fresh.recipe, fresh.layers):
            raise EdgeOmniError(f"{self.kept} is of {self.result.recipe} and {self.result.layers} layers; take it away")

    def whole(self, threads: list[int]) -> Measured:
        self.stage("checkpoint", self.write)
        self.stage("export", self.export)
        self.stage("bundle", self.sizes)
        shutil.rmtree(self.checkpoint, ignore_errors=True)
        self.stage("starts", self.starts)
        self.stage("speeds", lambda: tuple(self.speed(count) for count in threads))
        for large in (self.bundle, self.cache):
            shutil.rmtree(large, ignore_errors=True)
        self.stage("solved", self.solve)
        return self.result

    def stage(self, name: str, measure: Callable[[], T]) -> None:
        if getattr(self.result, name) is None:
            print(f"{time.strftime('%H:%M:%S')} {name}", file=sys.stderr, flush=True)
            self.result = replace(self.result, **{name: measure()})
            self.kept.write_bytes(RESULT.dump_json(self.result, indent=1))

    def write(self) -> Written:
        shutil.rmtree(self.checkpoint, ignore_errors=True)  # what a stopped run left
        free = shutil.disk_usage(self.folder).free
        if free < NEEDED[self.one_layer]:
            needed = NEEDED[self.one_layer]
            raise EdgeOmniError(
                f"{self.folder} has {free / 1e9:.0f} GB free, this measurement needs {needed / 1e9:.0f}"
            )
        began = time.perf_counter()
        tensors = write_checkpoint(self.checkpoint, self.changes)
        seconds = time.perf_counter() - began
        return Written(sum(t.parameters for t in tensors), sum(t.nbytes for t in tensors), seconds)

    def export(self) -> Watched:
        command = [sys.executable, "-m", "apps", "export", str(self.checkpoint), "-o", str(self.bundle)]
        return watched([*command, "--recipe", self.result.recipe, "--random", "--standalone", "--force"], self.folder)

    def sizes(self) -> Bundle:
        manifest = read_bundle(self.bundle)
        graphs = (GraphSize(k, g.parameters, g.weight_bytes, g.precision) for k, g in manifest.graphs.items())
        return Bundle(sum(file.nbytes for file in manifest.files), tuple(graphs))

    def starts(self) -> Starts:
        shutil.rmtree(self.cache, ignore_errors=True)
        first, second = (start(self.bundle, 1, self.cache) for _ in range(2))
        return Starts(first, second, sum(file.stat().st_size for file in self.cache.rglob("*") if file.is_file()))

    def speed(self, threads: int) -> Speed:
        """Decode and audio frames behind CONTEXT positions, and plain reading of as many bytes in between."""
        engine = Engine(self.bundle, Options(threads, prepack_cache=self.cache))
        graphs = engine.manifest.graphs
        decoder, lm_head, head = (
            bytes_read(self.bundle / graphs[n].file) for n in ("decoder", "lm_head", "audio_head")
        )
        speaker, reader = Speaker(engine, CONTEXT), Reader(decoder + lm_head)
        rounds = [
            (
                reader.read(decoder + lm_head, threads), speaker.decode(),
                reader.read(decoder + head, threads), *speaker.audio_frame(),
            )
            for _ in range(ROUNDS + 1)
        ]  # fmt: skip
        token_read, token, frame_read, frame, of_head = map(timing, zip(*rounds[1:], strict=True))
        return Speed(
            threads, Pace(decoder + lm_head, token, token_read), Pace(decoder + head, frame, frame_read), of_head
        )

    def solve(self) -> Solved:
        run = watched([sys.executable, "-m", "tests.full_size_gptq"], self.folder)
        return Solved(run, MATRICES.validate_json((self.folder / "output.txt").read_bytes()))


def timing(clocks: Sequence[Clock]) -> Timing:
    wall, processor = zip(*clocks, strict=True)
    return Timing(spread(list(wall)), spread(list(processor)))


def bytes_read(path: Path) -> int:
    """Bytes of matrices that one run of a graph reads: those of a node anew for each node that multiplies by them."""
    graph = ir.load(path).graph
    multiplying = (node for node in graph if "MatMul" in node.op_type)
    stored = (v.const_value for node in multiplying for v in node.inputs if v is not None)
    return sum(tensor.nbytes for tensor in stored if tensor is not None)


def table(result: Measured) -> str:
    """The result in Markdown."""
    found = result.machine
    rows = [
        f"Recipe `{result.recipe}`, {result.layers} decoder layers, random weights, {found.cpu}, {found.cores} cores."
    ]
    rows += ["", "| what | measured |", "|---|---|"]
    for part in (_written(result), _exported(result), _started(result), _spoken(result), _solved(result)):
        rows += [f"| {what} | {value} |" for what, value in part]
    if result.bundle:
        rows += ["", "| graph | parameters | as bf16 | in the bundle | bits a weight |", "|---|---|---|---|---|"]
        rows += [
            f"| `{g.name}` | {g.parameters:,} | {_gb(2 * g.parameters)} | {_gb(g.nbytes)} | {g.bits:.2f} |"
            for g in result.bundle.graphs
        ]
    return "\n".join(rows)


Rows = list[tuple[str, str]]


def _written(result: Measured) -> Rows:
    made = result.checkpoint
    return [("checkpoint", f"{made.parameters:,} parameters, {_gb(made.nbytes)}")] if made else []


def _exported(result: Measured) -> Rows:
    run, bundle = result.export, result.bundle
    if run is None or bundle is None:
        return []
    return [
        ("`export --recipe`, time", f"{run.seconds:.0f} s ({run.processor_seconds:.0f} s of processor)"),
        ("peak resident memory", _gb(run.resident)),
        ("of that anonymous / file-mapped, each at its own peak", f"{_gb(run.anonymous)} / {_gb(run.mapped)}"),
        ("bundle", _gb(bundle.nbytes)),
    ]


def _started(result: Measured) -> Rows:
    if result.starts is None:
        return []
    rows = [
        (
            f"{name} start: all graphs open / first token",
            f"{s.seconds:.1f} s / {s.first_token_seconds:.1f} s, private {_gb(s.private_after_token)}, "
            f"mapped {_gb(s.mapped_after_token)}, peak {_gb(s.peak)}",
        )
        for name, s in (("first", result.starts.first), ("second", result.starts.second))
    ]
    return [*rows, ("packed weights on disk", _gb(result.starts.cache))]


def _spoken(result: Measured) -> Rows:
    rows = []
    for speed in result.speeds or ():
        threads = f"{speed.threads} thread" + "s" * (speed.threads > 1)
        for what, pace in (("token", speed.token), ("audio frame", speed.frame)):
            reading = f"reading its {_gb(pace.nbytes)} alone takes {_ms(pace.reading)}: {pace.share:.0%} of the limit"
            rows.append((f"one {what} behind {CONTEXT}, {threads}", f"{_ms(pace.taken)}; {reading}"))
        rows.append((f"of a frame the audio head, {threads}", _ms(speed.head)))
    return rows


def _solved(result: Measured) -> Rows:
    if result.solved is None:
        return []
    layer, head = (result.solved.seconds(graph) / 60 for graph in ("decoder", "audio_head"))
    return [
        (f"GPTQ of one decoder layer, {CALIBRATION} positions, extrapolated", f"{layer:.1f} minutes of processor"),
        (f"of {result.layers} layers / of the audio head", f"{result.layers * layer:.0f} / {head:.0f} minutes"),
        ("peak resident memory while matrices are solved", _gb(result.solved.run.resident)),
    ]


def _ms(timing: Timing) -> str:
    wall, processor = timing.wall_ms, timing.cpu_ms
    return f"{wall.median:.0f} ms ({wall.low:.0f} to {wall.high:.0f}), {processor.median:.0f} ms of processor"


def _gb(nbytes: int) -> str:
    return f"{nbytes / 1e9:.2f} GB"


def main(
    folder: Path,
    recipe: Annotated[str, typer.Option(help="Recipe of the export.")] = "int4-rtn",
    one_layer: Annotated[bool, typer.Option("--one-layer", help="One layer of each kind.")] = False,
    threads: Annotated[list[int], typer.Option(help="Threads to time with; may be repeated.")] = [1, 2],  # noqa: B006
) -> None:
    """Measure in FOLDER and print a table."""
    folder.mkdir(parents=True, exist_ok=True)
    try:
        print(table(Run(folder, recipe, one_layer).whole(threads)))
    except EdgeOmniError as error:
        sys.exit(str(error))


if __name__ == "__main__":
    typer.run(main)
