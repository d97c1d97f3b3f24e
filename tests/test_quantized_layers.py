"""Quantized checkpoints: GPTQ, AWQ and bitsandbytes read back bit by bit as their own libraries read them."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.numpy import load_file, save_file

from export.checkpoint import Checkpoint, open_checkpoint
from export.lazy_tensor import LazyTensor
from export.packed_tensor import AWQ, PackedTensor, Packing, gptq
from runtime.errors import CheckpointError
from runtime.integers import Form, dequantize
from tests import tiny_quantized
from tests.tiny_quantized import AWQ_CONFIG, BNB_CONFIG, GPTQ_CONFIG, into_words, packed_parts

GOLDEN = Path(__file__).parent / "golden" / "quantized"

Tensors = dict[str, np.ndarray]


def opened(folder: Path, tensors: Tensors, config: object) -> Checkpoint:
    save_file({key: np.ascontiguousarray(value) for key, value in tensors.items()}, folder / "model.safetensors")
    (folder / "config.json").write_text(json.dumps({} if config is None else {"quantization_config": config}))
    return open_checkpoint(folder)


def golden(file: str, layer: str) -> tuple[Tensors, np.ndarray]:
    """A recorded layer, and the values that its library makes of it."""
    tensors = {k: v for k, v in load_file(GOLDEN / f"{file}.safetensors").items() if k.startswith(f"{layer}.")}
    return tensors, tensors.pop(f"{layer}.values")


def refusal(folder: Path, tensors: Tensors, config: object) -> str:
    with pytest.raises(CheckpointError) as caught:
        opened(folder, tensors, config)
    return str(caught.value)


def in_place(form: Form, columns: int) -> np.ndarray:
    """Where each column of a matrix lies among its stored ones."""
    return np.arange(columns) if form.order is None else np.argsort(form.order)


def check(tensor: PackedTensor, values: np.ndarray) -> Form:
    """Values, whole and in part, and the integers that stand for them, all bit by bit."""
    assert tensor.shape == values.shape and tensor.read().dtype == np.float32
    assert tensor.read().tobytes() == values.tobytes()
    form = tensor.form()
    assert form is not None
    for start, stop in [(0, len(values)), (3, 21), (8, 8), (31, 32)]:
        assert tensor.rows(start, stop).tobytes() == values[start:stop].tobytes()
        stored = tensor.integers(start, stop)
        assert stored.codes.max(initial=0) < 2**form.bits == 2**stored.bits
        assert dequantize(stored)[:, in_place(form, values.shape[1])].tobytes() == values[start:stop].tobytes()
    return form


@pytest.mark.parametrize(
    ("layer", "bits", "symmetric", "reordered"),
    [
        ("4-bit", 4, True, False),
        ("4-bit-zeros-act-order", 4, False, True),
        ("8-bit-zeros", 8, False, False),
        ("2-bit-zeros-act-order", 2, False, True),
    ],
)
def test_gptq_is_read_as_auto_gptq_reads_it(
    tmp_path: Path, layer: str, bits: int, symmetric: bool, reordered: bool
) -> None:
    tensors, values = golden("gptq", layer)
    checkpoint = opened(tmp_path, tensors, GPTQ_CONFIG | {"bits": bits})
    assert list(checkpoint) == [f"{layer}.weight"]
    tensor = checkpoint[f"{layer}.weight"]
    assert isinstance(tensor, PackedTensor) and tensor.dtype == "GPTQ"
    assert tensor.nbytes == len(tensor.raw()) == sum(part.nbytes for part in tensors.values())
    form = check(tensor, values)
    assert (form.bits, form.group_size, form.symmetric, form.order is not None) == (bits, 32, symmetric, reordered)


def test_version_2_of_gptq_stores_zeros_as_they_are(tmp_path: Path) -> None:
    tensors, values = golden("gptq", "4-bit-zeros-act-order")
    zeros = tensors["4-bit-zeros-act-order.qzeros"]
    tensors["4-bit-zeros-act-order.qzeros"] = (zeros.view(np.uint32) + np.uint32(0x11111111)).view(np.int32)
    checkpoint = opened(tmp_path, tensors, GPTQ_CONFIG | {"checkpoint_format": "gptq_v2"})
    assert checkpoint["4-bit-zeros-act-order.weight"].read().tobytes() == values.tobytes()


def test_awq_is_read_as_autoawq_reads_it(tmp_path: Path) -> None:
    tensors, values = golden("awq", "layer")
    tensor = opened(tmp_path, tensors, AWQ_CONFIG)["layer.weight"]
    assert isinstance(tensor, PackedTensor) and tensor.dtype == "AWQ"
    assert check(tensor, values) == Form(4, 32, symmetric=False)


@pytest.mark.parametrize("layer", ["nf4", "nf4-nested", "fp4-nested"])
def test_bitsandbytes_is_read_as_it_reads_itself(tmp_path: Path, layer: str) -> None:
    tensors, values = golden("bitsandbytes", layer)
    checkpoint = opened(tmp_path, tensors, BNB_CONFIG)
    tensor = checkpoint[f"{layer}.weight"]
    assert list(checkpoint) == [f"{layer}.weight"] and tensor.form() is None
    assert tensor.read().tobytes() == values.tobytes()
    assert tensor.nbytes == len(tensor.raw())
    for start, stop in [(0, 5), (3, 20), (7, 7), (32, 33)]:
        assert tensor.rows(start, stop).tobytes() == values[start:stop].tobytes()


def packed(rng: np.random.Generator, packing: Packing, rows: int, columns: int, group: int) -> tuple[Tensors, Tensors]:
    """Random codes, zeros and scales [rows, ...], and the tensors that the format makes of them."""
    groups = -(-columns // group)
    top = 2**packing.bits
    made = {
        "codes": rng.integers(0, top, (rows, columns), np.uint32),
        "zeros": rng.integers(1, top, (rows, groups), np.uint32),
        "scales": rng.standard_normal((rows, groups)).astype(np.float16),
    }
    return made, {f"w.{name}": part for name, part in packed_parts(**made, packing=packing).items()}


@given(
    packing=st.sampled_from([gptq(2, 1), gptq(4, 1), gptq(8, 1), gptq(4, 2), AWQ]),
    group=st.sampled_from([16, 32, 48, 64, 96, 192]),
    reordered=st.booleans(),
    seed=st.integers(0, 2**16),
)
@settings(max_examples=60, deadline=None)
def test_what_was_packed_comes_back(
    tmp_path_factory: pytest.TempPathFactory, packing: Packing, group: int, reordered: bool, seed: int
) -> None:
    rng = np.random.default_rng(seed)
    rows, columns = 32, 192
    made, tensors = packed(rng, packing, rows, columns, group)
    group_of = np.arange(columns) // group
    if reordered and packing is not AWQ:
        group_of = rng.permutation(group_of)
        tensors["w.g_idx"] = group_of.astype(np.int32)
    version = {"checkpoint_format": "gptq" if packing.stored_less else "gptq_v2"}
    config = AWQ_CONFIG if packing is AWQ else GPTQ_CONFIG | {"bits": packing.bits} | version
    folder = tmp_path_factory.mktemp("packed")
    tensor = opened(folder, tensors, config | {"group_size": -1 if group == columns else group})["w.weight"]
    assert isinstance(tensor, PackedTensor)
    less_zero = made["codes"].astype(np.float32) - made["zeros"].astype(np.float32)[:, group_of]
    form = check(tensor, less_zero * made["scales"].astype(np.float32)[:, group_of])
    assert form.group_size == min(group & -group, 128 if packing.bits == 2 else 256) and form.bits == packing.bits


def test_zeros_that_borrowed_from_their_neighbours_come_back(tmp_path: Path) -> None:
    """GPTQModel takes 1 off whole words, so that a zero of 0 borrows from the next one."""
    rng = np.random.default_rng(0)
    made, tensors = packed(rng, gptq(4, 2), 16, 32, 32)
    made["zeros"][:, 0] = rng.permutation(np.arange(16))
    words = into_words(made["zeros"].T, gptq(4, 2), 1).view(np.uint32)
    tensors["w.qzeros"] = (words - np.uint32(0x11111111)).view(np.int32)
    tensor = opened(tmp_path, tensors, GPTQ_CONFIG)["w.weight"]
    stored = tensor.integers(0, 16)
    assert stored.zeros is not None and np.array_equal(stored.zeros, made["zeros"])


def test_groups_that_no_operator_knows_are_floats(tmp_path: Path) -> None:
    made, tensors = packed(np.random.default_rng(0), gptq(4, 1), 16, 40, 40)
    tensor = opened(tmp_path, tensors, GPTQ_CONFIG | {"group_size": -1})["w.weight"]
    assert tensor.form() is None
    expected = (made["codes"].astype(np.float32) - made["zeros"]) * made["scales"].astype(np.float32)
    np.testing.assert_array_equal(tensor.read(), expected.astype(np.float32))


def test_biases_of_zeros_only_are_left_out_where_all_layers_of_a_name_have_such(tmp_path: Path) -> None:
    _, part = packed(np.random.default_rng(0), gptq(4, 1), 16, 32, 32)
    tensors = {f"{n}.{kind}{k[1:]}": v for n in (0, 1) for kind in ("o_proj", "q_proj") for k, v in part.items()}
    biases = {f"{n}.{kind}.bias": np.zeros(16, np.float16) for n in (0, 1) for kind in ("o_proj", "q_proj")}
    biases["1.q_proj.bias"] = np.arange(16, dtype=np.float16)
    checkpoint = opened(tmp_path, tensors | biases, GPTQ_CONFIG)
    assert {key for key in checkpoint if key.endswith("bias")} == {"0.q_proj.bias", "1.q_proj.bias"}


def test_each_bias_is_looked_at_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    _, part = packed(np.random.default_rng(0), gptq(4, 1), 16, 32, 32)
    tensors = {f"{n}.o_proj{k[1:]}": v for n in range(5) for k, v in part.items()}
    read, looked_at = LazyTensor.read, []
    monkeypatch.setattr(LazyTensor, "read", lambda tensor: looked_at.append(tensor.key) or read(tensor))
    opened(tmp_path, tensors | {f"{n}.o_proj.bias": np.zeros(16, np.float16) for n in range(5)}, GPTQ_CONFIG)
    assert sorted(looked_at) == [f"{n}.o_proj.bias" for n in range(5)]


def test_what_auto_gptq_wrote_before_transformers_knew_it_is_found(tmp_path: Path) -> None:
    tensors, values = golden("gptq", "4-bit")
    (tmp_path / "quantize_config.json").write_text(json.dumps({"bits": 4, "group_size": 32, "desc_act": False}))
    assert opened(tmp_path, tensors, None)["4-bit.weight"].read().tobytes() == values.tobytes()


@pytest.mark.parametrize(
    ("config", "expected"),
    [
        (None, ["has no quantization_config", "'4-bit.qweight'"]),
        ("gptq", ["quantization_config is 'gptq', expected an object"]),
        ({"quant_method": "fp8"}, ["quant_method 'fp8', which is not read; expected gptq, awq, bitsandbytes"]),
        (
            {"quant_method": "gptq", "bits": 3, "group_size": 0, "checkpoint_format": "marlin", "pack_dtype": "int16"},
            ["bits is 3", "group_size is 0", "checkpoint_format is 'marlin'", "pack_dtype is 'int16'"],
        ),
        (GPTQ_CONFIG | {"dynamic": {"+:.*down": {"bits": 8}, "-:lm_head": {}}}, ["dynamic gives '+:.*down' settings"]),
        (
            {"quant_method": "awq", "bits": 8, "group_size": "128", "version": "gemv", "zero_point": False},
            ["bits is 8", "group_size is '128'", "version is 'gemv'"],
        ),
        (
            {"quant_method": "bitsandbytes", "load_in_8bit": True, "bnb_4bit_quant_type": "nf3"},
            ["LLM.int8() is not", "bnb_4bit_quant_type is 'nf3'"],
        ),
    ],
)
def test_every_mistake_in_a_config_is_named(tmp_path: Path, config: object, expected: list[str]) -> None:
    message = refusal(tmp_path, golden("gptq", "4-bit")[0], config)
    for words in expected:
        assert words in message


def test_a_method_that_is_not_read_is_named_beside_types_that_are_not(tmp_path: Path) -> None:
    header = b'{"w.weight": {"dtype": "F8_E4M3", "shape": [2, 2], "data_offsets": [0, 4]}}'
    (tmp_path / "model.safetensors").write_bytes(len(header).to_bytes(8, "little") + header + bytes(4))
    (tmp_path / "config.json").write_text(json.dumps({"quantization_config": {"quant_method": "fp8"}}))
    with pytest.raises(CheckpointError, match=r"(?s)dtype 'F8_E4M3' is not supported.*quant_method 'fp8'"):
        open_checkpoint(tmp_path)


def test_every_misfit_of_a_packed_layer_is_named(tmp_path: Path) -> None:
    _, part = packed(np.random.default_rng(0), gptq(4, 1), 16, 32, 32)
    bad: dict[str, dict[str, Any]] = {
        "none": {"scales": None, "qzeros": None},
        "empty": {"qweight": np.zeros((0, 16), np.int32)},
        "types": {"scales": np.zeros((1, 16), np.int32), "g_idx": np.zeros(32, np.int64)},
        "shapes": {"scales": np.zeros((2, 16), np.float16), "g_idx": np.zeros(31, np.int32)},
    }
    tensors = {}
    for layer, changes in bad.items():
        parts = {key[2:]: value for key, value in part.items()} | changes
        tensors |= {f"{layer}.{name}": value for name, value in parts.items() if value is not None}
    message = refusal(tmp_path, tensors, GPTQ_CONFIG)
    for words in [
        "'none': qzeros, scales missing, which GPTQ needs",
        "'empty': qweight is [0, 16], which holds nothing",
        "scales is I32[1, 16], expected F16 or BF16 or F32 of 2 dimensions",
        "g_idx is I64[32], expected I32 of 1 dimensions",
        "scales is [2, 16], but qweight and 4 bits in groups of 32 make it [1, 16]",
        "g_idx is [31], but qweight and 4 bits in groups of 32 make it [32]",
    ]:
        assert words in message


def test_a_group_that_has_no_scale_is_named(tmp_path: Path) -> None:
    _, tensors = packed(np.random.default_rng(0), gptq(4, 1), 16, 64, 32)
    tensor = opened(tmp_path, tensors | {"w.g_idx": np.full(64, 2, np.int32)}, GPTQ_CONFIG)["w.weight"]
    with pytest.raises(CheckpointError, match=r"'w.g_idx' names the groups 2 to 2, but there are scales for 0 to 1"):
        tensor.form()


def test_every_misfit_of_a_4_bit_layer_is_named(tmp_path: Path) -> None:
    tensors, _ = golden("bitsandbytes", "nf4")
    state = "nf4.weight.quant_state.bitsandbytes__nf4"
    without = {key: value for key, value in tensors.items() if not key.endswith(("absmax", "weight"))}
    assert "expected nf4 or fp4" in refusal(tmp_path, without, BNB_CONFIG)
    short = {**without, "nf4.weight": tensors["nf4.weight"][:-1]}
    message = refusal(tmp_path, short, BNB_CONFIG)
    assert "absmax is missing" in message and "codes is U8[3167, 1], expected U8 of 3168 values" in message
    column = {**tensors, "nf4.weight.absmax": tensors["nf4.weight.absmax"][:, None]}
    assert "absmax is " in refusal(tmp_path, column, BNB_CONFIG)
    for text in (b"[]", b"{}", b'{"shape": [33, 192], "blocksize": 0}', b"\xff"):
        assert "nf4" in refusal(tmp_path, {**tensors, state: np.frombuffer(text, np.uint8)}, BNB_CONFIG)


def test_awq_without_zero_point_is_read_by_the_zeros_that_it_stores(tmp_path: Path) -> None:
    meant = tiny_quantized.save_packed(tmp_path, AWQ, 32, symmetric=True)
    path = tmp_path / "config.json"
    config = json.loads(path.read_text())
    config["quantization_config"]["zero_point"] = False
    path.write_text(json.dumps(config))
    found = open_checkpoint(tmp_path)
    for key, weight in meant.items():
        assert found[key].read().tobytes() == weight.tobytes(), key


def test_awq_without_zero_point_and_without_zeros_is_refused(tmp_path: Path) -> None:
    tiny_quantized.save_packed(tmp_path, AWQ, 32, symmetric=True)
    tensors = load_file(tmp_path / "model.safetensors")
    save_file({k: v for k, v in tensors.items() if not k.endswith("qzeros")}, tmp_path / "model.safetensors")
    with pytest.raises(CheckpointError, match="qzeros missing, which AWQ needs"):
        open_checkpoint(tmp_path)
