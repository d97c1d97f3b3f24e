"""Log-mel to codes: the Whisper-style encoder, the bridge that joins its frames, and the residual quantizer."""

from typing import Any

import numpy as np
import onnx_ir as ir
from onnxscript import nn

from export.config import AudioConfig
from export.graph import FLOAT, Derived, Subgraph, author, cast, compute_dtype, contrib, ints, scalar, tap
from export.layers import Conv1d, LayerNorm, Linear, NarrowingNorm, TransformerLayer, gelu, silu
from runtime.bundle import Port, Profile

PREFIX = "audio_tokenizer"
MODEL, BRIDGE = f"{PREFIX}.audio_model", f"{PREFIX}.audio_bridge_model"
PADDING = (1, 1)  # frames, of both convolutions; not in config.json


class Encoder(nn.Module):
    """Log-mel [1, num_mel_bins, F] -> [1, E, d_model] in fp32, E = (F - 1) // stride_size + 1.

    Attention covers exactly the frames given, unlike Whisper's, which always sees 30 s. Norms and sums are fp32 in
    every profile: a code is a nearest neighbour, and rounding on the way flips it.
    """

    def __init__(self, config: AudioConfig, dtype: ir.DataType):
        super().__init__()
        self.dtype = dtype
        width, kernel, stride = config.d_model, config.kernel_size, config.stride_size
        self.conv1 = Conv1d(config.num_mel_bins, width, kernel, padding=PADDING, dtype=dtype)
        self.conv2 = Conv1d(width, width, kernel, stride, PADDING, dtype=dtype)
        # stored, not computed: checkpoints hold it rounded to their own type
        self.positional_embedding = nn.Parameter([config.max_frames // stride, width], FLOAT)
        self.layers = nn.ModuleList([_layer(config, dtype) for _ in range(config.encoder_layers)])
        self.layer_norm = LayerNorm(width)

    def forward(self, op: Any, mel: ir.Value) -> ir.Value:
        x = tap(self.embed(op, mel), f"{MODEL}.embedded")
        for index, layer in enumerate(self.layers):
            x = tap(layer(op, x), f"{MODEL}.layers.{index}.out")
        return tap(self.layer_norm(op, x), f"{MODEL}.out")

    def embed(self, op: Any, mel: ir.Value) -> ir.Value:
        """What enters the first layer: both convolutions and the positions, [1, E, d_model]."""
        x = gelu(op, self.conv1(op, cast(op, mel, self.dtype)))
        x = op.Transpose(gelu(op, self.conv2(op, x)), perm=[0, 2, 1])
        positions = op.Slice(self.positional_embedding, ints(op, 0), op.Shape(x, start=1, end=2), ints(op, 0))
        return op.Add(cast(op, x, FLOAT), positions)


def _layer(config: AudioConfig, dtype: ir.DataType) -> TransformerLayer:
    def norm() -> NarrowingNorm:
        return NarrowingNorm(config.d_model, dtype=dtype)

    return TransformerLayer(
        config.d_model, config.encoder_attention_heads, config.encoder_ffn_dim, norm=norm, dtype=dtype
    )


class Codebook(nn.Module):
    """The codewords of one level and |e|^2 of each, fp32 in every profile; half precision flips codes."""

    def __init__(self, size: int, width: int):
        super().__init__()
        self.embed = nn.Parameter([size, width], FLOAT)
        self.squared_norm = nn.Parameter([size], FLOAT)

    def forward(self, op: Any, r: ir.Value) -> ir.Value:
        """Euclidean distance of r [n, width] to every codeword: [n, size].

        The root decides nothing but ties, which rounding it can make; the first codeword wins those.
        """
        product = contrib(op, "FusedMatMul", r, self.embed, alpha=-2.0, transB=1, dtype=FLOAT)
        norms = op.Add(op.ReduceSumSquare(r, ints(op, -1), keepdims=1), self.squared_norm)
        return op.Sqrt(op.Max(op.Add(norms, product), scalar(op, 0.0)))


class Quantizer(nn.Module):
    """One level of the residual quantizer: the nearest codeword, and what is left for the next level."""

    def __init__(self, size: int, width: int):
        super().__init__()
        self.codebook = Codebook(size, width)

    def forward(self, op: Any, r: ir.Value, index: int) -> tuple[ir.Value, ir.Value]:
        """Codes [n, 1] of r [n, width], and what they leave of it."""
        distance = tap(self.codebook(op, r), f"{BRIDGE}.vq_list.{index}.distance")
        code = op.ArgMin(distance, axis=-1, keepdims=1, select_last_index=0)
        return code, op.Sub(r, op.Gather(self.codebook.embed, op.Squeeze(code, ints(op, -1)), axis=0))


class Bridge(nn.Module):
    """Every avg_pooler encoder frames become one row of codes: a gated MLP beside the frames themselves, normalised.

    The official gate and up projections are convolutions whose stride is their kernel: matrices on stacked frames.
    """

    def __init__(self, config: AudioConfig, dtype: ir.DataType):
        super().__init__()
        self.pool, self.width, self.dtype = config.avg_pooler, config.bridge_dim, dtype
        self.gate_proj = Linear(self.width, self.width, bias=False, dtype=dtype)
        self.up_proj = Linear(self.width, self.width, bias=False, dtype=dtype)
        self.down_proj = Linear(self.width, self.width, bias=False, dtype=dtype)
        self.layer_norm = LayerNorm(self.width)
        self.vq_list = nn.ModuleList([Quantizer(size, self.width) for size in config.vq_config.codebook_sizes])

    def forward(self, op: Any, frames: ir.Value) -> ir.Value:
        """[1, E, d_model] -> codes [E // avg_pooler, codebooks]."""
        r = op.Slice(self.join(op, frames), ints(op, 0), self.length(op, frames), ints(op, 1))
        r = op.Squeeze(r, ints(op, 0))
        codes = []
        for index, quantizer in enumerate(self.vq_list):
            code, r = quantizer(op, r, index)
            codes.append(code)
        return op.Concat(*codes, axis=1)

    def join(self, op: Any, frames: ir.Value) -> ir.Value:
        """[1, E, d_model] -> [1, ceil(E / avg_pooler), bridge_dim]; the last group may be filled up with zeros."""
        missing = op.Mod(op.Neg(op.Shape(frames, start=1, end=2)), ints(op, self.pool))
        padded = op.Pad(frames, op.Concat(ints(op, 0), missing, axis=0), None, ints(op, 1))
        stacked = op.Reshape(padded, ints(op, 1, -1, self.width))
        x = cast(op, stacked, self.dtype)
        x = self.down_proj(op, op.Mul(silu(op, self.gate_proj(op, x)), self.up_proj(op, x)))
        joined = self.layer_norm(op, op.Add(cast(op, x, FLOAT), stacked))
        return tap(joined, f"{BRIDGE}.out")

    def length(self, op: Any, frames: ir.Value) -> ir.Value:
        """Whole groups alone are quantized: up to avg_pooler - 1 frames at the end are dropped."""
        return op.Div(op.Shape(frames, start=1, end=2), ints(op, self.pool))


class Tokenizer(nn.Module):
    """The whole graph; the official class has the audio decoder in it too."""

    def __init__(self, config: AudioConfig, dtype: ir.DataType):
        super().__init__()
        self.audio_model = Encoder(config, dtype)
        self.audio_bridge_model = Bridge(config, dtype)

    def forward(self, op: Any, mel: ir.Value) -> ir.Value:
        return self.audio_bridge_model(op, self.audio_model(op, mel))


def audio_encoder(config: AudioConfig, profile: Profile) -> Subgraph:
    """Log-mel [1, num_mel_bins, frames] of one segment, valid frames alone -> codes [codes, codebooks].

    Segments run one by one: in the official padded batch the end of a shorter one depends on the padding.
    """
    codebooks = len(config.vq_config.codebook_sizes)
    inputs = [Port("mel", "float32", (1, config.num_mel_bins, "frames"))]
    outputs = [Port("codes", "int64", ("codes", codebooks))]
    root = Tokenizer(config, compute_dtype(profile))
    return author("audio_encoder", root, inputs, outputs, prefix=PREFIX, derived=_derived(config))


def _derived(config: AudioConfig) -> dict[str, Derived]:
    convolution = (config.bridge_dim, config.d_model, config.avg_pooler)
    derived = {
        key: Derived((key,), (convolution,), _on_stacked_frames)
        for key in (f"{BRIDGE}.gate_proj.weight", f"{BRIDGE}.up_proj.weight")
    }
    for index, size in enumerate(config.vq_config.codebook_sizes):
        codebook = f"{BRIDGE}.vq_list.{index}.codebook"
        shape = (size, config.bridge_dim)
        derived[f"{codebook}.squared_norm"] = Derived((f"{codebook}.embed",), (shape,), _squared_norms)
    return derived


def _on_stacked_frames(kernel: np.ndarray) -> np.ndarray:
    """A convolution's weight [out, d_model, pool] as a matrix on frames side by side, [out, pool * d_model]."""
    return np.ascontiguousarray(kernel.transpose(0, 2, 1)).reshape(len(kernel), -1)


def _squared_norms(embed: np.ndarray) -> np.ndarray:
    """|e|^2 of each codeword [size, width] -> [size], summed in float64."""
    return np.einsum("cw,cw->c", embed, embed, dtype=np.float64).astype(np.float32)
