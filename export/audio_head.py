"""One hidden state to one frame of codes: the depth transformer unrolled over the codebooks, with the draws inside.

The official code runs the whole head, all positions and all output layers, once for each code of a frame. Here each
depth is one position, which keeps the keys and values of those before it and reads its own slice of the weights.
"""

from collections.abc import Callable, Mapping, Sequence
from itertools import accumulate
from typing import Any

import numpy as np
import onnx_ir as ir
from onnxscript import nn

from export.config import OmniConfig
from export.graph import (
    FLOAT,
    INT64,
    Derived,
    Subgraph,
    author,
    cast,
    compute_dtype,
    constant,
    contrib,
    ints,
    port_dtype,
    scalar,
    tap,
)
from export.layers import Embedding, Linear, RMSNorm, gelu
from runtime.bundle import Port, Profile
from runtime.errors import CheckpointError

PREFIX = "audio_head"
HEAD_WIDTH = 128  # of an attention head; hard-wired in the official code, as are the next two
EPSILON = 1e-6
FFN_FACTOR = 2
ROWS = 64  # CUDA's quantized kernels take output widths that are a multiple of this
NEVER = -1e4  # logit of a padded row; finite in fp16

Pair = tuple[ir.Value, ir.Value]


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
    """torch.nn.MultiheadAttention at one position, which sees itself and those in `past`.

    x [1, 1, hidden]; past key and value [1, heads, depth, head width]. Returns y [1, 1, hidden] without the bias of
    out_proj, and the present key and value.
    """

    def __init__(self, width: int, dtype: ir.DataType):
        super().__init__()
        self.heads, self.dtype = width // HEAD_WIDTH, dtype
        self.in_proj_weight = nn.Parameter([3 * width, width], dtype)
        self.in_proj_bias = nn.Parameter([3 * width], dtype)
        self.out_proj = Product(width, width, dtype=dtype)

    def forward(self, op: Any, x: ir.Value, past: Pair | None) -> tuple[ir.Value, Pair]:
        packed = contrib(op, "FusedMatMul", x, self.in_proj_weight, transB=1, dtype=self.dtype)
        y, key, value = contrib(
            op, "MultiHeadAttention", *op.Split(packed, axis=-1, num_outputs=3, _outputs=3),
            self.in_proj_bias, None, None, *(past or (None, None)),
            num_heads=self.heads, _outputs=3, dtype=self.dtype,
        )  # fmt: skip
        return self.out_proj(op, y), (key, value)


class Layer(nn.Module):
    """One layer at one depth. Its residual is the normalised sum, not the sum: a quirk that the weights fit."""

    def __init__(self, width: int, depths: int, dtype: ir.DataType):
        super().__init__()
        inner = FFN_FACTOR * width
        self.layernorm1 = SumNorm(width, EPSILON, dtype)
        self.self_attention = Attention(width, dtype)
        self.layernorm2 = SumNorm(width, EPSILON, dtype)
        self.linear1 = nn.ModuleList([Linear(width, inner, bias=False, dtype=dtype) for _ in range(depths)])
        self.linear2 = nn.ModuleList([Linear(inner, width, bias=False, dtype=dtype) for _ in range(depths)])

    def forward(self, op: Any, x: ir.Value, skip: ir.Value | None, past: Pair | None, depth: int) -> tuple[Any, ...]:
        """The layer's input is x + skip and its output the sum of the first two results, each [1, 1, hidden]; then
        that input and the present key and value."""
        h, x = self.layernorm1(op, x, skip)
        a, present = self.self_attention(op, h, past)
        y, _ = self.layernorm2(op, a, x, self.self_attention.out_proj.bias)
        return self.linear2[depth](op, gelu(op, self.linear1[depth](op, y))), y, x, present


class DepthTransformer(nn.Module):
    """Input row of a depth [1, 1, hidden] and what its layers remember -> raw logits of its codebook, fp32
    [1, 1, size + 1 or more], and what they remember then."""

    def __init__(self, width: int, layers: int, rows: Sequence[int], dtype: ir.DataType):
        super().__init__()
        self.transformer_layers = nn.ModuleList([Layer(width, len(rows), dtype) for _ in range(layers)])
        self.headnorm = SumNorm(width, EPSILON, dtype)
        self.heads = nn.ModuleList([Linear(width, count, dtype=dtype) for count in rows])

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


