"""Figures of spoken answers: what a recogniser makes of them, and what can be said without listening."""

from collections.abc import Callable, Iterator, Sequence

from quant.comparison.figures import Figure, TurnResult, known, mean_difference, over_turns
from quant.comparison.metrics import Floats, ratio_of_sums
from quant.comparison.spoken import Heard, Spoken
from runtime.repetition import repetition


def speech_figures(results: Sequence[TurnResult], seed: int) -> Iterator[Figure]:
    """Over all spoken answers; the two lists of a paired figure are those of the reference and of the candidate."""
    yield from _both("answers.truncated_added", [_pair(r, lambda a: a.ending != "end") for r in results], seed)
    repeated = [_pair(r, lambda a: repetition(a.ids)) for r in results]
    yield from _both("answers.repetition_added", repeated, seed)
    found = [r.speech for r in results if r.speech is not None]
    if not found:
        return
    yield from recognised_figures([r.recognised for r in fair(results) if r.recognised], seed)
    yield from _own_figures(found, seed)
    yield from _both("speech.cut_added", [_pair(r, lambda a: a.cut) for r in results if r.speech], seed)
    yield from _same_figures(found, seed)


def fair(results: Sequence[TurnResult]) -> list[TurnResult]:
    """Those whose speech was recognised and that the reference said to the end: of others some words are not heard."""
    return [r for r in results if r.recognised and not r.recognised.problem and not r.reference.cut]


def recognised_figures(found: Sequence[Heard], seed: int) -> Iterator[Figure]:
    """Round trip: each side's speech against its own text, errors over words of all answers."""
    ours, theirs = ([heard.errors[side] for heard in found] for side in (0, 1))
    if not sum(edits.count for edits in ours) or not sum(edits.count for edits in theirs):
        return
    totals = [[float(edits.total) for edits in side] for side in (ours, theirs)]
    counts = [[float(edits.count) for edits in side] for side in (ours, theirs)]
    yield over_turns("speech.wer_reference", ratio_of_sums, (totals[0], counts[0]), len(found), seed)
    yield over_turns("speech.wer", ratio_of_sums, (totals[1], counts[1]), len(found), seed)
    yield over_turns("speech.wer_added", _rate_added, (totals[1], counts[1], totals[0], counts[0]), len(found), seed)


def _own_figures(found: Sequence[Spoken], seed: int) -> Iterator[Figure]:
    """Each side saying its own answer."""
    n, seconds = len(found), _sides([s.seconds for s in found])
    yield over_turns("speech.duration_ratio", ratio_of_sums, (seconds[1], seconds[0]), n, seed)
    yield from _both("speech.silence_added", [s.silence for s in found], seed)
    yield from _both("speech.repetition_added", [s.repetition for s in found], seed)
    clicks = _sides([(60.0 * s.clicks[0], 60.0 * s.clicks[1]) for s in found])
    yield over_turns("speech.clicks_added", _rate_added, (clicks[1], seconds[1], clicks[0], seconds[0]), n, seed)


def _same_figures(found: Sequence[Spoken], seed: int) -> Iterator[Figure]:
    """Both making the same codes audible."""
    n, one = len(found), [1.0] * len(found)
    yield over_turns("speech.log_spectral", ratio_of_sums, ([s.log_spectral for s in found], one), n, seed)
    yield over_turns("speech.log_mel", ratio_of_sums, ([s.log_mel for s in found], one), n, seed)
    voiced = [s for s in found if s.voiced]
    if voiced:
        squares, counts = [s.voiced * s.cents**2 for s in voiced], [float(s.voiced) for s in voiced]
        yield over_turns("speech.f0_cents", _root, (squares, counts), sum(s.voiced for s in voiced), seed)
    pitched = [s.voicing for s in found if s.voicing == s.voicing]
    if pitched:
        yield over_turns("speech.voicing", ratio_of_sums, (pitched, [1.0] * len(pitched)), len(pitched), seed)
    streamed = [s.streamed for s in found if s.streamed == s.streamed]
    if streamed:
        yield known("speech.streamed", max(streamed), len(streamed))


def _both(name: str, pairs: Sequence[tuple[float, float]], seed: int) -> Iterator[Figure]:
    """The mean of the candidate less that of the reference."""
    ours, theirs = _sides(pairs)
    yield over_turns(name, mean_difference, (theirs, ours), len(pairs), seed)


def _sides(pairs: Sequence[tuple[float, float]]) -> tuple[list[float], list[float]]:
    return [float(pair[0]) for pair in pairs], [float(pair[1]) for pair in pairs]


def _pair(result: TurnResult, of: Callable) -> tuple[float, float]:
    return of(result.reference), of(result.candidate)


def _rate_added(upper: Floats, over: Floats, lower: Floats, under: Floats, axis: int = -1) -> Floats:
    return ratio_of_sums(upper, over, axis) - ratio_of_sums(lower, under, axis)


def _root(squares: Floats, counts: Floats, axis: int = -1) -> Floats:
    return ratio_of_sums(squares, counts, axis) ** 0.5
