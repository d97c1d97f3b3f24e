"""The U-Net of flow matching, all causal and channels last: x and mu side by side -> the flow's velocity."""

from collections.abc import Iterator
from typing import Any

import numpy as np
import onnx_ir as ir
from onnxscript import nn

from export.config import FlowMatchingConfig
from export.graph import Derived, contrib, ints, static_shape, tap
from export.layers import LayerNorm, Linear, gelu, mish

PREFIX = "audio_tokenizer.audio_flow_matching_decoder"
DECODER = f"{PREFIX}.conditional_decoder"
KERNEL = 3  # of every causal convolution
TAIL = KERNEL - 1  # frames of its input that a causal convolution carries
MLP_RATIO = 4  # of the MLPs and of the time embedding to the channels
TIME_SCALE = 1000.0
LONGEST_PERIOD = 10_000.0  # of the sinusoids that embed a time

Derivations = Iterator[tuple[str, Derived]]


class Context:
    """What all parts of the U-Net share in one run, and what it carries in and out, in the order in which they ask."""

    def __init__(self, step: ir.Value, visible: ir.Value, tails: tuple[ir.Value, ...], pasts: tuple[ir.Value, ...]):
        self.step, self.visible = step, visible
        self._tails, self._pasts = iter(tails), iter(zip(pasts[::2], pasts[1::2], strict=True))
        self.tails: list[ir.Value] = []
        self.presents: list[ir.Value] = []

    def extend(self, op: Any, x: ir.Value) -> ir.Value:
        """x [2, T, C] behind the frames that ended the run before: [2, TAIL + T, C]."""
        longer = op.Concat(next(self._tails), x, axis=1)
        self.tails.append(op.Slice(longer, ints(op, -TAIL), ints(op, np.iinfo(np.int64).max), ints(op, 1)))
        return longer

    def past(self) -> tuple[ir.Value, ir.Value]:
        return next(self._pasts)


class CausalConv1d(nn.Module):
    """Kernel 3 over a frame and the two before it: one matrix product of three frames side by side.

    The whole network keeps channels last, as attention wants them, so nothing in it transposes.
    """

    def __init__(self, n_in: int, n_out: int, dtype: ir.DataType):
        super().__init__()
        self.n_in, self.n_out, self.dtype = n_in, n_out, dtype
        self.unfolded_weight = nn.Parameter([n_out, KERNEL * n_in], dtype)
        self.bias = nn.Parameter([n_out], dtype)

    def forward(self, op: Any, x: ir.Value, context: Context) -> ir.Value:
        longer = context.extend(op, x)
        earlier = [op.Slice(longer, ints(op, lag), ints(op, lag - TAIL), ints(op, 1)) for lag in range(TAIL)]
        frames = op.Concat(*earlier, x, axis=-1)  # [2, T, KERNEL * n_in]
        return op.Add(contrib(op, "FusedMatMul", frames, self.unfolded_weight, transB=1, dtype=self.dtype), self.bias)

    def derived(self, path: str) -> Derivations:
        shape = (self.n_out, self.n_in, KERNEL)
        yield f"{path}.unfolded_weight", Derived((f"{path}.weight",), (shape,), unfold)


def unfold(weight: np.ndarray) -> np.ndarray:
    """Convolution weight [out, in, kernel] -> [out, kernel * in], the kernel's positions one after the other."""
    return weight.transpose(0, 2, 1).reshape(len(weight), -1)


class PointwiseConv1d(Linear):
    """A convolution of kernel 1: its stored weight [out, in, 1] has one axis more than a Linear's."""

    def derived(self, path: str) -> Derivations:
        yield f"{path}.weight", Derived((f"{path}.weight",), ((*static_shape(self.weight), 1),), lambda w: w[:, :, 0])


class CausalBlock(nn.Module):
    """mish(norm(conv(x))). Index 1 of the official sequence is a transpose, which channels last does without."""

    def __init__(self, n_in: int, n_out: int, dtype: ir.DataType):
        super().__init__()
        self.dtype = dtype
        self.block = nn.ModuleList([CausalConv1d(n_in, n_out, dtype), nn.Module(), LayerNorm(n_out, dtype=dtype)])

    def forward(self, op: Any, x: ir.Value, context: Context) -> ir.Value:
        return mish(op, self.block[2](op, self.block[0](op, x, context)), self.dtype)


