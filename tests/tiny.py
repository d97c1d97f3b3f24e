"""Small real models for tests: graphs of golden set A, authored, filled from its checkpoint and opened."""

import tempfile
from pathlib import Path

from export.checkpoint import open_checkpoint
from export.config import OmniConfig
from export.families import baichuan_omni_1_5
from export.graph import Subgraph
from export.parity.golden import Golden
from export.parity.graphs import Graphs
from export.weights import WeightStore
from runtime.bundle import Graph

GOLDEN = Golden(Path(__file__).parent / "golden" / "a")
CHECKPOINT = GOLDEN.folder / "checkpoint"


def golden_config() -> OmniConfig:
    return baichuan_omni_1_5.read_config(open_checkpoint(CHECKPOINT))


def golden_graphs(*subgraphs: Subgraph) -> Graphs:
    """Fill the authored graphs with the golden checkpoint and open them, each under its own name."""
    folder = Path(tempfile.mkdtemp(prefix="edgeomni-test-"))
    store = WeightStore(folder, baichuan_omni_1_5.tensors(open_checkpoint(CHECKPOINT)))
    return Graphs(folder, {subgraph.name: describe(subgraph, store.write(subgraph)) for subgraph in subgraphs})


def describe(subgraph: Subgraph, weights: tuple[str, ...]) -> Graph:
    return Graph(
        file=f"{subgraph.name}.onnx",
        weights=weights,
        inputs=subgraph.inputs,
        outputs=subgraph.outputs,
        precision="fp32",
        parameters=0,
        weight_bytes=0,
    )
