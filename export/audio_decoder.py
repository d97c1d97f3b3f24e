"""Codes to states at the mel frame rate: RVQ decoding, a transposed convolution, and causal transformer layers."""

from typing import Any

import onnx_ir as ir
from onnxscript import nn

from export.config import AudioConfig
from export.graph import FLOAT, Subgraph, author, carried, cast, compute_dtype, ints, port_dtype, scalar, tap
from export.layers import LayerNorm, Linear, NarrowingNorm, TransformerLayer
from runtime.bundle import Port, Profile

PREFIX = "audio_tokenizer"
BRIDGE, DECODER = f"{PREFIX}.audio_bridge_model", f"{PREFIX}.audio_decoder"
NORM_EPS = 1e-5
LAST = 2**62  # as the end of a slice: all that is there


class Bridge(nn.Module):
    """codes [L, codebooks] -> [1, L, d_model]: the sum of the codewords, in fp32 from the last level to the first."""

    def __init__(self, config: AudioConfig, dtype: ir.DataType):
        super().__init__()
        self.dtype, width = dtype, config.bridge_dim
        self.codebooks = tuple(nn.Parameter([size, width], FLOAT) for size in config.vq_config.codebook_sizes)
        for level, codebook in enumerate(self.codebooks):
            setattr(self, f"vq_list.{level}.codebook.embed", codebook)
        self.proj_decoder = Linear(width, config.d_model, dtype=dtype)

    def forward(self, op: Any, codes: ir.Value) -> ir.Value:
        vectors = [
            op.Gather(codebook, op.Gather(codes, op.Constant(value_int=level), axis=1), axis=0)
            for level, codebook in enumerate(self.codebooks)
        ]
        total = vectors.pop()
        while vectors:
            total = op.Add(total, vectors.pop())
        x = self.proj_decoder(op, cast(op, tap(total, f"{BRIDGE}.rvq_sum"), self.dtype))
        return op.Unsqueeze(tap(x, f"{BRIDGE}.proj_decoder.out"), ints(op, 0))


class ConvTranspose1d(nn.Module):
    """[1, L, width] -> [1, stride * L + overlap, width], and what overlaps with the code that follows.

    A kernel longer than the stride lets neighbouring codes overlap by the difference: those frames of the last code are
    carried to the next run. A shorter one leaves frames between kernels, and after the last, that hold the bias alone:
    the official convolution ends without the latter.
    """

    def __init__(self, width: int, kernel: int, stride: int, dtype: ir.DataType):
        super().__init__()
        self.overlap = max(0, kernel - stride)
        self.attributes = {"strides": [stride], "output_padding": [max(0, stride - kernel)]}
        self.weight = nn.Parameter([width, width, kernel], dtype)
        self.bias = nn.Parameter([width], dtype)

    def forward(self, op: Any, x: ir.Value, past: ir.Value | None) -> tuple[ir.Value, list[ir.Value]]:
        y = op.ConvTranspose(op.Transpose(x, perm=[0, 2, 1]), self.weight, **self.attributes)
        y, present = op.Transpose(y, perm=[0, 2, 1]), []
        if past is not None:
            cut, end = ints(op, self.overlap), ints(op, LAST)
            joint = op.Add(op.Slice(y, ints(op, 0), cut, ints(op, 1)), past)
            y = op.Concat(joint, op.Slice(y, cut, end, ints(op, 1)), axis=1)
            present = [op.Slice(y, ints(op, -self.overlap), end, ints(op, 1))]
        return op.Add(y, self.bias), present


class RunningGroupNorm(nn.Module):
    """GroupNorm of one group: statistics over channels and all frames of the segment, in fp32.

    `past` and the second result are [3]: count, mean and sum of squared deviations, merged as in Chan, Golub and
    LeVeque (1979). Exact where past and own frames are the whole segment, an approximation before its end.
    """

    def __init__(self, width: int):
        super().__init__()
        self.weight = nn.Parameter([width], FLOAT)
        self.bias = nn.Parameter([width], FLOAT)

    def forward(self, op: Any, y: ir.Value, past: ir.Value) -> tuple[ir.Value, ir.Value]:
        merged = self.merge(op, past, self.moments(op, y))
        count, mean, deviation = op.Split(merged, axis=0, num_outputs=3, _outputs=3)
        spread = op.Sqrt(op.Add(op.Div(deviation, count), scalar(op, NORM_EPS)))
        return op.Add(op.Mul(op.Div(op.Sub(y, mean), spread), self.weight), self.bias), merged

    def moments(self, op: Any, y: ir.Value) -> ir.Value:
        values = op.Reshape(y, ints(op, -1))
        mean = op.ReduceMean(values, ints(op, 0), keepdims=1)
        deviation = op.ReduceSumSquare(op.Sub(values, mean), ints(op, 0), keepdims=1)
        return op.Concat(op.Cast(op.Shape(values), to=FLOAT.value), mean, deviation, axis=0)

    def merge(self, op: Any, a: ir.Value, b: ir.Value) -> ir.Value:
        count_a, mean_a, deviation_a = op.Split(a, axis=0, num_outputs=3, _outputs=3)
        count_b, mean_b, deviation_b = op.Split(b, axis=0, num_outputs=3, _outputs=3)
        count, apart = op.Add(count_a, count_b), op.Sub(mean_b, mean_a)
        share = op.Div(count_b, count)
        between = op.Mul(op.Mul(apart, apart), op.Mul(count_a, share))
        mean = op.Add(mean_a, op.Mul(apart, share))
        return op.Concat(count, mean, op.Add(op.Add(deviation_a, deviation_b), between), axis=0)


