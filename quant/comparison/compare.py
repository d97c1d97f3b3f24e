"""Two bundles, the same turns: graph by graph, choice by choice, answer by answer, and which graph lost it."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

import numpy as np

from quant.comparison.advice import Advice, Governing, advice, governing
from quant.comparison.attribution import Swap, summed
from quant.comparison.cost import Cost, cost, cost_figures
from quant.comparison.each_turn import Pair, Progress, Spread, serially
from quant.comparison.figures import (
    Figure,
    TurnResult,
    answer_figures,
    code_figures,
    heard_figures,
    known,
    text_figures,
    time_figures,
    weight_figures,
)
from quant.comparison.gates import Gate, Judged, judge
from quant.comparison.layers import layer_rows
from quant.comparison.memory import Memory
from quant.comparison.metrics import cosine, max_abs, non_finite, sqnr
from quant.comparison.pareto import Tried
from quant.comparison.recognise import Recogniser
from quant.comparison.record import Machine, Reference, Sample, Side, all_feeds, run_sample, side
from quant.comparison.speech_figures import speech_figures
from quant.comparison.spoken import heard
from quant.comparison.task_figures import task_figures
from quant.comparison.within import Within, lost_within
from quant.limits import Limits
from quant.observe import Observed
from runtime.errors import EdgeOmniError

SWAP_TURNS = 8
MARGIN = 0.02


@dataclass(frozen=True)
class TensorError:
    """One output of one graph on the reference's own inputs, the worst of its runs; `same` for outputs of integers."""

    graph: str
    output: str
    max_abs: float
    cosine: float
    sqnr: float
    non_finite: int
    same: float | None = None


@dataclass(frozen=True)
class LayerError:
    """What left one layer of a graph, on the reference's own inputs; `place` counts the layers of the graph from 0."""

    graph: str
    layer: str
    place: int
    max_abs: float
    cosine: float
    sqnr: float
    non_finite: int


@dataclass(frozen=True, eq=False)
class Comparison:
    """All that was found; `swaps` is empty where the reference is a record or nothing differs."""

    reference: Side
    candidate: Side
    machine: Machine
    stored: bool
    limits: Limits
    margin: float
    results: tuple[TurnResult, ...]
    figures: tuple[Figure, ...]
    tensors: tuple[TensorError, ...]
    layers: tuple[LayerError, ...]
    swaps: tuple[Swap, ...]
    within: Within | None
    governing: tuple[Governing, ...]
    advice: tuple[Advice, ...]
    gates: tuple[Judged, ...]
    costs: tuple[Cost, Cost]
    recogniser: str  # "" where none was asked
    tried: tuple[Tried, ...] = ()  # this candidate and those of earlier reports, where some were given

    @property
    def seed(self) -> int:
        return self.limits.seed

    @property
    def passed(self) -> bool:
        return all(gate.passed for gate in self.gates)

    def figure(self, name: str) -> Figure | None:
        return next((figure for figure in self.figures if figure.name == name), None)


def compare(
    reference: Reference,
    candidate: Observed,
    machine: Machine,
    gates: Sequence[Gate] = (),
    swap_turns: int = SWAP_TURNS,
    margin: float = MARGIN,
    progress: Progress = lambda text: None,
    spread: Spread = serially,
    recogniser: Recogniser | None = None,
    memory: Memory | None = None,
) -> Comparison:
    """Measure what `candidate` loses against `reference` on the reference's turns.

    Both follow the reference's answers; what was heard and seen goes through each one's own encoders. `swap_turns`
    is how many turns each graph is swapped for, `spread` who does the turns, `recogniser` who listens to the speech,
    `memory` what the candidate takes. EdgeOmniError where the two are of different families or tokenizers.
    """
    ours, theirs = reference.side, side(candidate.folder, candidate.whole)
    refuse_unlike(ours, theirs)
    pair = Pair(reference, candidate, swap_turns)
    works = [*spread(pair, progress)]
    results = [listened(work.result, recogniser, progress) for work in works]
    progress("groups of weights")
    within = lost_within(reference.engine, candidate, [results[index] for index in pair.swapped_turns])
    samples = reference.samples()
    tensors = tuple(tensor_errors(samples, candidate))
    figures = [*all_figures(ours, theirs, results, tensors, reference.limits.seed)]
    if reference.engine is not None:
        figures += time_figures(results, reference.limits.seed)
    figures += cost_figures(results, memory, reference.limits.seed)
    return Comparison(
        reference=ours,
        candidate=theirs,
        machine=machine,
        stored=reference.engine is None,
        limits=reference.limits,
        margin=margin,
        results=tuple(results),
        figures=tuple(figures),
        tensors=tensors,
        layers=tuple(layer_errors(samples, candidate)),
        swaps=summed([work.swaps for work in works]),
        within=within,
        governing=governing(within, candidate.manifest.quantization),
        advice=advice(within, candidate.manifest),
        gates=judge(gates, figures),
        costs=(
            cost([result.reference for result in results], reference.machine or machine, reference.memory),
            cost([result.candidate for result in results], machine, memory),
        ),
        recogniser=recogniser.name if recogniser else "",
    )


