"""Module -> ONNX: the only file that knows opsets, domains, dynamic axes and how weights reach their initializers."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Literal

import numpy as np
import onnx_ir as ir
from onnx_ir.passes.common import ClearMetadataAndDocStringPass, RemoveUnusedNodesPass
from onnxscript import GraphBuilder, nn

from runtime.bundle import DType, Port, Profile

# ONNX Runtime 1.31 loads up to IR 13 / opset 26, but from opset 22 on some kernels are missing (InstanceNormalization
# on CUDA, random draws on CPU). Opset 21 has all of them.
IR_VERSION = 10
OPSET = 21
CONTRIB = "com.microsoft"

FLOAT, FLOAT16, INT64, INT32 = ir.DataType.FLOAT, ir.DataType.FLOAT16, ir.DataType.INT64, ir.DataType.INT32
DTYPES: dict[DType, ir.DataType] = {
    "float32": FLOAT,
    "float16": FLOAT16,
    "int64": INT64,
    "int32": INT32,
    "uint8": ir.DataType.UINT8,
    "bool": ir.DataType.BOOL,
}


def compute_dtype(profile: Profile) -> ir.DataType:
    """The type in which a profile multiplies: fp32 on CPU (its fp16 gains nothing), fp16 on CUDA."""
    return FLOAT16 if profile == "cuda" else FLOAT


def port_dtype(dtype: ir.DataType) -> DType:
    return next(name for name, known in DTYPES.items() if known == dtype)


@dataclass(frozen=True)
class Derived:
    """What fills an initializer: `make(*arrays)` of the checkpoint tensors `keys`, which have `shapes`.

    `make` gets and returns float32. Without it the one tensor is taken as it lies, and stored once however many
    initializers take it. Two kinds of `make` let large tensors be read by rows and never whole: one that `selects` only
    picks columns, in any type; one that `stacks` puts the rows of each tensor below those of the one before it.
    """

    keys: tuple[str, ...]
    shapes: tuple[tuple[int, ...], ...]
    make: Callable[..., np.ndarray] | None = None
    selects: bool = False
    stacks: bool = False


@dataclass(frozen=True)
class Subgraph:
    """An authored graph whose parameters have names and shapes, but no values yet."""

    name: str
    model: ir.Model
    inputs: tuple[Port, ...]
    outputs: tuple[Port, ...]
    derived: Mapping[str, Derived] = field(default_factory=dict)

    def deriving(self, derived: Mapping[str, Derived]) -> "Subgraph":
        """The same graph, where a family's checkpoint spells or cuts some parameters differently."""
        return replace(self, derived={**self.derived, **derived})

    def parameters(self) -> Iterator[ir.Value]:
        """Initializers that a checkpoint must fill (constants written by the author have values already)."""
        for value in self.model.graph.initializers.values():
            if value.const_value is None:
                yield value

    def source_of(self, parameter: ir.Value) -> Derived:
        """What fills `parameter`: its own derivation, else the checkpoint tensor of the same name and shape."""
        name, shape = str(parameter.name), static_shape(parameter)
        return self.derived.get(name) or Derived((name,), (shape,))


def static_shape(value: ir.Value) -> tuple[int, ...]:
    if value.shape is None:
        raise ValueError(f"{value.name} has no shape")
    return value.shape.numpy()


def author(
    name: str,
    root: nn.Module,
    inputs: Sequence[Port],
    outputs: Sequence[Port],
    prefix: str = "",
    derived: Mapping[str, Derived] | None = None,
) -> Subgraph:
    """Call `root` on the input ports and name what it returns by the output ports, in their order.

    `prefix` and the attribute paths below `root` become the names of the initializers: the checkpoint's own keys.
    """
    graph = ir.Graph([], [], nodes=[], opset_imports={"": OPSET, CONTRIB: 1}, name=name)
    builder = GraphBuilder(graph)
    if prefix:
        root._set_name(prefix)
    values = [builder.input(port.name, DTYPES[port.dtype], list(port.shape)) for port in inputs]
    results = root(builder.op, *values)
    results = results if isinstance(results, tuple | list) else (results,)
    if len(results) != len(outputs):
        raise ValueError(f"{name}: {len(results)} values for {len(outputs)} output ports")
    for value, port in zip(results, outputs, strict=True):
        _give_output(builder, value, port)
    model = ir.Model(graph, ir_version=IR_VERSION, producer_name="edgeomni")
    RemoveUnusedNodesPass()(model)
    ClearMetadataAndDocStringPass()(model)
    return Subgraph(name, model, tuple(inputs), tuple(outputs), dict(derived or {}))


def _give_output(builder: GraphBuilder, value: ir.Value, port: Port) -> None:
    if value.is_graph_input() or value.is_graph_output():  # a graph may not hand an input straight through
        value = builder.op.Identity(value)
    value.type = ir.TensorType(DTYPES[port.dtype])
    value.shape = ir.Shape(list(port.shape))
    builder.add_output(value, port.name)


def carried(side: Literal["past", "present"], states: Sequence[Port]) -> list[Port]:
    """Ports of state as they go in (past) or come out (present); a dimension called "past" is longer when it does."""
    return [
        Port(f"{side}.{port.name}", port.dtype, tuple(side if dim == "past" else dim for dim in port.shape))
        for port in states
    ]


def tap(value: ir.Value, name: str) -> ir.Value:
    """Give an inner value a name by which parity and comparison can ask for it later; costs nothing at run time."""
    value.name = name
    return value


def contrib(op: Any, kind: str, *args: Any, dtype: ir.DataType | None = None, **attributes: Any) -> Any:
    """A node of ONNX Runtime's own domain. Its outputs have no schema here, so their `dtype` is set by hand."""
    result = getattr(op, kind)(*args, _domain=CONTRIB, _version=1, **attributes)
    for value in result if isinstance(result, tuple | list) else (result,):
        if dtype is not None:
            value.type = ir.TensorType(dtype)
    return result


def constant(op: Any, array: np.ndarray, name: str) -> ir.Value:
    """A table that the author computes (rotary angles, windows, masks), stored as an initializer called `name`."""
    return op.builder.initializer(ir.tensor(array, name=name), name=name, qualify=False)


def ints(op: Any, *values: int) -> ir.Value:
    """An int64 vector, for shapes, axes and slices."""
    return op.Constant(value_ints=list(values))


def scalar(op: Any, value: float, dtype: ir.DataType = FLOAT) -> ir.Value:
    return op.Constant(value=ir.tensor(np.array(value, dtype.numpy()), dtype=dtype))


def cast(op: Any, value: ir.Value, dtype: ir.DataType) -> ir.Value:
    """Cast, or nothing where the type is known to be right already."""
    if value.type is not None and value.type.dtype == dtype:
        return value
    result = op.Cast(value, to=dtype.value)
    result.type = ir.TensorType(dtype)
    return result
