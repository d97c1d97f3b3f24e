"""Choosing a token: recorded distributions of the official code, a plain full-vocabulary reference, and properties."""

from pathlib import Path

import numpy as np
import pytest
from hypothesis import assume, given
from hypothesis import strategies as st
from safetensors.numpy import load_file

from runtime.bundle import Sampling, SpecialTokens
from runtime.errors import EdgeOmniError
from runtime.sampling import SamplingOptions, banned_in_text, gumbel, penalise, probabilities, sample

GOLDEN = load_file(Path(__file__).parent / "golden" / "a" / "g06_sampling.safetensors")
STEPS = {
    "text_first": Sampling(temperature=0.8, top_k=20, top_p=0.85, repetition_penalty=1.1),
    "text_next": Sampling(temperature=0.3, top_k=20, top_p=0.85, repetition_penalty=1.05),
    "audio": Sampling(temperature=0.5, top_k=5, top_p=0.85, repetition_penalty=1.3),
}
NOBODY = np.empty(0, np.int64)

grid_logits = st.lists(st.integers(-6, 6), min_size=1, max_size=40).map(lambda v: np.array(v, np.float32) / 2)
samplings = st.builds(
    Sampling,
    temperature=st.floats(0.05, 4.0),
    top_k=st.integers(0, 50),
    top_p=st.one_of(st.just(1.0), st.floats(0.01, 0.99)),
    repetition_penalty=st.floats(0.5, 2.0),
)


def ascending_probabilities(logits, sampling):
    """The definition, without shortcuts: temperature and top-k over the whole vocabulary, then sorted softmax."""
    scores = np.asarray(logits, np.float64) / sampling.temperature
    if 0 < sampling.top_k < len(scores):
        scores = np.where(scores < np.sort(scores)[-sampling.top_k], -np.inf, scores)
    order = np.argsort(scores, kind="stable")
    weights = np.exp(scores[order] - scores.max())
    return order, weights / weights.sum()


def reference(logits, sampling):
    order, probs = ascending_probabilities(logits, sampling)
    if sampling.top_p < 1:
        drop = probs.cumsum() <= 1 - sampling.top_p
        drop[-1] = False
        probs = np.where(drop, 0, probs)
    full = np.empty(len(probs))
    full[order] = probs / probs.sum()
    return full


@pytest.mark.parametrize("step", STEPS)
@pytest.mark.parametrize("row", range(3))
def test_penalty_and_distribution_are_those_of_the_official_code(step, row):
    logits, context = GOLDEN["logits"][row], GOLDEN["context"][row]
    penalised = penalise(logits, context, STEPS[step].repetition_penalty)
    expected = GOLDEN[f"{step}.penalised"][row]
    np.testing.assert_allclose(penalised, expected, atol=2e-6 * np.abs(expected).max())
    probs = probabilities(penalised, STEPS[step])
    expected = GOLDEN[f"{step}.probs"][row]
    assert np.array_equal(probs > 0, expected > 0)
    np.testing.assert_allclose(probs, expected, atol=1e-5)


@given(grid_logits, samplings)
def test_the_distribution_follows_its_definition_also_with_ties(logits, sampling):
    if sampling.top_p < 1:  # a cumulative probability that meets the limit exactly is decided by rounding
        _, probs = ascending_probabilities(logits, sampling)
        assume(np.abs(probs.cumsum() - (1 - sampling.top_p)).min() > 1e-9)
    np.testing.assert_allclose(probabilities(logits, sampling), reference(logits, sampling), atol=1e-6)


@given(grid_logits, samplings, st.booleans(), st.integers(0, 2**32), st.data())
def test_a_banned_or_filtered_id_never_comes_out(logits, sampling, greedy, seed, data):
    ids = st.integers(0, len(logits) - 1)
    context = np.array(data.draw(st.lists(ids, max_size=5)), np.int64)
    banned = np.array(data.draw(st.lists(ids, max_size=len(logits) - 1)), np.int64)
    assume(len(set(banned.tolist())) < len(logits))
    scores = penalise(logits, context, sampling.repetition_penalty)
    scores[banned] = -np.inf
    sampling = Sampling(
        sampling.temperature, sampling.top_k, sampling.top_p, sampling.repetition_penalty, greedy=greedy
    )
    token = sample(logits, context, sampling, np.random.default_rng(seed), banned)
    assert token not in banned
    if greedy:
        assert token == int(np.argmax(scores))
    else:
        assert probabilities(scores, sampling)[token] > 0


