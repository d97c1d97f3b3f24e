"""Round to nearest: values come back within half a step, and the search for scales loses less than none."""

from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from quant.affine import Quantized, dequantize, middle, quantize
from quant.rtn import best_scales, rtn
from quant.scheme import Scheme

BITS = (2, 4, 8)
SCHEMES = [Scheme(bits, 32, symmetric) for bits in BITS for symmetric in (True, False)]
ROWS = st.integers(1, 4)


def weights(width: int = 64) -> st.SearchStrategy[np.ndarray]:
    values = st.floats(-1e4, 1e4, width=32)
    return ROWS.flatmap(lambda rows: arrays(np.float32, (rows, width), elements=values))


def covering(weight: np.ndarray, scheme: Scheme) -> Quantized:
    """With the scale that just covers each group's largest value, as ONNX Runtime's own quantizer chooses it."""
    groups = weight.reshape(len(weight), -1, scheme.group_size)
    place = np.abs(groups).argmax(-1)[..., None]
    scales = np.take_along_axis(groups, place, -1)[..., 0] / -middle(scheme.bits)
    return quantize(weight, scales, None, scheme.bits)


def heavy_tailed(rows: int, columns: int) -> np.ndarray:
    return np.random.default_rng(0).standard_t(4, (rows, columns)).astype(np.float32)


def error(matrix: Quantized, weight: np.ndarray) -> float:
    return float(np.square(dequantize(matrix) - weight).sum())


@given(weights(), st.sampled_from(SCHEMES))
@settings(deadline=None)
def test_codes_stay_in_their_range_and_values_in_the_groups(weight: np.ndarray, scheme: Scheme) -> None:
    matrix = rtn(weight, scheme)
    assert matrix.codes.max(initial=0) < 2**scheme.bits
    assert (matrix.zeros is None) == scheme.symmetric
    assert np.isfinite(matrix.scales).all()
    largest = np.abs(weight).reshape(len(weight), -1, 32).max(-1).repeat(32, 1)
    assert (np.abs(dequantize(matrix)) <= 2.1 * largest).all()


@given(weights())
@settings(deadline=None)
def test_eight_bits_with_zeros_come_back_within_a_step(weight: np.ndarray) -> None:
    matrix = rtn(weight, Scheme(8, 32, symmetric=False))
    step = np.abs(matrix.scales).repeat(32, 1)
    # the widest range that is tried to be cut is 2.5 steps of 255
    assert (np.abs(dequantize(matrix) - weight) <= 3.1 * step + 1e-30).all()


@pytest.mark.parametrize("scheme", SCHEMES, ids=str)
def test_what_a_scheme_can_hold_comes_back_exactly(scheme: Scheme) -> None:
    """Values on the grid of a scheme, its ends among them, are found again, whichever scale made them."""
    rng = np.random.default_rng(0)
    codes = rng.integers(0, 2**scheme.bits, (6, 96)).astype(np.uint8)
    codes[:, ::32], codes[:, 1::32] = 0, 2**scheme.bits - 1
    zeros = None if scheme.symmetric else rng.integers(0, 2**scheme.bits, (6, 3)).astype(np.uint8)
    weight = dequantize(Quantized(codes, np.exp2(rng.integers(-9, 9, (6, 3))).astype(np.float32), zeros, scheme.bits))
    np.testing.assert_allclose(dequantize(rtn(weight, scheme)), weight, rtol=1e-5)


@pytest.mark.parametrize("scheme", SCHEMES, ids=str)
def test_a_group_of_zeros_stays_zero_beside_one_that_is_not(scheme: Scheme) -> None:
    weight = np.zeros((2, 64), np.float32)
    weight[0, 40] = 3.0
    back = dequantize(rtn(weight, scheme))
    np.testing.assert_allclose(back, weight, atol=1e-6)
    assert not back[1].any()


@pytest.mark.parametrize("scale", [1e-30, 1e-12, 1e12, 1e30])
def test_the_size_of_the_values_does_not_matter(scale: float) -> None:
    weight = heavy_tailed(4, 64)
    one, other = rtn(weight, Scheme(4, 32)), rtn(weight * np.float32(scale), Scheme(4, 32))
    assert np.mean(one.codes == other.codes) > 0.98  # values that lie on an edge between two codes may fall either way


@pytest.mark.parametrize(("bits", "less"), [(2, 0.9), (4, 0.95), (8, 0.98)])
def test_the_search_loses_less_than_the_scale_that_covers_the_largest_value(bits: Any, less: float) -> None:
    weight, scheme = heavy_tailed(64, 256), Scheme(bits, 32)
    assert error(rtn(weight, scheme), weight) < less * error(covering(weight, scheme), weight)


def test_zeros_of_their_own_serve_groups_that_lie_on_one_side() -> None:
    weight = 5 + heavy_tailed(16, 64) * np.float32(0.1)
    assert error(rtn(weight, Scheme(4, 32, symmetric=False)), weight) < 0.6 * error(rtn(weight, Scheme(4, 32)), weight)


def test_more_bits_and_smaller_groups_lose_less() -> None:
    weight = heavy_tailed(32, 512)
    schemes = (Scheme(2, 32), Scheme(4, 128), Scheme(4, 32), Scheme(8, 32))
    losses = [error(rtn(weight, scheme), weight) for scheme in schemes]
    assert losses == sorted(losses, reverse=True)


def test_rows_do_not_depend_on_each_other() -> None:
    weight, scheme = heavy_tailed(8, 64), Scheme(4, 32)
    whole = rtn(weight, scheme)
    for row in range(8):
        np.testing.assert_array_equal(rtn(weight[row : row + 1], scheme).codes, whole.codes[row : row + 1])


def test_half_precision_weights_get_half_precision_scales_that_their_codes_are_made_for() -> None:
    weight = heavy_tailed(8, 64).astype(np.float16)
    matrix = rtn(weight, Scheme(4, 32))
    assert matrix.scales.dtype == np.float16
    again = quantize(weight, matrix.scales, None, 4)
    np.testing.assert_array_equal(matrix.codes, again.codes)


def test_a_scale_that_is_too_small_for_half_precision_makes_zeros_and_no_infinity() -> None:
    weight = np.full((1, 32), 6e-8, np.float16)
    with np.errstate(all="raise", under="ignore"):
        assert np.isfinite(dequantize(rtn(weight, Scheme(4, 32)))).all()


@given(weights(32))
@settings(deadline=None, max_examples=50)
def test_no_scale_between_those_tried_is_much_better(weight: np.ndarray) -> None:
    """The refitted scale is at the bottom: moving it either way by a little does not lower the weighted loss much."""
    scales, _ = best_scales(np.ascontiguousarray(weight.reshape(-1, 32).T), Scheme(4, 32))
    best = error(quantize(weight, scales[:, None], None, 4), weight)
    for factor in (0.98, 1.02):
        assert best <= 1.35 * error(quantize(weight, scales[:, None] * np.float32(factor), None, 4), weight) + 1e-20
