"""Our decode and prefill beside those of other programs on the same weights: in turns, so that all bear the same load.

Each program runs in a process of its own for each number of threads, and all of them are open at once; every round asks
each in turn, and what is told are the ratios within a round. They read the same token ids and choose greedily.
"""

import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import numpy as np

from apps.bench.audio_head import Spread, spread
from apps.bench.bench import Machine, machine
from runtime.bundle import Manifest, read_bundle
from runtime.errors import EdgeOmniError
from runtime.tokenizer import Tokenizer

PREFILL = 512  # positions
CONTEXT = 128  # of them stay for decode
TOKENS = 32  # decoded
OURS = "edgeomni"
TEXT = (
    "The river rises in the hills behind the village, runs past the old mill and the school, and meets the sea at the "
    "harbour, where every morning the boats come in with fish. Two friends walk along it on Sundays and count birds. "
)
# The packages that each needs, and what installs them.
PEERS: dict[str, tuple[tuple[str, ...], str]] = {
    "llama.cpp": (("llama-cpp-python", "gguf"), "llama-cpp-python gguf"),
    "onnxruntime-genai": (("onnxruntime-genai",), "onnxruntime-genai"),
    "transformers": (("transformers", "torch"), "transformers torch"),
}


@dataclass(frozen=True)
class Variant:
    """One program with one form of the weights."""

    program: str
    form: str  # how the weights are stored or computed with
    version: str
    model: Path
    extra: str
    nbytes: int | None  # of the weights on disk; None where they are made in memory

    @property
    def name(self) -> str:
        return f"{self.program} {self.form}"


@dataclass(frozen=True)
class Measured:
    name: str
    version: str
    threads: int
    prefill_ms: Spread  # of all positions
    decode_ms: Spread  # of one token
    prefill_cpu_ms: Spread
    decode_cpu_ms: Spread
    private_bytes: int  # of the whole process, with its libraries and its cache
    mapped_bytes: int
    bits_per_weight: float | None  # of its file
    same_tokens: float  # share of those that it chose in the first round as we did, up to the first other one


@dataclass(frozen=True)
class Ratio:
    """How many times as fast we are: their time / ours, round by round, by the clock and in processor time.

    On a machine that does other things, processor time is the fairer of the two for one thread; with more of them it
    also counts threads that spin while they wait.
    """

    name: str
    threads: int
    prefill: Spread
    decode: Spread
    prefill_cpu: Spread
    decode_cpu: Spread


@dataclass(frozen=True)
class Against:
    prefill: int
    context: int
    tokens: int
    rounds: int
    measured: tuple[Measured, ...]
    ratios: tuple[Ratio, ...]
    missing: dict[str, str]  # programs that are not installed, and what installs them
    refused: dict[str, str]  # those that cannot run this bundle, and why
    machine: Machine


def against(
    bundle: Path,
    peers: Sequence[str],
    threads: Sequence[int] = (1, 2),
    rounds: int = 7,
    progress: Callable[[str], None] = lambda doing: None,
) -> Against:
    """Run `bundle` and those of `peers` that are installed. EdgeOmniError for a name that is none of PEERS."""
    manifest = read_bundle(bundle)
    refuse(bundle, manifest, peers, rounds)
    missing = {name: f"pip install {PEERS[name][1]}" for name in peers if not installed(name)}
    before = os.getloadavg()[0]
    with tempfile.TemporaryDirectory(prefix="edgeomni-bench-") as name, ExitStack() as stack:
        progress("writing the weights for the others")
        variants, refused = prepare(bundle, manifest, [peer for peer in peers if peer not in missing], Path(name))
        ids = prompt_ids(bundle, manifest)
        progress("opening them all")
        running = [
            Running(variant, count, stack.enter_context(process(variant, count)))
            for count in threads
            for variant in variants
        ]
        for index in range(rounds + 1):
            progress(f"round {index} of {rounds}" if index else "warming up")
            turn(running, ids, index)
    return Against(
        prefill=PREFILL,
        context=CONTEXT,
        tokens=TOKENS,
        rounds=rounds,
        measured=tuple(one.measured(ours(running, one), parameters(manifest)) for one in running),
        ratios=tuple(one.ratio(ours(running, one)) for one in running if one.variant.program != OURS),
        missing=missing,
        refused=refused,
        machine=machine(before),
    )


