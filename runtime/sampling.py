"""From logits to one token: repetition penalty, temperature, top-k, top-p, min-p and the draw, in numpy.

The order and the treatment of ties are those of Hugging Face transformers' logits processors
(`generation/logits_process.py`), which the official code generates with.
"""

import math
from collections.abc import Iterator
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray

from runtime.bundle import Sampling, SpecialTokens
from runtime.errors import EdgeOmniError

Floats = NDArray[np.floating]
Ids = NDArray[np.int64]

NEGLIGIBLE = 60.0  # e^-60: of a vocabulary of such tokens beside the likeliest, not one in 10^20 draws takes any
NOTHING: Ids = np.empty(0, np.int64)


@dataclass(frozen=True)
class SamplingOptions:
    """What of a bundle's sampling of text is to be otherwise; None: as the bundle says.

    temperature 0 takes the likeliest token always. top_k 0, top_p 1, min_p 0 and repetition_penalty 1 switch off. A
    bundle that always takes the likeliest draws where any of these but the repetition penalty is given. EdgeOmniError,
    one for all of them, for values out of bounds.
    """

    temperature: float | None = None
    top_p: float | None = None
    top_k: int | None = None
    repetition_penalty: float | None = None
    min_p: float | None = None

    def __post_init__(self) -> None:
        if wrong := list(self._wrong()):
            raise EdgeOmniError("; ".join(wrong))

    def _wrong(self) -> Iterator[str]:
        bounds = (
            ("temperature", self.temperature, 0.0, math.inf, "0 (the likeliest always) or more"),
            ("top-p", self.top_p, math.ulp(0.0), 1.0, "more than 0, and 1 (off) at most"),
            ("top-k", self.top_k, 0, math.inf, "a whole number, 0 (off) or more"),
            ("repeat-penalty", self.repetition_penalty, 0.01, 100.0, "0.01 to 100, of which 1 is off"),
            ("min-p", self.min_p, 0.0, 1.0, "0 (off) to 1"),
        )
        for name, value, least, most, expected in bounds:
            if value is None or (
                math.isfinite(value) and least <= value <= most and (name != "top-k" or value % 1 == 0)
            ):
                continue
            yield f"{name} is {value:g}, expected {expected}"

    @property
    def draws(self) -> bool:
        """Whether these ask for a draw, which always taking the likeliest would contradict."""
        shaped = any(value is not None for value in (self.top_p, self.top_k, self.min_p))
        return shaped if self.temperature is None else self.temperature > 0

    def of(self, sampling: Sampling) -> Sampling:
        """The bundle's settings with these in their place."""
        given = {name: value for name, value in vars(self).items() if value is not None}
        if self.temperature == 0:
            return replace(sampling, **(given | {"temperature": 1.0}), greedy=True)
        return replace(sampling, **given, greedy=sampling.greedy and not self.draws)


AS_BUNDLE = SamplingOptions()


def sample(logits: Floats, context: Ids, sampling: Sampling, rng: np.random.Generator, banned: Ids = NOTHING) -> int:
    """Choose the next token.

    logits [vocab] as the model gave them; context [n] ids that the repetition penalty counts as seen;
    banned [m] ids that must not come out. Raises EdgeOmniError when the logits hold NaN or +inf or leave no choice.
    """
    scores = penalise(logits, context, sampling.repetition_penalty)
    scores[banned] = -np.inf
    _check(scores)
    if sampling.greedy:
        return int(scores.argmax())
    ids, probs = _candidates(scores, sampling)
    reach = probs.cumsum()
    return int(ids[np.searchsorted(reach[:-1], rng.random() * reach[-1], side="right")])


def penalise(logits: Floats, context: Ids, penalty: float) -> NDArray[np.float32]:
    """Make every id of `context` less likely, however often it occurs (Keskar et al. 2019, CTRL, section 4.1).

    logits [vocab] -> new float32 [vocab]: a negative score is multiplied by the penalty, any other divided.
    """
    scores = np.array(logits, np.float32)
    if penalty != 1.0:
        seen = scores[context]
        scores[context] = np.where(seen < 0, seen * np.float32(penalty), seen / np.float32(penalty))
    return scores


