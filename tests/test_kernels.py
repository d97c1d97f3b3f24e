"""The lint that says whether ONNX Runtime has a kernel for every node, and the tables that it reads."""

import ctypes
import importlib
import shutil
from collections.abc import Callable, Sequence
from itertools import product
from typing import Any

import numpy as np
import onnx_ir as ir
import onnxruntime as ort
import pytest
from hypothesis import given
from hypothesis import strategies as st
from onnxscript import GraphBuilder

from export.dump_kernels import (
    DOMAINS,
    PROVIDERS,
    TABLE,
    build_library,
    formal,
    merged,
    table,
    tensor_types,
    write_table,
)
from export.families.baichuan_omni_1_5 import subgraphs
from export.graph import CONTRIB, FLOAT, FLOAT16, IR_VERSION, OPSET, contrib, ints
from export.kernels import lint, tables
from runtime.bundle import Profile
from tests.tiny import golden_config

Shape = Sequence[int | str]
registry: Any = importlib.import_module("onnxruntime.capi._pybind_state")


def model(
    body: Callable, *inputs: tuple[ir.DataType, Shape], opset: int = OPSET, outputs: Sequence[ir.DataType] = (FLOAT,)
) -> ir.Model:
    """A graph whose inputs x0, x1, ... go through `body(op, *values)`."""
    graph = ir.Graph([], [], nodes=[], opset_imports={"": opset, CONTRIB: 1}, name="test")
    builder = GraphBuilder(graph)
    values = [builder.input(f"x{i}", dtype, list(shape)) for i, (dtype, shape) in enumerate(inputs)]
    results = body(builder.op, *values)
    results = results if isinstance(results, tuple | list) else (results,)
    for i, (value, dtype) in enumerate(zip(results, outputs, strict=False)):
        value.type = value.type or ir.TensorType(dtype)
        builder.add_output(value, f"y{i}")
    return ir.Model(graph, ir_version=IR_VERSION)


ROWS: Shape = (1, 4, "t")


@pytest.mark.parametrize("profile", ["cpu", "cuda"])
def test_every_graph_of_the_family_has_a_kernel_for_every_node(profile: Profile):
    found = {graph.name: lint(graph.model, profile) for graph in subgraphs(golden_config(), profile)}
    assert found
    assert {name: problems for name, problems in found.items() if problems} == {}


def test_an_operator_that_is_only_a_function_body_is_reported_on_both_providers():
    mish = model(lambda op, x: op.Mish(x), (FLOAT, ROWS))
    assert ["no cuda kernel" in line and line.startswith("Mish") for line in lint(mish, "cuda")] == [True]
    assert ["no cpu kernel" in line for line in lint(mish, "cpu")] == [True]


def attention(dtype: ir.DataType) -> ir.Model:
    def body(op, q, k, past_key, past_value, lengths, total):
        return contrib(
            op, "GroupQueryAttention", q, k, k, past_key, past_value, lengths, total,
            num_heads=2, kv_num_heads=1, _outputs=3, dtype=dtype,
        )  # fmt: skip

    int32 = ir.DataType.INT32
    cache = (dtype, (1, 1, "past", 16))
    rows = (dtype, (1, 1, 32)), (dtype, (1, 1, 16)), cache, cache, (int32, (1,)), (int32, ())
    return model(body, *rows, outputs=(dtype,))


def test_attention_in_a_type_that_cuda_lacks_is_reported_with_the_types_it_has():
    (line,) = lint(attention(FLOAT), "cuda")
    assert "GroupQueryAttention" in line and "T = float" in line and "T = float16" in line
    assert lint(attention(FLOAT), "cpu") == []
    assert lint(attention(FLOAT16), "cuda") == []


def test_a_fourier_transform_is_reported_on_cuda_and_passes_on_the_cpu():
    def body(op, wave):
        return op.STFT(wave, op.Constant(value_int=4), op.Constant(value_floats=[1.0] * 16))

    transform = model(body, (FLOAT, (1, "t", 1)))
    assert ["STFT" in line for line in lint(transform, "cuda")] == [True]
    assert lint(transform, "cpu") == []