def scores_tap(depth: int) -> str:
    return f"{PREFIX}.scores.{depth}"


class Draw:
    """How a code is chosen from its codebook's logits: as runtime.sampling does, with the chance given as noise.

    Order and ties follow Hugging Face's logits processors, but for one case: of scores that equal the least one that
    top-p keeps, all are kept. The code is the argmax of score + noise among those that are left (Gumbel 1954).
    """

    def __init__(self, op: Any, sizes: Sequence[int], ports: Mapping[str, ir.Value]):
        """`sizes` of the codebooks' score vectors, which lie one behind the other in noise and seen."""
        self.op, self.sizes = op, sizes
        self.zero, self.nowhere = scalar(op, 0, INT64), scalar(op, -np.inf)
        factor = op.Where(ports["seen"], ports["repetition_penalty"], scalar(op, 1.0))
        self.noise = self._split(ports["noise"])
        self.slope = self._split(op.Mul(factor, factor))
        self.divisor = self._split(op.Mul(factor, ports["temperature"]))
        every = np.array(sizes, np.int64)
        top_k = op.Where(op.Greater(ports["top_k"], self.zero), ports["top_k"], scalar(op, max(sizes), INT64))
        self.top_k = self._each(op.Min(top_k, constant(op, every, "draw.sizes")))
        # a running sum may round to 1 before its end, so "off" must be more than 1
        self.top_p = op.Where(op.Less(ports["top_p"], scalar(op, 1.0)), ports["top_p"], scalar(op, 2.0))
        self.forced = self._each(ports["forced"])
        self.is_forced = self._each(op.GreaterOrEqual(ports["forced"], self.zero))

    def code(self, logits: ir.Value, depth: int) -> ir.Value:
        """Raw logits fp32 [1, 1, size or more] -> code int64 [1, 1]."""
        op = self.op
        scores = self._scores(logits, depth)
        least = self._least_kept(scores, self.top_k[depth])
        noisy = op.Where(op.GreaterOrEqual(scores, least), op.Add(scores, self.noise[depth]), self.nowhere)
        chosen = op.ArgMax(noisy, axis=-1, keepdims=0)
        return op.Where(self.is_forced[depth], self.forced[depth], chosen)

    def _scores(self, logits: ir.Value, depth: int) -> ir.Value:
        """After repetition penalty and temperature: a seen score s becomes s * p if it is negative, else s / p.

        PRelu multiplies a negative s by p^2 beforehand, so that one division by p serves both.
        """
        op = self.op
        cut = op.Slice(logits, ints(op, 0), ints(op, self.sizes[depth]), ints(op, -1))
        return tap(op.Div(op.PRelu(cut, self.slope[depth]), self.divisor[depth]), scores_tap(depth))

    def _least_kept(self, scores: ir.Value, k: ir.Value) -> ir.Value:
        """The least score [1, 1, 1] that passes top-k and top-p.

        A score is dropped by top-p if those from the least one up to it add up to a probability of 1 - p or less:
        if those above it have p or more.
        """
        op = self.op
        top, ids = op.TopK(scores, k, axis=-1, _outputs=2)
        kth = op.Gather(top, ints(op, -1), axis=-1)
        probs = op.Softmax(op.Where(op.GreaterOrEqual(scores, kth), scores, self.nowhere), axis=-1)
        above = op.CumSum(op.GatherElements(probs, ids, axis=-1), scalar(op, -1, INT64), exclusive=1)
        kept = op.Where(op.Less(above, self.top_p), top, scalar(op, np.inf))
        return op.ReduceMin(kept, ints(op, -1), keepdims=1)

    def _split(self, vector: ir.Value) -> tuple[ir.Value, ...]:
        return self.op.Split(vector, ints(self.op, *self.sizes), axis=0, _outputs=len(self.sizes))

    def _each(self, vector: ir.Value) -> tuple[ir.Value, ...]:
        return self.op.Split(vector, axis=0, num_outputs=len(self.sizes), _outputs=len(self.sizes))


