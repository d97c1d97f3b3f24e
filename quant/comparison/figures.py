"""The figures of a comparison, each with its 95 % interval over turns where turns are a sample: what gates may name."""

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import cached_property

import numpy as np
from numpy.typing import NDArray

from quant.answer import Answer
from quant.comparison.defects import degeneracies, lapses
from quant.comparison.metrics import (
    paired_interval,
    proportion_interval,
    ratio_of_sums,
)
from quant.comparison.record import GraphCost, Side
from quant.comparison.score import Score, score
from quant.comparison.spoken import Heard, Spoken, spoken
from quant.comparison.stretch import Stretch, joined
from quant.comparison.wer import word_errors
from quant.turn import Turn

Floats = NDArray[np.float64]

# name (or pattern: one figure a codebook) -> what it means
KNOWN = {
    "text.kl": "KL divergence from the reference, nats a token",
    "text.kl_p95": "95th percentile of it over all positions",
    "text.top1": "share of positions with the same likeliest token",
    "text.rms_delta_p": "RMS change of the probability of the reference's token",
    "text.perplexity_ratio": "perplexity of the reference's answers, candidate over reference",
    "text.non_finite": "positions whose logits are not finite",
    "codes.kl": "KL divergence, nats a code, all codebooks",
    "codes.top1": "share of codes with the same likeliest one, all codebooks",
    "codes.frames": "share of frames whose likeliest codes are the same in every codebook",
    "codes.non_finite": "codes whose logits are not finite",
    "code*.kl": "KL divergence in one codebook, counted from 0",
    "code*.top1": "share of frames with the same likeliest code in one codebook",
    "heard*": "share of codes of the heard audio that are the same in one codebook",
    "answers.exact": "share of free-running answers that are the same, token for token and code for code",
    "answers.wer": "word error rate of the candidate's free-running text against the reference's",
    "answers.degenerate_added": "answers that are degenerate, less those of the reference",
    "answers.accuracy_reference": "share of right answers of the reference",
    "answers.accuracy": "share of right answers of the candidate",
    "answers.accuracy_loss": "share of right answers that was lost",
    "answers.mcnemar_p": "p-value of the exact McNemar test",
    "answers.detectable_loss": "smallest loss that so many turns show in 4 of 5 cases",
    "suite.*.accuracy_reference": "share of right answers of the reference in one data set",
    "suite.*.accuracy": "share of right answers of the candidate in one data set",
    "suite.*.accuracy_loss": "share of right answers that was lost in one data set",
    "suite.*.mcnemar_p": "p-value of the exact McNemar test in one data set",
    "suite.*.detectable_loss": "smallest loss that so many items of a data set show in 4 of 5 cases",
    "suite.*.right_option_reference": "mean probability of the right option among all, reference",
    "suite.*.right_option": "mean probability of the right option among all, candidate",
    "suite.*.right_option_loss": "mean probability of the right option that was lost",
    "suite.*.error_rate_reference": "word or character error rate of the reference's transcriptions",
    "suite.*.error_rate": "word or character error rate of the candidate's transcriptions",
    "suite.*.error_rate_added": "error rate of the candidate's transcriptions, less that of the reference's",
    "suite.*.detectable_errors": "smallest rise of the error rate that so many items show in 4 of 5 cases",
    "answers.truncated_added": "share of answers that a limit ended, less that of the reference",
    "answers.repetition_added": "share of a text's runs of 4 tokens that were there before, less that of the reference",
    "speech.wer_reference": "word errors (Chinese: character errors) of what is heard in the reference's speech",
    "speech.wer": "word errors (Chinese: character errors) of what is heard in the candidate's speech",
    "speech.wer_added": "word errors heard in the candidate's speech, less those in the reference's",
    "speech.duration_ratio": "length of the free-running speech, candidate over reference",
    "speech.silence_added": "share of silent frames, less that of the reference",
    "speech.repetition_added": "share of runs of 4 frames that were there before, less that of the reference",
    "speech.cut_added": "share of answers with a piece of speech that a limit ended, less that of the reference",
    "speech.clicks_added": "clicks in a minute of speech, less those of the reference",
    "speech.log_spectral": "log-spectral distance of the reference's own codes made audible by both, dB",
    "speech.log_mel": "log-mel distance of the reference's own codes made audible by both, dB",
    "speech.f0_cents": "RMS pitch error of them where both have a pitch, cents",
    "speech.voicing": "share of their frames that have a pitch in one of the two only",
    "speech.streamed": "largest difference of the candidate's speech made piece by piece and at once, full scale 1",
    "graphs.worst_sqnr": "lowest signal to quantization noise of any graph's output, dB",
    "graphs.non_finite": "values of graphs' outputs that are not finite",
    "cost.bytes_ratio": "bytes of weights, candidate over reference",
    "cost.bits_per_weight": "bits that a weight of the candidate takes, scales and zeros included",
    "cost.first_token_p50": "seconds from the question to the first token of the candidate, median turn",
    "cost.first_token_p95": "the same, 95th percentile of turns",
    "cost.first_audio_p50": "seconds from the question to the first sound of the candidate, median turn",
    "cost.first_audio_p95": "the same, 95th percentile of turns",
    "cost.real_time_factor_p50": "seconds that the candidate takes for one of speech, median turn",
    "cost.real_time_factor_p95": "the same, 95th percentile of turns",
    "cost.tokens_per_second_p50": "text tokens a second of the candidate, median turn",
    "cost.tokens_per_second_p95": "the same, what 95 of 100 turns reach",
    "cost.peak_memory": "bytes at most of a process in which the candidate answers, mapped weights included",
    "cost.private_memory": "bytes of it that are its own and no file's",
    "cost.prefill_ratio": "seconds to read a prompt position, candidate over reference",
    "cost.decode_ratio": "seconds a text token, candidate over reference",
}


