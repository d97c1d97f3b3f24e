"""Checkpoint tensors into the initializers of a graph: linked where the bytes fit as they lie, else written once."""

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import BinaryIO

import numpy as np
import onnx_ir as ir

from export.graph import Derived, Subgraph, static_shape
from export.lazy_tensor import LazyTensor
from runtime.bundle_writer import SMALL, Place, append, append_pieces, link

PIECE = 1 << 22  # values of a large tensor that are in memory at once
STORED = {"F32": ir.DataType.FLOAT, "F16": ir.DataType.FLOAT16, "I64": ir.DataType.INT64}


@dataclass
class WeightStore:
    """The weight files of one bundle in the making. A tensor that two graphs share is stored once.

    Tensors of the shards in `linked` whose stored form is the wanted one are not copied: the shard is hard-linked into
    the bundle (ONNX Runtime refuses symbolic links that leave the folder) and initializers point into it.
    """

    folder: Path
    tensors: Mapping[str, LazyTensor]
    linked: frozenset[Path] = frozenset()
    places: dict[tuple[str, str], Place] = field(default_factory=dict)
    _links: dict[Path, str | None] = field(default_factory=dict)

    def write(self, subgraph: Subgraph) -> tuple[str, ...]:
        """Fill every parameter of `subgraph`, save NAME.onnx, and return the weight files that it uses."""
        path = self.folder / f"{subgraph.name}.data"
        with path.open("wb") as out:
            for value in subgraph.model.graph.initializers.values():
                self._fill(value, subgraph, out)
        if path.stat().st_size == 0:
            path.unlink()
        ir.save(subgraph.model, self.folder / f"{subgraph.name}.onnx")
        return tuple(sorted(set(external_files(subgraph.model))))

    def _fill(self, value: ir.Value, subgraph: Subgraph, out: BinaryIO) -> None:
        if value.const_value is not None:
            constant = value.const_value
            if constant.nbytes >= SMALL:
                self._point(value, append(out, f"{subgraph.name}.data", constant.numpy()))
            return
        source = subgraph.source_of(value)
        assert value.dtype is not None
        key = (str(value.name) if source.make else source.keys[0], value.dtype.name)
        place = self.places.get(key) or self._linked(value, source)
        if place is None:
            nbytes = math.prod(static_shape(value)) * value.dtype.bitwidth // 8
            if nbytes < SMALL:
                value.const_value = ir.tensor(np.concatenate(list(self._pieces(value, source))), name=value.name)
                return
            place = append_pieces(out, f"{subgraph.name}.data", nbytes, self._pieces(value, source))
        self.places[key] = place
        self._point(value, place)

    def _pieces(self, value: ir.Value, source: Derived) -> Iterator[np.ndarray]:
        """The initializer's values in its own type: rows at a time where each depends on its own alone, else whole."""
        assert value.dtype is not None
        declared, rows = static_shape(value), 0
        stored = [self.tensors[key] for key in source.keys]
        whole = source.make is not None and not source.selects
        for arrays in [[t.read().astype(np.float32, copy=False) for t in stored]] if whole else _by_rows(stored):
            piece = source.make(*arrays) if source.make else arrays[0]
            if piece.shape[1:] != declared[1:]:
                raise ValueError(f"{value.name}: made {piece.shape}, declared {declared}")
            rows += len(piece) if declared else 0
            yield piece.astype(value.dtype.numpy(), copy=False)
        if rows != sum(declared[:1]):
            raise ValueError(f"{value.name}: made {rows} rows, declared {declared}")

    def _linked(self, value: ir.Value, source: Derived) -> Place | None:
        """The place of a stored tensor in its hard-linked shard, if it is taken as it lies."""
        tensor = as_it_lies(value, source, self.tensors)
        if tensor is None or tensor.file not in self.linked:
            return None
        name = self._link(tensor.file)
        return None if name is None else Place(name, tensor.offset, tensor.nbytes)

    def _link(self, file: Path) -> str | None:
        if file not in self._links:
            self._links[file] = link(file, self.folder)
        return self._links[file]

    def _point(self, value: ir.Value, place: Place) -> None:
        assert value.dtype is not None
        value.const_value = ir.ExternalTensor(
            place.file,
            place.offset,
            place.nbytes,
            value.dtype,
            shape=ir.Shape(static_shape(value)),
            name=str(value.name),
            base_dir=self.folder,
        )


def _by_rows(tensors: Sequence[LazyTensor]) -> Iterator[list[np.ndarray]]:
    """The same rows of every tensor, as many at a time as hold about PIECE values."""
    count, *tail = tensors[0].shape or (0,)
    if not count:
        yield [tensor.read() for tensor in tensors]
        return
    step = max(1, PIECE // max(1, math.prod(tail)))
    for start in range(0, count, step):
        yield [tensor.rows(start, min(count, start + step)) for tensor in tensors]


def as_it_lies(value: ir.Value, source: Derived, tensors: Mapping[str, LazyTensor]) -> LazyTensor | None:
    """The stored tensor that an initializer could be mapped from without a change, if there is one."""
    if source.make is not None:
        return None
    tensor = tensors[source.keys[0]]
    same = STORED.get(tensor.dtype) == value.dtype and tensor.strides is None and tensor.offset % 4 == 0
    return tensor if same and tensor.nbytes >= SMALL else None


def worth_linking(subgraphs: Iterable[Subgraph], tensors: Mapping[str, LazyTensor]) -> frozenset[Path]:
    """Shards of which at least half the bytes would be used as they lie; a link keeps the whole file alive."""
    usable: dict[Path, dict[str, int]] = {}
    for graph in subgraphs:
        for value in graph.parameters():
            tensor = as_it_lies(value, graph.source_of(value), tensors)
            if tensor is not None:
                usable.setdefault(tensor.file, {})[tensor.key] = tensor.nbytes
    return frozenset(file for file, sizes in usable.items() if 2 * sum(sizes.values()) >= file.stat().st_size)


def external_files(model: ir.Model) -> Iterator[str]:
    """The files, relative to the model's folder, that hold its external initializers."""
    for value in model.graph.initializers.values():
        if isinstance(value.const_value, ir.ExternalTensor):
            yield str(value.const_value.location)
