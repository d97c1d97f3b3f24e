"""Level 3: how many answers are right on both sides, all together and in each data set, with paired statistics."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from string import ascii_uppercase

import numpy as np

from quant.comparison.figures import Figure, TurnResult, known, mean_difference, over_turns, share
from quant.comparison.metrics import Floats, detectable_loss, mcnemar, ratio_of_sums, unseen_share
from quant.comparison.score import Score

# Quantiles of the normal distribution at 97.5 % and 80 %: what a two-sided test at 5 % finds in 4 of 5 cases.
_FOUND = 1.959964 + 0.841621
_WIDTH = 2 * 1.959964  # of a 95 % interval, in standard errors


@dataclass(frozen=True, eq=False)
class Item:
    """What counts as one: a turn, or several that are asked in other words and are right only together."""

    results: tuple[TurnResult, ...]
    right: tuple[bool, bool]

    @property
    def lost(self) -> bool:
        return self.right == (True, False)

    @property
    def gained(self) -> bool:
        return self.right == (False, True)


def suites_of(results: Sequence[TurnResult]) -> dict[str, list[TurnResult]]:
    """Results of each data set, in the order in which they came; turns of one's own left out where they are alone."""
    found: dict[str, list[TurnResult]] = {}
    for result in results:
        if result.turn.suite:
            found.setdefault(result.turn.suite, []).append(result)
    return found


def items_of(results: Sequence[TurnResult]) -> list[Item]:
    """The judged turns; those of one suite and item together."""
    together: dict[tuple[str, str], list[TurnResult]] = {}
    for number, result in enumerate(results):
        if result.scores is not None:
            name = (result.turn.suite, result.turn.item) if result.turn.item else ("", f"#{number}")
            together.setdefault(name, []).append(result)
    return [Item(tuple(turns), _both([r.scores for r in turns if r.scores])) for turns in together.values()]


def _both(scores: Sequence[tuple[Score, Score]]) -> tuple[bool, bool]:
    return all(ours.right for ours, _ in scores), all(theirs.right for _, theirs in scores)


def task_figures(results: Sequence[TurnResult], seed: int) -> Iterator[Figure]:
    """Accuracy of all that is right or wrong, and then of each data set; of transcriptions also the error rate."""
    yield from accuracy_figures("answers", items_of([r for r in results if r.turn.metric not in ("wer", "cer")]), seed)
    for suite, found in suites_of(results).items():
        yield from accuracy_figures(f"suite.{suite}", items_of(found), seed)
        yield from option_figures(f"suite.{suite}", found, seed)
        yield from error_figures(f"suite.{suite}", found, seed)


def accuracy_figures(name: str, items: Sequence[Item], seed: int) -> Iterator[Figure]:
    n = len(items)
    if not n:
        return
    ref, cand = ([item.right[side] for item in items] for side in (0, 1))
    losses, gains = sum(item.lost for item in items), sum(item.gained for item in items)
    yield share(f"{name}.accuracy_reference", ref)
    yield share(f"{name}.accuracy", cand)
    loss = over_turns(f"{name}.accuracy_loss", mean_difference, (ref, cand), n, seed)
    unseen = unseen_share(n)
    yield loss if losses or gains else replace(loss, low=-unseen, high=unseen)
    yield known(f"{name}.mcnemar_p", mcnemar(losses, gains), n)
    yield known(f"{name}.detectable_loss", detectable_loss(n, gains / n), n)


def option_figures(name: str, results: Sequence[TurnResult], seed: int) -> Iterator[Figure]:
    """How likely the right option was, where options are chosen by letters: it moves before any answer flips."""
    right = [(r.reference.letters, r.candidate.letters, ascii_uppercase.index(r.turn.answers[0]))
             for r in results if r.reference.letters and r.candidate.letters]  # fmt: skip
    pairs = [(ours[place], theirs[place]) for ours, theirs, place in right if np.isfinite([*ours, *theirs]).all()]
    if not pairs:
        return
    ref, cand = ([pair[side] for pair in pairs] for side in (0, 1))
    counts = [1.0] * len(pairs)
    yield over_turns(f"{name}.right_option_reference", ratio_of_sums, (ref, counts), len(pairs), seed)
    yield over_turns(f"{name}.right_option", ratio_of_sums, (cand, counts), len(pairs), seed)
    yield over_turns(f"{name}.right_option_loss", mean_difference, (ref, cand), len(pairs), seed)


def error_figures(name: str, results: Sequence[TurnResult], seed: int) -> Iterator[Figure]:
    """Error rates of transcriptions: edits over words, both summed over all items."""
    pairs = [(ours.edits, theirs.edits) for ours, theirs in (r.scores for r in results if r.scores)]
    edits = [(ours, theirs) for ours, theirs in pairs if ours and theirs]
    if not sum(ours.count for ours, _ in edits):
        return
    count, n = [ours.count for ours, _ in edits], len(edits)
    ref, cand = [ours.total for ours, _ in edits], [theirs.total for _, theirs in edits]
    yield over_turns(f"{name}.error_rate_reference", ratio_of_sums, (ref, count), n, seed)
    yield over_turns(f"{name}.error_rate", ratio_of_sums, (cand, count), n, seed)
    added = over_turns(f"{name}.error_rate_added", _difference_of_rates, (ref, cand, count), n, seed)
    yield added
    if added.low is not None and added.high is not None:
        yield known(f"{name}.detectable_errors", _FOUND * (added.high - added.low) / _WIDTH, n)


def _difference_of_rates(ref: Floats, cand: Floats, count: Floats, axis: int = -1) -> Floats:
    return ratio_of_sums(cand - ref, count, axis)


def holm(p: Sequence[float]) -> list[float]:
    """p-values adjusted for being several, so that any below 5 % is a finding (Holm 1979)."""
    adjusted, highest = [0.0] * len(p), 0.0
    for rank, place in enumerate(np.argsort(p, kind="stable")):
        highest = max(highest, min(1.0, p[place] * (len(p) - rank)))
        adjusted[place] = highest
    return adjusted
