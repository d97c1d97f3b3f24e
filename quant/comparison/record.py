"""What a reference bundle answers to turns, how sure it was of each choice, and what its graphs gave on the way."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Protocol

import numpy as np
from numpy.typing import NDArray
from pydantic import ConfigDict
from pydantic.dataclasses import dataclass as checked_dataclass

from quant.answer import Answer, Taken
from quant.comparison.layers import layer_rows
from quant.comparison.memory import Memory
from quant.comparison.metrics import Top, log_softmax, top
from quant.limits import Limits
from quant.observe import HEAD, KEPT, Feeds, Observed
from quant.turn import Turn
from runtime.bundle import MANIFEST, Manifest, sha256_of
from runtime.prompt import Prompt

STRICT = ConfigDict(extra="forbid")


@checked_dataclass(frozen=True, config=STRICT)
class GraphCost:
    """What one component weighs."""

    name: str
    precision: str
    parameters: int
    weight_bytes: int


@checked_dataclass(frozen=True, config=STRICT)
class Side:
    """Which bundle it is and what it weighs."""

    path: str
    family: str
    source: str
    random: bool
    manifest_sha256: str
    tokenizer_sha256: str
    recipe: str
    weight_bytes: int
    graphs: tuple[GraphCost, ...]


def side(folder: Path, manifest: Manifest) -> Side:
    tokenizer = next(file.sha256 for file in manifest.files if file.path == manifest.tokenizer)
    graphs = (GraphCost(name, g.precision, g.parameters, g.weight_bytes) for name, g in manifest.graphs.items())
    return Side(
        path=str(folder),
        family=manifest.family,
        source=manifest.source.name,
        random=manifest.source.random,
        manifest_sha256=sha256_of(folder / MANIFEST),
        tokenizer_sha256=tokenizer,
        recipe=manifest.quantization.recipe if manifest.quantization else "",
        weight_bytes=manifest.weight_bytes,
        graphs=tuple(graphs),
    )


@checked_dataclass(frozen=True, config=STRICT)
class Machine:
    """What every figure was measured with."""

    cpu: str
    onnxruntime: str
    python: str
    threads: int  # 0: as many as there are cores
    turns_sha256: str  # "" where a stored reference brought them and does not say it


@dataclass(frozen=True, eq=False)
class Seen:
    """n choices from one vocabulary or codebook: their distributions, and the log-probability of what was taken."""

    top: Top
    taken: NDArray[np.float64]  # [n]


@dataclass(frozen=True, eq=False)
class Recorded:
    """The reference's answer to one turn; `seen` has, for each of its steps, one entry a stream of choices."""

    answer: Answer
    seen: tuple[tuple[Seen, ...], ...]
    heard: NDArray[np.int64]  # [L, codebooks]: codes of the audio in the prompt
    prompt_positions: int
    prefill: float  # seconds
    token_seconds: tuple[float, ...]


@dataclass(frozen=True, eq=False)
class Sample:
    """One run of one graph; in the first of each graph, also rows of what left each of its layers."""

    graph: str
    feeds: Feeds
    outputs: Feeds
    layers: Feeds = field(default_factory=dict)


Fed = dict[str, list[tuple[int, int, Feeds]]]  # by graph: turn, run, and what it was given in it


class Reference(Protocol):
    """What a candidate is compared with."""

    side: Side
    limits: Limits
    turns: tuple[Turn, ...]
    engine: Observed | None  # None where only its record is here
    machine: Machine | None  # where a record was made; None: where it is compared
    memory: Memory | None  # None where it was not measured

    def recorded(self, index: int) -> Recorded: ...

    def samples(self) -> list[Sample]: ...