def probabilities(logits: Floats, sampling: Sampling) -> NDArray[np.float32]:
    """Distribution that `sample` draws from, after temperature, top-k, top-p and min-p; [vocab] -> float32 [vocab].

    Raises EdgeOmniError when the logits hold NaN or +inf or leave no choice.
    """
    _check(logits)
    ids, probs = _candidates(logits, sampling)
    full = np.zeros(logits.shape, np.float32)
    full[ids] = probs
    return full


def _candidates(scores: Floats, sampling: Sampling) -> tuple[Ids, NDArray[np.float64]]:
    """Ids that pass top-k and top-p, and their probabilities, which add up to 1."""
    # Temperature is positive and keeps the order, so top-k may come first and spare the rest the arithmetic.
    least = max(_kth_largest(scores, sampling.top_k), float(scores.max()) - NEGLIGIBLE * sampling.temperature)
    ids = np.flatnonzero(scores >= least)
    probs = scores[ids].astype(np.float64)
    probs -= probs.max()
    probs /= sampling.temperature
    np.exp(probs, out=probs)
    probs /= probs.sum()
    if sampling.top_p < 1.0:
        ids, probs = _top_p(ids, probs, scores, sampling.top_p)
    if sampling.min_p > 0.0:
        likely = probs >= sampling.min_p * probs.max()
        ids, probs = ids[likely], probs[likely]
    return ids, probs / probs.sum()


def _top_p(ids: Ids, probs: NDArray[np.float64], scores: Floats, p: float) -> tuple[Ids, NDArray[np.float64]]:
    """The likeliest ids that make up a probability of p, least likely first: the others add up to 1 - p at most.

    Sorting a whole vocabulary would take longer than a small model takes for a token. Ids of less than an equal share
    of 1 - p cannot add up to it, so they fall whatever their order is, and only the others are sorted.
    """
    plausible = np.flatnonzero(probs > (1.0 - p) / len(ids))
    fallen = 1.0 - probs[plausible].sum()
    order = plausible[np.argsort(scores[ids[plausible]], kind="stable")]
    first = min(int(np.count_nonzero(fallen + probs[order].cumsum() <= 1.0 - p)), len(order) - 1)
    return ids[order[first:]], probs[order[first:]]


def _kth_largest(scores: Floats, k: int) -> float:
    """The score that top-k lets pass, with every one that equals it; -inf where k is 0 or all pass."""
    return float(scores[np.argpartition(scores, -k)[-k]]) if 0 < k < scores.size else -np.inf


def _check(scores: Floats) -> None:
    if scores.ndim != 1 or scores.size == 0:
        raise EdgeOmniError(f"cannot choose a token: logits have shape {scores.shape}, expected [vocab]")
    highest = float(scores.max())  # NaN wins every comparison of max, so this one number tells all three cases
    if not np.isfinite(highest):
        what = "every token is ruled out" if highest == -np.inf else f"the logits contain {highest}"
        raise EdgeOmniError(
            f"cannot choose a token: {what}; the model's arithmetic failed, try a bundle of higher precision"
        )


def banned_in_text(tokens: SpecialTokens, known_tokens: int, vocab_size: int) -> Ids:
    """Ids that a text step must not produce: placeholders of media, the end of audio, and ids without a text.

    A sampled placeholder would claim a row of media that does not exist. Gives int64 [m], sorted.
    """
    named = (tokens.audio_pad, tokens.img_pad, tokens.video_place, tokens.audiogen_end)
    banned = {i for i in named if i is not None} | set(range(known_tokens, vocab_size))
    return np.array(sorted(banned), np.int64)


def gumbel(rng: np.random.Generator, n: int, greedy: bool) -> NDArray[np.float32]:
    """Noise that turns an argmax over logits into a draw from their softmax (Gumbel 1954); zeros when greedy.

    Gives float32 [n]: the noise input of the audio head's graph.
    """
    return np.zeros(n, np.float32) if greedy else rng.gumbel(size=n).astype(np.float32)
