"""GGUF (versions 2 and 3): its metadata as a dict and its tensors as LazyTensors, shapes in numpy's order.

Format: "GGUF", version, counts; then key-value pairs, then one record a tensor (name, dims with the fastest axis
first, type, offset), then padding to `general.alignment`, then the data. Everything is little endian.
"""

import struct
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

from export.files import file_size
from export.lazy_tensor import STORED_TYPES, LazyTensor, checked_shape, layout_problems
from export.problems import gathering, refuse
from runtime.errors import CheckpointError

MAX_HEADER_BYTES = 256 << 20  # vocabulary and merges of the largest known tokenizers take a tenth of it
MAX_NESTING = 4  # of arrays in arrays
MAX_GGML_DIMS = 4

# By their numbers in ggml's `enum ggml_type`; those not in STORED_TYPES serve the message that they are not supported.
_TYPE_NAMES = (
    "F32 F16 Q4_0 Q4_1 Q4_2 Q4_3 Q5_0 Q5_1 Q8_0 Q8_1 Q2_K Q3_K Q4_K Q5_K Q6_K Q8_K IQ2_XXS IQ2_XS IQ3_XXS IQ1_S "
    "IQ4_NL IQ3_S IQ2_S IQ4_XS I8 I16 I32 I64 F64 IQ1_M BF16 Q4_0_4_4 Q4_0_4_8 Q4_0_8_8 TQ1_0 TQ2_0 IQ4_NL_4_4 "
    "IQ4_NL_4_8 IQ4_NL_8_8 MXFP4"
)
GGML_TYPES = dict(enumerate(_TYPE_NAMES.split()))

# By their numbers in `enum gguf_metadata_value_type`; 8 and 9 are no scalars.
SCALARS = dict(enumerate(("u1", "i1", "<u2", "<i2", "<u4", "<i4", "<f4", "?", None, None, "<u8", "<i8", "<f8")))
STRING, ARRAY = 8, 9


@dataclass(frozen=True)
class GGUFFile:
    """An opened GGUF file.

    `metadata` holds the file's own keys; strings are str, numbers int, float or bool, arrays of numbers numpy arrays,
    arrays of strings or of arrays lists. `tensors` are keyed by the file's names.
    """

    path: Path
    version: int
    metadata: dict[str, Any] = field(repr=False)
    tensors: dict[str, LazyTensor] = field(repr=False)


@dataclass(frozen=True)
class _TensorInfo:
    name: str
    shape: tuple[int, ...]
    ggml_type: int
    offset: int  # from the start of the data


def read_gguf(path: Path) -> GGUFFile:
    """Header of a GGUF file; no tensor is read.

    Raises CheckpointError for another format or version, a damaged or truncated header, and, all at once, for
    tensors of unsupported types, outside the file, overlapping or misaligned.
    """
    size = file_size(path)
    try:
        with path.open("rb") as file:
            cursor = _Cursor(file, size)
            version = _read_version(cursor)
            tensor_count, metadata_count = cursor.number("<u8"), cursor.number("<u8")
            metadata = _read_metadata(cursor, metadata_count)
            infos = [_read_tensor_info(cursor) for _ in range(tensor_count)]
    except (CheckpointError, OSError) as error:
        raise CheckpointError(f"{path.name!r}: {error}") from None
    tensors = _place_tensors(path, infos, metadata, cursor.position, size)
    return GGUFFile(path, version, metadata, tensors)


class _Cursor:
    """Reads a header front to back and never past its end."""

    def __init__(self, file: BinaryIO, size: int) -> None:
        self.file = file
        self.size = size
        self.position = 0

    def take(self, nbytes: int) -> bytes:
        end = self.position + nbytes
        if end > self.size:
            raise CheckpointError(f"truncated inside its header: {self.size} bytes found, at least {end} expected")
        if end > MAX_HEADER_BYTES:
            raise CheckpointError(f"its header takes {end} bytes or more, at most {MAX_HEADER_BYTES} expected")
        data = self.file.read(nbytes)
        if len(data) != nbytes:
            raise CheckpointError("the file changed while it was being read")
        self.position = end
        return data

    def number(self, dtype: str) -> Any:
        return self.numbers(dtype, 1)[0].item()

    def numbers(self, dtype: str, count: int) -> np.ndarray:
        """[count] of one scalar type; a byte that is no bool's counts as true."""
        if dtype == "?":
            return self.numbers("<u1", count) != 0
        return np.frombuffer(self.take(count * np.dtype(dtype).itemsize), dtype)

    def string(self) -> str:
        data = self.take(struct.unpack("<Q", self.take(8))[0])
        try:
            return data.decode("utf-8")
        except UnicodeDecodeError as error:
            raise CheckpointError(f"a string before byte {self.position} is not UTF-8: {error}") from None


