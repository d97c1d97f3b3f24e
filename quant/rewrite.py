"""One graph: FusedMatMul with a float weight becomes MatMulNBits, Gather from a float table GatherBlockQuantized.

The only file of this floor that knows how graphs are spelled. What a weight is read by decides whether it can be
quantized at all: kernels of convolutions and RVQ codebooks (whose distances are products with -2) cannot.
"""

import math
from collections.abc import Hashable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray

from quant.scheme import Scheme
from runtime.bundle import Profile
from runtime.bundle_writer import SMALL, Place
from runtime.float_bundle import Streamed
from runtime.integers import Form, Quantized

CONTRIB = "com.microsoft"
FLOATS = (np.dtype(np.float32), np.dtype(np.float16))
INT8_ACTIVATIONS = 4  # MatMulNBits' accuracy_level; without it the CPU multiplies in fp32
# CUDA's fused kernels take output widths that are a multiple of this, by bits.
CUDA_ROWS = {2: 64, 4: 64, 8: 32}

Model = ir.Model


def open_graph(path: Path) -> Model:
    """A graph of a bundle; its weights stay on disk."""
    return ir.load(path)


def save_graph(model: Model, path: Path) -> None:
    ir.save(model, path)


@dataclass(frozen=True)
class Weight:
    """An initializer [*shape] that has not been read: `offset` bytes into `file`, or (None) in the graph itself.

    One that is `streamed` gives its rows itself; `file` then says where the same bytes happen to lie, if they do.
    """

    value: ir.Value
    name: str
    shape: tuple[int, ...]
    dtype: np.dtype
    file: Path | None
    offset: int
    streamed: Streamed | None = None

    @property
    def parameters(self) -> int:
        return math.prod(self.shape)

    @property
    def nbytes(self) -> int:
        return self.parameters * self.dtype.itemsize

    @property
    def source(self) -> Hashable:
        """Where it comes from: two graphs that share a weight name the same source."""
        if self.streamed is not None:
            return self.streamed.key
        return self.value if self.file is None else (self.file, self.offset)

    @property
    def is_float(self) -> bool:
        return self.dtype in FLOATS

    @property
    def stays_inside(self) -> bool:
        """Whether a graph that keeps it holds it itself: it does so now, and it is small."""
        return self.file is None and self.nbytes < SMALL

    def rows(self, start: int, stop: int) -> NDArray[Any]:
        """Rows `start` to `stop`, [stop - start, *shape[1:]]; only their bytes are read."""
        if self.streamed is not None:
            return self.streamed.rows(start, stop)
        if self.file is None:
            assert self.value.const_value is not None
            return self.value.const_value.numpy()[start:stop]
        row = math.prod(self.shape[1:])
        at = self.offset + start * row * self.dtype.itemsize
        values = np.fromfile(self.file, self.dtype, (stop - start) * row, offset=at)
        return values.reshape(stop - start, *self.shape[1:])

    @property
    def stored_as(self) -> tuple[str, ...]:
        """The quantized types that its checkpoint stores it in; none where it stores floats."""
        return () if self.streamed is None else self.streamed.stored_as

    def form(self) -> Form | None:
        """How its checkpoint stores it as integers that all its readers could take; None where it does not."""
        form = None if self.streamed is None else self.streamed.form()
        looked_up = any(node.op_type == "Gather" for node, _ in self.value.uses())
        return None if form is not None and form.order and looked_up else form

    def integers(self, start: int, stop: int) -> Quantized:
        """Rows `start` to `stop` of a weight that has a form."""
        assert self.streamed is not None
        return self.streamed.integers(start, stop)

    def obstacle(self) -> str | None:
        """Why no scheme can store it, or None."""
        if len(self.shape) != 2 or not self.is_float:
            return f"is {self.dtype}{list(self.shape)}, not a matrix of floats"
        readers = {node.op_type for node, place in self.value.uses() if not _takes_matrix(node, place)}
        return f"is read by {', '.join(sorted(readers))} in a way that needs floats" if readers else None


