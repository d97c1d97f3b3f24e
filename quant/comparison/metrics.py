"""How far two arrays, distributions or lists of right and wrong answers lie apart: pure functions."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from scipy import stats

Floats = NDArray[np.float64]
CONFIDENCE = 0.95
RESAMPLES = 2000


# Tensors


def max_abs(ref: np.ndarray, cand: np.ndarray) -> float:
    """Largest absolute difference of two arrays of one shape; 0 for empty ones."""
    return float(np.abs(_wide(ref) - _wide(cand)).max(initial=0.0))


def cosine(ref: np.ndarray, cand: np.ndarray) -> float:
    """Cosine of the angle between two arrays as vectors; 1 where both are zero, 0 where one is."""
    a, b = _wide(ref).ravel(), _wide(cand).ravel()
    norms = float(np.linalg.norm(a) * np.linalg.norm(b))
    if not norms:
        return float(not a.any() and not b.any())
    return float(np.clip(a @ b / norms, -1.0, 1.0))


def sqnr(ref: np.ndarray, cand: np.ndarray) -> float:
    """Signal to quantization noise, 10 log10(sum ref^2 / sum (ref - cand)^2), in dB; inf where they are equal."""
    a, noise = _wide(ref), _wide(ref) - _wide(cand)
    signal, lost = float(np.square(a).sum()), float(np.square(noise).sum())
    if not lost:
        return float("inf")
    return float(10 * np.log10(signal / lost)) if signal else float("-inf")


def non_finite(array: np.ndarray) -> int:
    """How many values are NaN or infinite."""
    return int(np.count_nonzero(~np.isfinite(array)))


def agreement(ref: np.ndarray, cand: np.ndarray) -> Floats:
    """Codes [n, codebooks] twice -> share of equal codes in each codebook, [codebooks]; NaN for n = 0."""
    with np.errstate(invalid="ignore"):
        return np.sum(np.asarray(ref) == np.asarray(cand), axis=0) / np.float64(len(ref))


def _wide(array: np.ndarray) -> Floats:
    return np.asarray(array, np.float64)


# Distributions


def log_softmax(logits: np.ndarray) -> Floats:
    """[..., n] -> natural logarithms of the softmax over the last axis, float64."""
    shifted = _wide(logits) - np.max(logits, axis=-1, keepdims=True)
    return shifted - np.log(np.exp(shifted).sum(axis=-1, keepdims=True))


def kl_divergence(ref: np.ndarray, cand: np.ndarray) -> Floats:
    """Logits [n, vocab] twice -> KL(ref || cand) at each position, in nats, [n] (Kullback and Leibler 1951)."""
    p, q = log_softmax(ref), log_softmax(cand)
    return np.sum(np.exp(p) * (p - q), axis=-1)


@dataclass(frozen=True, eq=False)
class Top:
    """Distributions at n positions, cut to the k likeliest ids and what is left over.

    `tail` is the logarithm of the mass outside `ids`, -inf where they are all there are.
    """

    ids: NDArray[np.int64]  # [n, k], likeliest first
    logp: Floats  # [n, k]
    tail: Floats  # [n]

    def __len__(self) -> int:
        return len(self.ids)


def top(logits: np.ndarray, k: int) -> Top:
    """Logits [n, vocab] -> their `k` likeliest ids, the first of equals first; all of them where vocab is smaller."""
    logp = log_softmax(logits)
    ids = np.argsort(-logp, axis=-1, kind="stable")[:, :k]
    kept = np.take_along_axis(logp, ids, axis=-1)
    if ids.shape[1] == logp.shape[1]:
        return Top(ids, kept, np.full(len(ids), -np.inf))
    return Top(ids, kept, _log_rest(logp, ids))


def kl_from_top(ref: Top, cand: np.ndarray) -> Floats:
    """KL(ref || cand) at each position [n], in nats, from a cut reference and the candidate's logits [n, vocab].

    What is cut off counts as one outcome. By the data-processing inequality (Cover and Thomas, Elements of Information
    Theory, 2.8) the figure is at most the true one; what lacks is the tail's mass times the divergence within it.
    """
    q = log_softmax(cand)
    kept = np.take_along_axis(q, ref.ids, axis=-1)
    inside = np.sum(np.exp(ref.logp) * (ref.logp - kept), axis=-1)
    cut = np.isfinite(ref.tail)
    outside = np.zeros(len(ref))
    outside[cut] = np.exp(ref.tail[cut]) * (ref.tail[cut] - _log_rest(q[cut], ref.ids[cut]))
    return np.maximum(inside + outside, 0.0)


def _log_rest(logp: Floats, ids: NDArray[np.int64]) -> Floats:
    """Logarithm of the mass outside `ids`; summed over what is outside, as 1 - inside would lose all digits."""
    rest = logp.copy()
    np.put_along_axis(rest, ids, -np.inf, axis=-1)
    highest = rest.max(axis=-1, keepdims=True)
    return (highest + np.log(np.exp(rest - highest).sum(axis=-1, keepdims=True)))[:, 0]


def rms_delta_p(ref_logp: Floats, cand_logp: Floats) -> float:
    """Root mean square change of the probability of the tokens that were taken, from log-probabilities [n] twice."""
    return float(np.sqrt(np.mean(np.square(np.exp(cand_logp) - np.exp(ref_logp)))))


def perplexity(logp: Floats) -> float:
    """exp(-mean) of the log-probabilities [n] of the tokens that were taken."""
    return float(np.exp(-np.mean(logp)))


# Paired statistics


def mcnemar(losses: int, gains: int) -> float:
    """Two-sided p-value of the exact test that losses and gains are equally likely (McNemar 1947): binomial, 1/2."""
    return float(stats.binomtest(losses, losses + gains, 0.5).pvalue) if losses + gains else 1.0


def proportion_interval(successes: int, n: int) -> tuple[float, float]:
    """95 % score interval of a share of n items (Wilson 1927)."""
    found = stats.binomtest(successes, n).proportion_ci(CONFIDENCE, method="wilson")
    return float(found.low), float(found.high)


def unseen_share(n: int) -> float:
    """The largest share of items of which n drawn ones show none in 5 of 100 cases: 1 - 0.05^(1/n), about 3/n."""
    return 1 - (1 - CONFIDENCE) ** (1 / n)


def detectable_loss(n: int, gain_rate: float = 0.0, power: float = 0.8) -> float:
    """Smallest net loss, as a share of n paired items, that the exact McNemar test at 5 % finds with `power`.

    `gain_rate` is the share of items that got better. 1 where even the loss of every item would not be found.
    """
    low, high = 0.0, 1.0 - gain_rate
    if n < 1 or _power(n, high, gain_rate) < power:
        return 1.0
    while high - low > 1e-4:
        middle = (low + high) / 2
        low, high = (low, middle) if _power(n, middle, gain_rate) >= power else (middle, high)
    return max(0.0, high - gain_rate)


def _power(n: int, loss_rate: float, gain_rate: float) -> float:
    """Chance that the test calls n pairs a loss: over the number of discordant pairs, those with few enough gains."""
    discordant = np.arange(n + 1)
    limit = stats.binom.ppf((1 - CONFIDENCE) / 2, discordant, 0.5)
    limit = np.where(2 * stats.binom.cdf(limit, discordant, 0.5) > 1 - CONFIDENCE, limit - 1, limit)
    changed = loss_rate + gain_rate
    found = stats.binom.cdf(limit, discordant, gain_rate / changed if changed else 0.0)
    return float(np.sum(stats.binom.pmf(discordant, n, min(1.0, changed)) * found))


def paired_interval(
    statistic: Callable[..., Floats], *columns: Sequence[float] | Floats, seed: int = 0
) -> tuple[float, float] | None:
    """95 % percentile bootstrap interval (Efron 1979) of a statistic over items, drawn with all their columns [n].

    `statistic` takes the columns and an `axis`. None where every draw gives the same, as of a single item: then the
    bootstrap knows no spread, which does not mean that there is none.
    """
    if len(columns[0]) < 2:
        return None
    found = stats.bootstrap(
        tuple(np.asarray(column, np.float64) for column in columns), statistic, paired=True, vectorized=True,
        n_resamples=RESAMPLES, confidence_level=CONFIDENCE, method="percentile", rng=np.random.default_rng(seed),
    ).confidence_interval  # fmt: skip
    return (float(found.low), float(found.high)) if found.low < found.high else None


def ratio_of_sums(upper: Floats, lower: Floats, axis: int = -1) -> Floats:
    """Mean over all positions, from each item's sum and count: a statistic for `paired_interval`."""
    return np.sum(upper, axis=axis) / np.maximum(np.sum(lower, axis=axis), 1e-300)
