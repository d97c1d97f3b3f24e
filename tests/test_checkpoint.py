"""Opening checkpoints: tensors stay on disk, the safetensors package agrees, and all that is wrong is said at once."""

import json
import os
import tracemalloc
from contextlib import suppress
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest
import safetensors
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.numpy import save_file

from export.checkpoint import fold_weight_norm, open_checkpoint
from export.lazy_tensor import LazyTensor
from export.safetensors_file import read_safetensors
from export.torch_archive import read_torch
from runtime.errors import CheckpointError

GOLDEN = Path(__file__).parent / "golden" / "a" / "checkpoint"
INDEX = "model.safetensors.index.json"
MIXED = {
    "f32": np.arange(12, dtype=np.float32).reshape(4, 3),
    "f16": np.arange(6, dtype=np.float16).reshape(3, 2),
    "bf16": np.arange(10, dtype=np.float32).reshape(5, 2).astype(ml_dtypes.bfloat16),
    "i64": np.array([-(2**40), 7]),
    "i32": np.array([[-5], [6]], np.int32),
    "u8": np.arange(5, dtype=np.uint8),
    "bool": np.array([True, False, True]),
    "scalar": np.array(2.5, np.float32),
    "empty": np.zeros((0, 3), np.float32),
}


def write(path: Path, header: object, data: bytes = b"") -> Path:
    """A safetensors file with any header at all."""
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    path.write_bytes(len(text).to_bytes(8, "little") + text + data)
    return path


def entry(dtype: Any, shape: Any, *offsets: Any) -> dict[str, Any]:
    return {"dtype": dtype, "shape": shape, "data_offsets": list(offsets)}


def folder_of(folder: Path, **shards: dict[str, np.ndarray]) -> Path:
    """A sharded checkpoint: one shard a keyword."""
    (folder / "config.json").write_text('{"model_type": "tiny"}')
    for name, tensors in shards.items():
        save_file(tensors, folder / f"{name}.safetensors")
    weight_map = {key: f"{name}.safetensors" for name, tensors in shards.items() for key in tensors}
    (folder / INDEX).write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    return folder


def edit_index(folder: Path, **changes: str | None) -> None:
    index = json.loads((folder / INDEX).read_text())
    weight_map = index["weight_map"] | changes
    index["weight_map"] = {key: name for key, name in weight_map.items() if name is not None}
    (folder / INDEX).write_text(json.dumps(index))


def two_shards(folder: Path) -> Path:
    return folder_of(folder, one={"a": np.ones(4, np.float32), "b": np.ones(3, np.int32)}, two={"c": np.ones((2, 2))})


def refusal(path: Path) -> str:
    with pytest.raises(CheckpointError) as caught:
        open_checkpoint(path)
    return str(caught.value)


def header_refusal(path: Path) -> str:
    with pytest.raises(CheckpointError) as caught:
        read_safetensors(path)
    return str(caught.value)


