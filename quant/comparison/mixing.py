"""One graph made of two: the reference's, in which some weights are read as the candidate stores them."""

from collections.abc import Iterable, Iterator

import onnx_ir as ir

from quant.taps import Model, array_of

Values = dict[str, ir.Value]


class Mixer:
    """Two graphs of one architecture. A weight of both goes by the reference's name for it."""

    def __init__(self, reference: Model, candidate: Model):
        self.reference, self.candidate = reference, candidate
        self._theirs = values_of(candidate)

    def differing(self) -> list[str]:
        """The reference's weights that the candidate stores in another way, in the graph's order."""
        ours, theirs = self.reference.graph.initializers, self.candidate.graph.initializers
        return [name for name in ours if name not in theirs and self._readers_are_known(ours[name])]

    def rescaled(self) -> list[str]:
        """Weights of both that hold other values: scales that were moved from one weight to another, for instance."""
        ours, theirs = self.reference.graph.initializers, self.candidate.graph.initializers
        return [name for name in ours if name in theirs and not _equal(ours[name], theirs[name])]

    def mixed(self, names: Iterable[str]) -> Model:
        """The reference with what reads the weights `names` taken from the candidate."""
        model = self.reference.clone()
        for name in names:
            weight = model.graph.initializers[name]
            if name in self.candidate.graph.initializers:
                weight.const_value = self.candidate.graph.initializers[name].const_value
                continue
            for node, _ in tuple(weight.uses()):
                self._replace(model.graph, node)
            del model.graph.initializers[name]
        return model

    def _readers_are_known(self, weight: ir.Value) -> bool:
        return bool(weight.uses()) and all(self._result(node) is not None for node, _ in weight.uses())

    def _result(self, node: ir.Node) -> tuple[list[ir.Node], ir.Value] | None:
        """The reference's nodes that the candidate's took the place of, and their result as the candidate has it.

        A bias that is added behind the product may have moved into the candidate's operator.
        """
        if found := self._theirs.get(str(node.outputs[0].name)):
            return [node], found
        uses = tuple(node.outputs[0].uses())
        if len(uses) != 1 or uses[0].node.op_type != "Add":
            return None
        found = self._theirs.get(str(uses[0].node.outputs[0].name))
        return None if found is None else ([node, uses[0].node], found)

    def _replace(self, graph: ir.Graph, node: ir.Node) -> None:
        result = self._result(node)
        assert result is not None, node.name
        old, found = result
        new = [*self._copies(found, graph, values_of_graph(graph))]
        before, after = old[-1].outputs[:1], new[-1].outputs[:1]
        ir.convenience.replace_nodes_and_values(graph, old[-1], old, new, before, after)

    def _copies(self, value: ir.Value, graph: ir.Graph, ours: Values) -> Iterator[ir.Node]:
        """The candidate's nodes that compute `value`, back to values that the reference has too."""
        node, inputs = value.producer(), []
        assert node is not None
        for given in node.inputs:
            if given is None or str(given.name) in ours:
                inputs.append(None if given is None else ours[str(given.name)])
            elif given.is_initializer():
                inputs.append(_register(graph, given))
            else:
                nodes = [*self._copies(given, graph, ours)]
                yield from nodes
                inputs.append(next(output for output in nodes[-1].outputs if output.name == given.name))
        copy = ir.Node(
            node.domain, node.op_type, inputs, tuple(node.attributes.values()),
            num_outputs=len(node.outputs), version=node.version, name=node.name,
        )  # fmt: skip
        for made, output in zip(copy.outputs, node.outputs, strict=True):
            made.name, made.type, made.shape = output.name, output.type, output.shape
        yield copy


def values_of(model: Model) -> Values:
    return values_of_graph(model.graph)


def values_of_graph(graph: ir.Graph) -> Values:
    """Inputs, initializers and what nodes give, by name."""
    values = [*graph.inputs, *graph.initializers.values(), *(value for node in graph for value in node.outputs)]
    return {str(value.name): value for value in values if value.name}


def _register(graph: ir.Graph, given: ir.Value) -> ir.Value:
    if str(given.name) not in graph.initializers:
        copy = ir.Value(name=given.name, type=given.type, shape=given.shape, const_value=given.const_value)
        graph.register_initializer(copy)
    return graph.initializers[str(given.name)]


def _equal(ours: ir.Value, theirs: ir.Value) -> bool:
    a, b = array_of(ours.const_value), array_of(theirs.const_value)
    return a.dtype == b.dtype and a.shape == b.shape and bool((a == b).all())
