"""Two bundles, the same turns: graph by graph, choice by choice, answer by answer, and which graph lost it."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np

from quant.defects import log_mel_distance
from quant.figures import (
    Figure,
    Stretch,
    TurnResult,
    answer_figures,
    code_figures,
    cost_figures,
    heard_figures,
    joined,
    known,
    speech_figures,
    text_figures,
)
from quant.gates import Gate, Judged, judge
from quant.metrics import agreement, cosine, kl_from_top, max_abs, non_finite, sqnr
from quant.observe import Followed, Observed, Taken
from quant.record import Recorded, Reference, Sample, Seen, Side, choices, log_of, run_sample, side
from runtime.errors import EdgeOmniError

SWAP_TURNS = 8
MARGIN = 0.02
Progress = Callable[[str], None]


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
class Swap:
    """The reference with one graph of the candidate in its place; None where nothing of that kind was measured."""

    graph: str
    text_kl: float | None
    codes_kl: float | None
    log_mel: float | None

    @property
    def weight(self) -> tuple[float, float]:
        """By what swaps are ordered: distributions first, sound among those that leave them alone."""
        return max(self.text_kl or 0.0, self.codes_kl or 0.0), self.log_mel or 0.0


@dataclass(frozen=True)
class Machine:
    """What every figure was measured with."""

    cpu: str
    onnxruntime: str
    python: str
    threads: int  # 0: as many as there are cores
    turns_sha256: str  # "" where a stored reference brought them


@dataclass(frozen=True, eq=False)
class Comparison:
    """All that was found; `swaps` is empty where the reference is a record or nothing differs."""

    reference: Side
    candidate: Side
    machine: Machine
    stored: bool
    seed: int
    margin: float
    results: tuple[TurnResult, ...]
    figures: tuple[Figure, ...]
    tensors: tuple[TensorError, ...]
    swaps: tuple[Swap, ...]
    gates: tuple[Judged, ...]

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
) -> Comparison:
    """Measure what `candidate` loses against `reference` on the reference's turns.

    Both follow the reference's answers; what was heard and seen goes through each one's own encoders. `swap_turns`
    is how many turns each graph is swapped for. EdgeOmniError where the two are of different families or tokenizers.
    """
    ours, theirs = reference.side, side(candidate.folder, candidate.whole)
    refuse_unlike(ours, theirs)
    swapped = swaps_of(reference.engine, candidate) if swap_turns else {}
    results, gathered = [], {name: ([], []) for name in swapped}
    for index in range(len(reference.turns)):
        progress(f"turn {index + 1} of {len(reference.turns)}")
        recorded = reference.recorded(index)
        results.append(one_turn(candidate, reference, index, recorded))
        if index < swap_turns:
            for name, engine in swapped.items():
                if reference.engine is None or name not in reference.engine.opened():
                    continue  # this graph has no part in the turn
                progress(f"turn {index + 1} with the candidate's {name}")
                stretches, distance = one_swap(engine, reference, index, recorded, name)
                gathered[name][0].append(stretches)
                gathered[name][1].extend(distance)
    tensors = tuple(tensor_errors(reference.samples(), candidate))
    figures = tuple(all_figures(ours, theirs, results, tensors, reference.limits.seed))
    swaps = sorted(
        (summed(name, *found) for name, found in gathered.items() if found[0]), key=lambda s: s.weight, reverse=True
    )
    return Comparison(
        reference=ours,
        candidate=theirs,
        machine=machine,
        stored=reference.engine is None,
        seed=reference.limits.seed,
        margin=margin,
        results=tuple(results),
        figures=figures,
        tensors=tensors,
        swaps=tuple(swaps),
        gates=judge(gates, figures),
    )


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


def one_turn(candidate: Observed, reference: Reference, index: int, recorded: Recorded) -> TurnResult:
    """The candidate along the reference's answer, and then by itself."""
    turn, speech = reference.turns[index], candidate.manifest.speech
    prompt = candidate.prompt(turn)
    followed = candidate.follow(prompt, recorded.answer.steps)
    steps = stretches_of(recorded, followed)
    answer = candidate.answer(prompt, turn.spoken)
    audible = turn.spoken and any(step.kind == "audio" for step in recorded.answer.steps)
    return TurnResult(
        turn=turn,
        reference=recorded.answer,
        candidate=answer,
        stretches=by_name(steps),
        frames=same_frames(steps),
        heard=agreement(recorded.heard, prompt.codes) if len(recorded.heard) else np.empty(0),
        same_wave=candidate.sound(recorded.answer.steps) if audible else np.empty(0, np.float32),
        prefill=(recorded.prefill / recorded.prompt_positions, followed.prefill / followed.prompt_positions),
        decode=(_median(recorded.token_seconds), _median(followed.token_seconds)),
        rate=speech.sampling_rate if audible and speech else 0,
    )


def _median(seconds: Sequence[float]) -> float:
    return float(np.median(seconds)) if seconds else 0.0


