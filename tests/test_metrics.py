"""Errors, divergences and paired statistics against values worked out by hand, and their properties."""

import math
from itertools import product

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

pytest.importorskip("scipy")

from quant.comparison import metrics


def logits(positions: int = 3, vocab: int = 9) -> st.SearchStrategy[np.ndarray]:
    return arrays(np.float32, (positions, vocab), elements=st.floats(-20, 20, width=32))


def test_known_tensor_errors() -> None:
    ref, cand = np.array([3.0, 4.0]), np.array([3.0, 4.5])
    assert metrics.max_abs(ref, cand) == 0.5
    assert metrics.sqnr(ref, cand) == pytest.approx(10 * math.log10(25 / 0.25))
    assert metrics.cosine(ref, np.array([4.0, -3.0])) == 0
    assert metrics.non_finite(np.array([1.0, np.nan, np.inf])) == 2


def test_equal_and_empty_and_zero_arrays_have_errors_too() -> None:
    zero = np.zeros(3)
    assert metrics.sqnr(zero, zero) == math.inf
    assert metrics.sqnr(zero, zero + 1) == -math.inf
    assert metrics.cosine(zero, zero) == 1
    assert metrics.cosine(zero, zero + 1) == 0
    assert metrics.max_abs(np.empty(0), np.empty(0)) == 0


@given(arrays(np.float64, 8, elements=st.floats(0.1, 10)), st.floats(0.1, 10))
def test_neither_cosine_nor_sqnr_knows_the_scale_of_both(ref: np.ndarray, scale: float) -> None:
    cand = ref + np.linspace(0.01, 0.05, 8)
    assert metrics.sqnr(ref * scale, cand * scale) == pytest.approx(metrics.sqnr(ref, cand))
    assert metrics.cosine(ref, cand * scale) == pytest.approx(metrics.cosine(ref, cand))


def test_codes_agree_by_codebook() -> None:
    found = metrics.agreement(np.array([[1, 2], [3, 4]]), np.array([[1, 9], [3, 4]]))
    assert found.tolist() == [1.0, 0.5]


def test_a_known_divergence() -> None:
    ref, cand = np.log([[0.5, 0.5]]), np.log([[0.25, 0.75]])
    wanted = 0.5 * math.log(2) + 0.5 * math.log(0.5 / 0.75)
    assert metrics.kl_divergence(ref, cand) == pytest.approx([wanted])


@given(logits(), logits())
def test_a_divergence_is_never_negative_and_nothing_from_itself(ref: np.ndarray, cand: np.ndarray) -> None:
    assert (metrics.kl_divergence(ref, cand) >= -1e-9).all()
    assert metrics.kl_divergence(ref, ref + 7) == pytest.approx(0, abs=1e-9)


@given(logits(), logits(), st.integers(1, 8))
def test_a_cut_reference_gives_the_divergence_less_that_within_what_was_cut(
    ref: np.ndarray, cand: np.ndarray, k: int
) -> None:
    whole, cut = metrics.kl_divergence(ref, cand), metrics.kl_from_top(metrics.top(ref, k), cand)
    outside = np.argsort(-metrics.log_softmax(ref), axis=-1, kind="stable")[:, k:]
    tail_ref, tail_cand = (np.take_along_axis(x, outside, axis=-1) for x in (ref, cand))
    within = np.exp(metrics.top(ref, k).tail) * metrics.kl_divergence(tail_ref, tail_cand)
    assert cut == pytest.approx(whole - within, rel=1e-6, abs=1e-8)
    assert (cut <= whole + 1e-8).all()


@given(logits(), logits())
def test_a_reference_that_was_not_cut_gives_the_divergence_itself(ref: np.ndarray, cand: np.ndarray) -> None:
    top = metrics.top(ref, 100)
    assert (top.tail == -np.inf).all()
    assert metrics.kl_from_top(top, cand) == pytest.approx(metrics.kl_divergence(ref, cand), abs=1e-9)


def test_the_likeliest_come_first_and_the_first_of_equals() -> None:
    assert metrics.top(np.array([[1.0, 5.0, 5.0, 0.0]]), 3).ids.tolist() == [[1, 2, 0]]


def test_known_changes_of_probability_and_perplexity() -> None:
    assert metrics.rms_delta_p(np.log([0.5, 0.5]), np.log([0.8, 0.1])) == pytest.approx(math.sqrt(0.125))
    assert metrics.perplexity(np.log([0.5, 0.125])) == pytest.approx(4)


def test_mcnemar_is_the_binomial_test_of_losses_against_gains() -> None:
    assert metrics.mcnemar(0, 0) == 1
    assert metrics.mcnemar(6, 0) == pytest.approx(2 / 2**6)
    assert metrics.mcnemar(8, 1) == pytest.approx(2 * (1 + 9) / 2**9)


def test_fewer_than_six_turns_can_show_no_loss_at_all() -> None:
    """Five losses and no gain have p = 0.0625."""
    assert metrics.detectable_loss(5) == 1
    assert metrics.detectable_loss(0) == 1


def test_the_detectable_loss_of_few_turns_is_where_six_losses_become_likely() -> None:
    least = metrics.detectable_loss(20)
    fewer = sum(math.comb(20, k) * least**k * (1 - least) ** (20 - k) for k in range(6))
    assert 1 - fewer == pytest.approx(0.8, abs=0.01)


@settings(max_examples=20, deadline=None)
@given(st.integers(10, 400), st.floats(0, 0.2))
def test_more_turns_show_smaller_losses_and_gains_hide_them(n: int, gains: float) -> None:
    assert metrics.detectable_loss(2 * n, gains) <= metrics.detectable_loss(n, gains) + 1e-3
    assert metrics.detectable_loss(n) <= metrics.detectable_loss(n, gains) + 1e-3


def test_the_power_counts_every_outcome_that_the_test_calls_a_loss() -> None:
    n, loss, gain = 8, 0.5, 0.1
    chance = {"loss": loss, "gain": gain, "same": 1 - loss - gain}
    total = 0.0
    for outcome in product(chance, repeat=n):
        losses, gains = outcome.count("loss"), outcome.count("gain")
        if losses > gains and metrics.mcnemar(losses, gains) <= 0.05:
            total += math.prod(chance[kind] for kind in outcome)
    assert metrics._power(n, loss, gain) == pytest.approx(total)


def test_an_interval_covers_the_truth_about_as_often_as_it_says() -> None:
    rng, covered = np.random.default_rng(0), 0
    for trial in range(60):
        sample = rng.normal(1.0, 1.0, 40)
        low, high = metrics.paired_interval(metrics.ratio_of_sums, sample, np.ones(40), seed=trial) or (0, 0)
        covered += low <= 1.0 <= high
    assert 50 <= covered <= 60


def test_known_intervals_of_shares() -> None:
    assert metrics.proportion_interval(0, 10) == pytest.approx((0, 0.2775), abs=1e-4)
    assert (1 - metrics.unseen_share(50)) ** 50 == pytest.approx(0.05)
    assert metrics.unseen_share(300) == pytest.approx(3 / 300, rel=0.01)


def test_what_does_not_vary_has_no_interval() -> None:
    assert metrics.paired_interval(metrics.ratio_of_sums, [1.0, 1.0, 1.0], [1.0, 1.0, 1.0]) is None


def test_one_turn_has_no_interval() -> None:
    assert metrics.paired_interval(metrics.ratio_of_sums, [1.0], [2.0]) is None
