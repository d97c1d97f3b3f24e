"""Checkpoint tensors into the initializers of a graph: shared where the bytes fit as they lie, else written once."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import BinaryIO

import onnx_ir as ir

from export.graph import Subgraph, static_shape
from export.lazy_tensor import LazyTensor
from export.streamed import StreamedTensor, fill
from runtime.bundle_writer import SMALL, Place, append, append_pieces


@dataclass
class WeightStore:
    """The weight files of one bundle in the making. A tensor that two graphs share is stored once.

    Tensors of the shards in `shared` whose stored form is the wanted one are not copied: the bundle has the shard
    whole, under the name that `shared` gives it, and initializers point into that.
    """

    folder: Path
    tensors: Mapping[str, LazyTensor]
    shared: Mapping[Path, str] = field(default_factory=dict)
    places: dict[tuple[str, str], Place] = field(default_factory=dict)

    def write(self, subgraph: Subgraph) -> tuple[str, ...]:
        """Fill every parameter of `subgraph`, save NAME.onnx, and return the weight files that it uses."""
        fill(subgraph, self.tensors)
        path = self.folder / f"{subgraph.name}.data"
        with path.open("wb") as out:
            for value in subgraph.model.graph.initializers.values():
                self._store(value, out, path.name)
        if path.stat().st_size == 0:
            path.unlink()
        ir.save(subgraph.model, self.folder / f"{subgraph.name}.onnx")
        return tuple(sorted(set(external_files(subgraph.model))))

    def _store(self, value: ir.Value, out: BinaryIO, name: str) -> None:
        tensor = value.const_value
        assert tensor is not None
        if isinstance(tensor, StreamedTensor):
            self._point(value, self._place(tensor, out, name))
        elif tensor.nbytes >= SMALL:
            self._point(value, append(out, name, tensor.numpy()))

    def _place(self, tensor: StreamedTensor, out: BinaryIO, name: str) -> Place:
        if tensor.key not in self.places:
            shared = self._shared(tensor.lying)
            self.places[tensor.key] = shared or append_pieces(out, name, tensor.nbytes, tensor.pieces())
        return self.places[tensor.key]

    def _shared(self, tensor: LazyTensor | None) -> Place | None:
        """The place of a stored tensor in its shard, if the bundle has that and the tensor is taken as it lies."""
        if tensor is None or tensor.file not in self.shared:
            return None
        return Place(self.shared[tensor.file], tensor.offset, tensor.nbytes)

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


def external_files(model: ir.Model) -> Iterator[str]:
    """The files, relative to the model's folder, that hold its external initializers."""
    for value in model.graph.initializers.values():
        if isinstance(value.const_value, ir.ExternalTensor):
            yield str(value.const_value.location)
