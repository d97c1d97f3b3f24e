"""GGUF: metadata and tensors read back, the gguf package agrees on every block, and damage is refused by name."""

import os
import struct
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from gguf import GGMLQuantizationType, GGUFReader, GGUFValueType, dequantize, quantize
from hypothesis import given, settings
from hypothesis import strategies as st

from export.checkpoint import open_checkpoint
from export.gguf_file import GGML_TYPES, read_gguf
from export.lazy_tensor import STORED_TYPES
from runtime import integers
from runtime.errors import CheckpointError
from runtime.integers import Form

U32, STRING, ARRAY = 4, 8, 9
F32, F16, Q4_0, Q4_1, Q8_0, Q2_K = 0, 1, 2, 3, 8, 10

FORMS = {
    "Q4_0": Form(4, 32, symmetric=True),
    "Q5_0": Form(8, 32, symmetric=True),
    "Q8_0": Form(8, 32, symmetric=True),
    "Q6_K": Form(8, 16, symmetric=True, scale_bits=32),
}


def string(text: str | bytes) -> bytes:
    data = text.encode() if isinstance(text, str) else text
    return struct.pack("<Q", len(data)) + data


def pair(key: str, kind: int, value: bytes) -> bytes:
    return string(key) + struct.pack("<I", kind) + value


def array(kind: int, count: int, values: bytes) -> bytes:
    return struct.pack("<IQ", kind, count) + values


@dataclass
class Tensor:
    """What the writer below states of a tensor; `dims` in GGUF's order, the fastest first."""

    name: str
    dims: list[int]
    ggml_type: int
    data: bytes
    offset: int | None = None


@dataclass
class Writer:
    """A GGUF file put together from its parts, right or wrong."""

    tensors: list[Tensor] = field(default_factory=list)
    pairs: list[bytes] = field(default_factory=list)
    magic: bytes = b"GGUF"
    version: int = 3
    alignment: int = 32

    def to_bytes(self) -> bytes:
        head = self.magic + struct.pack("<IQQ", self.version, len(self.tensors), len(self.pairs)) + b"".join(self.pairs)
        data = b""
        for tensor in self.tensors:
            offset = len(data) if tensor.offset is None else tensor.offset
            dims = struct.pack(f"<I{len(tensor.dims)}Q", len(tensor.dims), *tensor.dims)
            head += string(tensor.name) + dims + struct.pack("<IQ", tensor.ggml_type, offset)
            data += tensor.data + bytes(-len(tensor.data) % self.alignment)
        return head + bytes(-len(head) % self.alignment) + data

    def write(self, path: Path) -> Path:
        path.write_bytes(self.to_bytes())
        return path


def refusal(path: Path) -> str:
    with pytest.raises(CheckpointError) as caught:
        read_gguf(path)
    return str(caught.value)


def blocks(name: str, shape: tuple[int, ...]) -> bytes:
    """Quantized normal values of the gguf package's own making."""
    values = np.random.default_rng(7).standard_normal(shape).astype(np.float32)
    return quantize(values, GGMLQuantizationType[name]).tobytes()