def test_a_type_without_a_cuda_kernel_is_reported_where_other_types_have_one():
    wide = model(lambda op, x: op.ArgMax(x), (ir.DataType.INT64, ("a", "b")), outputs=(ir.DataType.INT64,))
    assert ["T = int64" in line for line in lint(wide, "cuda")] == [True]
    assert lint(model(lambda op, x: op.ArgMax(x), (FLOAT, ("a", "b"))), "cuda") == []


def test_half_precision_is_reported_on_the_cpu_where_it_would_be_cast():
    weights = np.ones((4, 4, 3), np.float16)
    conv = model(lambda op, x: op.Conv(x, op.Constant(value=ir.tensor(weights))), (FLOAT16, ROWS), outputs=(FLOAT16,))
    assert ["T = float16" in line for line in lint(conv, "cpu")] == [True]
    assert lint(conv, "cuda") == []


@pytest.mark.parametrize("pads,expected", [([1, 2], 1), ([1, 1], 0)])
def test_a_transposed_convolution_padded_on_one_side_is_reported(pads, expected):
    weights = ir.tensor(np.ones((4, 4, 4), np.float32))
    up = model(lambda op, x: op.ConvTranspose(x, op.Constant(value=weights), strides=[2], pads=pads), (FLOAT, ROWS))
    assert len(lint(up, "cuda")) == expected
    assert lint(up, "cpu") == []


def test_a_kernel_without_an_end_does_not_serve_a_newer_version_of_its_operator():
    assert lint(model(lambda op, x: op.Elu(x), (FLOAT, ROWS), opset=21), "cuda") == []
    assert len(lint(model(lambda op, x: op.Elu(x), (FLOAT, ROWS), opset=22), "cuda")) == 1


def test_what_the_lint_refuses_on_the_cpu_onnx_runtime_cannot_open():
    def draws(opset: int) -> ir.Model:
        return model(lambda op, x: op.RandomNormalLike(x, dtype=1), (FLOAT, ROWS), opset=opset)

    def openable(graph: ir.Model) -> bool:
        try:
            ort.InferenceSession(ir.to_proto(graph).SerializeToString(), providers=["CPUExecutionProvider"])
        except registry.NotImplemented:
            return False
        return True

    assert [bool(lint(draws(opset), "cpu")) for opset in (21, 22)] == [False, True]
    assert [openable(draws(opset)) for opset in (21, 22)] == [True, False]


def test_an_operator_that_nobody_knows_is_reported():
    (line,) = lint(model(lambda op, x: contrib(op, "Frobnicate", x, dtype=FLOAT), (FLOAT, ROWS)), "cpu")
    assert "Frobnicate" in line and "does not know" in line


def test_an_operator_newer_than_the_opset_is_reported():
    graph = model(lambda op, x: op.Sin(x), (FLOAT, ROWS))
    next(iter(graph.graph)).op_type = "RMSNormalization"  # from opset 23
    assert ["does not know" in line for line in lint(graph, "cpu")] == [True]


def test_an_unknown_type_is_reported_rather_than_passed():
    graph = model(lambda op, x: op.Sin(x), (FLOAT, ROWS))
    graph.graph.inputs[0].type = None
    assert ["the type of x0" in line and "unknown" in line for line in lint(graph, "cpu")] == [True]


def test_types_that_the_author_left_open_follow_from_the_schema():
    def body(op, x):
        quantized, scale, zero = op.DynamicQuantizeLinear(op.Neg(op.Cast(x, to=FLOAT.value)), _outputs=3)
        return op.DequantizeLinear(quantized, scale, zero)

    graph = model(body, (ir.DataType.INT64, ROWS))
    for node in graph.graph:
        for value in node.outputs:
            value.type = None
    assert lint(graph, "cpu") == []


