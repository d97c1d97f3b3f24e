"""Opens a bundle's own graphs with named inner values as extra outputs, so that stages inside one can be compared."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import onnx_ir as ir

from runtime.bundle import Graph, Port
from runtime.errors import EdgeOmniError
from runtime.session import Options, Session


@dataclass
class Graphs:
    """The graphs of a bundle by name. With taps, a copy of the graph is written beside it for as long as it is open."""

    folder: Path
    graphs: Mapping[str, Graph]
    options: Options = field(default_factory=Options)
    _open: dict[tuple[str, tuple[str, ...]], Session] = field(default_factory=dict)

    def session(self, name: str) -> Session:
        return self._session(name, ())

    def run(self, name: str, feeds: Mapping[str, np.ndarray], taps: Sequence[str] = ()) -> dict[str, np.ndarray]:
        """Run graph `name`; the result holds its outputs and the tapped values."""
        return self._session(name, tuple(taps)).run(**feeds)

    def _session(self, name: str, taps: tuple[str, ...]) -> Session:
        if name not in self.graphs:
            raise EdgeOmniError(f"the bundle has no graph {name!r}; it has {', '.join(self.graphs)}")
        if (name, taps) not in self._open:
            graph = self.graphs[name]
            self._open[name, taps] = self._tapped(graph, taps) if taps else Session(self.folder, graph, self.options)
        return self._open[name, taps]

    def _tapped(self, graph: Graph, taps: tuple[str, ...]) -> Session:
        path = self.folder / f".tapped-{Path(graph.file).stem}-{abs(hash(taps)):x}.onnx"
        try:
            ports = expose(self.folder / graph.file, taps, path)
            opened = Graph(
                file=path.name,
                weights=graph.weights,
                inputs=graph.inputs,
                outputs=(*graph.outputs, *ports),
                precision=graph.precision,
                parameters=graph.parameters,
                weight_bytes=graph.weight_bytes,
            )
            return Session(self.folder, opened, self.options)
        finally:
            path.unlink(missing_ok=True)


def expose(source: Path, taps: Sequence[str], target: Path) -> list[Port]:
    """Write `source` to `target` with the values called `taps` as further outputs; weights stay where they are."""
    model = ir.load(source)
    values = {value.name: value for node in model.graph for value in node.outputs}
    missing = [name for name in taps if name not in values]
    if missing:
        raise EdgeOmniError(f"{source.name} has no inner value {', '.join(missing)}; export it with this version")
    for name in taps:
        if not values[name].is_graph_output():
            model.graph.outputs.append(values[name])
    ir.save(model, target)
    return [Port(name, "float32", ()) for name in taps]
