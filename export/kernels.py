"""Whether ONNX Runtime has a kernel for every node of a graph: the released kernel tables, and a lint against them.

kernels.json holds what the wheels of ONNX Runtime 1.31.1 register, read from the binary by `export.dump_kernels`: for
each operator its versions, and for each kernel the versions and types it serves, on CPU and on CUDA. (The CPU tables
of the onnxruntime and onnxruntime-gpu wheels are equal.)

A node that has no kernel is not an error to ONNX Runtime: it spells the operator out by its function body, or runs it
on the CPU and copies its tensors there and back in every run. Both are silent, and slow. (The lint agrees with the node
placements that ONNX Runtime logs when it opens this project's graphs, and probes of single operators, on CUDA with
`dump_kernels`' stub libraries.)
"""

import json
import math
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import onnx_ir as ir

from runtime.bundle import Profile

TABLE = Path(__file__).with_name("kernels.json")
NEEDS_NO_KERNEL = {"::Constant"}  # becomes an initializer when the graph is loaded
READS_SHAPES = {"::Shape", "::Size"}  # on CUDA, too, their outputs lie in the host's memory
TYPE_NAMES = {"double": "DOUBLE", "float": "FLOAT"}  # the rest are spelled alike: int64, float16, bool, ...
# Attributes that name the type of an output that no input has.
TYPE_ATTRIBUTES = {"::Cast": "to", "::EyeLike": "dtype", "::RandomNormalLike": "dtype", "::RandomUniformLike": "dtype"}

Types = Mapping[str, frozenset[str]]


@dataclass(frozen=True)
class Formal:
    """A parameter of an operator. `type` is a type variable ("T") or one type ("tensor(int64)").

    `only` is the one type that it can have, if there is but one.
    """

    name: str
    type: str
    only: str | None
    variadic: bool


@dataclass(frozen=True)
class Schema:
    since: int
    inputs: tuple[Formal, ...]
    outputs: tuple[Formal, ...]


@dataclass(frozen=True)
class Kernel:
    """Serves operator versions `since` to `until`; without an end, exactly version `since`: ONNX Runtime's own rule."""

    since: int
    until: int | None
    types: Types  # by type variable, in a few cases by parameter

    def serves(self, version: int) -> bool:
        return self.since == version or (self.until is not None and self.since < version <= self.until)


@dataclass(frozen=True)
class Tables:
    """What one release of ONNX Runtime knows, by "domain::operator"."""

    release: str
    schemas: Mapping[str, tuple[Schema, ...]]
    kernels: Mapping[Profile, Mapping[str, tuple[Kernel, ...]]]

    def schema(self, operator: str, opset: int) -> Schema | None:
        """The newest version of the operator that this opset has."""
        versions = [schema for schema in self.schemas.get(operator, ()) if schema.since <= opset]
        return max(versions, key=lambda schema: schema.since, default=None)


@cache
def tables() -> Tables:
    stored = json.loads(TABLE.read_text(encoding="utf-8"))
    kernels: dict[Profile, Mapping[str, tuple[Kernel, ...]]] = {
        "cpu": {name: tuple(map(_kernel, rows)) for name, rows in stored["cpu"].items()},
        "cuda": {name: tuple(map(_kernel, rows)) for name, rows in stored["cuda"].items()},
    }
    schemas = {name: tuple(map(_schema, rows)) for name, rows in stored["schemas"].items()}
    return Tables(stored["onnxruntime"], schemas, kernels)


def _kernel(row: Sequence[Any]) -> Kernel:
    since, until, types = row
    return Kernel(since, until, {variable: frozenset(names) for variable, names in types.items()})


def _schema(row: Sequence[Any]) -> Schema:
    since, inputs, outputs = row
    return Schema(since, tuple(map(_formal, inputs)), tuple(map(_formal, outputs)))


def _formal(text: str) -> Formal:
    name, _, kind = text.removesuffix("*").partition(":")
    variable, _, only = kind.partition("=")
    tensor = re.fullmatch(r"tensor\((\w+)\)", only or kind)
    return Formal(name, variable, tensor and tensor[1], text.endswith("*"))


