"""Graphs of a bundle changed in memory: with inner values as further outputs; no file is written, no weight copied."""

import re
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import onnx_ir as ir

from runtime.bundle import Graph, Port
from runtime.errors import EdgeOmniError

Model = ir.Model
InMemory = tuple[bytes, dict[str, np.ndarray], Graph]  # what runtime.session.InMemory takes

LAYER = re.compile(r"(.*?\.\d+)/")  # the scope of a node in a numbered layer
SUM = 3  # the output of SkipLayerNormalization and its kin that is the sum itself


def load(folder: Path, graph: Graph) -> Model:
    """The graph, its weights still on disk."""
    return ir.load(folder / graph.file)


def exposed(model: Model, graph: Graph, taps: Sequence[str]) -> InMemory:
    """The graph, whose outputs hold the inner values called `taps` too; EdgeOmniError where it has no such values."""
    values = {str(value.name): value for node in model.graph for value in node.outputs}
    missing = [name for name in taps if name not in values]
    if missing:
        raise EdgeOmniError(f"{graph.file} has no inner value {', '.join(missing)}; export it with this version")
    shown = [name for name in taps if not values[name].is_graph_output()]
    model.graph.outputs.extend(values[name] for name in shown)
    ports = (Port(name, "float32", ()) for name in shown)
    return in_memory(model, replace(graph, outputs=(*graph.outputs, *ports)))


def in_memory(model: Model, graph: Graph) -> InMemory:
    """The model's bytes and its weights, mapped from their files."""
    tensors = {name: value.const_value for name, value in model.graph.initializers.items()}
    weights = {name: array_of(tensor) for name, tensor in tensors.items() if isinstance(tensor, ir.ExternalTensor)}
    return ir.to_proto(model).SerializeToString(), weights, graph


def array_of(tensor: ir.TensorProtocol | None) -> np.ndarray:
    """A stored tensor as an array of its file's pages, which may be hard-linked; another as its values."""
    assert tensor is not None
    if not isinstance(tensor, ir.ExternalTensor):
        return tensor.numpy()
    shape, offset = tuple(tensor.shape.numpy()), tensor.offset or 0
    return np.asarray(np.memmap(tensor.path, tensor.dtype.numpy(), "r", offset, shape))


def layer_values(model: Model) -> dict[str, str]:
    """Layer, as its weights are called -> the value that is the sum of what went into it and what its branches added.

    It is found by structure, since a name may depend on what a layer was exported with: the last sum of a layer's own
    scope, or of a normalization that takes the last branch of the layer along. Layers that add nothing, or
    multiply with no matrix, have none.
    """
    products = {layer for node in model.graph if "MatMul" in node.op_type for layer in _layers(node)}
    return {layer: name for node in model.graph for layer, name in _sums(node) if layer in products}


def _sums(node: ir.Node) -> Iterator[tuple[str, str]]:
    if node.op_type == "Add" and not any(value is None or value.is_initializer() for value in node.inputs):
        scope = str(node.name).rpartition("/")[0]
        yield from ((layer, str(node.outputs[0].name)) for layer in _layers(node) if layer == scope.replace("/", "."))
    elif node.op_type.startswith("Skip") and node.inputs[0] is not None and len(node.outputs) > SUM:
        before = node.inputs[0].producer()
        if before is not None and node.outputs[SUM].name:
            yield from ((layer, str(node.outputs[SUM].name)) for layer in _layers(before))


def _layers(node: ir.Node) -> Iterator[str]:
    """The numbered layer that a node is part of, if it is: the outermost."""
    if found := LAYER.match(str(node.name)):
        yield found[1].replace("/", ".")