class Upsampling(nn.Module):
    """dconv1: [1, L, d_model] -> normalised frames in fp32, and its state: merged statistics, and what overlaps."""

    def __init__(self, config: AudioConfig, dtype: ir.DataType):
        super().__init__()
        self.conv = ConvTranspose1d(config.d_model, config.decoder_kernel_size, config.avg_pooler, dtype)
        self.norm = RunningGroupNorm(config.d_model)

    def forward(self, op: Any, x: ir.Value, frames: ir.Value, norm: ir.Value, *overlap: ir.Value) -> list[ir.Value]:
        y, present = self.conv(op, x, *(overlap or [None]))
        whole = op.Shape(y, start=1, end=2)
        y = op.Slice(cast(op, y, FLOAT), ints(op, 0), op.Unsqueeze(frames, ints(op, 0)), ints(op, 1))
        y, moments = self.norm(op, tap(y, f"{DECODER}.dconv1.conv.out"), norm)
        if overlap:  # the norm covers what overhangs at the end of a segment, and then it is cut off
            y = op.Slice(y, ints(op, 0), op.Sub(whole, ints(op, self.conv.overlap)), ints(op, 1))
        return [tap(y, f"{DECODER}.dconv1.out"), moments, *present]


class Decoder(nn.Module):
    """[1, L, d_model] -> [1, frames, d_model]: upsampling, stored positions, causal layers, a last norm."""

    def __init__(self, config: AudioConfig, dtype: ir.DataType):
        super().__init__()
        self.dconv1 = Upsampling(config, dtype)
        self.positional_embedding = nn.Parameter([config.max_frames, config.d_model], FLOAT)
        self.layers = nn.ModuleList([_layer(config, dtype) for _ in range(config.decoder_layers)])
        self.layer_norm = LayerNorm(config.d_model)

    def forward(self, op: Any, x: ir.Value, frames: ir.Value, *pasts: ir.Value) -> list[ir.Value]:
        caches = pasts[len(pasts) - 2 * len(self.layers) :]
        x, *present = self.dconv1(op, x, frames, *pasts[: len(pasts) - len(caches)])
        x = op.Add(x, self.positions(op, x, caches[0]))
        for index, layer in enumerate(self.layers):
            x, key, value = layer(op, x, caches[2 * index : 2 * index + 2])
            tap(x, f"{DECODER}.layers.{index}.out")
            present += [key, value]
        return [self.layer_norm(op, x), *present]

    def positions(self, op: Any, x: ir.Value, past: ir.Value) -> ir.Value:
        """Rows of the table from the length of the past on."""
        first = op.Shape(past, start=2, end=3)
        last = op.Add(first, op.Shape(x, start=1, end=2))
        return op.Slice(self.positional_embedding, first, last, ints(op, 0))


def _layer(config: AudioConfig, dtype: ir.DataType) -> TransformerLayer:
    def norm() -> NarrowingNorm:
        return NarrowingNorm(config.d_model, dtype=dtype)

    heads, ffn_dim = config.decoder_attention_heads, config.decoder_ffn_dim
    return TransformerLayer(config.d_model, heads, ffn_dim, norm, causal=True, dtype=dtype)


class CodesToStates(nn.Module):
    def __init__(self, config: AudioConfig, dtype: ir.DataType):
        super().__init__()
        self.audio_bridge_model = Bridge(config, dtype)
        self.audio_decoder = Decoder(config, dtype)

    def forward(self, op: Any, codes: ir.Value, frames: ir.Value, *pasts: ir.Value) -> list[ir.Value]:
        return self.audio_decoder(op, self.audio_bridge_model(op, codes), frames, *pasts)


def audio_decoder(config: AudioConfig, profile: Profile) -> Subgraph:
    """codes [L, codebooks], frames [] -> hidden [1, T, d_model], T = frames but at most avg_pooler * L.

    `frames` is how many the norm covers: avg_pooler * L inside a segment, and `frames_short` less at its end. Carried:
    the statistics of dconv1's norm, the frames that overlap with the next code where its kernel is longer than its
    stride, and keys and values; the position is the length of their past.
    """
    dtype, overlap = compute_dtype(profile), max(0, -frames_short(config))
    cache = (1, config.decoder_attention_heads, "past", config.d_model // config.decoder_attention_heads)
    names = [f"{i}.{side}" for i in range(config.decoder_layers) for side in ("key", "value")]
    states = [Port("norm", "float32", (3,)), *(Port(name, port_dtype(dtype), cache) for name in names)]
    if overlap:
        states.insert(1, Port("overlap", port_dtype(dtype), (1, overlap, config.d_model)))
    codes = Port("codes", "int64", ("codes", len(config.vq_config.codebook_sizes)))
    inputs = [codes, Port("frames", "int64", ()), *carried("past", states)]
    outputs = [Port("hidden", "float32", (1, "kept", config.d_model)), *carried("present", states)]
    return author("audio_decoder", CodesToStates(config, dtype), inputs, outputs, prefix=PREFIX)


def frames_short(config: AudioConfig) -> int:
    """Frames that a segment of L codes falls short of avg_pooler * L before it is cut; negative where codes overlap."""
    return config.avg_pooler - config.decoder_kernel_size
