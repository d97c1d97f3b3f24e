"""Packing: the layout of MatMulNBits and GatherBlockQuantized, judged by ONNX Runtime's own quantizer and kernels."""

from typing import Any

import numpy as np
import onnx_ir as ir
import onnxruntime as ort
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from onnxruntime.capi import _pybind_state as native

from quant.affine import Quantized, dequantize, middle
from quant.pack import pack, pack_bits, unpack, unpack_bits

BITS = (2, 4, 8)
GROUPS = (16, 32, 64, 128, 256)


@st.composite
def matrices(draw: st.DrawFn) -> Quantized:
    bits, size, rows, groups = draw(
        st.tuples(st.sampled_from(BITS), st.sampled_from(GROUPS), st.integers(1, 5), st.integers(1, 5))
    )
    return random_matrix(bits, size, rows, groups, draw(st.booleans()), draw(st.integers(0, 2**32 - 1)))


def random_matrix(bits: int, size: int, rows: int, groups: int, symmetric: bool, seed: int = 0) -> Quantized:
    rng = np.random.default_rng(seed)
    codes = rng.integers(0, 2**bits, (rows, groups * size), dtype=np.uint8)
    scales = rng.standard_normal((rows, groups), np.float32)
    zeros = None if symmetric else rng.integers(0, 2**bits, (rows, groups), dtype=np.uint8)
    return Quantized(codes, scales, zeros, bits)


@given(matrices())
def test_what_is_packed_comes_back(matrix: Quantized) -> None:
    back = unpack(pack(matrix), matrix.bits)
    np.testing.assert_array_equal(back.codes, matrix.codes)
    np.testing.assert_array_equal(back.scales, matrix.scales)
    assert (back.zeros is None) == (matrix.zeros is None)
    if matrix.zeros is not None:
        np.testing.assert_array_equal(back.zeros, matrix.zeros)


def test_the_first_code_lies_in_the_lowest_bits() -> None:
    assert pack_bits(np.array([1, 2], np.uint8), 4).tolist() == [0x21]
    assert pack_bits(np.array([1, 2, 3, 0], np.uint8), 2).tolist() == [0b00_11_10_01]
    assert unpack_bits(np.array([0x21], np.uint8), 4).tolist() == [1, 2]