def read_everything(tensors: list[LazyTensor]) -> None:
    for tensor in tensors:
        assert tensor.read().shape == tensor.shape
        if tensor.shape:
            assert tensor.rows(0, tensor.shape[0] // 2).shape[1:] == tensor.shape[1:]


# --- what opens ---


def test_the_golden_checkpoint_reads_as_the_safetensors_package_reads_it() -> None:
    checkpoint = open_checkpoint(GOLDEN)
    expected = {}
    for shard in sorted(GOLDEN.glob("model-*.safetensors")):
        expected |= dict(safetensors.deserialize(shard.read_bytes()))
    assert set(checkpoint) == set(expected)
    for key, tensor in checkpoint.items():
        assert (tensor.dtype, list(tensor.shape)) == (expected[key]["dtype"], expected[key]["shape"])
        assert tensor.read().tobytes() == tensor.raw().tobytes() == bytes(expected[key]["data"])
    assert {tensor.dtype for tensor in checkpoint.values()} == {"BF16", "F32"}


def test_the_golden_checkpoint_tells_its_config_files_and_vocoder() -> None:
    checkpoint = open_checkpoint(str(GOLDEN))
    assert checkpoint.kind == "safetensors" and checkpoint.folder == GOLDEN and checkpoint.metadata == {}
    assert checkpoint.config == json.loads((GOLDEN / "config.json").read_text())
    assert {file.name: file.size for file in checkpoint.files} == {p.name: p.stat().st_size for p in GOLDEN.iterdir()}
    assert checkpoint.hift_config == GOLDEN / "hift_config.json"
    assert "conv_pre.weight_g" in (checkpoint.hift or {})


def test_hift_pt_equals_hift_safetensors_bit_by_bit() -> None:
    pickled, plain = read_torch(GOLDEN / "hift.pt"), read_safetensors(GOLDEN / "hift.safetensors")
    assert pickled.keys() == plain.keys() and len(plain) > 300
    for key, tensor in pickled.items():
        assert (tensor.key, tensor.dtype, tensor.shape) == (key, plain[key].dtype, plain[key].shape)
        assert tensor.read().tobytes() == plain[key].read().tobytes()


def test_all_dtypes_shapes_and_row_ranges_read_back(tmp_path: Path) -> None:
    save_file(MIXED, tmp_path / "model.safetensors")
    tensors = read_safetensors(tmp_path / "model.safetensors")
    assert set(tensors) == set(MIXED)
    for key, expected in MIXED.items():
        read = tensors[key].read()
        assert read.dtype == expected.dtype and read.shape == expected.shape and read.tobytes() == expected.tobytes()
        for start in range(expected.shape[0] + 1 if expected.ndim else 0):
            for stop in range(start, expected.shape[0] + 1):
                np.testing.assert_array_equal(tensors[key].rows(start, stop), expected[start:stop])


def test_rows_outside_the_tensor_are_an_error(tmp_path: Path) -> None:
    save_file(MIXED, tmp_path / "model.safetensors")
    tensors = read_safetensors(tmp_path / "model.safetensors")
    for key, start, stop in [("f32", 0, 5), ("f32", 3, 2), ("f32", -1, 2), ("scalar", 0, 1)]:
        with pytest.raises(ValueError, match="rows"):
            tensors[key].rows(start, stop)


def test_a_tensor_says_where_its_bytes_lie(tmp_path: Path) -> None:
    save_file(MIXED, tmp_path / "model.safetensors")
    tensor = read_safetensors(tmp_path / "model.safetensors")["f32"]
    stored = tensor.file.read_bytes()[tensor.offset : tensor.offset + tensor.nbytes]
    assert stored == MIXED["f32"].tobytes()


def test_reading_rows_takes_memory_for_those_rows_only(tmp_path: Path) -> None:
    row = np.ones((1, 1 << 16), np.float32)  # 256 KiB
    save_file({"wide": np.repeat(row, 64, axis=0), "other": np.ones(1 << 20, np.float32)}, tmp_path / "m.safetensors")
    tracemalloc.start()
    tensors = read_safetensors(tmp_path / "m.safetensors")
    rows = tensors["wide"].rows(10, 12)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert rows.nbytes == 2 * row.nbytes and peak < 3 * row.nbytes


@pytest.mark.skipif(not Path("/proc/self/maps").exists(), reason="needs /proc")
def test_an_open_checkpoint_maps_no_file_and_holds_none_open() -> None:
    checkpoint = open_checkpoint(GOLDEN)
    largest = max(checkpoint.values(), key=lambda tensor: tensor.nbytes)
    array = largest.read()
    opened = {str(link.readlink()) for link in Path("/proc/self/fd").iterdir() if link.is_symlink()}
    assert array.nbytes and not any(path.startswith(str(GOLDEN)) for path in opened)
    assert str(GOLDEN) not in Path("/proc/self/maps").read_text()


def test_a_file_cut_after_opening_is_an_error_when_read(tmp_path: Path) -> None:
    save_file(MIXED, tmp_path / "model.safetensors")
    tensor = read_safetensors(tmp_path / "model.safetensors")["i64"]
    os.truncate(tensor.file, tensor.offset + 3)
    with pytest.raises(CheckpointError, match=r"3 bytes found.*16 expected"):
        tensor.read()
    tensor.file.unlink()
    with pytest.raises(CheckpointError, match="can no longer be read"):
        tensor.raw()


def test_shards_may_be_links_out_of_the_folder_and_lie_in_subfolders(tmp_path: Path) -> None:
    blobs, folder = tmp_path / "blobs", tmp_path / "snapshot"
    blobs.mkdir()
    folder.mkdir()
    two_shards(folder)
    (folder / "one.safetensors").rename(blobs / "0123")
    (folder / "one.safetensors").symlink_to("../blobs/0123")
    (folder / "deep").mkdir()
    (folder / "two.safetensors").rename(folder / "deep" / "two.safetensors")
    edit_index(folder, c="deep/two.safetensors")
    checkpoint = open_checkpoint(folder)
    np.testing.assert_array_equal(checkpoint["a"].read(), np.ones(4))
    assert [file.name for file in checkpoint.files] == ["config.json", "deep/two.safetensors", INDEX, "one.safetensors"]


def test_a_single_file_comes_before_an_index(tmp_path: Path) -> None:
    two_shards(tmp_path)
    save_file({"single": np.ones(2)}, tmp_path / "model.safetensors")
    checkpoint = open_checkpoint(tmp_path)
    assert list(checkpoint) == ["single"] and checkpoint.hift is None and checkpoint.hift_config is None


# --- what is refused: the folder ---


def test_an_empty_folder_lacks_weights_and_config(tmp_path: Path) -> None:
    message = refusal(tmp_path)
    assert "2 problems" in message and "the folder is empty" in message and "'config.json' is missing" in message


def test_a_missing_path_and_a_file_are_named(tmp_path: Path) -> None:
    assert "'nowhere' is missing" in refusal(tmp_path / "nowhere")
    assert "expected a checkpoint's folder" in refusal(GOLDEN / "model-00001-of-00005.safetensors")
    assert "cannot open" in refusal(tmp_path / "nul\0")


def test_a_folder_without_config_or_with_a_broken_one_is_refused(tmp_path: Path) -> None:
    two_shards(tmp_path)
    for text, expected in [("[]", "a JSON list"), ("{", "not valid JSON"), ('{"a": 1, "a": 2}', "more than once: 'a'")]:
        (tmp_path / "config.json").write_text(text)
        assert expected in refusal(tmp_path)
    (tmp_path / "config.json").unlink()
    assert "'config.json' is missing" in refusal(tmp_path)


@pytest.mark.parametrize(
    ("name", "hint"),
    [
        ("pytorch_model.bin", "convert it to safetensors"),
        ("model-00001-of-00002.safetensors", "is missing: download it too"),
        ("notes.txt", "found 'notes.txt'"),
    ],
)
def test_other_weights_get_a_hint(tmp_path: Path, name: str, hint: str) -> None:
    (tmp_path / name).write_bytes(b"")
    assert hint in refusal(tmp_path)


def test_a_broken_link_is_called_one(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text("{}")
    (tmp_path / "model.safetensors").symlink_to("../blobs/gone")
    assert "'model.safetensors' is a link to a file that is not there" in refusal(tmp_path)


# --- what is refused: the index and its shards ---


def test_everything_wrong_with_all_shards_is_in_one_error(tmp_path: Path) -> None:
    two_shards(tmp_path)
    save_file({"f": np.ones(2), "stray": np.ones(2)}, tmp_path / "three.safetensors")
    edit_index(tmp_path, d="missing.safetensors", e="one.safetensors", f="three.safetensors")
    size = (tmp_path / "two.safetensors").stat().st_size
    os.truncate(tmp_path / "two.safetensors", size - 5)
    (tmp_path / "config.json").unlink()
    save_file(
        {"x.weight_g": np.ones(1), "x.parametrizations.weight.original1": np.ones(1)}, tmp_path / "hift.safetensors"
    )
    message = refusal(tmp_path)
    for expected in [
        "'missing.safetensors' is missing",
        f"'two.safetensors': truncated: {size - 5} bytes found, {size} expected",
        "says 'one.safetensors' holds 'e', but it does not",
        "'three.safetensors' holds 'stray', but",
        "'config.json' is missing",
        "weight norm is spelled both",
    ]:
        assert expected in message


def test_a_tensor_in_two_shards_is_refused(tmp_path: Path) -> None:
    folder_of(tmp_path, one={"a": np.ones(1), "b": np.ones(1)}, two={"a": np.ones(1), "c": np.ones(1)})
    assert "more than one shard: 'a'" in refusal(tmp_path)


@pytest.mark.parametrize(
    "name", ["../x", "/etc/hostname", "sub/../../x", "..\\x", "C:\\x", "C:x", "\\\\host\\share", ""]
)
def test_a_shard_path_that_leaves_the_folder_is_refused(tmp_path: Path, name: str) -> None:
    folder = tmp_path / "checkpoint"
    folder.mkdir()
    save_file({"a": np.ones(4)}, tmp_path / "x")
    edit_index(two_shards(folder), a=name)
    assert "inside the checkpoint's folder" in refusal(folder)


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        (".", "expected a file inside"),
        ("folder", "'folder' is not a regular file"),
        ("pipe", "'pipe' is not a regular file"),
        ("a" * 300, "cannot open 'aaa"),
        ("nul\0", "cannot open 'nul"),
        ("\ud800", "cannot open"),
    ],
)
def test_a_shard_that_is_no_regular_file_is_refused(tmp_path: Path, name: str, expected: str) -> None:
    (tmp_path / "folder").mkdir()
    os.mkfifo(tmp_path / "pipe")
    edit_index(two_shards(tmp_path), a=name)
    assert expected in refusal(tmp_path)


