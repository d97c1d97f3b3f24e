"""Small real models for tests: graphs of golden set A, authored, filled from its checkpoint and opened."""

import functools
import tempfile
from collections.abc import Mapping
from pathlib import Path

import numpy as np
import onnx_ir as ir
import soundfile

from export.checkpoint import open_checkpoint
from export.config import OmniConfig
from export.convert import export
from export.families import baichuan_omni_1_5
from export.graph import Subgraph
from export.parity.golden import Golden
from export.parity.graphs import Graphs
from export.weights import WeightStore
from quant.synthetic import picture, voice
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


def random_graphs(
    *subgraphs: Subgraph, tensors: Mapping[str, np.ndarray] | None = None
) -> tuple[Graphs, dict[str, np.ndarray]]:
    """Fill authored graphs of any size with `tensors` and random ones; returns them and all tensors by their keys."""
    folder, rng = Path(tempfile.mkdtemp(prefix="edgeomni-test-")), np.random.default_rng(0)
    tensors = dict(tensors or {})
    for subgraph in subgraphs:
        for value in subgraph.parameters():
            source = subgraph.source_of(value)
            for key, shape in zip(source.keys, source.shapes, strict=True):
                fan_in = np.prod(shape[1:]) if len(shape) > 1 else 4
                tensors.setdefault(key, (rng.standard_normal(shape) / np.sqrt(fan_in)).astype(np.float32))
            stored = [tensors[key] for key in source.keys]
            array = source.make(*stored) if source.make else stored[0]
            assert value.dtype is not None
            value.const_value = ir.tensor(array.astype(value.dtype.numpy()), name=value.name)
        ir.save(subgraph.model, folder / f"{subgraph.name}.onnx")
    return Graphs(folder, {subgraph.name: describe(subgraph, ()) for subgraph in subgraphs}), tensors


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


@functools.cache
def omni_bundle() -> Path:
    """Golden set A's checkpoint as a whole bundle, exported once a test run."""
    folder = Path(tempfile.mkdtemp(prefix="edgeomni-test-")) / "omni"
    export(CHECKPOINT, folder, random=True)
    return folder


def spoken_turns(folder: Path) -> Path:
    """A file with a turn that is heard and answered aloud, and one that is seen."""
    soundfile.write(folder / "question.wav", voice(1.0, 16000, seed=1), 16000)
    (folder / "door.png").write_bytes(picture(56, 56, seed=1))
    lines = [
        '{"audio": "question.wav", "spoken": true, "answer": "Good day."}',
        '{"image": "door.png", "text": "What?"}',
    ]
    (folder / "turns.jsonl").write_text("\n".join(lines))
    return folder / "turns.jsonl"