def refuse(bundle: Path, manifest: Manifest, peers: Sequence[str], rounds: int) -> None:
    wrong = [f"{name!r} is none of {', '.join(PEERS)}" for name in peers if name not in PEERS]
    if rounds < 1:
        wrong.append("repeats must be 1 or more")
    if manifest.cache.max_positions < PREFILL + TOKENS:
        wrong.append(f"{PREFILL} + {TOKENS} positions do not fit its context of {manifest.cache.max_positions}")
    if wrong:
        raise EdgeOmniError(f"{bundle} cannot be compared: " + "; ".join(wrong))


def installed(peer: str) -> str | None:
    """Versions of what a peer needs, or None if something is missing."""
    try:
        return ", ".join(f"{name} {version(name)}" for name in PEERS[peer][0])
    except PackageNotFoundError:
        return None


def parameters(manifest: Manifest) -> int:
    """Weights of the text model; a head that reads the embeddings counts once."""
    graphs = manifest.graphs
    tied = graphs["lm_head"].weights == graphs["embed_tokens"].weights
    return sum(graphs[name].parameters for name in ("embed_tokens", "decoder", *(() if tied else ("lm_head",))))


def prepare(
    bundle: Path, manifest: Manifest, peers: Sequence[str], folder: Path
) -> tuple[list[Variant], dict[str, str]]:
    """Ours and each peer's forms of the weights, below `folder`; and which peers cannot have them, and why."""
    recipe = manifest.quantization.recipe if manifest.quantization else "floats"
    text = [manifest.graphs[name].weights for name in ("embed_tokens", "decoder", "lm_head")]
    nbytes = sum(file.nbytes for file in manifest.files if any(file.path in files for files in text))
    runs_on = f"onnxruntime {machine(0.0).onnxruntime}"
    variants = [Variant(OURS, recipe, runs_on, bundle, str(folder / "cache"), nbytes)]
    refused: dict[str, str] = {}
    for peer in peers:
        try:
            variants += FORMS[peer](bundle, folder)
        except EdgeOmniError as error:
            refused[peer] = str(error)
    return variants, refused


def gguf_forms(bundle: Path, folder: Path) -> Iterator[Variant]:
    from apps.bench.gguf_file import write_gguf
    from apps.bench.model import read_text_model

    model = read_text_model(bundle)
    forms = {4: ("Q4_0", "Q4_1") if model.symmetric else ("Q4_1",), 8: ("Q8_0",)}.get(model.bits, ("F32",))
    for form in forms:
        path = folder / f"{form}.gguf"
        write_gguf(model, path, "Q4_1" if form == "Q4_1" else "Q4_0")
        yield Variant("llama.cpp", form, str(installed("llama.cpp")), path, "", path.stat().st_size)


def genai_forms(bundle: Path, folder: Path) -> Iterator[Variant]:
    from apps.bench.genai import write_genai

    home = folder / "genai"
    home.mkdir()
    write_genai(bundle, home)
    nbytes = (home / "model.data").stat().st_size
    yield Variant("onnxruntime-genai", "our graphs", str(installed("onnxruntime-genai")), home, "", nbytes)


def transformers_forms(bundle: Path, folder: Path) -> Iterator[Variant]:
    from apps.bench.model import read_text_model

    read_text_model(bundle)  # refuses here what its own process would die of
    for form in ("float32", "bfloat16"):
        yield Variant("transformers", form, str(installed("transformers")), bundle, form, None)


FORMS: dict[str, Callable[[Path, Path], Iterator[Variant]]] = {
    "llama.cpp": gguf_forms,
    "onnxruntime-genai": genai_forms,
    "transformers": transformers_forms,
}