def lint(model: ir.Model, profile: Profile) -> list[str]:
    """One line for each node that ONNX Runtime has no kernel for; empty for a graph that runs whole on its provider.

    "cpu": every node needs a CPU kernel at its opset and types. "cuda": every node needs a CUDA kernel, except on host
    paths: a node that reads host values alone (see `host_values`) may have a CPU kernel instead, for then nothing
    large is copied. A type that neither the author nor the schema tells is reported, not passed.
    """
    return list(_lint_graph(model.graph, profile, dict(model.graph.opset_imports), Typed({}), set()))


def _lint_graph(
    graph: ir.Graph, profile: Profile, opsets: Mapping[str, int], typed: "Typed", host: set[ir.Value]
) -> Iterator[str]:
    host |= host_values(graph)
    for node in graph:
        operator = f"{node.domain}::{node.op_type}"
        schema = tables().schema(operator, opsets.get(node.domain, 0))
        on_host = all(value is None or value in host for value in node.inputs)
        if on_host or operator in READS_SHAPES:
            host.update(node.outputs)
        if schema is None:
            yield f"{_place(node)}: ONNX Runtime {tables().release} does not know it at opset {opsets.get(node.domain)}"
            continue
        yield from typed.learn(node, schema)
        if operator not in NEEDS_NO_KERNEL:
            providers: tuple[Profile, ...] = ("cuda", "cpu") if profile == "cuda" and on_host else (profile,)
            yield from _without_kernel(node, operator, schema, typed, providers)
        for body in _bodies(node):
            yield from _lint_graph(body, profile, opsets, typed, host)


def host_values(graph: ir.Graph) -> set[ir.Value]:
    """What lies in the host's memory before any node has run.

    These are scalar inputs, integer or boolean input vectors, and initializers of up to 1024 elements (larger ones are
    weights). The lint adds what Shape and Size give, and what a node makes of host values alone.
    """
    inputs = {value for value in graph.inputs if _is_small_input(value)}
    return inputs | {value for value in graph.initializers.values() if _elements(value) <= 1024}


def _is_small_input(value: ir.Value) -> bool:
    rank = None if value.shape is None else len(value.shape)
    return rank == 0 or (rank == 1 and value.dtype is not None and not value.dtype.is_floating_point())


def _elements(value: ir.Value) -> float:
    if value.shape is None or not value.shape.is_static():
        return math.inf
    return math.prod(value.shape.numpy())


def _without_kernel(
    node: ir.Node, operator: str, schema: Schema, typed: "Typed", providers: Iterable[Profile]
) -> Iterator[str]:
    """Nothing if one of the providers has a kernel for the node; else the reason why the first has none."""
    reasons = [_reason(node, operator, schema, typed, provider) for provider in providers]
    if None not in reasons:
        yield f"{_place(node)}: {reasons[0]}"


def _reason(node: ir.Node, operator: str, schema: Schema, typed: "Typed", provider: Profile) -> str | None:
    kernels = [k for k in tables().kernels[provider].get(operator, ()) if k.serves(schema.since)]
    if not kernels:
        return f"no {provider} kernel for version {schema.since}"
    if provider == "cuda" and operator == "::ConvTranspose" and _pads_unequally(node):
        return "the cuda kernel takes equal padding on both sides alone"
    asked = {variable for kernel in kernels for variable in kernel.types}
    bound = {variable: _bound(node, schema, typed, variable) for variable in sorted(asked)}
    unknown = sorted({value.name or "?" for values in bound.values() for value in values if typed[value] is None})
    if unknown:
        return f"the type of {', '.join(unknown)} is unknown, so no {provider} kernel can be chosen"
    actual = {variable: {str(typed[value]) for value in values} for variable, values in bound.items()}
    if any(all(actual[name] <= types for name, types in kernel.types.items()) for kernel in kernels):
        return None
    found = ", ".join(f"{name} = {'/'.join(sorted(types))}" for name, types in actual.items() if types)
    offered = "; ".join(" ".join(f"{n} = {'/'.join(sorted(t))}" for n, t in kernel.types.items()) for kernel in kernels)
    return f"no {provider} kernel for {found}; there is one for {offered}"