class ResnetBlock(nn.Module):
    """block2(block1(x) + shift) + res_conv(x); `shifts` is what the time embedding adds at each Euler step.

    The times are known when the graph is made, so the embedding and its projection are a table [steps, channels].
    """

    def __init__(self, config: FlowMatchingConfig, n_in: int, dtype: ir.DataType):
        super().__init__()
        self.config, width = config, config.channels[0]
        self.shifts = nn.Parameter([config.diffusion_steps, width], dtype)
        self.block1 = CausalBlock(n_in, width, dtype)
        self.block2 = CausalBlock(width, width, dtype)
        self.res_conv = PointwiseConv1d(n_in, width, dtype=dtype)

    def forward(self, op: Any, x: ir.Value, context: Context) -> ir.Value:
        h = op.Add(self.block1(op, x, context), op.Gather(self.shifts, context.step, axis=0))
        return op.Add(self.block2(op, h, context), self.res_conv(op, x))

    def derived(self, path: str) -> Derivations:
        width, times = self.config.channels[0], time_steps(self.config)[:-1]
        embedded, inner = self.config.in_channels + self.config.prenet_out_dim, MLP_RATIO * width
        linears = (f"{DECODER}.time_mlp.linear_1", f"{DECODER}.time_mlp.linear_2", f"{path}.mlp.1")
        keys = [f"{linear}.{part}" for linear in linears for part in ("weight", "bias")]
        shapes = ((inner, embedded), (inner,), (inner, inner), (inner,), (width, inner), (width,))

        def make(w1: np.ndarray, b1: np.ndarray, w2: np.ndarray, b2: np.ndarray, w: np.ndarray, b: np.ndarray):
            return step_shifts(time_embedding(times, w1, b1, w2, b2), w, b)

        yield f"{path}.shifts", Derived(tuple(keys), shapes, make)


def time_steps(config: FlowMatchingConfig) -> np.ndarray:
    """Times at which the flow is evaluated, and 1: float32 [steps + 1]. Cosine: t_k = 1 - cos(pi / 2 * k / steps)."""
    even = np.linspace(0, 1, config.diffusion_steps + 1, dtype=np.float32)
    if config.cfm_params.t_scheduler == "cosine":
        return np.float32(1) - np.cos(even * np.float32(0.5) * np.float32(np.pi))
    return even


def time_embedding(times: np.ndarray, w1: np.ndarray, b1: np.ndarray, w2: np.ndarray, b2: np.ndarray) -> np.ndarray:
    """linear_2(silu(linear_1(sinusoid(1000 t)))): times [n] -> [n, 4 * channels], in fp32 as it is trained."""
    half = w1.shape[1] // 2
    frequencies = np.exp(np.arange(half, dtype=np.float32) * np.float32(-np.log(LONGEST_PERIOD) / (half - 1)))
    angles = np.outer(np.float32(TIME_SCALE) * times.astype(np.float32), frequencies)
    h = np.concatenate([np.sin(angles), np.cos(angles)], axis=1) @ w1.T + b1
    return (h / (1 + np.exp(-h))) @ w2.T + b2


def step_shifts(embedding: np.ndarray, weight: np.ndarray, bias: np.ndarray) -> np.ndarray:
    """A resnet block's Linear(Mish(embedding)): [steps, 4 * channels] -> [steps, channels]."""
    return (embedding * np.tanh(np.logaddexp(0, embedding))) @ weight.T + bias


class Attention(nn.Module):
    """Attention whose heads have a width of their own; queries, keys and values have no bias."""

    def __init__(self, config: FlowMatchingConfig, dtype: ir.DataType):
        super().__init__()
        width, inner = config.channels[0], config.num_heads * config.attention_head_dim
        self.heads, self.dtype = config.num_heads, dtype
        self.to_q = Linear(width, inner, bias=False, dtype=dtype)
        self.to_k = Linear(width, inner, bias=False, dtype=dtype)
        self.to_v = Linear(width, inner, bias=False, dtype=dtype)
        self.to_out = nn.ModuleList([Linear(inner, width, dtype=dtype)])

    def forward(self, op: Any, x: ir.Value, context: Context) -> ir.Value:
        y, key, value = contrib(
            op, "MultiHeadAttention", self.to_q(op, x), self.to_k(op, x), self.to_v(op, x),
            None, None, context.visible, *context.past(), num_heads=self.heads, _outputs=3, dtype=self.dtype,
        )  # fmt: skip
        context.presents += [key, value]
        return self.to_out[0](op, y)


class GeluProjection(nn.Module):
    def __init__(self, n_in: int, n_out: int, dtype: ir.DataType):
        super().__init__()
        self.proj = Linear(n_in, n_out, dtype=dtype)

    def forward(self, op: Any, x: ir.Value) -> ir.Value:
        return gelu(op, self.proj(op, x))