@contextmanager
def process(variant: Variant, threads: int) -> Iterator[subprocess.Popen[str]]:
    """A program's own process, ready. EdgeOmniError with what it said if it does not start."""
    arguments = (variant.program, str(variant.model.resolve()), str(threads), str(PREFILL + TOKENS), variant.extra)
    pinned = {name: str(threads) for name in ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS")}
    with tempfile.TemporaryFile("w+") as said:
        child = subprocess.Popen(
            [sys.executable, "-m", "apps.bench.peer", *arguments],
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=said, text=True, cwd=Path(__file__).parents[2],
            env=os.environ | pinned | {"ORT_DISABLE_TELEMETRY": "1", "HF_HUB_OFFLINE": "1"},
        )  # fmt: skip
        try:
            assert child.stdout is not None
            if not child.stdout.readline():
                raise EdgeOmniError(f"{variant.name} does not start: {last_words(said)}")
            yield child
        finally:
            child.kill()
            child.communicate()


def last_words(said: Any) -> str:
    said.seek(0)
    lines = [line.strip() for line in said.read().splitlines() if line.strip()]
    return lines[-1] if lines else "it said nothing"


@dataclass
class Running:
    """A program at work, and what its rounds took."""

    variant: Variant
    threads: int
    child: "subprocess.Popen[str]"
    prefill: list[dict[str, Any]] = field(default_factory=list)
    decode: list[dict[str, Any]] = field(default_factory=list)

    def ask(self, rewind: int, ids: list[int], count: int) -> dict[str, Any]:
        assert self.child.stdin is not None and self.child.stdout is not None
        try:
            print(json.dumps({"rewind": rewind, "ids": ids, "count": count}), file=self.child.stdin, flush=True)
            return json.loads(self.child.stdout.readline())
        except (OSError, ValueError):
            raise EdgeOmniError(f"{self.variant.name} died in the middle of a round") from None

    def round(self, ids: list[int], keep: bool) -> None:
        timed = self.ask(0, ids, 1), self.ask(CONTEXT, ids[CONTEXT : CONTEXT + 1], TOKENS)
        if keep:
            self.prefill.append(timed[0])
            self.decode.append(timed[1])

    def times(self, clock: str) -> tuple[np.ndarray, np.ndarray]:
        """Milliseconds of each round's prefill, and of a token of its decode."""
        return (
            np.array([row[clock] for row in self.prefill]),
            np.array([row[clock] for row in self.decode]) / TOKENS,
        )

    def measured(self, ours: "Running", count: int) -> Measured:
        (prefill, decode), (prefill_cpu, decode_cpu) = self.times("wall_ms"), self.times("cpu_ms")
        last, nbytes = self.decode[-1]["memory"], self.variant.nbytes
        return Measured(
            name=self.variant.name,
            version=self.variant.version,
            threads=self.threads,
            prefill_ms=spread(prefill),
            decode_ms=spread(decode),
            prefill_cpu_ms=spread(prefill_cpu),
            decode_cpu_ms=spread(decode_cpu),
            private_bytes=last["RssAnon"],
            mapped_bytes=last["RssFile"],
            bits_per_weight=None if nbytes is None else 8 * nbytes / count,
            same_tokens=agreement(self.decode[0]["tokens"], ours.decode[0]["tokens"]),
        )

    def ratio(self, ours: "Running") -> Ratio:
        clocks = [(self.times(clock), ours.times(clock)) for clock in ("wall_ms", "cpu_ms")]
        wall, processor = ([spread(their / our) for their, our in zip(*pair, strict=True)] for pair in clocks)
        return Ratio(self.variant.name, self.threads, *wall, *processor)


def ours(running: Sequence[Running], other: Running) -> Running:
    return next(one for one in running if one.variant.program == OURS and one.threads == other.threads)


def agreement(tokens: Sequence[int], reference: Sequence[int]) -> float:
    """Share of `reference` that `tokens` equals before the first difference: behind it the contexts differ."""
    same = np.array(tokens) == np.array(reference)
    return float(same.argmin() if not same.all() else len(same)) / len(same)


def turn(running: Sequence[Running], ids: np.ndarray, index: int) -> None:
    """One round: each program once, another one first each time; the first round warms up."""
    prompt, start = np.roll(ids, index)[:PREFILL].tolist(), index % len(running)
    for one in (*running[start:], *running[:start]):
        one.round(prompt, keep=index > 0)


def prompt_ids(bundle: Path, manifest: Manifest) -> np.ndarray:
    """TEXT over and over: what follows is then so certain that rounding does not change the words."""
    ids = Tokenizer(bundle / manifest.tokenizer).encode(TEXT, special=False)
    return np.resize(ids, PREFILL + len(ids))