class CodeTables(nn.Module):
    """The decoder's own embeddings of codes: the row that one code adds, [1, 1, hidden]."""

    def __init__(self, codebook_sizes: Sequence[int], width: int, dtype: ir.DataType):
        super().__init__()
        self.audio_embed_layers = nn.ModuleList([Embedding(size + 1, width, dtype) for size in codebook_sizes])

    def forward(self, op: Any, code: ir.Value, depth: int) -> ir.Value:
        return self.audio_embed_layers[depth](op, code)


class AudioHead(nn.Module):
    def __init__(self, config: OmniConfig, profile: Profile):
        super().__init__()
        width, dtype = config.decoder.hidden_size, compute_dtype(profile)
        books = config.audio_config.vq_config.codebook_sizes
        self.sizes = score_sizes(books)
        self.model = CodeTables(books, width, dtype)
        layers = config.audio_config.audio_head_transformer_layers
        self.audio_head = DepthTransformer(width, layers, head_rows(books, profile), dtype)

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


def score_sizes(codebook_sizes: Sequence[int]) -> tuple[int, ...]:
    """Codes that may be chosen at each depth: the first codebook's, and the end of audio; of the others, theirs."""
    return (codebook_sizes[0] + 1, *codebook_sizes[1:])


def head_rows(codebook_sizes: Sequence[int], profile: Profile) -> tuple[int, ...]:
    """Output width of each head: as stored, or for CUDA padded to a multiple of ROWS."""
    step = ROWS if profile == "cuda" else 1
    return tuple(-(-(size + 1) // step) * step for size in codebook_sizes)


def audio_head(config: OmniConfig, profile: Profile) -> Subgraph:
    """hidden [1, hidden] of one position -> the codes [codebooks] of one frame, and the decoder's next input row.

    noise [N] is standard Gumbel noise for a draw or zeros for the likeliest codes, with one value for each score of
    each depth (`score_sizes`, N in all). top_k 0 and top_p 1 switch off; top_k 1 is the cheapest way to be greedy.
    seen [N] marks the codes that repetition_penalty counts, and seen_next also those of this frame. A code in
    `forced` that is not -1 is taken in place of the choice. CheckpointError if hidden_size cannot be split into heads.
    """
    width, books = config.decoder.hidden_size, config.audio_config.vq_config.codebook_sizes
    if width < HEAD_WIDTH or width % (width // HEAD_WIDTH):
        raise CheckpointError(f"hidden_size {width} cannot be split into the audio head's {width // HEAD_WIDTH} heads")
    kind, count = port_dtype(compute_dtype(profile)), sum(score_sizes(books))
    inputs = [
        Port("hidden", kind, (1, width)),
        Port("noise", "float32", (count,)),
        Port("temperature", "float32", ()),
        Port("top_k", "int64", ()),
        Port("top_p", "float32", ()),
        Port("repetition_penalty", "float32", ()),
        Port("seen", "bool", (count,)),
        Port("forced", "int64", (len(books),)),
    ]
    outputs = [
        Port("codes", "int64", (len(books),)),
        Port("row", kind, (1, width)),
        Port("seen_next", "bool", (count,)),
    ]
    return author("audio_head", AudioHead(config, profile), inputs, outputs, derived=derivations(config, profile))


def derivations(config: OmniConfig, profile: Profile) -> dict[str, Derived]:
    """Each depth's columns of linear1 and linear2, and padded heads."""
    width, books = config.decoder.hidden_size, config.audio_config.vq_config.codebook_sizes
    inner, derived = FFN_FACTOR * width, {}
    for layer in range(config.audio_config.audio_head_transformer_layers):
        path = f"{PREFIX}.transformer_layers.{layer}"
        for depth in range(len(books)):
            for name, rows, columns in (("linear1", inner, width), ("linear2", width, inner)):
                key, shape = f"{path}.{name}.weight", (rows, len(books) * columns)
                derived[f"{path}.{name}.{depth}.weight"] = Derived((key,), (shape,), columns_of(depth, columns))
    for depth, (size, rows) in enumerate(zip(books, head_rows(books, profile), strict=True)):
        if rows != size + 1:
            weight, bias = f"{PREFIX}.heads.{depth}.weight", f"{PREFIX}.heads.{depth}.bias"
            derived[weight] = Derived((weight,), ((size + 1, width),), padded(rows, 0.0))
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