@pytest.mark.parametrize("index", ["[]", "{}", '{"weight_map": 3}', '{"weight_map": {"a": 1}}', "[" * 100_000, ""])
def test_an_index_that_is_none_is_refused(tmp_path: Path, index: str) -> None:
    (two_shards(tmp_path) / INDEX).write_text(index)
    assert INDEX in refusal(tmp_path)


# --- what is refused: one safetensors file ---


def test_a_file_too_short_for_its_header_is_called_truncated(tmp_path: Path) -> None:
    path = tmp_path / "x"
    path.write_bytes(b"1234567")
    assert "7 bytes" in header_refusal(path)
    path.write_bytes((1000).to_bytes(8, "little") + b"{}")
    assert "10 bytes found, 1008 expected" in header_refusal(path)
    path.write_bytes((2**63).to_bytes(8, "little") + b"{}")
    assert "at most 100000000 expected" in header_refusal(path)


@pytest.mark.parametrize("header", [b"not json", b"\xff\xfe", b"[]", b'{"a": 1, "a": 2}', b"[" * 100_000, b"9" * 5000])
def test_a_header_that_is_no_json_object_is_refused(tmp_path: Path, header: bytes) -> None:
    assert "header of 'x'" in header_refusal(write(tmp_path / "x", header))


@pytest.mark.parametrize(
    ("bad", "expected"),
    [
        (entry("F32", [-1, 4], 0, 16), "none negative"),
        (entry("F32", [2**62, 2**62], 0, 16), "larger than any memory"),
        (entry("F32", [0, 2**62, 2**62], 0, 0), "larger than any memory"),
        (entry("F32", [10**4000], 0, 16), "none negative"),
        (entry("F32", [1] * 65, 0, 4), "at most 64"),
        (entry("F32", [True], 0, 4), "none negative"),
        (entry("F32", [4.0], 0, 16), "none negative"),
        (entry("F32", "4", 0, 16), "none negative"),
        (entry("F32", [3], 0, 16), "16 bytes, but F32 [3] takes 12"),
        (entry("F32", [4], 16, 0), "-16 bytes"),
        (entry("F32", [4], 0, 10**4299), "data_offsets"),
        (entry("F32", [4], 0), "data_offsets"),
        (entry("F32", [4], 0, "16"), "data_offsets"),
        (entry("F8_E4M3", [16], 0, 16), "dtype 'F8_E4M3' is not supported"),
        (entry("Q4_0", [32], 0, 18), "dtype 'Q4_0' is not supported"),
        (entry(["F32"], [4], 0, 16), "is not supported"),
        ({"dtype": "F32", "shape": [4]}, "expected dtype, shape and data_offsets"),
        (7, "expected dtype, shape and data_offsets"),
    ],
)
def test_a_bad_header_entry_is_named(tmp_path: Path, bad: object, expected: str) -> None:
    message = header_refusal(write(tmp_path / "x", {"bad": bad}, bytes(16)))
    assert "tensor 'bad'" in message and expected in message