class Live:
    """A reference bundle that is asked now; `k` None keeps its distributions whole."""

    machine: Machine | None = None

    def __init__(self, engine: Observed, turns: Sequence[Turn], k: int | None = None, memory: Memory | None = None):
        self.engine: Observed | None = engine
        self.turns, self.k, self.limits = tuple(turns), k, engine.limits
        self.side = side(engine.folder, engine.whole)
        self._asked, self.memory = engine, memory
        self.fed: Fed = {}

    def recorded(self, index: int) -> Recorded:
        turn = self.turns[index]
        self._asked.forget()
        prompt, answer = self._asked.ask(turn)
        found = record_turn(self._asked, prompt, answer, self.k)
        self.merge({name: [(index, run, fed) for run, fed in enumerate(k)] for name, k in self._asked.kept().items()})
        return found

    def merge(self, fed: Fed) -> None:
        """Add what graphs were given in other turns, of which the first few are kept."""
        for name, runs in fed.items():
            self.fed[name] = sorted([*self.fed.get(name, []), *runs], key=lambda run: run[:2])[:KEPT]

    def samples(self) -> list[Sample]:
        """First runs of each graph in the turns so far; the decoder's is the first turn's prompt, on an empty cache."""
        engine = self._asked
        rows = engine.context().embed(engine.prompt(self.turns[0]))
        feeds = [(name, feed) for name in sorted(self.fed) for _, _, feed in self.fed[name]]
        feeds.append(("decoder", {"inputs_embeds": rows[None]}))
        seen: set[str] = set()
        return [sample(engine, name, feed, name not in seen and not seen.add(name)) for name, feed in feeds]


def sample(engine: Observed, name: str, feeds: Feeds, with_layers: bool) -> Sample:
    """Run a graph again. An audio head is told to take its own codes, so that another one's later depths compare."""
    outputs = run_sample(engine, name, feeds)
    if name == HEAD:
        feeds = {**feeds, "forced": outputs["codes"]}
    return Sample(name, feeds, outputs, layer_rows(engine, name, all_feeds(engine, name, feeds)) if with_layers else {})


def record_turn(engine: Observed, prompt: Prompt, answer: Answer, k: int | None) -> Recorded:
    """Follow the engine's own answer, which says how sure it was of each choice."""
    followed = engine.follow(prompt, answer.steps)
    seen = [
        tuple(seen_at(logits, chosen, k) for logits, chosen in zip(streams, choices(step), strict=True))
        for streams, step in zip(followed.logits, answer.steps, strict=True)
    ]
    return Recorded(
        answer, tuple(seen), prompt.codes, followed.prompt_positions, followed.prefill, followed.token_seconds
    )


def choices(step: Taken) -> list[NDArray[np.int64]]:
    """What was taken from each stream: [n] ids, or [n] codes for each codebook."""
    return [step.chosen] if step.kind == "text" else list(step.chosen.T)


def seen_at(logits: NDArray[np.float32], chosen: NDArray[np.int64], k: int | None) -> Seen:
    return Seen(top(logits, logits.shape[-1] if k is None else k), log_of(logits, chosen))


def log_of(logits: NDArray[np.float32], chosen: NDArray[np.int64]) -> NDArray[np.float64]:
    """Log-probabilities [n] of what was chosen [n] from logits [n, vocab]; -inf for a choice that they do not offer."""
    known = chosen < logits.shape[-1]
    found = np.take_along_axis(log_softmax(logits), np.where(known, chosen, 0)[:, None], axis=-1)[:, 0]
    return np.where(known, found, -np.inf)


def run_sample(engine: Observed, name: str, feeds: Feeds) -> Feeds:
    return engine.session(name).run(**all_feeds(engine, name, feeds))


def all_feeds(engine: Observed, name: str, feeds: Feeds) -> Feeds:
    """A sample's inputs; the decoder is given an empty cache besides."""
    if name != "decoder":
        return feeds
    return {**feeds, **empty_cache(engine.manifest, feeds["inputs_embeds"].shape[1])}


def empty_cache(manifest: Manifest, positions: int) -> Feeds:
    cache = manifest.cache
    empty = np.zeros((1, cache.kv_heads, positions, cache.head_dim), cache.dtype)
    names = [f"past.{layer}.{kind}" for layer in range(cache.layers) for kind in ("key", "value")]
    return {
        **dict.fromkeys(names, empty),
        "seqlens_k": np.array([positions - 1], np.int32),
        "total_sequence_length": np.array(positions, np.int32),
    }