def test_draws_follow_the_distribution():
    logits = np.array([1.0, 0.0, 2.0, -1.0, 1.5], np.float32)
    sampling = Sampling(temperature=0.9, top_k=4, top_p=0.97)
    rng = np.random.default_rng(7)
    draws = np.bincount([sample(logits, NOBODY, sampling, rng) for _ in range(20_000)], minlength=5) / 20_000
    expected = probabilities(logits, sampling)
    assert np.all(np.abs(draws - expected) <= 4 * np.sqrt(expected * (1 - expected) / 20_000))


def test_the_same_seed_gives_the_same_tokens():
    logits = np.random.default_rng(0).normal(size=500).astype(np.float32)

    def draw(seed):
        rng = np.random.default_rng(seed)
        return [sample(logits, NOBODY, Sampling(), rng) for _ in range(20)]

    assert draw(3) == draw(3)
    assert draw(3) != draw(4)


def test_scores_equal_to_the_kth_largest_are_all_kept():
    probs = probabilities(np.array([0.0, 1.0, 1.0, 2.0, 1.0], np.float32), Sampling(top_k=2))
    assert np.flatnonzero(probs).tolist() == [1, 2, 3, 4]


def test_top_p_keeps_at_least_the_likeliest_token():
    probs = probabilities(np.array([0.0, 0.1, 0.2], np.float32), Sampling(top_p=1e-6))
    assert probs.tolist() == [0, 0, 1]


def test_an_extreme_temperature_does_not_overflow():
    assert probabilities(np.array([1e30, -1e30, 0], np.float32), Sampling(temperature=1e-30)).tolist() == [1, 0, 0]


def test_the_penalty_counts_a_repeated_id_once_and_leaves_the_input_alone():
    logits = np.array([2.0, -2.0, 1.0], np.float32)
    assert penalise(logits, np.array([0, 1, 0, 1, 0]), 2.0).tolist() == [1.0, -4.0, 1.0]
    assert logits.tolist() == [2.0, -2.0, 1.0]


def test_half_precision_logits_are_sampled_in_single_precision():
    logits = np.array([1.0, 3.0, 2.0], np.float16)
    assert penalise(logits, np.array([1]), 1.1)[1] == np.float32(3) / np.float32(1.1)


@pytest.mark.parametrize("greedy", [True, False])
@pytest.mark.parametrize(
    ("logits", "message"),
    [
        ([0.0, np.nan, np.inf], "contain nan"),
        ([0.0, np.inf], "contain inf"),
        ([-np.inf, -np.inf], "every token is ruled out"),
        ([], "shape"),
        ([[1.0, 2.0]], "shape"),
    ],
)
def test_broken_logits_are_an_error_and_not_a_token(logits, message, greedy):
    with pytest.raises(EdgeOmniError, match=message):
        sample(np.array(logits, np.float32), NOBODY, Sampling(greedy=greedy), np.random.default_rng(0))


def test_broken_logits_have_no_distribution():
    with pytest.raises(EdgeOmniError, match="contain nan"):
        probabilities(np.array([1.0, np.nan], np.float32), Sampling(top_k=1))


def test_banning_every_token_is_an_error():
    with pytest.raises(EdgeOmniError, match="every token is ruled out"):
        sample(np.zeros(3, np.float32), NOBODY, Sampling(), np.random.default_rng(0), np.arange(3))


def test_a_single_survivor_among_impossible_tokens_is_chosen():
    logits = np.array([-np.inf, -np.inf, -3.0, -np.inf], np.float32)
    assert sample(logits, NOBODY, Sampling(top_k=3, top_p=0.5), np.random.default_rng(0)) == 2


def test_a_text_step_bans_placeholders_and_ids_without_a_text():
    tokens = SpecialTokens(eos=(1,), audio_pad=3, img_pad=5, video_place=4, audiogen_start=6, audiogen_end=7)
    assert banned_in_text(tokens, known_tokens=9, vocab_size=12).tolist() == [3, 4, 5, 7, 9, 10, 11]
    assert banned_in_text(SpecialTokens(eos=(1,)), known_tokens=9, vocab_size=9).tolist() == []