@dataclass(frozen=True)
class Figure:
    """A number, its 95 % interval if it has one, and how many positions, turns or values it stands on."""

    name: str
    meaning: str
    value: float
    count: int
    low: float | None = None
    high: float | None = None


@dataclass(frozen=True, eq=False)
class TurnResult:
    """One turn, answered by both."""

    turn: Turn
    reference: Answer
    candidate: Answer
    stretches: dict[str, Stretch]  # "text", "code0", "code1", ...
    frames: NDArray[np.bool_]  # of each audio frame, whether all its likeliest codes are the same
    heard: Floats  # share of equal codes of the heard audio, by codebook
    same_wave: NDArray[np.float32]  # the reference's codes, made audible by the candidate
    prefill: tuple[float, float]  # seconds a prompt position, reference and candidate
    decode: tuple[float, float]  # seconds a token, median
    rate: int = 0  # samples a second of the waves; 0 for an answer in text
    streamed: float = math.nan  # largest difference of the candidate's speech made piece by piece and at once
    recognised: Heard | None = None  # what a recogniser heard, if one was asked
    defects: tuple[tuple[str, ...], tuple[str, ...]] = field(init=False)
    scores: tuple[Score, Score] | None = field(init=False)

    def __post_init__(self) -> None:
        ours, theirs = (degeneracies(answer, self.turn.spoken) for answer in (self.reference, self.candidate))
        finite = self.candidate.failure or all(s.finite.all() for s in self.stretches.values())
        broken = () if finite else ("scores are not finite",)
        beside = lapses(self.turn.text, self.reference, self.candidate)
        object.__setattr__(self, "defects", (ours, (*theirs, *broken, *beside)))
        object.__setattr__(self, "scores", _scored(self.turn, self.reference, self.candidate))

    @cached_property
    def speech(self) -> Spoken | None:
        """The numbers of what is heard; None where the reference says nothing aloud."""
        if not self.rate or not len(self.reference.wave):
            return None
        return spoken(self.reference, self.candidate, self.same_wave, self.rate, self.streamed)

    @property
    def exact(self) -> bool:
        return (self.reference.ids, self.reference.codes) == (self.candidate.ids, self.candidate.codes)

    @property
    def right(self) -> tuple[bool, bool] | None:
        """Whether the two answers are right; None where nothing was expected, or only another model could tell."""
        return None if self.scores is None else (self.scores[0].right, self.scores[1].right)


def _scored(turn: Turn, reference: Answer, candidate: Answer) -> tuple[Score, Score] | None:
    ours, theirs = score(turn, reference.text), score(turn, candidate.text)
    return None if ours is None or theirs is None else (ours, theirs)


def text_figures(results: Sequence[TurnResult], seed: int) -> Iterator[Figure]:
    """Distributions at text positions."""
    stretches = [r.stretches["text"] for r in results if "text" in r.stretches]
    yield from _broken("text", stretches)
    yield from _distribution("text", stretches, seed)
    kept = [(s.ref[s.finite], s.cand[s.finite]) for s in stretches]
    kl = np.concatenate([np.empty(0), *(s.kl[s.finite] for s in stretches)])
    if not len(kl):
        return
    counts = [len(ref) for ref, _ in kept]
    yield known("text.kl_p95", float(np.percentile(kl, 95)), len(kl))
    squares = [np.sum(np.square(np.exp(cand) - np.exp(ref))) for ref, cand in kept]
    yield over_turns("text.rms_delta_p", _root, (squares, counts), len(kl), seed)
    lost = [np.sum(ref - cand) for ref, cand in kept]
    yield over_turns("text.perplexity_ratio", _exp, (lost, counts), len(kl), seed)


def code_figures(results: Sequence[TurnResult], seed: int) -> Iterator[Figure]:
    """Distributions of the audio head's codes, together and in each codebook."""
    spoken = [{k: s for k, s in r.stretches.items() if k != "text"} for r in results]
    spoken = [streams for streams in spoken if streams]
    if not spoken:
        return
    every = [joined(streams.values()) for streams in spoken]
    yield from _broken("codes", every)
    yield from _distribution("codes", every, seed)
    frames = [r.frames for r in results if len(r.frames)]
    columns = ([float(same.sum()) for same in frames], [len(same) for same in frames])
    yield over_turns("codes.frames", ratio_of_sums, columns, sum(columns[1]), seed)
    for name in spoken[0]:
        yield from _distribution(name, [streams[name] for streams in spoken if name in streams], seed)


