"""GPTQ: never worse than rounding by the measure it minimises, and the same where columns are independent."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from quant.affine import Quantized, dequantize
from quant.gptq import WIDEST, Gram, curvature, gptq, part_width
from quant.rtn import rtn
from quant.scheme import GROUP_SIZES, Bits, GroupSize, Scheme
from runtime.errors import EdgeOmniError

INT4 = Scheme(4, 32)


def correlated(rng: np.random.Generator, positions: int, columns: int) -> NDArray[np.float32]:
    """Inputs of which some columns are large and most are mixtures of a few, as inside a model."""
    mixed = rng.standard_normal((positions, columns // 4)) @ rng.standard_normal((columns // 4, columns))
    loud = np.exp(rng.normal(0, 1, columns))
    return ((mixed + 0.3 * rng.standard_normal((positions, columns))) * loud).astype(np.float32)


def lost(weight: np.ndarray, made: Quantized, x: np.ndarray) -> float:
    """Squared error of the layer's output."""
    return float(np.square(x.astype(np.float64) @ (weight - dequantize(made)).T).sum())


def solved(weight: np.ndarray, x: np.ndarray, scheme: Scheme) -> Quantized:
    gram = Gram(weight.shape[1], scheme.group_size)
    gram.add(x)
    return gptq(weight, gram.curvatures(), scheme)


@settings(max_examples=15, deadline=None)
@given(
    seed=st.integers(0, 10**6),
    bits=st.sampled_from([2, 4, 8]),
    group=st.sampled_from([32, 64]),
    symmetric=st.booleans(),
)
def test_the_output_error_is_below_that_of_rounding(seed: int, bits: Bits, group: GroupSize, symmetric: bool) -> None:
    rng = np.random.default_rng(seed)
    weight, x = rng.standard_normal((24, 128)).astype(np.float32), correlated(rng, 400, 128)
    scheme = Scheme(bits, group, symmetric)
    assert lost(weight, solved(weight, x, scheme), x) < lost(weight, rtn(weight, scheme), x)


def test_four_bits_lose_less_than_half_of_what_rounding_loses_on_correlated_inputs() -> None:
    rng = np.random.default_rng(0)
    weight = rng.standard_normal((64, 256)).astype(np.float32)
    x, held_out = np.split(correlated(rng, 4000, 256), 2)
    made = solved(weight, x, INT4)
    assert lost(weight, made, x) < 0.5 * lost(weight, rtn(weight, INT4), x)
    assert lost(weight, made, held_out) < 0.6 * lost(weight, rtn(weight, INT4), held_out)


@pytest.mark.parametrize("symmetric", [True, False])
def test_with_independent_columns_it_is_rounding_to_nearest(symmetric: bool) -> None:
    weight = np.random.default_rng(1).standard_normal((16, 128)).astype(np.float32)
    scheme = Scheme(4, 32, symmetric)
    made, plain = gptq(weight, [curvature(np.eye(128))], scheme), rtn(weight, scheme)
    assert np.array_equal(made.codes, plain.codes)
    assert np.array_equal(made.scales, plain.scales)
    assert (made.zeros is None) == symmetric


def test_the_factor_is_the_upper_cholesky_factor_of_the_damped_inverse() -> None:
    x = np.random.default_rng(2).standard_normal((100, 12))
    hessian = x.T @ x
    found = curvature(hessian).factor.astype(np.float64)
    damped = hessian + 0.01 * np.diag(hessian).mean() * np.eye(12)
    assert np.array_equal(found, np.triu(found))
    np.testing.assert_allclose(found.T @ found @ damped, np.eye(12), atol=1e-5)


def test_parts_that_have_nothing_to_do_with_each_other_are_solved_as_if_alone() -> None:
    rng = np.random.default_rng(3)
    weight, x = rng.standard_normal((8, 128)).astype(np.float32), correlated(rng, 300, 64)
    one, two = (curvature(part.T @ part) for part in (x, x[::-1] ** 3))
    together = gptq(weight, [one, two], INT4)
    apart = [gptq(weight[:, :64], [one], INT4), gptq(weight[:, 64:], [two], INT4)]
    assert np.array_equal(together.codes, np.hstack([made.codes for made in apart]))
    assert np.array_equal(together.scales, np.hstack([made.scales for made in apart]))


