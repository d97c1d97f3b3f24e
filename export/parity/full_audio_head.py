"""The audio head as the official code runs it: all depths at once, and all of it anew for each code of a frame.

Ours is measured against it; no bundle holds these graphs. They are made of the unrolled head's own parts, so that what
is compared is the order of the work, not how well each part was written.
"""

import zlib
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import numpy as np
import onnx_ir as ir
from onnxscript import nn

from export.audio_head import EPSILON, CodeTables, HeadShape, Layer, SumNorm, depth_slices
from export.graph import FLOAT, Subgraph, author, ints
from export.layers import Linear, gelu
from runtime.bundle import Graph, Port
from runtime.session import Options, Session

# sliced: one product a depth with that depth's matrix. einsum: one over the stored tensor, which ONNX Runtime
# transposes at every run.
FeedForward = Literal["sliced", "einsum"]


class SlicedLayer(Layer):
    def feed_forward(self, op: Any, y: ir.Value, depth: int) -> ir.Value:
        """y [1, depths, hidden], every row by its own depth's matrices; `depth` is how many there are."""
        rows = op.Split(y, axis=1, num_outputs=depth, _outputs=depth)
        return op.Concat(*[Layer.feed_forward(self, op, row, index) for index, row in enumerate(rows)], axis=1)


class EinsumLayer(Layer):
    def __init__(self, shape: HeadShape, dtype: ir.DataType):
        super().__init__(shape, dtype)
        self.linear1 = WholeMatrix(shape.depths, shape.hidden_size, shape.inner)
        self.linear2 = WholeMatrix(shape.depths, shape.inner, shape.hidden_size)

    def feed_forward(self, op: Any, y: ir.Value, depth: int) -> ir.Value:
        return self.linear2(op, gelu(op, self.linear1(op, y)))


class WholeMatrix(nn.Module):
    """The matrices of all depths side by side, as the checkpoint stores them, each applied to its own row."""

    def __init__(self, depths: int, n_in: int, n_out: int):
        super().__init__()
        self.shape = (n_out, depths, n_in)
        self.weight = nn.Parameter([n_out, depths * n_in])

    def forward(self, op: Any, x: ir.Value) -> ir.Value:
        return op.Einsum(x, op.Reshape(self.weight, ints(op, *self.shape)), equation="nld,tld->nlt")


LAYERS: dict[FeedForward, type[Layer]] = {"sliced": SlicedLayer, "einsum": EinsumLayer}


class FullTransformer(nn.Module):
    """Rows of all depths [1, depths, hidden] -> raw logits of all codebooks."""

    def __init__(self, shape: HeadShape, layer: type[Layer]):
        super().__init__()
        self.depths = shape.depths
        self.transformer_layers = nn.ModuleList([layer(shape, FLOAT) for _ in range(shape.layers)])
        self.headnorm = SumNorm(shape.hidden_size, EPSILON)
        self.heads = nn.ModuleList([Linear(shape.hidden_size, size + 1) for size in shape.codebook_sizes])

    def forward(self, op: Any, x: ir.Value) -> list[ir.Value]:
        skip = None
        for layer in self.transformer_layers:
            x, skip, *_ = layer(op, x, skip, None, self.depths)
        h, _ = self.headnorm(op, x, skip)
        rows = op.Split(h, axis=1, num_outputs=self.depths, _outputs=self.depths)
        return [head(op, row) for head, row in zip(self.heads, rows, strict=True)]


class FullHead(nn.Module):
    def __init__(self, shape: HeadShape, layer: type[Layer]):
        super().__init__()
        self.depths = shape.depths
        self.model = CodeTables(shape, FLOAT)
        self.audio_head = FullTransformer(shape, layer)

    def forward(self, op: Any, hidden: ir.Value, codes: ir.Value) -> list[ir.Value]:
        each = op.Split(codes, axis=1, num_outputs=self.depths, _outputs=self.depths)
        rows, total = [op.Unsqueeze(hidden, ints(op, 0))], None
        for depth, code in enumerate(each[:-1]):
            row = self.model(op, code, depth)
            total = row if total is None else op.Add(total, row)
            rows.append(total)
        return self.audio_head(op, op.Concat(*rows, axis=1))


def full_audio_head(shape: HeadShape, feed_forward: FeedForward) -> Subgraph:
    """hidden [1, hidden] and the codes [1, depths] chosen so far, zeros for the others -> logits of every depth."""
    inputs = [Port("hidden", "float32", (1, shape.hidden_size)), Port("codes", "int64", (1, shape.depths))]
    outputs = [Port(f"logits.{i}", "float32", (1, 1, size + 1)) for i, size in enumerate(shape.codebook_sizes)]
    root = FullHead(shape, LAYERS[feed_forward])
    return author(f"full_audio_head_{feed_forward}", root, inputs, outputs, derived=depth_slices(shape))


def official_frame(session: Session, depths: int, hidden: np.ndarray) -> np.ndarray:
    """The likeliest codes [depths] of one frame: the whole head run for each of them, one score vector of it used."""
    codes = np.zeros((1, depths), np.int64)
    for depth in range(depths):
        logits = session.run(hidden=hidden, codes=codes)[f"logits.{depth}"][0, 0]
        codes[0, depth] = (logits[:-1] if depth else logits).argmax()
    return codes[0]


@dataclass
class RandomWeights:
    """Checkpoint tensors that depend on the seed, their key and their shape alone."""

    seed: int
    _made: dict[str, np.ndarray] = field(default_factory=dict)

    def tensor(self, key: str, shape: tuple[int, ...]) -> np.ndarray:
        """float32; matrices keep the scale of what they multiply, and norms lie around 1."""
        if key not in self._made:
            rng = np.random.default_rng([self.seed, zlib.crc32(key.encode())])
            values = rng.standard_normal(shape, np.float32)
            scale = np.float32(0.1 if len(shape) == 1 else shape[-1] ** -0.5)
            self._made[key] = values * scale + np.float32("norm" in key)
        return self._made[key]

    def open(self, subgraph: Subgraph, folder: Path, options: Options) -> Session:
        """Fill an authored graph, write it to `folder` and open it there."""
        for value in subgraph.parameters():
            source = subgraph.source_of(value)
            stored = [self.tensor(key, shape) for key, shape in zip(source.keys, source.shapes, strict=True)]
            array = source.make(*stored) if source.make else stored[0]
            value.const_value = ir.tensor(np.ascontiguousarray(array), name=value.name)
        file, data = f"{subgraph.name}.onnx", f"{subgraph.name}.data"
        ir.save(subgraph.model, folder / file, external_data=data)
        described = Graph(file, (data,), subgraph.inputs, subgraph.outputs, "fp32", parameters=0, weight_bytes=0)
        return Session(folder, described, options)