def _takes_matrix(node: ir.Node, place: int) -> bool:
    """Whether a node reads its input number `place` in a way that a quantized operator knows."""
    if node.op_type == "Gather":
        return place == 0 and node.attributes.get_int("axis", 0) == 0
    plain = all(node.attributes.get_int(name, 0) == 0 for name in ("transA", "transBatchA", "transBatchB"))
    scaled = node.attributes.get_float("alpha", 1.0) != 1.0
    transposed = node.attributes.get_int("transB", 0) == 1
    return node.op_type == "FusedMatMul" and place == 1 and transposed and plain and not scaled


@dataclass(frozen=True)
class Matrix:
    """A quantized matrix in the bundle's weight files; its last rows may be padding.

    `order`, int32 [columns]: which columns of what it multiplies with belong to its own; None: they are in place.
    `sqnr_db`: what was left of values that had been rounded before; None if they had not, or nothing was lost.
    """

    scheme: Scheme
    rows: int
    columns: int
    dtype: np.dtype  # of the scales, and of what it multiplies with
    codes: Place
    scales: Place
    zeros: Place | None
    order: Place | None = None
    sqnr_db: float | None = None

    @property
    def nbytes(self) -> int:
        return self.codes.nbytes + self.scales.nbytes + (self.zeros.nbytes if self.zeros else 0)


def weights(model: Model) -> Iterator[Weight]:
    """The initializers of a graph, in its order."""
    for value in model.graph.initializers.values():
        tensor = value.const_value
        assert tensor is not None
        streamed = tensor if isinstance(tensor, Streamed) else None
        file, offset = _place(tensor)
        yield Weight(value, str(value.name), tuple(tensor.shape.numpy()), tensor.dtype.numpy(), file, offset, streamed)


def _place(tensor: ir.TensorProtocol) -> tuple[Path | None, int]:
    if isinstance(tensor, Streamed):
        return tensor.place or (None, 0)
    return (Path(tensor.path), tensor.offset or 0) if isinstance(tensor, ir.ExternalTensor) else (None, 0)


