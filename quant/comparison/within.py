"""Which weights within the decoder and the audio head lose what: groups of them swapped, along the reference's answers.

Each group is tried alone in the reference, and left out of the candidate. All choices of an answer are read in one run,
so that a group costs one prefill and not one step a choice. What one group loses depends on the others: the figures
need not add up.
"""

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Literal

import numpy as np
from numpy.typing import NDArray
from scipy import stats

from quant.answer import Taken
from quant.comparison.figures import TurnResult
from quant.comparison.metrics import Floats, kl_divergence
from quant.comparison.mixing import Mixer
from quant.comparison.record import empty_cache
from quant.observe import HEAD, Observed, forced, rewind
from quant.taps import Model, exposed, in_memory, load
from runtime.bundle import QuantizedWeight
from runtime.session import InMemory, Session

CHOICES = 24  # of each step of an answer
BLOCKS = 12  # of layers: as many groups at most
ROWS = 32  # choices whose divergence is computed at once, each as wide as the vocabulary
LAYER = re.compile(r"(?:^|\.)(\d+)(?=\.)")  # the first number in a weight's name


@dataclass(frozen=True)
class Loss:
    """KL divergence in nats a choice with one group of weights swapped."""

    graph: str
    group: str  # names with * for numbers of layers, or "layers 0 to 2"
    by: Literal["kind", "layer"]
    weights: tuple[str, ...]
    alone: float  # the reference with these weights of the candidate
    without: float  # the candidate with these weights of the reference
    error: float  # half the 95 % interval of what `without` wins back, over turns


@dataclass(frozen=True)
class Within:
    """`whole`: with everything that was tried of the candidate at once, measured in the same way."""

    whole: float
    choices: int
    losses: tuple[Loss, ...]


@dataclass(frozen=True, eq=False)
class Passage:
    """What was read before the choices [n] or [n, codebooks] of one step, and between them."""

    turn: int
    kind: str
    rows: NDArray[np.floating]  # [L, hidden]; the first choice comes after row `first`
    first: int
    chosen: NDArray[np.int64]


Groups = dict[Literal["kind", "layer"], dict[str, list[str]]]
Logits = list[list[NDArray[np.float32]]]  # by passage, and there by stream: [n, vocab]


def lost_within(reference: Observed | None, candidate: Observed, results: Sequence[TurnResult]) -> Within | None:
    """Try every group of weights on the reference's answers to a few turns; None where nothing can be swapped."""
    if reference is None:
        return None
    answered = [result for result in results if result.reference.steps]
    read = [passage for turn, result in enumerate(answered) for passage in passages(reference, result, turn)]
    trial = _Trial(reference, candidate, read)
    losses = tuple(trial.losses()) if read else ()
    if not losses:
        return None
    return Within(mean(trial.whole), len(trial.whole), losses)


def passages(engine: Observed, result: TurnResult, turn: int) -> Iterator[Passage]:
    """The steps of the reference's answer as rows that a decoder reads in one run."""
    context = engine.context()
    context.append(engine.prompt(result.turn))
    for step in result.reference.steps:
        rewind(context, step.inputs)
        first, chosen = len(context.tail) - 1, step.chosen[:CHOICES]
        for token, row in _pushed(engine, step):
            context.push(token, row)
        rows = np.stack(context.tail[: first + len(chosen)])
        yield Passage(turn, step.kind, rows, first, chosen)


def _pushed(engine: Observed, step: Taken) -> Iterator[tuple[int, NDArray[np.floating] | None]]:
    if step.kind == "text":
        yield from ((int(token), None) for token in step.chosen)
        return
    pad = engine.manifest.tokens.audio_pad
    assert pad is not None
    yield from ((pad, row) for row in engine.session("embed_audio").run(codes=step.chosen)["rows"])