def test_all_bad_entries_of_a_file_are_named_at_once(tmp_path: Path) -> None:
    header = {"p": entry("F3", [1], 0, 4), "q": entry("F32", [2], 0, 4), "r": entry("F32", [9], 0, 36)}
    message = header_refusal(write(tmp_path / "x", header, bytes(4)))
    assert "3 problems" in message and "tensor 'p'" in message and "tensor 'q'" in message and "truncated" in message


def test_overlaps_gaps_and_trailing_bytes_are_refused(tmp_path: Path) -> None:
    overlapping = {"a": entry("F32", [4], 0, 16), "b": entry("F32", [2], 12, 20)}
    assert "'a' and 'b' overlap by 4 bytes" in header_refusal(write(tmp_path / "x", overlapping, bytes(20)))
    apart = {"a": entry("U8", [4], 4, 8), "b": entry("U8", [2], 9, 11)}
    path = write(tmp_path / "x", apart, bytes(13))
    start = path.stat().st_size - 13
    message = header_refusal(path)
    for nbytes, at in [(4, start), (1, start + 8), (2, start + 11)]:
        assert f"{nbytes} bytes at {at} belong to no tensor" in message


def test_a_thousand_problems_do_not_fill_the_terminal(tmp_path: Path) -> None:
    message = header_refusal(write(tmp_path / "x", dict.fromkeys(map(str, range(1000)))))
    assert message.count("\n") < 50 and "and 960 more" in message