def padded_rows(rows: int, bits: int, profile: Profile) -> int:
    """Rows that a matrix is stored with, so that the profile's quick kernels take it."""
    step = CUDA_ROWS[bits] if profile == "cuda" else 1
    return -(-rows // step) * step


def point(weight: Weight, place: Place, folder: Path) -> None:
    """Let an initializer that stays as it is lie elsewhere."""
    weight.value.const_value = _external(weight.name, place, weight.dtype, weight.shape, folder)


def halve_uses(model: Model, weight: Weight, place: Place, folder: Path) -> None:
    """Let every node that reads `weight` read fp16 values that lie at `place`, widened to what they were.

    A matrix is widened once, when ONNX Runtime opens the graph; of a table only the rows that are looked up are.
    """
    kind, name = ir.DataType.from_numpy(weight.dtype), f"{weight.name}.fp16"
    tensor = _external(name, place, np.dtype(np.float16), weight.shape, folder)
    half = ir.Value(name=name, type=ir.TensorType(tensor.dtype), shape=ir.Shape(weight.shape), const_value=tensor)
    readers = tuple(weight.value.uses())
    model.graph.register_initializer(half)
    tables = [node for node, _ in readers if node.op_type == "Gather"]
    for node in tables:
        node.replace_input_with(0, half)
        rows, kept = node.outputs[0], f"{node.name}.fp16"
        wide = _widened(rows, kind, f"{node.name}.wide")
        model.graph.insert_after(node, wide)
        ir.convenience.replace_all_uses_with(rows, wide.outputs[0], replace_graph_outputs=True)
        wide.replace_input_with(0, rows)
        wide.outputs[0].name, rows.name = rows.name, kept
        wide.outputs[0].shape, rows.type = rows.shape, ir.TensorType(tensor.dtype)
    if len(tables) < len(readers):
        wide = _widened(half, kind, f"{weight.name}.wide")
        model.graph.insert_before(model.graph[0], wide)
        wide.outputs[0].name = f"{weight.name}.fp32"
        ir.convenience.replace_all_uses_with(weight.value, wide.outputs[0])
    del model.graph.initializers[weight.name]


def _widened(value: ir.Value, kind: ir.DataType, name: str) -> ir.Node:
    node = ir.Node("", "Cast", [value], [ir.AttrInt64("to", kind.value)], name=name)
    node.outputs[0].type = ir.TensorType(kind)
    return node


def quantize_uses(model: Model, weight: Weight, matrix: Matrix, profile: Profile, folder: Path) -> None:
    """Let every node that reads `weight` read `matrix` instead; the float initializer leaves the graph.

    On a CPU a bias that is added to the product moves into the operator. On CUDA it stays outside, and a product that
    is wider than the weight, for padding, is cut.
    """
    edit = _Edit(model.graph, weight, matrix, profile, folder)
    for node, _ in tuple(weight.value.uses()):
        edit.look_up(node) if node.op_type == "Gather" else edit.multiply(node)
    del model.graph.initializers[weight.name]


@dataclass(frozen=True)
class _Edit:
    graph: ir.Graph
    weight: Weight
    matrix: Matrix
    profile: Profile
    folder: Path

    def look_up(self, node: ir.Node) -> None:
        scheme = self.matrix.scheme
        inputs = [self._codes(2), node.inputs[1], *self._scales()]
        attributes = {"gather_axis": 0, "quantize_axis": 1, "block_size": scheme.group_size, "bits": scheme.bits}
        self._replace([node], [contrib("GatherBlockQuantized", inputs, attributes, str(node.name))])

    def multiply(self, node: ir.Node) -> None:
        scheme, name = self.matrix.scheme, str(node.name)
        attributes = {
            "K": self.matrix.columns,
            "N": self.matrix.rows,
            "bits": scheme.bits,
            "block_size": scheme.group_size,
        }
        inputs = [self._reordered(node.inputs[0]), self._codes(3), *self._scales()]
        if self.profile == "cuda":
            product = contrib("MatMulNBits", inputs, attributes, name)
            self._replace([node], [product, *self._cut(product, name)])
            return
        if scheme.activations == "int8":
            attributes["accuracy_level"] = INT8_ACTIVATIONS
        add, bias = bias_behind(node, self.weight.shape[0])
        if add is not None:
            inputs += [None] * (5 - len(inputs)) + [bias]  # zero_points and g_idx come before it
        self._replace([node] if add is None else [node, add], [contrib("MatMulNBits", inputs, attributes, name)])

    def _reordered(self, x: ir.Value | None) -> ir.Value | None:
        """x with its last axis in the order of the matrix's columns; matrices of equal order share the node."""
        place = self.matrix.order
        if place is None or x is None:
            return x
        for node, at in x.uses():
            if node.op_type == "Gather" and at == 0 and _lies_at(node.inputs[1], place):
                return node.outputs[0]
        order = self._stored(f"{self.weight.name}.order", place, np.dtype(np.int32), (self.matrix.columns,))
        gather = ir.node("Gather", [x, order], {"axis": -1}, name=f"{self.weight.name}.reordered")
        gather.outputs[0].type, gather.outputs[0].shape = x.type, x.shape
        producer = x.producer()
        self.graph.insert_before(self.graph[0], gather) if producer is None else self.graph.insert_after(
            producer, gather
        )
        return gather.outputs[0]

    def _cut(self, product: ir.Node, name: str) -> list[ir.Node]:
        if self.matrix.rows == self.weight.shape[0]:
            return []
        starts, ends, axes = (
            self._initializer(f"{self.weight.name}.{part}", ir.tensor(np.array([at], np.int64)))
            for part, at in (("begin", 0), ("end", self.weight.shape[0]), ("axis", -1))
        )
        product.outputs[0].name = f"{name}.padded"
        product.outputs[0].type = ir.TensorType(ir.DataType.from_numpy(self.matrix.dtype))
        return [ir.Node("", "Slice", [product.outputs[0], starts, ends, axes], name=f"{name}.cut")]

    def _replace(self, old: list[ir.Node], new: list[ir.Node]) -> None:
        """The last of `new` takes the place and the output of the last of `old`."""
        before, after = old[-1].outputs, new[-1].outputs
        ir.convenience.replace_nodes_and_values(self.graph, old[-1], old, new, before, after)

    def _codes(self, axes: int) -> ir.Value:
        """The bytes of the codes as MatMulNBits (3 axes) or GatherBlockQuantized (2 axes) declares them."""
        rows, columns, scheme = self.matrix.rows, self.matrix.columns, self.matrix.scheme
        groups, width = columns // scheme.group_size, scheme.group_size * scheme.bits // 8
        shape = (rows, groups, width) if axes == 3 else (rows, groups * width)
        name = f"{self.weight.name}.{'codes' if axes == 3 else 'code_rows'}"
        return self._stored(name, self.matrix.codes, np.dtype(np.uint8), shape)

    def _scales(self) -> list[ir.Value | None]:
        """Scales, and zeros if there are some."""
        rows, groups = self.matrix.rows, self.matrix.columns // self.matrix.scheme.group_size
        scales = self._stored(f"{self.weight.name}.scales", self.matrix.scales, self.matrix.dtype, (rows, groups))
        if self.matrix.zeros is None:
            return [scales]
        shape = (rows, self.matrix.zeros.nbytes // rows)
        return [scales, self._stored(f"{self.weight.name}.zeros", self.matrix.zeros, np.dtype(np.uint8), shape)]

    def _stored(self, name: str, place: Place, dtype: np.dtype, shape: tuple[int, ...]) -> ir.Value:
        return self._initializer(name, _external(name, place, dtype, shape, self.folder))

    def _initializer(self, name: str, tensor: ir.TensorProtocol) -> ir.Value:
        if name not in self.graph.initializers:
            shape = ir.Shape(tensor.shape.numpy())
            value = ir.Value(name=name, type=ir.TensorType(tensor.dtype), shape=shape, const_value=tensor)
            self.graph.register_initializer(value)
        return self.graph.initializers[name]


def contrib(kind: str, inputs: list[ir.Value | None], attributes: dict[str, int], name: str) -> ir.Node:
    """A node of ONNX Runtime's own domain with one output."""
    return ir.Node(CONTRIB, kind, inputs, ir.convenience.convert_attributes(attributes), version=1, name=name)


def bias_behind(node: ir.Node, width: int) -> tuple[ir.Node, ir.Value] | tuple[None, None]:
    """The Add that is all that reads the node's output, if what it adds is a stored vector [width]; and the vector."""
    uses = tuple(node.outputs[0].uses())
    if len(uses) != 1 or node.outputs[0].is_graph_output() or uses[0].node.op_type != "Add":
        return None, None
    add, place = uses[0]
    bias = add.inputs[1 - place]
    if bias is None or not bias.is_initializer() or bias.shape is None or bias.shape.dims != (width,):
        return None, None
    return add, bias


def _lies_at(value: ir.Value | None, place: Place) -> bool:
    tensor = None if value is None else value.const_value
    return isinstance(tensor, ir.ExternalTensor) and (tensor.location, tensor.offset) == (place.file, place.offset)


def _external(name: str, place: Place, dtype: np.dtype, shape: tuple[int, ...], folder: Path) -> ir.ExternalTensor:
    kind = ir.DataType.from_numpy(dtype)
    return ir.ExternalTensor(
        place.file, place.offset, place.nbytes, kind, shape=ir.Shape(shape), name=name, base_dir=folder
    )


def external_files(model: Model) -> tuple[str, ...]:
    """The files, relative to the bundle, that hold a graph's weights."""
    tensors = (value.const_value for value in model.graph.initializers.values())
    return tuple(sorted({str(tensor.location) for tensor in tensors if isinstance(tensor, ir.ExternalTensor)}))


def weight_bytes(model: Model) -> int:
    """Bytes of a graph's weights, those that lie in one place counted once."""
    sizes = {}
    for name, value in model.graph.initializers.items():
        tensor = value.const_value
        assert tensor is not None
        place = (tensor.location, tensor.offset) if isinstance(tensor, ir.ExternalTensor) else name
        sizes[place] = tensor.nbytes
    return sum(sizes.values())