@given(matrices())
def test_the_zeros_of_a_row_fill_whole_bytes(matrix: Quantized) -> None:
    packed, (rows, groups) = pack(matrix), matrix.scales.shape
    assert packed.codes.shape == (rows, groups, matrix.codes.shape[1] // groups * matrix.bits // 8)
    if packed.zeros is not None:
        assert packed.zeros.shape == (rows, -(-groups * matrix.bits // 8))


@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("bits", BITS)
def test_the_layout_is_that_of_the_quantizer_inside_onnx_runtime(bits: int, symmetric: bool) -> None:
    """What the native quantizer wrote, read with `unpack` and packed again, gives the same bytes and the weight."""
    rows, columns, size = 24, 256, 32
    groups = columns // size
    weight = np.random.default_rng(1).standard_normal((rows, columns), np.float32)
    codes = np.zeros((rows, groups, size * bits // 8), np.uint8)
    scales, zeros = np.zeros((rows, groups), np.float32), np.zeros((rows, -(-groups * bits // 8)), np.uint8)
    quantize = getattr(native, f"quantize_matmul_{bits}bits")
    quantize(
        codes, np.ascontiguousarray(weight.T), scales.reshape(-1), zeros.reshape(-1), size, rows, columns, symmetric
    )
    stored = Quantized(
        unpack_bits(codes.reshape(rows, -1), bits),
        scales,
        None if symmetric else unpack_bits(zeros, bits)[:, :groups],
        bits,
    )
    again = pack(stored)
    np.testing.assert_array_equal(again.codes, codes)
    if again.zeros is not None:
        np.testing.assert_array_equal(again.zeros, zeros)
    step = np.abs(scales).repeat(size, 1)
    assert (np.abs(dequantize(stored) - weight) <= 1.001 * step).all()


@settings(max_examples=25, deadline=None)
@given(matrices(), st.booleans())
def test_the_kernels_read_what_was_packed(matrix: Quantized, biased: bool) -> None:
    """MatMulNBits in fp32 equals the product with the dequantized matrix, and GatherBlockQuantized gives its rows."""
    weight = dequantize(matrix)
    x = np.random.default_rng(0).standard_normal((3, weight.shape[1]), np.float32)
    bias = np.arange(len(weight), dtype=np.float32) if biased else None
    np.testing.assert_allclose(
        product(matrix, x, bias), x @ weight.T + (0 if bias is None else bias), rtol=0, atol=1e-5 * np.abs(weight).sum()
    )
    np.testing.assert_array_equal(looked_up(matrix, np.arange(len(weight))), weight)


@pytest.mark.parametrize("bits", BITS)
def test_int8_activations_cost_about_a_hundredth(bits: int) -> None:
    matrix = random_matrix(bits, 32, rows=64, groups=8, symmetric=True)
    weight = dequantize(matrix)
    x = np.random.default_rng(0).standard_normal((5, weight.shape[1]), np.float32)
    error = product(matrix, x, accuracy_level=4) - x @ weight.T
    assert 1e-5 < np.abs(error).max() / np.abs(x @ weight.T).max() < 2e-2


def test_without_zeros_the_middle_code_is_zero() -> None:
    for bits in BITS:
        scales = np.ones((1, 1), np.float32)
        matrix = Quantized(np.full((1, 32), middle(bits), np.uint8), scales, None, bits)
        assert not dequantize(matrix).any()
        assert not product(matrix, np.ones((1, 32), np.float32)).any()


def product(matrix: Quantized, x: np.ndarray, bias: np.ndarray | None = None, **attributes: int) -> np.ndarray:
    """x times the transposed matrix by MatMulNBits alone."""
    packed, (rows, groups) = pack(matrix), matrix.scales.shape
    columns = matrix.codes.shape[1]
    inputs = {"x": x, "codes": packed.codes, "scales": packed.scales, "zeros": packed.zeros, "": None, "bias": bias}
    sizes = {"N": rows, "K": columns, "bits": matrix.bits, "block_size": columns // groups}
    return run("MatMulNBits", inputs, sizes | attributes)


def looked_up(matrix: Quantized, ids: np.ndarray) -> np.ndarray:
    packed, (rows, groups) = pack(matrix), matrix.scales.shape
    inputs = {"codes": packed.codes.reshape(rows, -1), "ids": ids, "scales": packed.scales, "zeros": packed.zeros}
    size = matrix.codes.shape[1] // groups
    return run(
        "GatherBlockQuantized", inputs, {"gather_axis": 0, "quantize_axis": 1, "block_size": size, "bits": matrix.bits}
    )


def run(kind: str, inputs: dict[str, Any], attributes: dict[str, int]) -> np.ndarray:
    """One node of ONNX Runtime's own domain; all that it reads but x and ids are stored."""
    values = {
        name: ir.Value(name=name, type=ir.TensorType(ir.DataType.from_numpy(array.dtype)), shape=ir.Shape(array.shape))
        for name, array in inputs.items()
        if array is not None
    }
    fed = [name for name in values if name in ("x", "ids")]
    for name in values.keys() - set(fed):
        values[name].const_value = ir.tensor(inputs[name], name=name)
    listed = [values.get(name) for name in inputs]
    node = ir.node(kind, listed, attributes, domain="com.microsoft", version=1)
    node.outputs[0].name, node.outputs[0].type = "y", ir.TensorType(ir.DataType.FLOAT)
    stored = [value for name, value in values.items() if name not in fed]
    graph = ir.Graph(
        [values[name] for name in fed],
        node.outputs,
        nodes=[node],
        initializers=stored,
        opset_imports={"": 21, "com.microsoft": 1},
        name="one",
    )
    session = ort.InferenceSession(ir.to_proto(ir.Model(graph, ir_version=10)).SerializeToString())
    return np.asarray(session.run(None, {name: inputs[name] for name in fed})[0])
