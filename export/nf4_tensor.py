"""bitsandbytes' 4-bit layers (NF4, FP4): codes of a table of 16 values, and a largest value for each block of them.

value = table[code] * absmax of its block, in float32. The largest values may themselves be stored as codes ("double
quantization"): absmax = table[code] * absmax of their block + offset. Layout: `bitsandbytes.functional.QuantState`,
whose dtype, to which the library would round the values, is left aside.
"""

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from export.files import parse_json
from export.lazy_tensor import LazyTensor, checked_shape, is_size
from export.problems import refuse
from runtime.errors import CheckpointError

STATE = ".quant_state.bitsandbytes__"  # then nf4 or fp4; its bytes are JSON
KINDS = ("nf4", "fp4")
PARTS = ("absmax", "quant_map", "nested_absmax", "nested_quant_map")


@dataclass(frozen=True, slots=True)
class Nested:
    """How largest values are stored as codes of a table of 256."""

    table: LazyTensor
    absmax: LazyTensor
    block: int
    offset: float


@dataclass(frozen=True, slots=True, kw_only=True)
class NF4Tensor(LazyTensor):
    """A tensor [*shape] of float32 values; `nbytes` counts all of its parts.

    codes uint8, two values each, the first in the high bits; table float32 [16]; absmax [values / block], float32 or,
    with `nested`, uint8.
    """

    codes: LazyTensor
    table: LazyTensor
    absmax: LazyTensor
    block: int
    nested: Nested | None

    def raw(self) -> NDArray[np.uint8]:
        """The stored bytes of all parts, one after another."""
        inner = [] if self.nested is None else [self.nested.absmax, self.nested.table]
        return np.concatenate([part.raw() for part in (self.codes, self.table, self.absmax, *inner)])

    def read(self) -> NDArray[np.float32]:
        return self.rows(0, self.shape[0])

    def rows(self, start: int, stop: int) -> NDArray[np.float32]:
        row = math.prod(self.shape[1:])
        return self._values(start * row, stop * row).reshape(stop - start, *self.shape[1:])

    def form(self) -> None:
        """A table of 16 values is no (code - zero) * scale."""
        return

    def _values(self, start: int, stop: int) -> NDArray[np.float32]:
        """Values of the flattened tensor."""
        first = start // 2
        octets = self.codes.rows(first, -(-stop // 2)).reshape(-1)
        codes = np.stack([octets >> 4, octets & 15], -1).reshape(-1)[start - 2 * first :][: stop - start]
        block = start // self.block
        absmax = self._absmax(block, -(-stop // self.block))
        return self.table.read()[codes] * absmax[np.arange(start, stop) // self.block - block]

    def _absmax(self, start: int, stop: int) -> NDArray[np.float32]:
        """The largest values of blocks `start` to `stop`."""
        stored, nested = self.absmax.rows(start, stop), self.nested
        if nested is None:
            return stored
        blocks = np.arange(start, stop) // nested.block
        return nested.table.read()[stored] * nested.absmax.read()[blocks] + np.float32(nested.offset)


def nf4_tensor(key: str, kind: str, codes: LazyTensor, parts: dict[str, LazyTensor], state: LazyTensor) -> NF4Tensor:
    """The tensor `key` of its `codes`, its `parts` by the last words of their keys, and its `state`.

    CheckpointError says everything that is missing or does not fit.
    """
    stated = _State.read(state)
    refuse(repr(key), list(_unfit(stated, {**parts, "codes": codes})))
    nested = None
    if stated.inner is not None:
        nested = Nested(parts["nested_quant_map"], parts["nested_absmax"], stated.inner, stated.offset)
    return NF4Tensor(
        key=key,
        dtype=kind.upper(),
        shape=stated.shape,
        file=codes.file,
        offset=codes.offset,
        nbytes=codes.nbytes + sum(part.nbytes for part in parts.values()),
        codes=codes,
        table=parts["quant_map"],
        absmax=parts["absmax"],
        block=stated.block,
        nested=nested,
    )


@dataclass(frozen=True)
class _State:
    """What the JSON beside a layer states: blocks of values, and blocks of largest values if those are codes too."""

    shape: tuple[int, ...]
    block: int
    inner: int | None
    offset: float

    @classmethod
    def read(cls, tensor: LazyTensor) -> "_State":
        stated = parse_json(tensor.raw().tobytes(), repr(tensor.key))
        if not isinstance(stated, dict):
            raise CheckpointError(f"{tensor.key!r} holds no JSON object")
        block: Any = stated.get("blocksize")
        inner, offset = stated.get("nested_blocksize"), stated.get("nested_offset", 0)
        blocked = isinstance(block, int) and block > 0 and (inner is None or (is_size(inner) and inner > 0))
        if not blocked or not isinstance(offset, int | float):
            raise CheckpointError(f"{tensor.key!r} states blocks of {block!r} and {inner!r}, and offset {offset!r}")
        try:
            return cls(checked_shape(stated.get("shape")), block, inner, float(offset))
        except CheckpointError as error:
            raise CheckpointError(f"{tensor.key!r}: {error}") from None


def _unfit(state: _State, parts: dict[str, LazyTensor]) -> Iterator[str]:
    """What does not fit between a state and its tensors."""
    values = math.prod(state.shape)
    blocks = -(-values // state.block)
    expected = {"codes": ("U8", -(-values // 2)), "quant_map": ("F32", 16)}
    expected["absmax"] = ("F32", blocks) if state.inner is None else ("U8", blocks)
    if state.inner is not None:
        expected |= {"nested_quant_map": ("F32", 256), "nested_absmax": ("F32", -(-blocks // state.inner))}
    for name, (dtype, size) in expected.items():
        part, shapes = parts.get(name), [(size,), (size, 1)] if name == "codes" else [(size,)]
        if part is None:
            yield f"{name} is missing"
        elif part.dtype != dtype or part.shape not in shapes:
            yield f"{name} is {part.dtype}{list(part.shape)}, expected {dtype} of {size} values"