class _Trial:
    """Runs decoders and heads of both, and mixed ones, on the same passages."""

    def __init__(self, reference: Observed, candidate: Observed, read: Sequence[Passage]):
        self.reference, self.candidate, self.read = reference, candidate, read
        self.heads = {name: reference.session(name) for name in self._heads()}
        self.their_heads = {name: candidate.session(name) for name in self._heads()}
        self.mixers = {graph: mixer for graph in ("decoder", *self.heads) if (mixer := self._mixer(graph))}

    def _heads(self) -> list[str]:
        kinds = {passage.kind for passage in self.read}
        return [name for kind, name in (("text", "lm_head"), ("audio", HEAD)) if kind in kinds]

    def losses(self) -> Iterator[Loss]:
        for graph, mixer in self.mixers.items():
            yield from self._losses(graph, mixer)

    @cached_property
    def whole(self) -> Floats:
        return self._divergence(self._logits(self._theirs, self.their_heads))

    @cached_property
    def _turns(self) -> NDArray[np.int64]:
        """The turn of each divergence, [choices]."""
        counts = [sum(map(len, streams)) for streams in self._wanted]
        return np.repeat([passage.turn for passage in self.read], counts)

    @cached_property
    def _ours(self) -> list[NDArray[np.floating]]:
        return self._hidden(self._session("decoder", self.reference))

    @cached_property
    def _theirs(self) -> list[NDArray[np.floating]]:
        """With the candidate's weights in the reference's decoder: what a smaller cache loses is no weight's fault."""
        mixer = self.mixers.get("decoder")
        if mixer is None:
            return self._ours
        every = [*mixer.differing(), *mixer.rescaled()]
        return self._hidden(self._session("decoder", self.reference, mixer.mixed(every)))

    @cached_property
    def _wanted(self) -> Logits:
        return self._logits(self._ours, self.heads)

    def _mixer(self, graph: str) -> Mixer | None:
        """None where the two are stored alike."""
        ours, theirs = (engine.manifest.graphs[graph] for engine in (self.reference, self.candidate))
        mixer = Mixer(load(self.reference.folder, ours), load(self.candidate.folder, theirs))
        return mixer if mixer.differing() else None

    def _stored(self, graph: str) -> dict[str, str]:
        """How the candidate stores each quantized weight of a graph."""
        quantization = self.candidate.manifest.quantization
        quantized = quantization.quantized if quantization else ()
        return {weight.name: stored_as(weight) for weight in quantized if weight.graph == graph}

    def _losses(self, graph: str, mixer: Mixer) -> Iterator[Loss]:
        differing, moved = mixer.differing(), mixer.rescaled()
        every = [*differing, *moved]
        # Where scales moved, a weight of one scale would meet an activation of another: then only layers are whole.
        tried: Groups = {"kind": {} if moved else by_kind(differing, self._stored(graph)), "layer": by_layers(every)}
        for by, groups in tried.items():
            for group, names in groups.items():
                left = [name for name in every if name not in set(names)]
                alone, without = self._alone(graph, mixer, names), self._left(graph, mixer, left)
                error = spread(self.whole - without, self._turns)
                yield Loss(graph, group, by, tuple(names), mean(alone), mean(without), error)

    def _alone(self, graph: str, mixer: Mixer, names: Sequence[str]) -> Floats:
        session = self._session(graph, self.reference, mixer.mixed(names))
        if graph == "decoder":
            return self._divergence(self._logits(self._hidden(session), self.heads))
        return self._divergence(self._logits(self._ours, {**self.heads, graph: session}))

    def _left(self, graph: str, mixer: Mixer, names: Sequence[str]) -> Floats:
        """Everything of the candidate, but of this graph only the weights `names`."""
        session = self._session(graph, self.reference, mixer.mixed(names))
        if graph == "decoder":
            return self._divergence(self._logits(self._hidden(session), self.their_heads))
        return self._divergence(self._logits(self._theirs, {**self.their_heads, graph: session}))

    def _session(self, name: str, engine: Observed, model: Model | None = None) -> Session:
        graph = engine.manifest.graphs[name]
        made = load(engine.folder, graph) if model is None else model
        shown = exposed(made, graph, engine.code_taps) if name == HEAD else in_memory(made, graph)
        return InMemory(*shown, engine.options)

    def _hidden(self, decoder: Session) -> list[NDArray[np.floating]]:
        """Hidden states [n, hidden] before each choice of each passage."""
        found = []
        for passage in self.read:
            cache = empty_cache(self.reference.manifest, len(passage.rows))
            hidden = decoder.run_for(["hidden"], {"inputs_embeds": passage.rows[None], **cache})["hidden"][0]
            found.append(hidden[passage.first :])
        return found

    def _logits(self, hidden: Sequence[NDArray[np.floating]], heads: dict[str, Session]) -> Logits:
        return [
            [heads["lm_head"].run(hidden=rows)["logits"]]
            if passage.kind == "text"
            else self._codes(passage, rows, heads)
            for passage, rows in zip(self.read, hidden, strict=True)
        ]

    def _codes(
        self, passage: Passage, hidden: NDArray[np.floating], heads: dict[str, Session]
    ) -> list[NDArray[np.float32]]:
        sizes, taps = self.reference.choices_of_code, self.reference.code_taps
        runs = [
            heads[HEAD].run_for(taps, {"hidden": row[None], **forced(codes, sum(sizes))})
            for row, codes in zip(hidden, passage.chosen, strict=True)
        ]
        return [
            np.array([run[tap].ravel()[:size] for run in runs], np.float32)
            for tap, size in zip(taps, sizes, strict=True)
        ]

    def _divergence(self, found: Logits) -> Floats:
        """KL at each choice of all passages, [choices]; NaN where logits are not finite."""
        ours, theirs = ([stream for streams in every for stream in streams] for every in (self._wanted, found))
        return np.concatenate([_kl(*pair) for pair in zip(ours, theirs, strict=True)])