def random_blocks(name: str, values: int) -> bytes:
    """Any bytes, but scales and minima that are finite."""
    kind = STORED_TYPES[name]
    data = np.random.default_rng(3).integers(0, 256, (values // kind.block, kind.block_bytes), np.uint8)
    at = kind.block_bytes - 2 if name == "Q6_K" else 0
    data[:, at + 1] &= 0x3B
    return data.tobytes()


def f32(name: str = "t", count: int = 2) -> Tensor:
    return Tensor(name, [count], F32, np.arange(count, dtype=np.float32).tobytes())


def test_metadata_of_every_type_reads_back(tmp_path: Path) -> None:
    scalars = [(0, "B", 200), (1, "b", -3), (2, "H", 60000), (3, "h", -300), (4, "I", 2**31), (5, "i", -(2**31))]
    scalars += [(6, "f", 0.5), (7, "?", True), (10, "Q", 2**63), (11, "q", -(2**63)), (12, "d", 0.1)]
    pairs = [pair(f"scalar.{kind}", kind, struct.pack("<" + code, value)) for kind, code, value in scalars]
    pairs += [
        pair("text", STRING, string("ein Gruß 你好")),
        pair("numbers", ARRAY, array(5, 3, struct.pack("<3i", -1, 2, 3))),
        pair("flags", ARRAY, array(7, 2, b"\1\0")),
        pair("words", ARRAY, array(STRING, 2, string("a") + string(""))),
        pair("nested", ARRAY, array(ARRAY, 2, array(0, 1, b"\5") + array(STRING, 0, b""))),
        pair("none", ARRAY, array(6, 0, b"")),
    ]
    metadata = read_gguf(Writer(pairs=pairs).write(tmp_path / "x.gguf")).metadata
    for kind, _, value in scalars:
        assert metadata[f"scalar.{kind}"] == value and type(metadata[f"scalar.{kind}"]) is type(value)
    assert metadata["text"] == "ein Gruß 你好" and metadata["words"] == ["a", ""]
    assert metadata["numbers"].dtype == np.int32 and metadata["numbers"].tolist() == [-1, 2, 3]
    assert metadata["flags"].tolist() == [True, False] and metadata["none"].tolist() == []
    assert [list(inner) for inner in metadata["nested"]] == [[5], []]


def test_type_numbers_are_those_of_the_gguf_package() -> None:
    ours = {name: number for number, name in GGML_TYPES.items()}
    assert {kind.name: kind.value for kind in GGMLQuantizationType if kind.name in ours} == {
        name: number for name, number in ours.items() if name in GGMLQuantizationType.__members__
    }
    assert set(STORED_TYPES) - {"U8", "BOOL"} <= GGMLQuantizationType.__members__.keys()
    assert GGUFValueType.STRING == STRING and GGUFValueType.ARRAY == ARRAY


@pytest.mark.parametrize("version", [2, 3])
def test_shapes_are_in_numpy_order_and_data_is_aligned(tmp_path: Path, version: int) -> None:
    matrix = np.arange(6, dtype=np.float16).reshape(2, 3)
    pairs = [pair("general.alignment", U32, struct.pack("<I", 64))]
    writer = Writer(
        [f32("vector"), Tensor("matrix", [3, 2], F16, matrix.tobytes())], pairs, version=version, alignment=64
    )
    file = read_gguf(writer.write(tmp_path / "x.gguf"))
    assert file.version == version and file.tensors["matrix"].shape == (2, 3)
    assert all(tensor.offset % 64 == 0 for tensor in file.tensors.values())
    np.testing.assert_array_equal(file.tensors["matrix"].read(), matrix)
    np.testing.assert_array_equal(file.tensors["vector"].read(), [0, 1])


@pytest.mark.parametrize("name", ["Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q8_0"])
def test_blocks_dequantize_bit_by_bit_as_the_gguf_package_does(tmp_path: Path, name: str) -> None:
    shape = (6, 96)
    stored, kind = blocks(name, shape), GGMLQuantizationType[name]
    tensor = read_gguf(Writer([Tensor("w", [96, 6], kind, stored)]).write(tmp_path / "x.gguf")).tensors["w"]
    expected = dequantize(np.frombuffer(stored, np.uint8).reshape(6, -1), kind)
    assert tensor.dtype == name and tensor.read().dtype == np.float32
    assert tensor.read().tobytes() == expected.tobytes()
    assert tensor.raw().tobytes() == stored
    for start in range(6):
        np.testing.assert_array_equal(tensor.rows(start, 6), expected[start:])


def test_any_bytes_dequantize_as_the_gguf_package_does(tmp_path: Path) -> None:
    rng = np.random.default_rng(1)
    for name in ("Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q8_0", "Q4_K", "Q5_K", "Q6_K"):
        stored = STORED_TYPES[name]
        data = rng.integers(0, 256, (8, 4 * stored.block_bytes), np.uint8)
        with np.errstate(all="ignore"):  # random scales may be infinite
            expected = dequantize(data, GGMLQuantizationType[name])
            np.testing.assert_array_equal(stored.decode(data.reshape(-1)).reshape(expected.shape), expected)


@pytest.mark.parametrize(("name", "form"), FORMS.items())
def test_blocks_without_minima_are_integers_that_stand_for_the_same_values(
    tmp_path: Path, name: str, form: Form
) -> None:
    columns, kind = 512, GGMLQuantizationType[name]
    stored = random_blocks(name, 6 * columns)
    tensor = read_gguf(Writer([Tensor("w", [columns, 6], kind, stored)]).write(tmp_path / "x.gguf")).tensors["w"]
    expected = dequantize(np.frombuffer(stored, np.uint8).reshape(6, -1), kind)
    assert tensor.form() == form
    for start, stop in [(0, 6), (2, 5), (3, 3)]:
        rows = tensor.integers(start, stop)
        assert rows.bits == form.bits and rows.scales.shape == (stop - start, columns // form.group_size)
        assert integers.dequantize(rows).tobytes() == expected[start:stop].tobytes()


@pytest.mark.parametrize("name", ["F32", "F16", "Q4_1", "Q5_1", "Q4_K", "Q5_K"])
def test_floats_and_blocks_with_minima_are_no_integers(tmp_path: Path, name: str) -> None:
    data = random_blocks(name, 512)
    writer = Writer([Tensor("w", [512, 1], GGMLQuantizationType[name], data)])
    assert read_gguf(writer.write(tmp_path / "x.gguf")).tensors["w"].form() is None


def test_rows_of_a_quantized_vector_may_cut_a_block(tmp_path: Path) -> None:
    stored = blocks("Q8_0", (1, 96))
    tensor = read_gguf(Writer([Tensor("w", [96], Q8_0, stored)]).write(tmp_path / "x.gguf")).tensors["w"]
    for start, stop in [(0, 96), (5, 40), (31, 33), (64, 64), (95, 96)]:
        np.testing.assert_array_equal(tensor.rows(start, stop), tensor.read()[start:stop])


def test_the_gguf_package_reads_the_same_of_a_whole_file(tmp_path: Path) -> None:
    pairs = [pair("general.architecture", STRING, string("llama")), pair("words", ARRAY, array(STRING, 1, string("a")))]
    tensors = [Tensor("q", [64, 2], Q4_0, blocks("Q4_0", (2, 64))), f32("v", 5)]
    path = Writer(tensors, pairs).write(tmp_path / "x.gguf")
    ours = read_gguf(path)
    for theirs in GGUFReader(path).tensors:
        tensor = ours.tensors[theirs.name]
        assert (tensor.offset, tensor.nbytes) == (theirs.data_offset, theirs.n_bytes)
        assert tensor.shape == tuple(theirs.shape.tolist()[::-1])
        assert tensor.read().tobytes() == dequantize(theirs.data, theirs.tensor_type).tobytes()


def test_a_gguf_opens_as_a_checkpoint_by_file_and_by_folder(tmp_path: Path) -> None:
    path = Writer([f32()], [pair("general.name", STRING, string("tiny"))]).write(tmp_path / "tiny.gguf")
    for checkpoint in (open_checkpoint(path), open_checkpoint(tmp_path)):
        assert checkpoint.kind == "gguf" and checkpoint.folder == tmp_path and list(checkpoint) == ["t"]
        assert checkpoint.metadata == {"general.name": "tiny"} and checkpoint.config == {}
        assert [(file.name, file.size) for file in checkpoint.files] == [("tiny.gguf", path.stat().st_size)]


def test_a_folder_with_two_ggufs_asks_for_one(tmp_path: Path) -> None:
    for name in ("a.gguf", "b.gguf"):
        Writer([f32()]).write(tmp_path / name)
    with pytest.raises(CheckpointError, match=r"'a.gguf', 'b.gguf': name one"):
        open_checkpoint(tmp_path)


# --- what is refused ---


def test_other_formats_and_versions_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "x.gguf"
    assert "expected b'GGUF'" in refusal(Writer(magic=b"GGML").write(path))
    assert "version 1, expected 2 or 3" in refusal(Writer(version=1).write(path))
    assert "big endian" in refusal(Writer(version=3 << 24).write(path))
    path.write_bytes(b"")
    assert "0 bytes found" in refusal(path)


def test_unsupported_types_and_bad_shapes_are_all_named(tmp_path: Path) -> None:
    tensors = [
        Tensor("k", [256], Q2_K, b""),
        Tensor("n", [1], 999, b""),
        Tensor("odd", [33, 2], Q4_0, b""),
        Tensor("scalar", [], Q4_0, b""),
        Tensor("huge", [2**40, 2**40], F32, b""),
        Tensor("askew", [1], F32, bytes(4), offset=8),
        f32("twice"),
        f32("twice"),
    ]
    message = refusal(Writer(tensors).write(tmp_path / "x.gguf"))
    for expected in [
        "tensor 'k' has type Q2_K, which is not supported",
        "tensor 'n' has type number 999",
        "tensor 'odd': shape [2, 33]: rows must be a multiple of 32",
        "tensor 'scalar': shape []",
        "tensor 'huge'",
        "tensor 'askew' at 8 is not aligned to 32",
        "tensor 'twice' is there twice",
    ]:
        assert expected in message


def test_overlapping_tensors_are_refused(tmp_path: Path) -> None:
    tensors = [Tensor("a", [16], F32, bytes(64)), Tensor("b", [4], F32, bytes(16), offset=32)]
    assert "'a' and 'b' overlap by 32 bytes" in refusal(Writer(tensors).write(tmp_path / "x.gguf"))


def test_a_truncated_file_says_the_bytes(tmp_path: Path) -> None:
    path = Writer([f32(count=8)]).write(tmp_path / "x.gguf")
    size = path.stat().st_size
    os.truncate(path, size - 3)
    assert f"truncated: {size - 3} bytes found, {size} expected" in refusal(path)
    os.truncate(path, 40)
    assert "truncated inside its header: 40 bytes found, at least" in refusal(path)


@pytest.mark.parametrize("count", [2**20, 2**63, 2**64 - 1])
def test_a_length_beyond_the_file_costs_no_memory(tmp_path: Path, count: int) -> None:
    path = tmp_path / "x.gguf"
    for value in (struct.pack("<Q", count), struct.pack("<IQ", 12, count), struct.pack("<IQ", STRING, count)):
        kind = STRING if len(value) == 8 else ARRAY
        assert "truncated" in refusal(Writer(pairs=[pair("k", kind, value)]).write(path))


def test_contradictory_metadata_is_refused(tmp_path: Path) -> None:
    path, number = tmp_path / "x.gguf", struct.pack("<I", 3)
    for pairs, expected in [
        ([pair("k", U32, number)] * 2, "'k' is there twice"),
        ([pair("k", 13, number)], "has type 13"),
        ([pair("k", ARRAY, array(ARRAY, 1, b"") * 9)], "type 9 at depth 4"),
        ([pair("k", STRING, string(b"\xff"))], "not UTF-8"),
        ([pair("general.alignment", U32, number)], "is 3, expected a power of two"),
        ([pair("split.count", 2, struct.pack("<H", 4))], "one of 4 parts"),
    ]:
        assert expected in refusal(Writer([f32()], pairs).write(path))


def test_a_tensor_of_five_dimensions_is_refused(tmp_path: Path) -> None:
    assert "5 dimensions" in refusal(Writer([Tensor("t", [1] * 5, F32, bytes(4))]).write(tmp_path / "x.gguf"))


def whole_file() -> bytes:
    pairs = [
        pair("general.alignment", U32, struct.pack("<I", 32)),
        pair("words", ARRAY, array(STRING, 2, string("ab") + string("c"))),
        pair("numbers", ARRAY, array(2, 3, bytes(6))),
    ]
    return Writer(
        [Tensor("q", [32, 3], Q4_1, bytes(60)), f32(), Tensor("h", [2, 2, 2], F16, bytes(16))], pairs
    ).to_bytes()


@given(data=st.data())
@settings(max_examples=400, deadline=None)
def test_any_damage_is_read_or_refused(tmp_path_factory: pytest.TempPathFactory, data: st.DataObject) -> None:
    content = bytearray(whole_file())
    extreme: Any = st.sampled_from([b"\xff" * 8, b"\x00" * 8, b"\xff" * 4, struct.pack("<Q", 2**62)])
    for _ in range(data.draw(st.integers(1, 3))):
        at = data.draw(st.integers(0, len(content) - 1))
        patch = data.draw(extreme | st.binary(max_size=4))
        content[at : at + data.draw(st.sampled_from([0, len(patch)]))] = patch
    path = tmp_path_factory.getbasetemp() / "damaged.gguf"
    path.write_bytes(content[: data.draw(st.sampled_from([len(content)] * 3 + [len(content) // 2]))])
    with suppress(CheckpointError), np.errstate(all="ignore"):
        for tensor in open_checkpoint(path).values():
            assert tensor.read().shape == tensor.shape
