"""Rewriting a graph: it computes what the float graph computes with the rounded weights, and what must not is left."""

from collections import Counter
from dataclasses import replace
from pathlib import Path

import numpy as np
import onnx_ir as ir
import pytest

from export.decoder import embed_tokens, lm_head
from export.graph import Subgraph
from export.vision_encoder import vision_projector
from quant.affine import dequantize
from quant.plan import open_bundle, plan
from quant.quantize import quantize, write_matrix
from quant.rewrite import Weight, external_files, open_graph, padded_rows, quantize_uses, save_graph, weights
from quant.rtn import rtn
from quant.scheme import Recipe, Scheme, parse_recipe
from runtime.bundle import Graph, Manifest, read_bundle
from runtime.session import Session
from tests.tiny import golden_config, omni_bundle, random_graphs

EXACT = """[weights]
"hift.*" = "keep"
"vad.*" = "keep"
"*embed*" = { bits = 8, group_size = [32, 16], symmetric = false, activations = "float" }
"*" = { bits = 4, group_size = [32, 16], activations = "float" }
"""


@pytest.fixture(scope="module")
def recipe() -> Recipe:
    return parse_recipe("exact", EXACT)


@pytest.fixture(scope="module")
def quantized(recipe: Recipe, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Manifest]:
    folder = tmp_path_factory.mktemp("rewrite") / "quantized"
    return folder, quantize(omni_bundle(), folder, recipe)


@pytest.fixture(scope="module")
def rounded(recipe: Recipe, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Graph]]:
    """The float graphs with every weight rounded as the recipe says, but still stored as floats."""
    folder = tmp_path_factory.mktemp("rounded")
    for graph in plan(open_bundle(omni_bundle()), recipe).graphs:
        for item in graph.decided:
            if item.weight.file is not None or item.scheme is not None:
                values = item.weight.rows(0, item.weight.shape[0])
                values = values if item.scheme is None else dequantize(rtn(values, item.scheme))
                item.weight.value.const_value = ir.tensor(values, name=item.weight.name)
        save_graph(graph.model, folder / graph.graph.file)
    return folder, read_bundle(omni_bundle()).graphs


SIZES = {"sequence": 3, "cache": 8, "n": 8, "frames": 16, "past": 0, "rows": 16}


def feeds(graph: Graph) -> dict[str, np.ndarray]:
    """Random values for every port; ids stay small, a decoder reads its positions from the start."""
    rng = np.random.default_rng(0)
    made = {}
    for port in graph.inputs:
        shape = tuple(SIZES.get(size, 4) if isinstance(size, str) else size for size in port.shape)
        if port.dtype.startswith("float"):
            made[port.name] = np.asarray(np.abs(rng.standard_normal(shape)), port.dtype)
        elif port.name == "forced":
            made[port.name] = np.full(shape, -1, port.dtype)
        else:
            made[port.name] = np.asarray(rng.integers(0, 2, shape), port.dtype)
    return made | positions(graph)


def positions(graph: Graph) -> dict[str, np.ndarray]:
    if not any(port.name == "seqlens_k" for port in graph.inputs):
        return {}
    count = SIZES["sequence"]
    return {"seqlens_k": np.array([count - 1], np.int32), "total_sequence_length": np.array(count, np.int32)}


GRAPHS = (
    "embed_tokens embed_audio decoder lm_head audio_head "
    "vision_projector audio_encoder audio_decoder flow_prenet flow_estimator"
)


@pytest.mark.parametrize("name", GRAPHS.split())
def test_a_quantized_graph_computes_with_the_rounded_weights(name: str, quantized, rounded) -> None:
    (folder, manifest), (float_folder, graphs) = quantized, rounded
    assert any(weight.graph == name for weight in manifest.quantization.quantized)
    fed = feeds(graphs[name])
    results, expected = (
        Session(folder, manifest.graphs[name]).run(**fed),
        Session(float_folder, graphs[name]).run(**fed),
    )
    for port in graphs[name].outputs:
        want, found = expected[port.name], results[port.name]
        if want.dtype.kind == "f":
            np.testing.assert_allclose(found, want, rtol=0, atol=1e-4 * max(1, np.abs(want).max(initial=0)))
        else:
            np.testing.assert_array_equal(found, want)