class FeedForward(nn.Module):
    """Index 1 of the official sequence is dropout."""

    def __init__(self, width: int, dtype: ir.DataType):
        super().__init__()
        inner = MLP_RATIO * width
        self.net = nn.ModuleList([GeluProjection(width, inner, dtype), nn.Module(), Linear(inner, width, dtype=dtype)])

    def forward(self, op: Any, x: ir.Value) -> ir.Value:
        return self.net[2](op, self.net[0](op, x))


class TransformerBlock(nn.Module):
    def __init__(self, config: FlowMatchingConfig, dtype: ir.DataType):
        super().__init__()
        width = config.channels[0]
        self.norm1 = LayerNorm(width, dtype=dtype)
        self.attn1 = Attention(config, dtype)
        self.norm3 = LayerNorm(width, dtype=dtype)
        self.ff = FeedForward(width, dtype)

    def forward(self, op: Any, x: ir.Value, context: Context) -> ir.Value:
        x = op.Add(x, self.attn1(op, self.norm1(op, x), context))
        return op.Add(x, self.ff(op, self.norm3(op, x)))


class Level(nn.Module):
    """Children 0, a resnet block; 1, its transformer blocks; and 2 where the network turns, a convolution."""

    def __init__(self, config: FlowMatchingConfig, n_in: int, dtype: ir.DataType, turns: bool = False):
        super().__init__()
        width = config.channels[0]
        resnet = ResnetBlock(config, n_in, dtype)
        blocks = [TransformerBlock(config, dtype) for _ in range(config.n_blocks)]
        conv = CausalConv1d(width, width, dtype) if turns else None
        self.parts = resnet, blocks, conv
        for index, module in enumerate((resnet, nn.ModuleList([*blocks]), *([conv] if conv else []))):
            setattr(self, str(index), module)

    def forward(self, op: Any, x: ir.Value, context: Context) -> tuple[ir.Value, ir.Value]:
        """What the transformer blocks give, from where the skip connection branches off, and that convolved."""
        resnet, blocks, conv = self.parts
        path = f"{DECODER}.{self.name}"
        x = tap(resnet(op, x, context), f"{path}.0.out")
        for index, block in enumerate(blocks):
            x = tap(block(op, x, context), f"{path}.1.{index}.out")
        return x, x if conv is None else conv(op, x, context)


class ConditionalDecoder(nn.Module):
    """One level, so with nothing to down- or up-sample: [2, T, mel bins + mu] -> velocity [2, T, mel bins]."""

    def __init__(self, config: FlowMatchingConfig, dtype: ir.DataType):
        super().__init__()
        width, mel_bins = config.channels[0], config.in_channels
        self.down_blocks = nn.ModuleList([Level(config, mel_bins + config.prenet_out_dim, dtype, turns=True)])
        self.mid_blocks = nn.ModuleList([Level(config, width, dtype) for _ in range(config.num_mid_blocks)])
        self.up_blocks = nn.ModuleList([Level(config, 2 * width, dtype, turns=True)])
        self.final_block = CausalBlock(width, width, dtype)
        self.final_proj = PointwiseConv1d(width, mel_bins, dtype=dtype)

    def forward(self, op: Any, x: ir.Value, context: Context) -> ir.Value:
        skip, x = self.down_blocks[0](op, x, context)
        for level in self.mid_blocks:
            _, x = level(op, x, context)
        _, x = self.up_blocks[0](op, op.Concat(x, skip, axis=-1), context)
        x = tap(self.final_block(op, x, context), f"{DECODER}.final_block.out")
        return tap(self.final_proj(op, x), f"{DECODER}.out")


def tail_widths(config: FlowMatchingConfig) -> list[int]:
    """Channels that enter each causal convolution, in the order in which the network runs them."""
    width = config.channels[0]
    down = [config.in_channels + config.prenet_out_dim, width, width]
    up = [2 * width, width, width]
    return [*down, *[width] * (2 * config.num_mid_blocks), *up, width]


def derivations(root: nn.Module) -> dict[str, Derived]:
    """The parameters below `root`, itself at PREFIX, that are not stored as the network takes them."""
    derived: dict[str, Derived] = {}
    for path, module in root.named_modules(PREFIX):
        if isinstance(module, CausalConv1d | PointwiseConv1d | ResnetBlock):
            derived.update(module.derived(path))
    return derived