def stretches_of(recorded: Recorded, followed: Followed) -> list[dict[str, Stretch]]:
    """The choices of each step by what was chosen from: "text", or "code0" and so on for each codebook."""
    found = []
    for step, seen, logits in zip(recorded.answer.steps, recorded.seen, followed.logits, strict=True):
        names = ["text"] if step.kind == "text" else [f"code{book}" for book in range(len(seen))]
        ended = step.kind == "audio" and ends_audio(step, logits[0])
        found.append(
            {
                name: stretch(ours, theirs, taken, len(taken) - (ended and name != "code0"))
                for name, ours, theirs, taken in zip(names, seen, logits, choices(step), strict=True)
            }
        )
    return found


def by_name(steps: Sequence[dict[str, Stretch]]) -> dict[str, Stretch]:
    names = dict.fromkeys(name for step in steps for name in step)
    return {name: joined(step[name] for step in steps if name in step) for name in names}


def same_frames(steps: Sequence[dict[str, Stretch]]) -> np.ndarray:
    """Of each audio frame [frames] but one that ends audio, whether all its codes have the same likeliest one."""
    found = [np.empty(0, np.bool_)]
    for streams in ([s.same for s in step.values()] for step in steps if "text" not in step):
        frames = min(map(len, streams))
        found.append(np.all([same[:frames] for same in streams], axis=0))
    return np.concatenate(found)


def ends_audio(step: Taken, first_logits: np.ndarray) -> bool:
    """Whether the last frame holds the code that ends audio: then its other codes mean nothing."""
    return len(step.chosen) > 0 and int(step.chosen[-1, 0]) == first_logits.shape[-1] - 1


def stretch(ours: Seen, theirs: np.ndarray, taken: np.ndarray, count: int) -> Stretch:
    """The first `count` choices from logits [n, vocab]; KL is NaN where one of them is not finite."""
    kept = slice(0, count)
    with np.errstate(invalid="ignore"):
        same = ours.top.ids[:, 0] == theirs.argmax(axis=-1)
        kl = np.where(np.isfinite(theirs).all(axis=-1), kl_from_top(ours.top, theirs), np.nan)
        return Stretch(kl[kept], (same & np.isfinite(kl))[kept], ours.taken[kept], log_of(theirs, taken)[kept])


# Attribution


def swaps_of(reference: Observed | None, candidate: Observed) -> dict[str, Observed]:
    """The reference with each graph of the candidate that differs and has the same ports, by the graph's name."""
    if reference is None:
        return {}
    ours, theirs = ({file.path: file.sha256 for file in engine.whole.files} for engine in (reference, candidate))
    found = {}
    for name, graph in candidate.manifest.graphs.items():
        other = reference.manifest.graphs.get(name)
        if other is None or (graph.inputs, graph.outputs) != (other.inputs, other.outputs):
            continue
        if {theirs[path] for path in (graph.file, *graph.weights)} != {ours[p] for p in (other.file, *other.weights)}:
            found[name] = reference.with_graphs(candidate, [name])
    return found


def one_swap(
    engine: Observed, reference: Reference, index: int, recorded: Recorded, name: str
) -> tuple[dict[str, Stretch], list[float]]:
    """Distributions along the reference's answer, and the log-mel distance of its codes made audible."""
    turn, speech = reference.turns[index], engine.manifest.speech
    stretches = by_name(stretches_of(recorded, engine.follow(engine.prompt(turn), recorded.answer.steps)))
    if speech is None or not len(recorded.answer.wave):
        return stretches, []
    return stretches, [
        log_mel_distance(recorded.answer.wave, engine.sound(recorded.answer.steps), speech.sampling_rate)
    ]


def summed(name: str, turns: Sequence[dict[str, Stretch]], distances: Sequence[float]) -> Swap:
    text = [s.kl for turn in turns for stream, s in turn.items() if stream == "text"]
    codes = [s.kl for turn in turns for stream, s in turn.items() if stream != "text"]
    return Swap(name, _mean(text), _mean(codes), float(np.mean(distances)) if distances else None)


def _mean(parts: Sequence[np.ndarray]) -> float | None:
    """Mean of all values; infinite if one is NaN, so that a graph which breaks arithmetic comes first."""
    every = np.concatenate([np.empty(0), *parts])
    if not len(every):
        return None
    return float(every.mean()) if np.isfinite(every).all() else float("inf")


# Graph by graph


def tensor_errors(samples: Sequence[Sample], candidate: Observed) -> list[TensorError]:
    """Each graph on the inputs that the reference gave it, worst first: non-finite ones, then by SQNR."""
    worst: dict[tuple[str, str], TensorError] = {}
    for sample in samples:
        if sample.graph not in candidate.manifest.graphs:
            continue
        found = run_sample(candidate, sample.graph, sample.feeds)
        for output, wanted in sample.outputs.items():
            if output in found and found[output].shape == wanted.shape and wanted.size:
                error = tensor_error(sample.graph, output, wanted, found[output])
                key = (sample.graph, output)
                worst[key] = min(worst.get(key, error), error, key=_badness)
    return sorted(worst.values(), key=_badness)


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
    yield from text_figures(results, seed)
    yield from code_figures(results, seed)
    yield from heard_figures(results)
    yield from speech_figures(results, seed)
    floats = [error for error in tensors if error.same is None]
    if floats:
        yield known("graphs.worst_sqnr", min(error.sqnr for error in floats), len(floats))
        yield known("graphs.non_finite", sum(error.non_finite for error in floats), len(floats))
    yield from cost_figures(ours, theirs, results, seed)