def listened(result: TurnResult, recogniser: Recogniser | None, progress: Progress) -> TurnResult:
    """The result with what is heard in it, if it is spoken and someone listens."""
    if recogniser is None or not result.rate or not len(result.reference.wave):
        return result
    progress(f"listening to {result.turn.text}")
    return replace(result, recognised=heard(recogniser, result.reference, result.candidate, result.rate))


def refuse_unlike(ours: Side, theirs: Side) -> None:
    """EdgeOmniError that says everything for which the two cannot be compared."""
    problems = []
    if ours.family != theirs.family:
        problems.append(f"  the reference is of the family {ours.family}, the candidate of {theirs.family}")
    if ours.tokenizer_sha256 != theirs.tokenizer_sha256:
        problems.append(
            f"  the reference's tokenizer is {ours.tokenizer_sha256[:12]}…, the candidate's "
            f"{theirs.tokenizer_sha256[:12]}…: their ids mean different things"
        )
    if problems:
        lines = "\n".join(problems)
        raise EdgeOmniError(
            f"{ours.path} and {theirs.path} cannot be compared:\n{lines}\ncompare bundles of one checkpoint"
        )


def tensor_errors(samples: Sequence[Sample], candidate: Observed) -> list[TensorError]:
    """Each graph on the inputs that the reference gave it, worst first: non-finite ones, then by SQNR."""
    worst: dict[tuple[str, str], TensorError] = {}
    for sample in samples:
        if sample.graph not in candidate.manifest.graphs:
            continue
        found = run_sample(candidate, sample.graph, sample.feeds)
        for output, wanted in sample.outputs.items():
            if output in found and comparable(wanted, found[output]):
                error = tensor_error(sample.graph, output, wanted, found[output])
                key = (sample.graph, output)
                worst[key] = min(worst.get(key, error), error, key=_badness)
    return sorted(worst.values(), key=_badness)


def comparable(ref: np.ndarray, cand: np.ndarray) -> bool:
    """Whether the two mean the same kind of thing: not floats here and, in a cache of 8 bits, codes there."""
    return bool(ref.size) and ref.shape == cand.shape and (ref.dtype.kind == "f") == (cand.dtype.kind == "f")


def layer_errors(samples: Sequence[Sample], candidate: Observed) -> Iterator[LayerError]:
    """Every layer in its order; those that one of the two lacks left out."""
    for sample in samples:
        if not sample.layers or sample.graph not in candidate.manifest.graphs:
            continue
        found = layer_rows(candidate, sample.graph, all_feeds(candidate, sample.graph, sample.feeds))
        for place, (layer, wanted) in enumerate(sample.layers.items()):
            if layer in found and found[layer].shape == wanted.shape:
                e = tensor_error(sample.graph, layer, wanted, found[layer])
                yield LayerError(e.graph, layer, place, e.max_abs, e.cosine, e.sqnr, e.non_finite)


def tensor_error(graph: str, output: str, ref: np.ndarray, cand: np.ndarray) -> TensorError:
    same = float(np.mean(ref == cand)) if ref.dtype.kind in "biu" else None
    broken = non_finite(cand)
    if broken:
        return TensorError(graph, output, float("inf"), 0.0, float("-inf"), broken, same)
    return TensorError(graph, output, max_abs(ref, cand), cosine(ref, cand), sqnr(ref, cand), 0, same)


def _badness(error: TensorError) -> tuple[int, float]:
    return -error.non_finite, error.sqnr


def all_figures(
    ours: Side, theirs: Side, results: Sequence[TurnResult], tensors: Sequence[TensorError], seed: int
) -> Iterator[Figure]:
    yield from answer_figures(results, seed)
    yield from task_figures(results, seed)
    yield from text_figures(results, seed)
    yield from code_figures(results, seed)
    yield from heard_figures(results)
    yield from speech_figures(results, seed)
    floats = [error for error in tensors if error.same is None]
    if floats:
        yield known("graphs.worst_sqnr", min(error.sqnr for error in floats), len(floats))
        yield known("graphs.non_finite", sum(error.non_finite for error in floats), len(floats))
    yield from weight_figures(ours, theirs)