def test_an_annotation_that_the_schema_contradicts_is_reported():
    def body(op, x, skip, weight):
        return contrib(op, "SkipSimplifiedLayerNormalization", x, skip, weight, _outputs=4, dtype=FLOAT16)

    halves = [(FLOAT16, (1, 2, 8)), (FLOAT16, (1, 2, 8)), (FLOAT16, (8,))]
    lines = lint(model(body, *halves, outputs=(FLOAT16,)), "cuda")
    assert len(lines) == 2  # mean and inverse deviation are always float32
    assert all("noted as float16, but must be float" in line for line in lines)


def test_arithmetic_on_shapes_may_run_on_the_host():
    def body(op, x, chosen):
        size = op.Slice(op.Shape(x), ints(op, 2), ints(op, 3))
        best = op.ArgMax(op.Concat(size, chosen, axis=0), axis=0)  # int64: a CPU kernel alone
        return op.Gather(x, best, axis=2)

    small = model(body, (FLOAT, ROWS), (ir.DataType.INT64, (3,)))
    assert lint(small, "cuda") == []
    large = model(body, (FLOAT, ROWS), (ir.DataType.INT64, (3, 3)))
    assert ["ArgMax" in line for line in lint(large, "cuda")] == [True]


def test_the_nodes_inside_a_branch_are_linted_too():
    outer = model(lambda op, x, flag: op.Identity(x), (FLOAT, ROWS), (ir.DataType.BOOL, ()))
    mish = ir.Node("", "Mish", [outer.graph.inputs[0]], name="inside")
    mish.outputs[0].type = ir.TensorType(FLOAT)
    body = ir.Graph([], [mish.outputs[0]], nodes=[mish], name="then")
    branch = ir.Node("", "If", [outer.graph.inputs[1]], [ir.AttrGraph("then_branch", body)], name="branch")
    branch.outputs[0].type = ir.TensorType(FLOAT)
    outer.graph.append(branch)
    assert ["inside" in line for line in lint(outer, "cpu")] == [True]


@pytest.mark.skipif(ort.__version__ != tables().release, reason="the tables are of another ONNX Runtime")
@pytest.mark.skipif("TensorrtExecutionProvider" in ort.get_available_providers(), reason="needs the CPU wheel")
def test_the_cpu_tables_are_what_the_installed_onnx_runtime_registers(tmp_path):
    read = {
        "onnxruntime": ort.__version__,
        "kernels": [
            (PROVIDERS[k.provider], k.domain, k.op_name, *k.version_range, k.type_constraints)
            for k in registry.get_all_opkernel_def()
            if k.provider in PROVIDERS and k.domain in DOMAINS
        ],
        "schemas": [
            (s.domain, s.name, s.since_version, [*map(formal, s.inputs)], [*map(formal, s.outputs)])
            for s in registry.get_all_operator_schema()
            if s.domain in DOMAINS
        ],
    }
    write_table(table(read), tmp_path / "here.json")
    here, stored = (path.read_text().split('"cpu": ')[1] for path in (tmp_path / "here.json", TABLE))
    assert here == stored


names = st.sampled_from(["float", "float16", "int64"])
kernels_of_two = st.lists(
    st.fixed_dictionaries({"T": st.frozensets(names, min_size=1), "U": st.frozensets(names, min_size=1)})
)


@given(kernels_of_two)
def test_merging_kernels_serves_the_same_combinations_of_types(kernels):
    def served(listed):
        return {pair for kernel in listed for pair in product(kernel["T"], kernel["U"])}

    assert served(merged(kernels)) == served(kernels)
    assert len(merged(kernels)) <= len(kernels)


def test_kernels_of_sequences_alone_are_left_out():
    assert tensor_types({"T": ["seq(tensor(float))"]}) is None
    assert tensor_types({"T": ["tensor(float)", "seq(tensor(float))"]}) == {"T": frozenset({"float"})}


@pytest.mark.skipif(shutil.which("cc") is None, reason="needs a C compiler")
@pytest.mark.parametrize("versioned", [False, True])
def test_a_stub_library_answers_every_call_with_success(tmp_path, versioned):
    path = tmp_path / "libstub.so.1"
    build_library(path, {"first", "second"}, versioned)
    assert ctypes.CDLL(str(path)).second() == 0