def _broken(name: str, stretches: Sequence[Stretch]) -> Iterator[Figure]:
    if total := sum(len(s.kl) for s in stretches):
        yield known(f"{name}.non_finite", sum(int((~s.finite).sum()) for s in stretches), total)


def _distribution(name: str, stretches: Sequence[Stretch], seed: int) -> Iterator[Figure]:
    counts = [int(s.finite.sum()) for s in stretches]
    total = sum(len(s.kl) for s in stretches)
    if sum(counts):
        sums = [np.sum(s.kl[s.finite]) for s in stretches]
        yield over_turns(f"{name}.kl", ratio_of_sums, (sums, counts), sum(counts), seed)
        same = [float(np.sum(s.same)) for s in stretches]
        yield over_turns(f"{name}.top1", ratio_of_sums, (same, [len(s.kl) for s in stretches]), total, seed)


def heard_figures(results: Sequence[TurnResult]) -> Iterator[Figure]:
    """How much of what was heard the two audio encoders write down alike."""
    heard = [r.heard for r in results if len(r.heard)]
    for book, share in enumerate(np.mean(heard, axis=0) if heard else ()):
        yield known(f"heard{book}", float(share), len(heard))


def answer_figures(results: Sequence[TurnResult], seed: int) -> Iterator[Figure]:
    """Free-running answers: how many are the same, and right."""
    yield share("answers.exact", [r.exact for r in results])
    edits = [word_errors(r.reference.text, r.candidate.text) for r in results]
    columns = ([e.total for e in edits], [e.count for e in edits])
    if sum(columns[1]):
        yield over_turns("answers.wer", ratio_of_sums, columns, len(results), seed)
    added = sum(bool(r.defects[1]) for r in results) - sum(bool(r.defects[0]) for r in results)
    yield known("answers.degenerate_added", added, len(results))


def share(name: str, found: Sequence[bool]) -> Figure:
    return Figure(
        name, meaning_of(name), sum(found) / len(found), len(found), *proportion_interval(sum(found), len(found))
    )


def weight_figures(reference: Side, candidate: Side) -> Iterator[Figure]:
    """What the candidate saves of memory."""
    yield known("cost.bytes_ratio", candidate.weight_bytes / max(1, reference.weight_bytes), len(candidate.graphs))
    yield known("cost.bits_per_weight", bits_per_weight(candidate.graphs), len(candidate.graphs))


def time_figures(results: Sequence[TurnResult], seed: int) -> Iterator[Figure]:
    """What the candidate saves of time; only of use where both ran on one machine."""
    for name, pairs in (("prefill", [r.prefill for r in results]), ("decode", [r.decode for r in results])):
        timed = [pair for pair in pairs if min(pair) > 0]
        if timed:
            columns = ([pair[1] for pair in timed], [pair[0] for pair in timed])
            yield over_turns(f"cost.{name}_ratio", _ratio_of_medians, columns, len(timed), seed)


def bits_per_weight(graphs: Sequence[GraphCost]) -> float:
    """Scales and zeros included; weights that two graphs share count in both."""
    return 8 * sum(graph.weight_bytes for graph in graphs) / max(1, sum(graph.parameters for graph in graphs))


def over_turns(
    name: str, statistic: Callable[..., Floats], columns: tuple[Sequence[float], ...], count: int, seed: int
) -> Figure:
    arrays = [np.asarray(column, np.float64) for column in columns]
    interval = paired_interval(statistic, *arrays, seed=seed) or (None, None)
    return Figure(name, meaning_of(name), float(statistic(*arrays, axis=-1)), count, *interval)


def known(name: str, value: float, count: int) -> Figure:
    return Figure(name, meaning_of(name), float(value), count)


def meaning_of(name: str) -> str:
    if name in KNOWN:
        return KNOWN[name]
    if name.startswith("suite."):
        return KNOWN["suite.*." + name.rsplit(".", 1)[1]]
    stem = name.rstrip("0123456789")
    return KNOWN["heard*"] if stem == "heard" else KNOWN["code*." + name.split(".")[1]]


def _root(squares: Floats, counts: Floats, axis: int = -1) -> Floats:
    return np.sqrt(ratio_of_sums(squares, counts, axis))


def _exp(lost: Floats, counts: Floats, axis: int = -1) -> Floats:
    return np.exp(ratio_of_sums(lost, counts, axis))


def mean_difference(upper: Floats, lower: Floats, axis: int = -1) -> Floats:
    return np.mean(upper - lower, axis=axis)


def _ratio_of_medians(upper: Floats, lower: Floats, axis: int = -1) -> Floats:
    return np.median(upper, axis=axis) / np.median(lower, axis=axis)
