"""A tensor of a checkpoint that has not been read: where its bytes lie, and how all or some rows of it are read."""

import math
import reprlib
from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np

from export import ggml_blocks
from export.files import read_bytes, read_strips
from export.ggml_blocks import BLOCK, SUPER, AsIntegers
from runtime.errors import CheckpointError
from runtime.integers import Form, Quantized, dequantize

MAX_BYTES = 2**63 - 1  # numpy's own limit on an array
MAX_DIMS = 64  # likewise


@dataclass(frozen=True, slots=True)
class StoredType:
    """How values of one type lie in a file: in blocks of `block` values, `block_bytes` bytes each."""

    dtype: np.dtype  # of the array that `LazyTensor.read` gives
    block: int
    block_bytes: int
    dequantize: Callable[[np.ndarray], np.ndarray] | None = None  # uint8 [n, block_bytes] -> float32 [n, block]
    as_integers: AsIntegers | None = None  # in its stead, where that is without loss

    def nbytes(self, shape: tuple[int, ...]) -> int:
        """Bytes of a contiguous tensor; CheckpointError if its rows are not whole blocks or it is too large."""
        if self.block > 1 and (not shape or shape[-1] % self.block):
            raise CheckpointError(f"shape {list(shape)}: rows must be a multiple of {self.block} values")
        # Zeros are left out, so that an empty tensor cannot hide sizes that no array may have.
        if math.prod(size for size in shape if size) * max(self.block_bytes, self.dtype.itemsize) > MAX_BYTES:
            raise CheckpointError(f"shape {list(shape)} is larger than any memory")
        return math.prod(shape) // self.block * self.block_bytes

    def decode(self, stored: np.ndarray) -> np.ndarray:
        """uint8 [nbytes] of whole blocks -> values [n]; a view of the same bytes unless they are quantized."""
        if self.as_integers is not None:
            return dequantize(self.as_integers.integers(stored.reshape(-1, self.block_bytes), self.block)).reshape(-1)
        if self.dequantize is not None:
            return self.dequantize(stored.reshape(-1, self.block_bytes)).reshape(-1)
        return stored.view(self.dtype)


def _plain(dtype: Any) -> StoredType:
    return StoredType(np.dtype(dtype), 1, np.dtype(dtype).itemsize)


def _integers(block: int, block_bytes: int, split: AsIntegers) -> StoredType:
    return StoredType(np.dtype(np.float32), block, block_bytes, as_integers=split)


def _floats(block: int, block_bytes: int, dequantize: Callable[[np.ndarray], np.ndarray]) -> StoredType:
    return StoredType(np.dtype(np.float32), block, block_bytes, dequantize)


STORED_TYPES = {
    "F64": _plain(np.float64),
    "F32": _plain(np.float32),
    "F16": _plain(np.float16),
    "BF16": _plain(ml_dtypes.bfloat16),
    "I64": _plain(np.int64),
    "I32": _plain(np.int32),
    "I16": _plain(np.int16),
    "I8": _plain(np.int8),
    "U8": _plain(np.uint8),
    "BOOL": _plain(np.bool_),
    "Q4_0": _integers(BLOCK, 18, AsIntegers(4, 32, 16, ggml_blocks.split_q4_0)),
    "Q5_0": _integers(BLOCK, 22, AsIntegers(8, 32, 16, ggml_blocks.split_q5_0)),
    "Q8_0": _integers(BLOCK, 34, AsIntegers(8, 32, 16, ggml_blocks.split_q8_0)),
    "Q6_K": _integers(SUPER, 210, AsIntegers(8, 16, 32, ggml_blocks.split_q6_k)),
    "Q4_1": _floats(BLOCK, 20, ggml_blocks.dequantize_q4_1),
    "Q5_1": _floats(BLOCK, 24, ggml_blocks.dequantize_q5_1),
    "Q4_K": _floats(SUPER, 144, ggml_blocks.dequantize_q4_k),
    "Q5_K": _floats(SUPER, 176, ggml_blocks.dequantize_q5_k),
}