# --- fuzzing ---

ANYTHING = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5) | st.sampled_from(["F32", "BF16"]),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=5), inner, max_size=4),
    max_leaves=8,
)
SIZES = st.lists(st.integers(0, 4), max_size=3) | ANYTHING
ENTRIES = st.fixed_dictionaries(
    {"dtype": st.sampled_from(["F32", "BF16", "I64", "BOOL"]) | ANYTHING, "shape": SIZES, "data_offsets": SIZES}
)


@given(header=st.dictionaries(st.text(max_size=5), ENTRIES | ANYTHING, max_size=4), data=st.binary(max_size=64))
@settings(max_examples=150, deadline=None)
def test_any_header_is_read_or_refused(tmp_path_factory: pytest.TempPathFactory, header: object, data: bytes) -> None:
    path = write(tmp_path_factory.getbasetemp() / "fuzz.safetensors", header, data)
    with suppress(CheckpointError):
        read_everything(list(read_safetensors(path).values()))


@given(data=st.data())
@settings(max_examples=300, deadline=None)
def test_any_damage_to_a_file_is_read_or_refused(tmp_path_factory: pytest.TempPathFactory, data: st.DataObject) -> None:
    path = tmp_path_factory.getbasetemp() / "damaged.safetensors"
    save_file(MIXED, path)
    content = bytearray(path.read_bytes())
    for _ in range(data.draw(st.integers(1, 3))):
        at = data.draw(st.integers(0, len(content) - 1))
        content[at : at + data.draw(st.integers(0, 4))] = data.draw(st.binary(max_size=4))
    path.write_bytes(content)
    with suppress(CheckpointError):
        read_everything(list(read_safetensors(path).values()))


