"""One hidden state to one frame of codes: the depth transformer unrolled over the codebooks, with the draws inside.

The official code runs the whole head, all positions and all output layers, once for each code of a frame. Here each
depth is one position, which keeps the keys and values of those before it and reads its own slice of the weights.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import accumulate
from typing import Any

import numpy as np
import onnx_ir as ir
from onnxscript import nn

from export.config import OmniConfig
from export.draw import Draw
from export.graph import (
    FLOAT,
    Derived,
    Subgraph,
    author,
    cast,
    compute_dtype,
    constant,
    contrib,
    ints,
    port_dtype,
    tap,
)
from export.layers import Embedding, Linear, RMSNorm, gelu
from runtime.bundle import Port, Profile
from runtime.errors import CheckpointError

PREFIX = "audio_head"
HEAD_WIDTH = 128  # of an attention head; hard-wired in the official code, as are the next two
EPSILON = 1e-6
FFN_FACTOR = 2
# Output widths of the heads are multiples of this: CUDA's quantized kernels take no others; on a CPU their biases then
# fill whole cache lines, without which ONNX Runtime 1.31 cannot keep the graph's packed weights in a file.
ROWS: dict[Profile, int] = {"cuda": 64, "cpu": 16}
NEVER = -1e4  # logit of a padded row; finite in fp16

Pair = tuple[ir.Value, ir.Value]


@dataclass(frozen=True)
class HeadShape:
    """The sizes that an audio head follows from."""

    hidden_size: int
    layers: int
    codebook_sizes: tuple[int, ...]

    @property
    def depths(self) -> int:
        return len(self.codebook_sizes)

    @property
    def heads(self) -> int:
        return self.hidden_size // HEAD_WIDTH

    @property
    def inner(self) -> int:
        return FFN_FACTOR * self.hidden_size

    def rows(self, profile: Profile) -> tuple[int, ...]:
        """Output width of each depth's head: padded to a multiple of ROWS."""
        step = ROWS[profile]
        return tuple(-(-(size + 1) // step) * step for size in self.codebook_sizes)


def score_sizes(codebook_sizes: Sequence[int]) -> tuple[int, ...]:
    """Codes to choose from at each depth: the first codebook's and the end of audio, then those of each other."""
    return (codebook_sizes[0] + 1, *codebook_sizes[1:])


class SumNorm(RMSNorm):
    """RMSNorm of x + skip + bias, and that sum."""

    def forward(self, op: Any, x: ir.Value, skip: ir.Value | None = None, bias: ir.Value | None = None) -> Any:
        if skip is None:
            return super().forward(op, x), x
        y, mean, deviation, total = contrib(
            op, "SkipSimplifiedLayerNormalization", x, skip, self.weight, bias,
            epsilon=self.eps, _outputs=4, dtype=self.dtype,
        )  # fmt: skip
        mean.type = deviation.type = ir.TensorType(FLOAT)
        return y, total


class Product(Linear):
    """x W^T; the bias is added by the operator behind it, which does so without a node more."""

    def forward(self, op: Any, x: ir.Value) -> ir.Value:
        return contrib(op, "FusedMatMul", x, self.weight, transB=1, dtype=self.dtype)


class Attention(nn.Module):
    """torch.nn.MultiheadAttention over depths, each of which sees itself and those before it.

    x [1, S, hidden] without a past, else [1, 1, hidden]; keys and values [1, heads, depths, head width]. Returns y like
    x, without the bias of out_proj, and the present key and value.
    """

    def __init__(self, shape: HeadShape, dtype: ir.DataType):
        super().__init__()
        width = shape.hidden_size
        self.heads, self.dtype = shape.heads, dtype
        self.in_proj_weight = nn.Parameter([3 * width, width], dtype)
        self.in_proj_bias = nn.Parameter([3 * width], dtype)
        self.out_proj = Product(width, width, dtype=dtype)

    def forward(self, op: Any, x: ir.Value, past: Pair | None) -> tuple[ir.Value, Pair]:
        packed = contrib(op, "FusedMatMul", x, self.in_proj_weight, transB=1, dtype=self.dtype)
        y, key, value = contrib(
            op, "MultiHeadAttention", *op.Split(packed, axis=-1, num_outputs=3, _outputs=3),
            self.in_proj_bias, None, None, *(past or (None, None)),
            num_heads=self.heads, unidirectional=int(past is None), _outputs=3, dtype=self.dtype,
        )  # fmt: skip
        return self.out_proj(op, y), (key, value)


class Layer(nn.Module):
    """One layer at one depth. Its residual is the normalised sum, not the sum: a quirk that the weights fit."""

    def __init__(self, shape: HeadShape, dtype: ir.DataType):
        super().__init__()
        width, inner, depths = shape.hidden_size, shape.inner, range(shape.depths)
        self.layernorm1 = SumNorm(width, EPSILON, dtype)
        self.self_attention = Attention(shape, dtype)
        self.layernorm2 = SumNorm(width, EPSILON, dtype)
        self.linear1 = nn.ModuleList([Linear(width, inner, bias=False, dtype=dtype) for _ in depths])
        self.linear2 = nn.ModuleList([Linear(inner, width, bias=False, dtype=dtype) for _ in depths])

    def forward(self, op: Any, x: ir.Value, skip: ir.Value | None, past: Pair | None, depth: int) -> tuple[Any, ...]:
        """The layer's input is x + skip and its output the sum of the first two results, each [1, 1, hidden]; then
        that input and the present key and value."""
        h, x = self.layernorm1(op, x, skip)
        a, present = self.self_attention(op, h, past)
        y, _ = self.layernorm2(op, a, x, self.self_attention.out_proj.bias)
        return self.feed_forward(op, y, depth), y, x, present

    def feed_forward(self, op: Any, y: ir.Value, depth: int) -> ir.Value:
        return self.linear2[depth](op, gelu(op, self.linear1[depth](op, y)))


class DepthTransformer(nn.Module):
    """Input row of a depth [1, 1, hidden] and what its layers remember -> raw logits of its codebook, fp32
    [1, 1, size + 1 or more], and what they remember then."""

    def __init__(self, shape: HeadShape, profile: Profile):
        super().__init__()
        width, dtype = shape.hidden_size, compute_dtype(profile)
        self.transformer_layers = nn.ModuleList([Layer(shape, dtype) for _ in range(shape.layers)])
        self.headnorm = SumNorm(width, EPSILON, dtype)
        self.heads = nn.ModuleList([Linear(width, count, dtype=dtype) for count in shape.rows(profile)])

    def forward(self, op: Any, x: ir.Value, pasts: list[Pair], depth: int) -> tuple[ir.Value, list[Pair]]:
        skip, presents = None, []
        for index, layer in enumerate(self.transformer_layers):
            x, skip, entered, present = layer(op, x, skip, pasts[index] if pasts else None, depth)
            presents.append(present)
            if index:
                tap(entered, layer_tap(index - 1, depth))
        h, left = self.headnorm(op, x, skip)
        tap(left, layer_tap(len(presents) - 1, depth))
        logits = cast(op, self.heads[depth](op, tap(h, headnorm_tap(depth))), FLOAT)
        return tap(logits, logits_tap(depth)), presents


def layer_tap(layer: int, depth: int) -> str:
    return f"{PREFIX}.transformer_layers.{layer}.out.{depth}"


def headnorm_tap(depth: int) -> str:
    return f"{PREFIX}.headnorm.out.{depth}"


def logits_tap(depth: int) -> str:
    return f"{PREFIX}.heads.{depth}.out"


class CodeTables(nn.Module):
    """The decoder's own embeddings of codes: the row that one code adds, [1, 1, hidden]."""

    def __init__(self, shape: HeadShape, dtype: ir.DataType):
        super().__init__()
        width = shape.hidden_size
        self.audio_embed_layers = nn.ModuleList([Embedding(size + 1, width, dtype) for size in shape.codebook_sizes])

    def forward(self, op: Any, code: ir.Value, depth: int) -> ir.Value:
        return self.audio_embed_layers[depth](op, code)


class AudioHead(nn.Module):
    """All depths of one frame in turn, from the input ports of `unrolled` to its output ports."""

    def __init__(self, shape: HeadShape, profile: Profile):
        super().__init__()
        self.sizes = score_sizes(shape.codebook_sizes)
        self.model = CodeTables(shape, compute_dtype(profile))
        self.audio_head = DepthTransformer(shape, profile)

    def forward(self, op: Any, *inputs: ir.Value) -> tuple[ir.Value, ...]:
        ports = {str(value.name): value for value in inputs}
        draw = Draw(op, self.sizes, ports)
        x = op.Unsqueeze(ports["hidden"], ints(op, 0))
        codes, pasts, total = [], [], None
        for depth in range(len(self.sizes)):
            logits, pasts = self.audio_head(op, x, pasts, depth)
            codes.append(draw.code(logits, depth))
            row = self.model(op, codes[-1], depth)
            total = row if total is None else op.Add(total, row)
            x = total
        frame = op.Reshape(op.Concat(*codes, axis=-1), ints(op, -1))
        return frame, op.Squeeze(total, ints(op, 0)), self._seen_next(op, ports["seen"], frame)

    def _seen_next(self, op: Any, seen: ir.Value, codes: ir.Value) -> ir.Value:
        starts = np.array([0, *accumulate(self.sizes)][:-1], np.int64)
        here = op.Add(codes, constant(op, starts, "draw.starts"))
        return op.ScatterElements(seen, here, constant(op, np.ones(len(starts), np.bool_), "draw.true"), axis=0)


def audio_head(config: OmniConfig, profile: Profile) -> Subgraph:
    """The audio head of a checkpoint; see `unrolled`."""
    audio = config.audio_config
    books = audio.vq_config.codebook_sizes
    return unrolled(HeadShape(config.decoder.hidden_size, audio.audio_head_transformer_layers, books), profile)


def unrolled(shape: HeadShape, profile: Profile) -> Subgraph:
    """hidden [1, hidden] of one position -> the codes [codebooks] of one frame, and the decoder's next input row.

    noise [N] is standard Gumbel noise for a draw or zeros for the likeliest codes, with one value for each score of
    each depth (`score_sizes`, N in all). top_k 0 and top_p 1 switch off; top_k 1 is the cheapest way to be greedy.
    seen [N] marks the codes that repetition_penalty counts, and seen_next also those of this frame. A code in
    `forced` that is not -1 is taken in place of the choice. CheckpointError if hidden_size cannot be split into heads.
    """
    if not shape.heads or shape.hidden_size % shape.heads:
        raise CheckpointError(
            f"hidden_size is {shape.hidden_size}; the audio head has one attention head for every {HEAD_WIDTH} of it, "
            f"and {shape.heads} heads do not divide it evenly"
        )
    kind, count = port_dtype(compute_dtype(profile)), sum(score_sizes(shape.codebook_sizes))
    inputs = [
        Port("hidden", kind, (1, shape.hidden_size)),
        Port("noise", "float32", (count,)),
        Port("temperature", "float32", ()),
        Port("top_k", "int64", ()),
        Port("top_p", "float32", ()),
        Port("repetition_penalty", "float32", ()),
        Port("seen", "bool", (count,)),
        Port("forced", "int64", (shape.depths,)),
    ]
    outputs = [
        Port("codes", "int64", (shape.depths,)),
        Port("row", kind, (1, shape.hidden_size)),
        Port("seen_next", "bool", (count,)),
    ]
    derived = {**depth_slices(shape), **padded_heads(shape, profile)}
    return author("audio_head", AudioHead(shape, profile), inputs, outputs, derived=derived)


def depth_slices(shape: HeadShape) -> dict[str, Derived]:
    """Each depth's linear1 and linear2: an official tensor holds those of all depths side by side."""
    derived, inner = {}, shape.inner
    for layer in range(shape.layers):
        path = f"{PREFIX}.transformer_layers.{layer}"
        for name, rows, columns in (("linear1", inner, shape.hidden_size), ("linear2", shape.hidden_size, inner)):
            key, whole = f"{path}.{name}.weight", (rows, shape.depths * columns)
            for depth in range(shape.depths):
                derived[f"{path}.{name}.{depth}.weight"] = Derived(
                    (key,), (whole,), columns_of(depth, columns), selects=True
                )
    return derived


def padded_heads(shape: HeadShape, profile: Profile) -> dict[str, Derived]:
    derived = {}
    for depth, (size, rows) in enumerate(zip(shape.codebook_sizes, shape.rows(profile), strict=True)):
        if rows != size + 1:
            weight, bias = f"{PREFIX}.heads.{depth}.weight", f"{PREFIX}.heads.{depth}.bias"
            derived[weight] = Derived((weight,), ((size + 1, shape.hidden_size),), padded(rows, 0.0))
            derived[bias] = Derived((bias,), ((size + 1,),), padded(rows, NEVER))
    return derived


def columns_of(depth: int, count: int) -> Callable[[np.ndarray], np.ndarray]:
    """The depth's `count` columns of a matrix that holds those of all depths side by side."""
    return lambda weight: weight[:, depth * count : (depth + 1) * count]


def padded(rows: int, value: float) -> Callable[[np.ndarray], np.ndarray]:
    """More rows at the end of an array, filled with `value`, so that it has `rows`."""

    def pad(array: np.ndarray) -> np.ndarray:
        filled = np.full((rows, *array.shape[1:]), value, array.dtype)
        filled[: len(array)] = array
        return filled

    return pad