@dataclass(frozen=True, slots=True)
class LazyTensor:
    """`nbytes` bytes at `offset` of `file` hold the tensor `key`; nothing of it is in memory.

    `dtype` is a name of STORED_TYPES. Without `strides` the bytes are the values in row-major order, so that another
    file may point at them. `strides` (in values) are given only for a view that is not contiguous; the bytes then
    span from its first value to its last one.
    """

    key: str
    dtype: str
    shape: tuple[int, ...]
    file: Path
    offset: int
    nbytes: int
    strides: tuple[int, ...] | None = None

    @property
    def is_quantized(self) -> bool:
        """Whether a quantization has been through its values, whether or not they can be read as integers."""
        stored = STORED_TYPES.get(self.dtype)
        return stored is None or stored.block > 1

    def raw(self) -> np.ndarray:
        """The stored bytes as they are, uint8 [nbytes]: for GGML types the blocks, to be repacked without loss."""
        return read_bytes(self.file, self.offset, self.nbytes)

    def read(self) -> np.ndarray:
        """The whole tensor, [*shape], in its stored type (bfloat16 is ml_dtypes'); quantized types become float32.

        Raises CheckpointError if the file changed since it was opened.
        """
        if self.strides is not None:
            return self._read_strided(self.strides)
        return self._read_values(0, math.prod(self.shape)).reshape(self.shape)

    def rows(self, start: int, stop: int) -> np.ndarray:
        """Rows `start` (inclusive) to `stop` (exclusive) of the first axis, [stop - start, *shape[1:]].

        Reads only their bytes. Raises ValueError unless 0 <= start <= stop <= shape[0].
        """
        if not self.shape or not 0 <= start <= stop <= self.shape[0]:
            raise ValueError(f"rows {start}..{stop} of {self.key!r} with shape {self.shape}")
        shape = (stop - start, *self.shape[1:])
        if self.strides is not None:
            itemsize = STORED_TYPES[self.dtype].block_bytes
            skipped = start * self.strides[0] * itemsize
            nbytes = span(shape, self.strides) * itemsize
            return replace(self, shape=shape, offset=self.offset + skipped, nbytes=nbytes).read()
        row = math.prod(self.shape[1:])
        return self._read_values(start * row, stop * row).reshape(shape)

    def columns(self, start: int, stop: int) -> np.ndarray:
        """Columns `start` to `stop` of a matrix whose values lie plainly in row-major order, [shape[0], stop - start].

        Reads only their bytes, unless they are most of them. Raises ValueError unless 0 <= start <= stop <= shape[1].
        """
        rows, width = self.shape
        if not 0 <= start <= stop <= width:
            raise ValueError(f"columns {start}..{stop} of {self.key!r} with shape {self.shape}")
        if 2 * (stop - start) > width:
            return self.read()[:, start:stop]
        size = STORED_TYPES[self.dtype].block_bytes
        strips = read_strips(self.file, self.offset + start * size, (stop - start) * size, width * size, rows)
        return STORED_TYPES[self.dtype].decode(strips).reshape(rows, stop - start)

    def form(self) -> Form | None:
        """How this matrix is stored as integers; None if it is not, or in a way that ONNX Runtime does not know."""
        stored = STORED_TYPES[self.dtype].as_integers
        if stored is None or len(self.shape) != 2:
            return None
        return Form(stored.bits, stored.group_size, symmetric=True, scale_bits=stored.scale_bits)

    def integers(self, start: int, stop: int) -> Quantized:
        """Rows `start` to `stop` of a matrix that has a form, in that form; only their bytes are read."""
        stored = STORED_TYPES[self.dtype]
        if stored.as_integers is None:
            raise ValueError(f"{self.key!r} is {self.dtype}, which is not stored as integers")
        row = stored.nbytes(self.shape[1:])
        blocks = read_bytes(self.file, self.offset + start * row, (stop - start) * row)
        return stored.as_integers.integers(blocks.reshape(-1, stored.block_bytes), self.shape[1])

    def _read_values(self, start: int, stop: int) -> np.ndarray:
        """Values start..stop of the flattened tensor; of a block that is needed in part the whole is read."""
        stored = STORED_TYPES[self.dtype]
        first, last = start // stored.block, -(-stop // stored.block)
        at = self.offset + first * stored.block_bytes
        values = stored.decode(read_bytes(self.file, at, (last - first) * stored.block_bytes))
        return values[start - first * stored.block : stop - first * stored.block]

    def _read_strided(self, strides: tuple[int, ...]) -> np.ndarray:
        values = STORED_TYPES[self.dtype].decode(self.raw())
        in_bytes = [stride * values.itemsize for stride in strides]
        return np.lib.stride_tricks.as_strided(values, self.shape, in_bytes, writeable=False).copy()


def layout_problems(tensors: Iterable[LazyTensor], size: int) -> list[str]:
    """What is wrong with where contiguous tensors lie in a file of `size` bytes: past its end, or on one another."""
    placed = sorted(tensors, key=lambda tensor: (tensor.offset, tensor.nbytes))
    end = max((tensor.offset + tensor.nbytes for tensor in placed), default=0)
    problems = [f"truncated: {size} bytes found, {end} expected"] if end > size else []
    for before, after in pairwise(placed):
        if (overlap := before.offset + before.nbytes - after.offset) > 0:
            problems.append(f"tensors {before.key!r} and {after.key!r} overlap by {overlap} bytes")
    return problems


def checked_shape(value: object) -> tuple[int, ...]:
    """A shape as a file states it -> tuple; CheckpointError unless it is a list of at most 64 sizes in 0..2^63-1."""
    if not isinstance(value, list | tuple) or len(value) > MAX_DIMS or not all(is_size(size) for size in value):
        raise CheckpointError(f"shape {reprlib.repr(value)}: expected at most {MAX_DIMS} whole numbers, none negative")
    return tuple(value)


def is_size(value: object) -> bool:
    """Whether a parsed value is a whole number that can be a size or an offset (True and False are not)."""
    return type(value) is int and 0 <= value <= MAX_BYTES


def span(shape: tuple[int, ...], strides: tuple[int, ...]) -> int:
    """Values from the first to the last one of a strided view, both counted; 0 if it is empty."""
    if 0 in shape:
        return 0
    return 1 + sum((size - 1) * stride for size, stride in zip(shape, strides, strict=True))
