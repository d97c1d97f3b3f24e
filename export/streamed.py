"""An initializer whose values are made from a checkpoint's tensors, a few rows at a time, whenever they are wanted."""

import functools
import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path

import numpy as np
import onnx_ir as ir

from export.graph import Derived, Subgraph, static_shape
from export.lazy_tensor import LazyTensor
from runtime.bundle_writer import SMALL
from runtime.integers import Form, Quantized, common_form

PIECE = 1 << 22  # values of a large tensor that are in memory at once
STORED = {"F32": ir.DataType.FLOAT, "F16": ir.DataType.FLOAT16, "I64": ir.DataType.INT64}


class StreamedTensor(ir.LazyTensor):
    """The initializer `value`, which `source` derives from the `stored` tensors. Nothing of it is in memory.

    A derivation that needs its tensors whole is made at the first rows that are asked for and forgotten at the last.
    """

    def __init__(self, value: ir.Value, source: Derived, stored: Sequence[LazyTensor]) -> None:
        assert value.dtype is not None
        super().__init__(self._read, value.dtype, ir.Shape(static_shape(value)), name=str(value.name))
        self._source, self._stored = source, tuple(stored)
        self._made: np.ndarray | None = None

    @property
    def key(self) -> tuple[str, str]:
        """What it is stored under once, however many graphs read it: a checkpoint's key or, if made, its own name."""
        return str(self.name) if self._source.make else self._source.keys[0], self.dtype.name

    @property
    def lying(self) -> LazyTensor | None:
        """The stored tensor that it could be mapped from without a change, if there is one."""
        tensor = self._stored[0]
        same = STORED.get(tensor.dtype) == self.dtype and tensor.strides is None and tensor.offset % 4 == 0
        return tensor if same and self._source.make is None and tensor.nbytes >= SMALL else None

    @property
    def place(self) -> tuple[Path, int] | None:
        return None if self.lying is None else (self.lying.file, self.lying.offset)

    def rows(self, start: int, stop: int) -> np.ndarray:
        """Rows `start` to `stop`, [stop - start, *shape[1:]], in its own type. ValueError if they are none of its."""
        count, *tail = self.shape.numpy()
        if not 0 <= start <= stop <= count:
            raise ValueError(f"rows {start}..{stop} of {self.name}, declared {self.shape}")
        made = self._rows(start, stop)
        if made.shape != (stop - start, *tail):
            raise ValueError(f"{self.name}: made {made.shape} for rows {start}..{stop}, declared {self.shape}")
        return made.astype(self.dtype.numpy(), copy=False)

    def form(self) -> Form | None:
        """How the checkpoint stores it as integers; None if it does not, or if what makes it is no stacking of rows."""
        return self._form

    @functools.cached_property
    def _form(self) -> Form | None:
        if self._source.make is not None and not self._source.stacks:
            return None
        return common_form([tensor.form() for tensor in self._stored])

    def integers(self, start: int, stop: int) -> Quantized:
        """Rows `start` to `stop` in that form. ValueError if there is none."""
        form = self._form
        if form is None:
            raise ValueError(f"{self.name} is not stored as integers")
        parts = [tensor.integers(*part).brought_to(form) for tensor, *part in self._stacked(start, stop)]
        zeros = [part.zeros for part in parts if part.zeros is not None]
        return Quantized(
            codes=np.concatenate([part.codes for part in parts]),
            scales=np.concatenate([part.scales for part in parts]),
            zeros=np.concatenate(zeros) if zeros else None,
            bits=form.bits,
        )

    @property
    def stored_as(self) -> tuple[str, ...]:
        """The types of those of its stored tensors that a quantization has been through already."""
        return tuple(sorted({tensor.dtype for tensor in self._stored if tensor.is_quantized}))

    def _rows(self, start: int, stop: int) -> np.ndarray:
        make = self._source.make
        if make is None or self._source.selects:
            arrays = [tensor.rows(start, stop) for tensor in self._stored]
            return make(*arrays) if make else arrays[0]
        if self._source.stacks:
            parts = [tensor.rows(*part) for tensor, *part in self._stacked(start, stop)]
            return np.concatenate([part.astype(np.float32, copy=False) for part in parts])
        made = self._whole() if self._made is None else self._made
        self._made = None if stop == len(made) else made
        return made[start:stop]

    def _stacked(self, start: int, stop: int) -> Iterator[tuple[LazyTensor, int, int]]:
        """The stored tensors that have some of rows `start` to `stop`, and which of their own rows those are."""
        for tensor in self._stored:
            count = tensor.shape[0]
            if start < count and stop > 0:
                yield tensor, max(0, start), min(stop, count)
            start, stop = start - count, stop - count

    def _whole(self) -> np.ndarray:
        make, declared = self._source.make, self.shape.numpy()
        arrays = [tensor.read() for tensor in self._stored]
        made = make(*(array.astype(np.float32, copy=False) for array in arrays)) if make else arrays[0]
        if made.shape != declared:
            raise ValueError(f"{self.name}: made {made.shape}, declared {declared}")
        return made

    def pieces(self) -> Iterator[np.ndarray]:
        """All rows in their order, as many at a time as hold about PIECE values."""
        count, *tail = self.shape.numpy()
        step = max(1, PIECE // max(1, math.prod(tail)))
        for start in range(0, count, step):
            yield self.rows(start, min(count, start + step))

    def _read(self) -> ir.Tensor:
        return ir.Tensor(self._whole().astype(self.dtype.numpy(), copy=False), name=self.name)


def fill(subgraph: Subgraph, tensors: Mapping[str, LazyTensor]) -> None:
    """Give every parameter its value: streamed, or read now if it is so small that it lies in the graph itself."""
    for value in tuple(subgraph.parameters()):
        source = subgraph.source_of(value)
        tensor = StreamedTensor(value, source, [tensors[key] for key in source.keys])
        value.const_value = tensor if tensor.nbytes >= SMALL else ir.tensor(tensor.numpy(), name=value.name)


def worth_sharing(subgraphs: Iterable[Subgraph]) -> dict[Path, int]:
    """Shards of which filled graphs use at least half the bytes as they lie, and how many those are.

    A bundle that shares one has it whole.
    """
    usable: dict[Path, dict[str, int]] = {}
    for graph in subgraphs:
        for value in graph.model.graph.initializers.values():
            tensor = value.const_value.lying if isinstance(value.const_value, StreamedTensor) else None
            if tensor is not None:
                usable.setdefault(tensor.file, {})[tensor.key] = tensor.nbytes
    sums = {file: sum(sizes.values()) for file, sizes in usable.items()}
    return {file: nbytes for file, nbytes in sums.items() if 2 * nbytes >= file.stat().st_size}