# --- the vocoder's weight norm ---


def checkpoint_with_hift(folder: Path, keys: list[str]) -> Path:
    two_shards(folder)
    save_file({key: np.full((2, 1), i, np.float32) for i, key in enumerate(keys)}, folder / "hift.safetensors")
    return folder


def test_both_spellings_of_weight_norm_give_the_same_keys(tmp_path: Path) -> None:
    keys = ["a.parametrizations.weight.original0", "a.parametrizations.weight.original1", "a.bias"]
    keys += ["b.weight_g", "b.weight_v"]
    hift = open_checkpoint(checkpoint_with_hift(tmp_path, keys)).hift
    assert hift is not None and set(hift) == {"a.weight_g", "a.weight_v", "a.bias", "b.weight_g", "b.weight_v"}
    assert all(tensor.key == key for key, tensor in hift.items())
    assert [hift[key].read()[0, 0] for key in ("a.weight_g", "a.weight_v", "b.weight_v")] == [0, 1, 4]


@pytest.mark.parametrize("old", [".weight_g", ".weight_v"])
@pytest.mark.parametrize("new", [".parametrizations.weight.original0", ".parametrizations.weight.original1"])
def test_a_layer_with_both_spellings_is_refused(tmp_path: Path, old: str, new: str) -> None:
    message = refusal(checkpoint_with_hift(tmp_path, ["conv" + old, "conv" + new, "other.weight_g"]))
    assert "in 'conv'" in message and "other" not in message


def test_folding_gives_rows_of_length_g_in_the_direction_of_v() -> None:
    rng = np.random.default_rng(0)
    v, g = rng.standard_normal((3, 4, 5), np.float32), rng.standard_normal((3, 1, 1), np.float32)
    w = fold_weight_norm(g, v)
    assert w.dtype == np.float32 and w.shape == v.shape
    for row in range(3):
        length = float(np.linalg.norm(v[row].astype(np.float64)))
        np.testing.assert_allclose(w[row], g[row, 0, 0] * v[row] / length, rtol=1e-6)


def test_folding_is_exact_where_float32_squares_would_overflow_or_vanish() -> None:
    for size in (1e-30, 1e30):
        w = fold_weight_norm(np.full((1, 1), 5, np.float32), np.array([[3 * size, 4 * size]], np.float32))
        np.testing.assert_allclose(w, [[3, 4]], rtol=1e-6)


def test_folding_refuses_what_has_no_direction_and_what_does_not_fit() -> None:
    with pytest.raises(CheckpointError, match=r"all-zero rows.*'1'"):
        fold_weight_norm(np.ones((2, 1), np.float32), np.array([[1, 0], [0, 0]], np.float32))
    with pytest.raises(CheckpointError, match="does not fit"):
        fold_weight_norm(np.ones((1, 2, 1), np.float32), np.ones((2, 2, 1), np.float32))


@pytest.mark.oracle
def test_folding_agrees_with_torch_on_the_golden_vocoder() -> None:
    import torch

    hift = open_checkpoint(GOLDEN).hift
    assert hift is not None
    layers = [key.removesuffix("_g") for key in hift if key.endswith("weight_g")]
    assert layers
    for layer in layers:
        g, v = hift[layer + "_g"].read(), hift[layer + "_v"].read()
        expected = torch.ops.aten._weight_norm(torch.from_numpy(v), torch.from_numpy(g), 0).numpy()
        np.testing.assert_allclose(fold_weight_norm(g, v), expected, rtol=1e-5, atol=1e-7)