def test_no_matrix_that_was_quantized_stays_in_the_graph_as_floats(quantized) -> None:
    folder, manifest = quantized
    for name, graph in manifest.graphs.items():
        left = {weight.name for weight in weights(open_graph(folder / graph.file))}
        gone = {weight.name for weight in manifest.quantization.quantized if weight.graph == name}
        assert not left & gone
        assert {f"{weight}.scales" for weight in gone} <= left


def test_codebooks_and_convolutions_stay_floats_although_a_star_matches_them(quantized) -> None:
    _, manifest = quantized
    kept = {(weight.graph, weight.name): weight.reason for weight in manifest.quantization.kept}
    codebooks = [place for place in kept if place[1].endswith("codebook.embed")]
    assert {graph for graph, _ in codebooks} == {"audio_encoder", "audio_decoder"}
    assert "not a matrix" in kept["audio_encoder", "audio_tokenizer.audio_model.conv1.weight"]
    assert any(name.endswith("unfolded_weight") for _, name in kept)
    changed = {weight.name for weight in manifest.quantization.quantized}
    assert not any("codebook" in name or "unfolded" in name for name in changed)


def kinds(model: ir.Model) -> Counter[str]:
    return Counter(node.op_type for node in model.graph)


def test_a_bias_moves_into_the_operator_on_a_cpu(quantized) -> None:
    folder, _ = quantized
    before, after = (
        kinds(open_graph(omni_bundle() / "vision_projector.onnx")),
        kinds(open_graph(folder / "vision_projector.onnx")),
    )
    assert before["FusedMatMul"] == after["MatMulNBits"] == 2
    assert before["Add"] - after["Add"] == 2


def alone(subgraph: Subgraph, folder: Path) -> tuple[ir.Model, dict[str, Weight], dict[str, np.ndarray]]:
    """A graph with random weights, by name, as a float bundle's would be."""
    graphs, tensors = random_graphs(subgraph)
    model = open_graph(graphs.folder / f"{subgraph.name}.onnx")
    return model, {weight.name: weight for weight in weights(model)}, tensors


def store(weight: Weight, scheme: Scheme, rows: int, folder: Path, name: str):
    with (folder / name).open("wb") as out:
        return write_matrix(weight, scheme, rows, out, name)


def run(subgraph: Subgraph, folder: Path, model: ir.Model, **fed: np.ndarray) -> dict[str, np.ndarray]:
    save_graph(model, folder / "one.onnx")
    graph = Graph("one.onnx", external_files(model), subgraph.inputs, subgraph.outputs, "test", 0, 0)
    return Session(folder, graph).run(**fed)


@pytest.mark.parametrize(("bits", "rows"), [(4, 128), (8, 128)])
def test_on_cuda_a_product_is_padded_to_what_its_kernels_take_and_cut_again(bits, rows: int, tmp_path: Path) -> None:
    config = replace(golden_config().decoder, vocab_size=100)
    subgraph = lm_head(config, "cuda")
    model, found, tensors = alone(subgraph, tmp_path)
    weight = found["lm_head.weight"]
    assert padded_rows(100, bits, "cuda") == rows
    assert padded_rows(100, bits, "cpu") == 100
    matrix = store(weight, Scheme(bits, 32), rows, tmp_path, "lm_head.data")
    quantize_uses(model, weight, matrix, "cuda", tmp_path)
    x = np.random.default_rng(0).standard_normal((3, config.hidden_size)).astype(np.float16)
    logits = run(subgraph, tmp_path, model, hidden=x)["logits"]
    assert matrix.dtype == np.float16
    expected = x.astype(np.float32) @ dequantize(rtn(tensors["lm_head.weight"].astype(np.float16), Scheme(bits, 32))).T
    np.testing.assert_allclose(logits, expected, atol=5e-3 * np.abs(expected).max())


def test_on_cuda_a_bias_stays_outside_the_operator(tmp_path: Path) -> None:
    vision = golden_config().visual_config
    assert vision is not None
    subgraph = vision_projector(vision, "cuda")
    model, found, _ = alone(subgraph, tmp_path)
    adds = kinds(model)["Add"]
    for name, weight in found.items():
        if weight.obstacle() is None:
            rows = padded_rows(weight.shape[0], 4, "cuda")
            quantize_uses(model, weight, store(weight, Scheme(4, 32), rows, tmp_path, name), "cuda", tmp_path)
    assert kinds(model)["MatMulNBits"] == 2
    assert kinds(model)["Add"] == adds
    assert not any("accuracy_level" in node.attributes for node in model.graph)


