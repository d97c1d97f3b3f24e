"""Quantized checkpoints into bundles: their own integers bit by bit and, where that cannot be, how much is lost."""

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnx_ir as ir
import pytest
from safetensors.numpy import load_file, save_file
from typer.testing import CliRunner

from apps import one_pass
from apps.cli import app
from export.convert import export
from export.packed_tensor import AWQ, gptq
from quant import quantize
from quant.affine import Quantized, dequantize
from quant.pack import unpack_bits
from quant.plan import open_bundle
from quant.scheme import Recipe, parse_recipe, read_recipe
from runtime.bundle import Manifest, Profile, QuantizedWeight, read_bundle
from runtime.errors import EdgeOmniError
from runtime.session import Session
from runtime.verify import refuse_failed, verify
from tests import tiny_llama, tiny_quantized
from tests.test_resume import computed, run
from tests.tiny_llama import LAYERS, Tensors

IDS = [5, 77, 200, 13]
LINEAR = ("self_attn.W_pack", "self_attn.o_proj", "mlp.gate_proj", "mlp.up_proj", "mlp.down_proj")

MIXED = """[weights]
"lm_head.*" = "keep"
"*.layers.1.*" = "stored"
"*" = { bits = 4, group_size = 16 }
"""


def made(checkpoint: Path, folder: Path, recipe: Recipe | None = None, profile: Profile = "cpu") -> Manifest:
    """The bundle of a checkpoint in one pass."""
    _, smaller = one_pass.plan(checkpoint, profile, recipe, random=True)
    assert smaller is not None
    return quantize.write(smaller, folder)


def rows_of(manifest: Manifest) -> dict[str, QuantizedWeight]:
    assert manifest.quantization is not None
    return {weight.name: weight for weight in manifest.quantization.quantized}


def held(graph: Path) -> dict[str, np.ndarray]:
    """What the quantized operators of a graph stand for, by weight, columns in the order of the weight's own."""
    values = {}
    for node in ir.load(graph).graph:
        if node.op_type not in ("MatMulNBits", "GatherBlockQuantized"):
            continue
        arrays = {
            str(v.name): v.const_value.numpy() for v in node.inputs if v is not None and v.const_value is not None
        }
        name = next(key for key in arrays if key.endswith((".codes", ".code_rows"))).rpartition(".")[0]
        bits, scales = node.attributes.get_int("bits", 0), arrays[f"{name}.scales"]
        packed = arrays[f"{name}.codes"] if f"{name}.codes" in arrays else arrays[f"{name}.code_rows"]
        zeros = arrays.get(f"{name}.zeros")
        zeros = None if zeros is None else unpack_bits(zeros, bits)[:, : scales.shape[1]]
        matrix = Quantized(unpack_bits(packed.reshape(len(scales), -1), bits), scales, zeros, bits)
        values[name] = in_place(node.inputs[0], dequantize(matrix))
    return values


def in_place(x: ir.Value | None, values: np.ndarray) -> np.ndarray:
    gather = None if x is None else x.producer()
    if gather is None or gather.op_type != "Gather":
        return values
    order = gather.inputs[1]
    assert order is not None and order.const_value is not None
    return values[:, np.argsort(order.const_value.numpy())]


def meant(weights: Tensors, name: str) -> np.ndarray:
    """A weight of the decoder as the checkpoint's values make it."""
    if "W_pack" in name:
        return np.concatenate([weights[name.replace("W_pack", f"{side}_proj")] for side in "qkv"])
    return weights[name]


def check_logits(bundle: Path, folder: Path, weights: Tensors) -> None:
    """As those of a float bundle of the same values, but for activations that are rounded to 8 bits."""
    export(tiny_llama.save(folder / "values", weights), folder / "float")
    expected, found = (tiny_llama.logits(path, IDS) for path in (folder / "float", bundle))
    assert np.abs(found - expected).max() < 0.04 * np.abs(expected).max()
    assert np.corrcoef(found, expected)[0, 1] > 0.999


