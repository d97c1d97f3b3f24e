"""In which order the matrices of one graph can be calibrated, and the piece of graph that leads to each.

A matrix can be solved as soon as all that it multiplies is known, which takes every matrix before it in its quantized
form. So a graph falls into stages: the matrices that multiply the same values (gate and up; one that an unrolled loop
reads at each step has several). Between two stages lies a piece of graph, which runs by itself on what was kept from
the pieces before it. Each node runs once and nothing is known of layers: the order follows from the graph alone.
"""

from collections.abc import Collection, Iterable, Iterator
from dataclasses import dataclass

import onnx_ir as ir

from quant.rewrite import Model
from runtime.errors import EdgeOmniError

CHOICE = "ArgMax"  # what is chosen is given in calibration, so that nothing behind it depends on what is before it


@dataclass(frozen=True)
class Stage:
    """Initializers that multiply the same values: names of both."""

    weights: tuple[str, ...]
    inputs: tuple[str, ...]


def stages(model: Model, names: Collection[str]) -> tuple[Stage, ...]:
    """The stages of the matrices called `names`, each behind those that it depends on.

    EdgeOmniError names the matrices whose factor depends on their own product, as in a graph that is a loop.
    """
    order = [name for name in model.graph.initializers if name in set(names)]
    behind = _weights_behind(model, {name: 1 << place for place, name in enumerate(order)})
    inputs = {name: _factors(model, name) for name in order}
    needs = {name: _union(behind[value] for value in inputs[name]) for name in order}
    looped = [name for place, name in enumerate(order) if needs[name] >> place & 1]
    if looped:
        raise EdgeOmniError(
            f"{', '.join(looped)} cannot be calibrated: what they multiply depends on what they gave before; "
            'give them the method "rtn"'
        )
    groups: dict[tuple[str, ...], list[str]] = {}
    for name in sorted(order, key=lambda name: needs[name].bit_count()):  # stable; who needs more comes later
        groups.setdefault(inputs[name], []).append(name)
    return tuple(Stage(tuple(weights), values) for values, weights in groups.items())


def _weights_behind(model: Model, bit: dict[str, int]) -> dict[str, int]:
    """For each value of the graph, the named weights that it depends on, as bits."""
    behind: dict[str, int] = {}
    for node in model.graph:
        read = [str(value.name) for value in node.inputs if value is not None]
        known = 0 if node.op_type == CHOICE else _union(behind.get(name, 0) | bit.get(name, 0) for name in read)
        behind |= {str(value.name): known for value in node.outputs}
    for value in model.graph.inputs:
        behind[str(value.name)] = 0
    return behind


def _union(sets: Iterable[int]) -> int:
    together = 0
    for one in sets:
        together |= one
    return together


def _factors(model: Model, name: str) -> tuple[str, ...]:
    """What a matrix multiplies, in the order of the graph, each value once."""
    readers = {id(node) for node, _ in model.graph.initializers[name].uses()}
    found = (str(node.inputs[0].name) for node in model.graph if id(node) in readers and node.inputs[0] is not None)
    return tuple(dict.fromkeys(found))


def choices(model: Model) -> tuple[str, ...]:
    """The values that are choices; a run for calibration is given something in their place that nobody looks at."""
    return tuple(str(value.name) for node in model.graph if node.op_type == CHOICE for value in node.outputs)


def on_the_way(model: Model, known: Collection[str], wanted: Iterable[str]) -> set[str]:
    """All that is computed on the way from known values, or graph inputs, to the wanted ones, these included."""
    nodes = [node for _, node in _back_from(model, known, wanted) if node is not None and node.op_type != "Constant"]
    return {str(value.name) for node in nodes for value in node.outputs if value.name}


def needed(model: Model, known: Collection[str], wanted: Iterable[str]) -> set[str]:
    """The known values and graph inputs that the way to the wanted ones starts from; a known one is its own start."""
    return {name for name, node in _back_from(model, known, wanted) if node is None}


def _back_from(model: Model, known: Collection[str], wanted: Iterable[str]) -> Iterator[tuple[str, ir.Node | None]]:
    """Each value that the wanted ones depend on, with the node that gives it, or None where the way back ends."""
    producers = {str(value.name): node for node in model.graph for value in node.outputs}
    todo, seen = list(wanted), set[str]()
    while todo:
        name = todo.pop()
        if name in seen:
            continue
        seen.add(name)
        node = None if name in known else producers.get(name)
        yield name, node
        if node is not None:
            todo += [str(value.name) for value in node.inputs if value is not None and not value.is_initializer()]


def cut_out(model: Model, known: Collection[str], wanted: Iterable[str]) -> tuple[tuple[str, ...], Model]:
    """The piece of graph between known values and wanted ones, which reads the same weights; and what goes into it."""
    inputs = tuple(sorted(needed(model, known, wanted)))
    graph = ir.convenience.extract(model.graph, inputs, tuple(wanted))
    return inputs, ir.Model(graph, ir_version=model.ir_version, producer_name=model.producer_name)