def test_a_table_and_a_head_that_share_a_weight_read_the_same_bytes(tmp_path: Path) -> None:
    config = golden_config().decoder
    table, head = embed_tokens(config, "cpu"), lm_head(config, "cpu")
    weight = np.random.default_rng(0).standard_normal((config.vocab_size, config.hidden_size)).astype(np.float32)
    tensors = {"model.embed_tokens.weight": weight, "lm_head.weight": weight}
    graphs, _ = random_graphs(table, head, tensors=tensors)
    scheme = Scheme(4, 32, activations="float")
    models = {name: open_graph(graphs.folder / f"{name}.onnx") for name in ("embed_tokens", "lm_head")}
    matrix = store(next(weights(models["lm_head"])), scheme, config.vocab_size, tmp_path, "shared.data")
    for model in models.values():
        quantize_uses(model, next(w for w in weights(model) if w.obstacle() is None), matrix, "cpu", tmp_path)
    assert external_files(models["embed_tokens"]) == external_files(models["lm_head"]) == ("shared.data",)
    rows = run(table, tmp_path, models["embed_tokens"], ids=np.arange(config.vocab_size))["rows"]
    np.testing.assert_array_equal(rows, dequantize(rtn(weight, scheme)))
    logits = run(head, tmp_path, models["lm_head"], hidden=np.eye(config.hidden_size, dtype=np.float32))["logits"]
    np.testing.assert_allclose(logits, rows.T, atol=1e-5 * np.abs(rows).max())


def test_the_accuracy_level_follows_the_scheme_and_the_profile(tmp_path: Path) -> None:
    levels = {}
    for activations in ("int8", "float"):
        model, found, _ = alone(lm_head(golden_config().decoder, "cpu"), tmp_path)
        weight, scheme = found["lm_head.weight"], Scheme(4, 32, activations=activations)
        matrix = store(weight, scheme, weight.shape[0], tmp_path, "lm_head.data")
        quantize_uses(model, weight, matrix, "cpu", tmp_path)
        node = next(node for node in model.graph if node.op_type == "MatMulNBits")
        levels[activations] = node.attributes.get_int("accuracy_level", 0)
    assert levels == {"int8": 4, "float": 0}


@pytest.mark.parametrize("attribute", [{"alpha": -2.0}, {"transA": 1}, {"transB": 0}, {"transBatchB": 1}])
def test_a_product_that_is_not_a_plain_linear_layer_needs_floats(attribute: dict[str, float]) -> None:
    for attributes, fits in (({"transB": 1}, True), ({"transB": 1} | attribute, False)):
        weight = ir.Value(name="weight", const_value=ir.tensor(np.zeros((32, 32), np.float32)))
        x = ir.Value(name="x")
        node = ir.node("FusedMatMul", [x, weight], attributes, domain="com.microsoft")
        graph = ir.Graph([x], node.outputs, nodes=[node], initializers=[weight], opset_imports={"": 21}, name="one")
        assert (next(weights(ir.Model(graph, ir_version=10))).obstacle() is None) == fits


def test_rows_of_a_weight_are_read_from_its_file_alone(tmp_path: Path) -> None:
    values = np.random.default_rng(0).standard_normal((9, 5)).astype(np.float32)
    (tmp_path / "one.data").write_bytes(bytes(64) + values.tobytes())
    weight = Weight(ir.Value(name="w"), "w", (9, 5), values.dtype, tmp_path / "one.data", 64)
    np.testing.assert_array_equal(weight.rows(3, 7), values[3:7])
    assert (weight.parameters, weight.nbytes) == (45, 180)


def test_the_decoder_keeps_its_node_count(quantized) -> None:
    """One operator for one: nothing is added to what runs for every token."""
    folder, _ = quantized
    before, after = (kinds(open_graph(at / "decoder.onnx")) for at in (omni_bundle(), folder))
    assert before["FusedMatMul"] == after["MatMulNBits"]
    assert sum(after.values()) <= sum(before.values())