def test_gumbel_noise_turns_argmax_into_a_draw():
    logits = np.log(np.array([0.1, 0.6, 0.3], np.float32))
    rng = np.random.default_rng(1)
    noise = gumbel(rng, 3 * 20_000, greedy=False)
    assert noise.dtype == np.float32
    draws = np.bincount((logits + noise.reshape(-1, 3)).argmax(1), minlength=3) / 20_000
    np.testing.assert_allclose(draws, [0.1, 0.6, 0.3], atol=4 * 0.5 / np.sqrt(20_000))


def test_greedy_noise_is_zero_and_draws_nothing():
    rng, twin = np.random.default_rng(1), np.random.default_rng(1)
    assert not gumbel(rng, 5, greedy=True).any()
    assert rng.random() == twin.random()


def test_tokens_of_less_than_a_share_of_the_likeliest_are_never_drawn():
    logits = np.log(np.array([0.5, 0.3, 0.15, 0.05], np.float32))
    np.testing.assert_allclose(probabilities(logits, Sampling(min_p=0.0)), [0.5, 0.3, 0.15, 0.05], atol=1e-6)
    np.testing.assert_allclose(probabilities(logits, Sampling(min_p=0.4)), [0.625, 0.375, 0, 0], atol=1e-6)
    np.testing.assert_allclose(probabilities(logits, Sampling(min_p=1.0)), [1, 0, 0, 0], atol=1e-6)
    both = probabilities(logits, Sampling(top_k=3, min_p=0.25))
    np.testing.assert_allclose(both, np.array([0.5, 0.3, 0.15, 0]) / 0.95, atol=1e-6)


def test_what_a_user_sets_stands_in_place_of_the_bundles_own_and_the_rest_stays():
    bundled = STEPS["text_first"]
    assert SamplingOptions().of(bundled) == bundled
    warmer = SamplingOptions(temperature=1.5, min_p=0.1).of(bundled)
    assert warmer == Sampling(temperature=1.5, top_k=20, top_p=0.85, repetition_penalty=1.1, min_p=0.1)


def test_temperature_0_takes_the_likeliest_and_any_other_draw_ends_a_bundles_habit_of_taking_it():
    likeliest = Sampling(greedy=True)
    assert SamplingOptions(temperature=0, repetition_penalty=1.3).of(STEPS["text_first"]) == Sampling(
        top_k=20, top_p=0.85, repetition_penalty=1.3, greedy=True
    )
    assert SamplingOptions(top_k=0).of(likeliest) == Sampling()
    assert SamplingOptions(repetition_penalty=1.2).of(likeliest) == Sampling(repetition_penalty=1.2, greedy=True)


def test_every_setting_out_of_bounds_is_named_in_one_message():
    with pytest.raises(EdgeOmniError) as found:
        SamplingOptions(temperature=-1, top_p=0, top_k=-3, repetition_penalty=float("nan"), min_p=1.5)
    assert str(found.value) == (
        "temperature is -1, expected 0 (the likeliest always) or more; top-p is 0, expected more than 0, and 1 (off) "
        "at most; top-k is -3, expected a whole number, 0 (off) or more; repeat-penalty is nan, expected 0.01 to 100, "
        "of which 1 is off; min-p is 1.5, expected 0 (off) to 1"
    )
    with pytest.raises(EdgeOmniError, match=r"top-k is 2\.5"):
        SamplingOptions(top_k=2.5)  # pyright: ignore[reportArgumentType]


@given(st.floats(), st.floats(), st.integers(), st.floats(), st.floats())
def test_settings_are_refused_or_can_be_drawn_with(temperature, top_p, top_k, penalty, min_p):
    try:
        options = SamplingOptions(temperature, top_p, top_k, penalty, min_p)
    except EdgeOmniError:
        return
    rng, seen = np.random.default_rng(0), np.array([0, 2])
    assert 0 <= sample(np.array([1.0, 2.0, -1.0], np.float32), seen, options.of(Sampling()), rng) < 3