def _read_version(cursor: _Cursor) -> int:
    magic, version = cursor.take(4), cursor.number("<u4")
    if magic != b"GGUF":
        raise CheckpointError(f"starts with {magic!r}, expected b'GGUF'")
    if version & 0xFFFF == 0:
        raise CheckpointError("is big endian, expected little endian: convert it on a machine of that kind")
    if version not in (2, 3):
        raise CheckpointError(f"has GGUF version {version}, expected 2 or 3")
    return version


def _read_metadata(cursor: _Cursor, count: int) -> dict[str, Any]:
    metadata: dict[str, Any] = {}
    for _ in range(count):
        key = cursor.string()
        if key in metadata:
            raise CheckpointError(f"metadata key {key!r} is there twice")
        metadata[key] = _read_value(cursor, cursor.number("<u4"), key)
    return metadata


def _read_value(cursor: _Cursor, kind: int, key: str, nesting: int = 0) -> Any:
    if kind == STRING:
        return cursor.string()
    if kind == ARRAY and nesting < MAX_NESTING:
        element, count = cursor.number("<u4"), cursor.number("<u8")
        if dtype := SCALARS.get(element):
            return cursor.numbers(dtype, count)
        return [_read_value(cursor, element, key, nesting + 1) for _ in range(count)]
    if dtype := SCALARS.get(kind):
        return cursor.number(dtype)
    raise CheckpointError(f"metadata {key!r} has type {kind} at depth {nesting}, which GGUF does not know")


def _read_tensor_info(cursor: _Cursor) -> _TensorInfo:
    name = cursor.string()
    dims = cursor.number("<u4")
    if dims > MAX_GGML_DIMS:
        raise CheckpointError(f"tensor {name!r} has {dims} dimensions, at most {MAX_GGML_DIMS} expected")
    shape = tuple(cursor.numbers("<u8", dims)[::-1].tolist())
    return _TensorInfo(name, shape, cursor.number("<u4"), cursor.number("<u8"))


def _place_tensors(
    path: Path, infos: list[_TensorInfo], metadata: dict[str, Any], header: int, size: int
) -> dict[str, LazyTensor]:
    problems: list[str] = []
    with gathering(problems):
        _check_whole(metadata)
    alignment = 1
    with gathering(problems):
        alignment = _alignment(metadata)
    start = -(-header // alignment) * alignment
    tensors: dict[str, LazyTensor] = {}
    for info in infos:
        with gathering(problems):
            if info.name in tensors:
                raise CheckpointError(f"tensor {info.name!r} is there twice")
            tensors[info.name] = _tensor(info, path, start, alignment)
    problems += layout_problems(tensors.values(), size)
    refuse(repr(path.name), problems)
    return tensors


def _check_whole(metadata: dict[str, Any]) -> None:
    parts = metadata.get("split.count", 1)
    if isinstance(parts, int) and parts > 1:
        raise CheckpointError(f"is one of {parts} parts: merge them first with llama.cpp's `llama-gguf-split --merge`")


def _alignment(metadata: dict[str, Any]) -> int:
    alignment = metadata.get("general.alignment", 32)
    if type(alignment) is not int or not 0 < alignment <= 1 << 20 or alignment & (alignment - 1):
        raise CheckpointError(f"general.alignment is {alignment!r}, expected a power of two")
    return alignment


def _tensor(info: _TensorInfo, path: Path, start: int, alignment: int) -> LazyTensor:
    name = GGML_TYPES.get(info.ggml_type, f"number {info.ggml_type}")
    stored = STORED_TYPES.get(name)
    if stored is None:
        supported = ", ".join(name for name in GGML_TYPES.values() if name in STORED_TYPES)
        raise CheckpointError(f"tensor {info.name!r} has type {name}, which is not supported; expected {supported}")
    try:
        nbytes = stored.nbytes(checked_shape(info.shape))
    except CheckpointError as error:
        raise CheckpointError(f"tensor {info.name!r}: {error}") from None
    if info.offset % alignment:
        raise CheckpointError(f"tensor {info.name!r} at {info.offset} is not aligned to {alignment} bytes")
    return LazyTensor(info.name, name, info.shape, path, start + info.offset, nbytes)
