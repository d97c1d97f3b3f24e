"""Matrices as integers: what brings two ways of storing together changes no value."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from runtime.integers import GROUP_SIZES, WIDEST, Form, Quantized, common_form, dequantize, even_groups

ROWS, COLUMNS = 3, 256


def matrix(form: Form, seed: int) -> Quantized:
    rng = np.random.default_rng(seed)
    groups = (ROWS, COLUMNS // form.group_size)
    zeros = None if form.symmetric else rng.integers(0, 2**form.bits, groups, np.uint8)
    scales = rng.standard_normal(groups).astype(np.float32)
    return Quantized(rng.integers(0, 2**form.bits, (ROWS, COLUMNS), np.uint8), scales, zeros, form.bits)


forms = st.builds(Form, st.sampled_from([2, 4, 8]), st.sampled_from([16, 32, 64, 128]), st.booleans())


@given(st.lists(forms, min_size=1, max_size=3), st.integers(0, 99))
def test_matrices_in_several_forms_are_brought_to_one_without_loss(given_forms: list[Form], seed: int) -> None:
    common = common_form(given_forms)
    assert common is not None
    for form in given_forms:
        stored = matrix(form, seed)
        brought = stored.brought_to(common)
        assert (brought.bits, brought.zeros is None) == (common.bits, common.symmetric)
        assert brought.scales.shape == (ROWS, COLUMNS // common.group_size)
        assert brought.codes.max() < 2**common.bits
        assert dequantize(brought).tobytes() == dequantize(stored).tobytes()


def test_what_would_lose_is_refused() -> None:
    for worse in (Form(2, 32, False), Form(4, 64, False), Form(4, 32, True)):
        with pytest.raises(ValueError, match="cannot be stored as"):
            matrix(Form(4, 32, symmetric=False), 0).brought_to(worse)


def test_floats_and_other_orders_have_no_form_in_common() -> None:
    one, other = (Form(4, 32, True, order=tuple(range(first, 256 + first))) for first in (0, 1))
    assert common_form([one, one]) == one
    assert common_form([one, other]) is None and common_form([one, None]) is None and common_form([]) is None


@given(st.lists(st.integers(1, 40), min_size=1, max_size=4), st.sampled_from([2, 4, 8]))
def test_the_groups_chosen_are_the_widest_that_mix_nothing(widths: list[int], bits: int) -> None:
    group_of = np.repeat(np.arange(len(widths)), [16 * width for width in widths])
    fitting = [size for size in GROUP_SIZES if size <= WIDEST[bits] and all(16 * width % size == 0 for width in widths)]
    assert even_groups(group_of, bits) == fitting[0]
    assert even_groups(group_of[1:], bits) is None