@given(groups=st.integers(1, 700), size=st.sampled_from(GROUP_SIZES))
def test_parts_are_equal_hold_whole_groups_and_are_not_too_wide(groups: int, size: int) -> None:
    width = part_width(groups * size, size)
    assert width % size == 0
    assert groups * size % width == 0
    assert width <= WIDEST


def test_a_wide_matrix_is_cut_into_few_parts() -> None:
    assert (part_width(3584, 32), part_width(18944, 32), part_width(18944, 128)) == (3584, 4736, 4736)


def test_a_gram_matrix_adds_up_what_it_is_given_in_pieces() -> None:
    x = np.random.default_rng(4).standard_normal((50, 64)).astype(np.float32)
    gram = Gram(64, 32)
    for piece in (x[:20], x[20:20], x[20:]):
        gram.add(piece)
    np.testing.assert_allclose(gram.parts[0], x.T @ x, rtol=1e-5, atol=1e-5)
    assert (gram.felt() > 0).all()


@pytest.mark.parametrize("silent", [slice(0, 5), slice(32, 64), slice(None)])
def test_columns_that_never_got_anything_are_rounded_all_the_same(silent: slice) -> None:
    rng = np.random.default_rng(5)
    weight, x = rng.standard_normal((8, 64)).astype(np.float32), correlated(rng, 200, 64)
    x[:, silent] = 0
    made = solved(weight, x, INT4)
    assert np.isfinite(made.scales).all()
    step = np.abs(made.scales).repeat(32, axis=1)
    assert (np.abs(weight - dequantize(made))[:, silent] <= 2 * step[:, silent]).all()


def test_fewer_positions_than_columns_and_a_matrix_of_zeros_are_no_trouble() -> None:
    rng = np.random.default_rng(6)
    weight = rng.standard_normal((8, 64)).astype(np.float32)
    few = correlated(rng, 3, 64)
    assert lost(weight, solved(weight, few, INT4), few) <= lost(weight, rtn(weight, INT4), few)
    assert not dequantize(solved(np.zeros_like(weight), few, INT4)).any()


def test_a_hessian_that_rounding_left_indefinite_is_damped_more_and_one_that_is_not_finite_refused() -> None:
    indefinite = np.diag([1.0, 1.0, -0.05])
    assert np.isfinite(curvature(indefinite).factor).all()
    with pytest.raises(EdgeOmniError, match="not finite"):
        curvature(np.diag([1.0, np.nan]))


def test_rows_do_not_depend_on_each_other() -> None:
    rng = np.random.default_rng(7)
    weight, x = rng.standard_normal((20, 64)).astype(np.float32), correlated(rng, 100, 64)
    whole, some = solved(weight, x, INT4), solved(weight[3:9], x, INT4)
    assert np.array_equal(whole.codes[3:9], some.codes)


def test_half_precision_weights_get_scales_of_their_own_type() -> None:
    rng = np.random.default_rng(8)
    weight, x = rng.standard_normal((8, 64)).astype(np.float16), correlated(rng, 100, 64)
    made = solved(weight, x, INT4)
    assert made.scales.dtype == np.float16
    assert lost(weight, made, x) < lost(weight, rtn(weight, INT4), x)


@pytest.mark.parametrize("bits", [2, 4, 8])
def test_a_search_that_knows_what_is_felt_loses_less_of_it(bits: Bits) -> None:
    rng = np.random.default_rng(9)
    weight = rng.standard_normal((64, 256)).astype(np.float32)
    x = (rng.standard_normal((500, 256)) * np.exp(rng.normal(0, 1.5, 256))).astype(np.float32)
    scheme = Scheme(bits, 32)
    gram = Gram(256, 32)
    gram.add(x)
    assert lost(weight, rtn(weight, scheme, gram.felt()), x) < lost(weight, rtn(weight, scheme), x)