PACKED: dict[str, Callable[[Path], Tensors]] = {
    "GPTQ version 1": lambda folder: tiny_quantized.save_packed(folder, gptq(4, 1), 32),
    "GPTQ version 2": lambda folder: tiny_quantized.save_packed(folder, gptq(4, 2), 16),
    "GPTQ, symmetric": lambda folder: tiny_quantized.save_packed(folder, gptq(4, 1), 32, symmetric=True),
    "GPTQ, act-order": lambda folder: tiny_quantized.save_packed(folder, gptq(4, 1), 16, act_order=True),
    "GPTQ, 8 bits, act-order": lambda folder: tiny_quantized.save_packed(folder, gptq(8, 1), 16, act_order=True),
    "GPTQ, 2 bits": lambda folder: tiny_quantized.save_packed(folder, gptq(2, 1), 32),
    "AWQ": lambda folder: tiny_quantized.save_packed(folder, AWQ, 32),
}


@pytest.mark.parametrize("kind", PACKED)
def test_packed_checkpoints_keep_their_integers(kind: str, tmp_path: Path) -> None:
    weights = PACKED[kind](tmp_path / "checkpoint")
    manifest = made(tmp_path / "checkpoint", tmp_path / "bundle")
    assert manifest.quantization is not None and manifest.quantization.recipe == "as stored"
    rows = rows_of(manifest)
    assert set(rows) == {f"model.layers.{layer}.{name}.weight" for layer in range(LAYERS) for name in LINEAR}
    assert {row.stored_as for row in rows.values()} == {kind[:4]}
    assert {(row.method, row.sqnr_db) for row in rows.values()} == {("stored", None)}
    found = held(tmp_path / "bundle" / "decoder.onnx")
    assert set(found) == set(rows)
    for name, values in found.items():
        assert values.tobytes() == meant(weights, name).tobytes(), name
    refuse_failed(tmp_path / "bundle", list(verify(tmp_path / "bundle", manifest)))
    check_logits(tmp_path / "bundle", tmp_path, weights)


def test_matrices_that_multiply_the_same_share_its_reordering(tmp_path: Path) -> None:
    PACKED["GPTQ, act-order"](tmp_path / "checkpoint")
    made(tmp_path / "checkpoint", tmp_path / "bundle")
    graph = ir.load(tmp_path / "bundle" / "decoder.onnx").graph
    gathers = [node for node in graph if node.op_type == "Gather" and str(node.name).endswith(".reordered")]
    assert len(gathers) == 4 * LAYERS  # before the queries, keys and values; o_proj; gate and up; down
    orders = {
        v.const_value.offset for g in gathers if (v := g.inputs[1]) and isinstance(v.const_value, ir.ExternalTensor)
    }
    assert len(orders) == 2  # one for each width