def _pads_unequally(node: ir.Node) -> bool:
    """ONNX Runtime sends such a ConvTranspose to the CPU, though its CUDA kernel is registered (measured)."""
    pads = node.attributes["pads"].as_ints() if "pads" in node.attributes else ()
    return tuple(pads[: len(pads) // 2]) != tuple(pads[len(pads) // 2 :])


def _bound(node: ir.Node, schema: Schema, typed: "Typed", variable: str) -> list[ir.Value]:
    """The inputs and outputs of the node whose type is `variable` (or that bear this name in the schema)."""
    given = [*_arguments(schema.inputs, node.inputs), *_arguments(schema.outputs, node.outputs)]
    return [value for formal, value in given if variable in (formal.type, formal.name)]


def _arguments(formals: Sequence[Formal], values: Sequence[ir.Value | None]) -> Iterator[tuple[Formal, ir.Value]]:
    """Pair the arguments that are there with their formal parameters; the variadic one takes all that is left."""
    for index, value in enumerate(values):
        formal = formals[min(index, len(formals) - 1)] if formals else None
        if formal is not None and (index < len(formals) or formal.variadic) and value is not None and value.name != "":
            yield formal, value


@dataclass
class Typed:
    """The type of each value: the author's annotation, else what the schema says about the node that makes it."""

    inferred: dict[ir.Value, str]

    def __getitem__(self, value: ir.Value) -> str | None:
        return self.inferred.get(value) or (None if value.dtype is None else type_name(value.dtype))

    def learn(self, node: ir.Node, schema: Schema) -> Iterator[str]:
        """Note the types of the node's outputs; complain of an annotation that the schema contradicts."""
        variables: dict[str, str] = {}
        for formal, value in _arguments(schema.inputs, node.inputs):
            known = self[value]
            if known is not None:
                variables.setdefault(formal.type, known)
        for formal, value in _arguments(schema.outputs, node.outputs):
            told = formal.only or variables.get(formal.type) or _type_by_attribute(node)
            noted = self[value]
            if told is not None and noted is not None and told != noted:
                yield f"{_place(node)}: its output {value.name} is noted as {noted}, but must be {told}"
            if told is not None:
                self.inferred[value] = told


def type_name(dtype: ir.DataType) -> str:
    """As ONNX Runtime's tables spell it."""
    return next((name for name, spelled in TYPE_NAMES.items() if spelled == dtype.name), dtype.name.lower())


def _type_by_attribute(node: ir.Node) -> str | None:
    operator = f"{node.domain}::{node.op_type}"
    if operator in ("::Constant", "::ConstantOfShape"):
        return _constant_type(node)
    named = node.attributes.get(TYPE_ATTRIBUTES.get(operator, ""))
    return None if named is None else type_name(ir.DataType(named.as_int()))


def _constant_type(node: ir.Node) -> str | None:
    if "value" in node.attributes:
        return type_name(node.attributes["value"].as_tensor().dtype)
    if node.op_type == "ConstantOfShape" or {"value_float", "value_floats"} & node.attributes.keys():
        return "float"
    return "int64" if {"value_int", "value_ints"} & node.attributes.keys() else None


def _bodies(node: ir.Node) -> Iterator[ir.Graph]:
    for attribute in node.attributes.values():
        if attribute.type == ir.AttributeType.GRAPH:
            yield attribute.as_graph()
        elif attribute.type == ir.AttributeType.GRAPHS:
            yield from attribute.as_graphs()


def _place(node: ir.Node) -> str:
    domain = f"{node.domain}." if node.domain else ""
    return f"{domain}{node.op_type} ({node.name or 'unnamed'})"