def mean(kl: Floats) -> float:
    """Infinite where one is not finite, so that weights which break arithmetic come first."""
    return float(kl.mean()) if np.isfinite(kl).all() else float("inf")


def spread(gains: Floats, turns: NDArray[np.int64]) -> float:
    """Half the 95 % interval of a mean of paired differences [n] that were drawn turn by turn [n].

    Choices of one answer resemble each other, so that their deviations are summed by turn before they are squared
    (Liang and Zeger 1986), and few turns widen the interval as Student's t does. Infinite for a single turn.
    """
    clusters, places = np.unique(turns, return_inverse=True)
    if len(clusters) < 2:
        return float("inf")
    sums = np.bincount(places, gains - gains.mean())
    error = np.sqrt(np.square(sums).sum() * len(clusters) / (len(clusters) - 1)) / len(gains)
    return float(stats.t.ppf(0.975, len(clusters) - 1) * error)


def _kl(ours: NDArray[np.float32], theirs: NDArray[np.float32]) -> Floats:
    with np.errstate(invalid="ignore"):
        parts = [kl_divergence(ours[at : at + ROWS], theirs[at : at + ROWS]) for at in range(0, len(ours), ROWS)]
    return np.concatenate(parts)


def stored_as(weight: QuantizedWeight) -> str:
    return f"int{weight.bits} by {weight.group_size}, {weight.method}"


def by_kind(names: Sequence[str], stored: Mapping[str, str]) -> dict[str, list[str]]:
    """Names alike but for their numbers, under the pattern that matches them; apart where they are stored unlike."""
    kinds: dict[str, dict[str, list[str]]] = {}
    for name in names:
        kinds.setdefault(kind_of(name), {}).setdefault(stored.get(name, ""), []).append(name)
    return {
        kind if len(ways) == 1 else f"{kind} ({way})": found
        for kind, ways in kinds.items()
        for way, found in ways.items()
    }


def kind_of(name: str) -> str:
    """The pattern that a name shares with those alike but for their numbers."""
    return re.sub(r"(?<=\.)\d+(?=\.)", "*", name)


def by_layers(names: Sequence[str]) -> dict[str, list[str]]:
    """Names by the first number in them: first and last layer for themselves, those between in BLOCKS - 2 blocks."""
    layers: dict[int, list[str]] = {}
    for name in names:
        if found := LAYER.search(name):
            layers.setdefault(int(found[1]), []).append(name)
    order = sorted(layers)
    if len(order) < 2:
        return {}
    inner = order[1:-1]
    blocks = [order[:1], *(list(b) for b in np.array_split(inner, min(BLOCKS - 2, len(inner)) or 1)), order[-1:]]
    return {_called(block): [name for layer in block for name in layers[layer]] for block in blocks if len(block)}


def _called(block: Sequence[int]) -> str:
    return f"layer {block[0]}" if len(block) == 1 else f"layers {block[0]} to {block[-1]}"