def test_a_reordered_matrix_is_taken_over_where_it_multiplies_and_rounded_where_its_rows_are_looked_up(
    tmp_path: Path,
) -> None:
    """A lookup has no way to bring columns back in order, so the two graphs that share the weight share no codes."""
    key, rng = "model.embed_tokens", np.random.default_rng(3)
    tensors = {name: array for name, array in tiny_llama.tensors().items() if name != "lm_head.weight"}
    table = np.pad(tensors.pop(f"{key}.weight"), ((0, 4), (0, 0)), "reflect")  # rows of whole words
    group_of = rng.permutation(np.arange(table.shape[1]) // 16)
    codes, zeros, scales = tiny_quantized.rounded(table, group_of, 4, False)
    parts = tiny_quantized.packed_parts(codes, zeros, scales, gptq(4, 1)) | {"g_idx": group_of.astype(np.int32)}
    tensors |= {f"{key}.{name}": np.ascontiguousarray(part) for name, part in parts.items()}
    stated = tiny_quantized.config(gptq(4, 1), 16)
    changes = {"quantization_config": stated, "tie_word_embeddings": True, "vocab_size": len(table)}
    tiny_llama.save(tmp_path / "checkpoint", tensors, **changes)
    recipe = parse_recipe("mine", '[weights]\n"*" = { bits = 4, group_size = 16, symmetric = false }')
    rows = rows_of(made(tmp_path / "checkpoint", tmp_path / "bundle", recipe))
    assert (rows[f"{key}.weight"].method, rows["lm_head.weight"].method) == ("rtn", "stored")
    values = (codes.astype(np.float32) - zeros.astype(np.float32)[:, group_of]) * scales.astype(np.float32)[:, group_of]
    looked_up = held(tmp_path / "bundle" / "embed_tokens.onnx")[f"{key}.weight"]
    assert held(tmp_path / "bundle" / "lm_head.onnx")["lm_head.weight"].tobytes() == values.tobytes()
    assert 0 < np.abs(looked_up - values).max() < 0.2 * np.abs(values).max()


GGUF: dict[str, tuple[dict[str, str], set[tuple[int, int]]]] = {
    "Q4_0": ({"norm.weight": "F32", "": "Q4_0"}, {(4, 32)}),
    "Q8_0": ({"norm.weight": "F32", "": "Q8_0"}, {(8, 32)}),
    "Q5_0": ({"norm.weight": "F32", "": "Q5_0"}, {(8, 32)}),
    "mixed": (
        {"norm.weight": "F32", "v_proj.weight": "Q8_0", "down_proj.weight": "Q5_0", "": "Q4_0"},
        {(4, 32), (8, 32)},
    ),
}


@pytest.mark.parametrize("kind", GGUF)
def test_gguf_keeps_its_integers(kind: str, tmp_path: Path) -> None:
    types, stored = GGUF[kind]
    weights = tiny_quantized.save_gguf(tmp_path / "model.gguf", types)
    manifest = made(tmp_path / "model.gguf", tmp_path / "bundle")
    rows = rows_of(manifest)
    assert {"lm_head.weight", "model.embed_tokens.weight", "model.layers.1.self_attn.W_pack.weight"} <= set(rows)
    assert {(row.bits, row.group_size) for row in rows.values()} == stored
    if kind == "mixed":
        assert rows["model.layers.0.self_attn.W_pack.weight"].stored_as == "Q4_0 and Q8_0"
    found = {}
    for graph in manifest.graphs.values():
        found |= held(tmp_path / "bundle" / graph.file)
    assert set(found) == set(rows)
    for name, values in found.items():
        expected = {key: tiny_llama.interleaved(key, value) for key, value in weights.items()}
        assert values.tobytes() == meant(expected, name).tobytes(), name
    check_logits(tmp_path / "bundle", tmp_path, weights)


@pytest.mark.parametrize("kind", ["Q4_0", "Q8_0"])
def test_onnx_runtime_reads_the_same_values_bit_by_bit(kind: str, tmp_path: Path) -> None:
    """Rows looked up, and products with unit vectors where activations are not rounded."""
    weights = tiny_quantized.save_gguf(tmp_path / "model.gguf", GGUF[kind][0])
    manifest = made(tmp_path / "model.gguf", tmp_path / "bundle")
    ids = np.arange(manifest.vocab_size)
    rows = Session(tmp_path / "bundle", manifest.graphs["embed_tokens"]).run(ids=ids)["rows"]
    assert rows.tobytes() == weights["model.embed_tokens.weight"].tobytes()
    path = tmp_path / "bundle" / "lm_head.onnx"
    model = ir.load(path)
    for node in model.graph:
        node.attributes.pop("accuracy_level", None)
    ir.save(model, path)
    units = np.eye(tiny_llama.HIDDEN, dtype=np.float32)
    products = Session(tmp_path / "bundle", manifest.graphs["lm_head"]).run(hidden=units)["logits"]
    np.testing.assert_array_equal(products.T, weights["lm_head.weight"])


def test_a_recipe_keeps_integers_that_its_schemes_can_hold_and_rounds_the_rest_again(tmp_path: Path) -> None:
    kinds = {"norm.weight": "F32", "gate_proj.weight": "Q4_1", "up_proj.weight": "Q8_0", "": "Q4_0"}
    weights = tiny_quantized.save_gguf(tmp_path / "model.gguf", kinds)
    recipe = parse_recipe(
        "mine", '[weights]\n"lm_head.*" = "keep"\n"*.layers.1.*" = "stored"\n"*" = { bits = 4, group_size = 16 }'
    )
    manifest = made(tmp_path / "model.gguf", tmp_path / "bundle", recipe)
    rows = rows_of(manifest)
    told = {name: (row.stored_as, row.method, row.bits, row.group_size) for name, row in rows.items()}
    layer = "model.layers.0."
    assert told["model.embed_tokens.weight"] == ("Q4_0", "stored", 4, 16)  # the same scales, each twice
    assert told[layer + "mlp.gate_proj.weight"] == ("Q4_1", "rtn", 4, 16)
    assert told[layer + "mlp.up_proj.weight"] == ("Q8_0", "rtn", 4, 16)
    assert told["model.layers.1.mlp.up_proj.weight"] == ("Q8_0", "stored", 8, 32)
    assert manifest.quantization is not None
    kept = {weight.name: weight.reason for weight in manifest.quantization.kept}
    assert kept["model.layers.1.mlp.gate_proj.weight"] == "no operator takes its Q4_1 as it is"
    assert kept["lm_head.weight"] == "kept by 'lm_head.*'"
    found = held(tmp_path / "bundle" / "decoder.onnx") | held(tmp_path / "bundle" / "embed_tokens.onnx")
    for name, row in rows.items():
        error = found[name] - meant({key: tiny_llama.interleaved(key, w) for key, w in weights.items()}, name)
        if row.method == "stored":
            assert not error.any() and row.sqnr_db is None
        else:
            signal = np.square(weights[name].astype(np.float64)).sum()
            assert row.sqnr_db == pytest.approx(
                10 * np.log10(signal / np.square(error, dtype=np.float64).sum()), abs=0.01
            )


def test_nf4_is_floats_without_a_recipe_and_rounded_again_with_one(tmp_path: Path) -> None:
    weights = tiny_quantized.save_nf4(tmp_path / "checkpoint")
    _, smaller = one_pass.plan(tmp_path / "checkpoint", "cpu", None, random=True)
    assert smaller is None
    export(tmp_path / "checkpoint", tmp_path / "bundle")
    export(tiny_llama.save(tmp_path / "values", weights), tmp_path / "float")
    ours, theirs = (tiny_llama.logits(tmp_path / name, IDS) for name in ("bundle", "float"))
    np.testing.assert_array_equal(ours, theirs)
    rows = rows_of(made(tmp_path / "checkpoint", tmp_path / "small", read_recipe("int8")))
    rounded = {name: row for name, row in rows.items() if "layers" in name}
    assert {(row.stored_as, row.method) for row in rounded.values()} == {("NF4", "rtn")}
    assert all(row.sqnr_db is not None and 30 < row.sqnr_db < 60 for row in rounded.values())
    assert rows["lm_head.weight"].stored_as is None and rows["lm_head.weight"].sqnr_db is None


def test_layers_of_one_matrix_whose_columns_lie_in_different_orders_become_floats(tmp_path: Path) -> None:
    """Queries, keys and values are one matrix here; quantizers give them one order, because they share their input."""
    weights = PACKED["GPTQ, act-order"](tmp_path / "checkpoint")
    tensors = load_file(tmp_path / "checkpoint" / "model.safetensors")
    key = "model.layers.0.self_attn.k_proj.g_idx"
    tensors[key] = tensors[key][::-1].copy()
    save_file(tensors, tmp_path / "checkpoint" / "model.safetensors")
    manifest = made(tmp_path / "checkpoint", tmp_path / "bundle")
    assert manifest.quantization is not None
    kept = {weight.name: weight.reason for weight in manifest.quantization.kept}
    assert "GPTQ" in kept["model.layers.0.self_attn.W_pack.weight"]
    assert "model.layers.1.self_attn.W_pack.weight" in rows_of(manifest) and weights


def test_on_cuda_what_its_kernels_take_is_taken_over(tmp_path: Path) -> None:
    weights = PACKED["GPTQ, symmetric"](tmp_path / "symmetric")
    manifest = made(tmp_path / "symmetric", tmp_path / "one", profile="cuda")
    assert {(row.method, row.group_size) for row in rows_of(manifest).values()} == {("stored", 32)}
    for name, values in held(tmp_path / "one" / "decoder.onnx").items():
        rows = meant(weights, name)
        assert values[: len(rows)].tobytes() == rows.tobytes() and not values[len(rows) :].any(), name
    PACKED["AWQ"](tmp_path / "zeros")
    with pytest.raises(EdgeOmniError, match="no matrix"):
        made(tmp_path / "zeros", tmp_path / "two", profile="cuda")


def test_a_scale_that_is_no_number_is_named(tmp_path: Path) -> None:
    PACKED["AWQ"](tmp_path / "checkpoint")
    tensors = load_file(tmp_path / "checkpoint" / "model.safetensors")
    tensors["model.layers.1.mlp.up_proj.scales"][0, 3] = np.inf
    save_file(tensors, tmp_path / "checkpoint" / "model.safetensors")
    with pytest.raises(EdgeOmniError, match=r"model\.layers\.1\.mlp\.up_proj\.weight has the scale inf"):
        made(tmp_path / "checkpoint", tmp_path / "bundle")
    assert not (tmp_path / "bundle").exists()


def test_what_was_taken_over_is_not_quantized_again(tmp_path: Path) -> None:
    PACKED["AWQ"](tmp_path / "checkpoint")
    made(tmp_path / "checkpoint", tmp_path / "bundle")
    with pytest.raises(EdgeOmniError, match="quantized already, by the recipe 'as stored'"):
        open_bundle(tmp_path / "bundle")


def test_the_command_takes_integers_over_unless_floats_are_wanted(tmp_path: Path) -> None:
    PACKED["GPTQ version 1"](tmp_path / "checkpoint")
    command = ["export", str(tmp_path / "checkpoint"), "-o", str(tmp_path / "bundle")]
    said = CliRunner().invoke(app, command)
    assert said.exit_code == 0 and "10 weights of GPTQ taken over bit by bit" in " ".join(said.stdout.split())
    assert read_bundle(tmp_path / "bundle").quantization is not None
    said = CliRunner().invoke(app, [*command, "--force", "--recipe", "int8"])
    assert "10 weights of GPTQ rounded again, which loses: signal to noise" in " ".join(said.stdout.split())
    said = CliRunner().invoke(app, [*command, "--force", "--float", "--json"])
    assert said.exit_code == 0 and "quantization" not in json.loads(said.stdout)["manifest"]
    assert read_bundle(tmp_path / "bundle").quantization is None
    said = CliRunner().invoke(
        app, ["quantize", str(tmp_path / "bundle"), "-o", str(tmp_path / "small"), "--recipe", "int8"]
    )
    assert "weights were GPTQ before, and rounding them again lost some" in " ".join(said.stdout.split())


def test_a_killed_run_goes_on_with_the_integers_it_has_taken_over(tmp_path: Path) -> None:
    PACKED["GPTQ, act-order"](tmp_path / "checkpoint")
    command = ("export", tmp_path / "checkpoint", "-o", tmp_path / "bundle")
    assert run(*command, kill=("write_matrix", 7)).code < 0
    done = run(*command)
    assert done.code == 0 and computed(done) == 10 - 6
    made(tmp_path / "checkpoint", tmp_path / "whole")
    for path in sorted((tmp_path / "whole").iterdir()):
        if path.suffix in (".onnx", ".data"):
            assert path.read_bytes() == (tmp_path / "bundle" / path.name).read_bytes(), path.name
