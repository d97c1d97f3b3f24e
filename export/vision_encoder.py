"""Patches of a picture to language-model rows: Qwen2-VL's vision tower, and the projector behind it."""

from typing import Any

import numpy as np
import onnx_ir as ir
from onnxscript import nn

from export.config import VisionConfig
from export.graph import FLOAT, Derived, Subgraph, author, cast, compute_dtype, constant, contrib, ints, port_dtype, tap
from export.layers import Linear, NarrowingNorm, Stage, gelu, quick_gelu, residual, split_last
from runtime.bundle import Port, Profile

ENCODER, PROJECTOR = "model.visual_model", "model.visual_bridge_model"
EPS = 1e-6  # of every norm here; the layer_norm_eps of config.json is a leftover
THETA = 10000.0


class Rotary:
    """Two-dimensional rotary positions: of each head's angles the first half count rows, the second half columns."""

    def __init__(self, op: Any, config: VisionConfig, positions: ir.Value, dtype: ir.DataType):
        angles = tap(self.angles(op, config, positions), f"{ENCODER}.rotary_angles")
        self.cos, self.sin = cast(op, op.Cos(angles), dtype), cast(op, op.Sin(angles), dtype)
        self.first, self.dtype = ints(op, 0), dtype

    @staticmethod
    def angles(op: Any, config: VisionConfig, positions: ir.Value) -> ir.Value:
        """Rows and columns [n, 2] -> radians [n, head_dim / 2], computed: a table would limit the picture's size."""
        frequency = constant(op, frequencies(config), "rotary.frequencies")
        angles = op.Mul(op.Unsqueeze(cast(op, positions, FLOAT), ints(op, 2)), frequency)  # [n, 2, head_dim / 4]
        return op.Reshape(angles, ints(op, -1, config.head_dim // 2))

    def __call__(self, op: Any, x: ir.Value) -> ir.Value:
        """Turn q or k [1, n, heads * head_dim]; the partner of a value is half a head away."""
        return contrib(op, "RotaryEmbedding", x, self.first, self.cos, self.sin, interleaved=0, dtype=self.dtype)


def frequencies(config: VisionConfig) -> np.ndarray:
    """Radians a patch, [head_dim / 4]: theta^(-2i / (head_dim / 2))."""
    width = config.head_dim // 2
    exponent = np.arange(0, width, 2, dtype=np.float32) / np.float32(width)
    return np.float32(1) / np.float32(THETA) ** exponent  # fp32, as the official table is


class Attention(nn.Module):
    """Among all patches of one run: one picture, or one frame of a video."""

    def __init__(self, config: VisionConfig, dtype: ir.DataType):
        super().__init__()
        self.heads, self.width, self.dtype = config.num_heads, config.embed_dim, dtype
        self.qkv = Linear(self.width, 3 * self.width, dtype=dtype)
        self.proj = Linear(self.width, self.width, dtype=dtype)

    def forward(self, op: Any, x: ir.Value, rotary: Rotary) -> ir.Value:
        q, k, v = split_last(op, self.qkv(op, x), self.width, self.width, self.width)
        q, k = rotary(op, q), rotary(op, k)
        return self.proj(op, contrib(op, "MultiHeadAttention", q, k, v, num_heads=self.heads, dtype=self.dtype))


class MLP(nn.Module):
    def __init__(self, config: VisionConfig, dtype: ir.DataType):
        super().__init__()
        self.dtype = dtype
        inner = int(config.embed_dim * config.mlp_ratio)
        self.fc1 = Linear(config.embed_dim, inner, dtype=dtype)
        self.fc2 = Linear(inner, config.embed_dim, dtype=dtype)

    def forward(self, op: Any, x: ir.Value) -> ir.Value:
        return self.fc2(op, quick_gelu(op, self.fc1(op, x), self.dtype))


class Block(nn.Module):
    """x + attention(norm(x)), then x + MLP(norm(x)); sums and norms are fp32 in every profile.

    The tower ends without a norm, so its residual stream may grow past what fp16 holds.
    """

    def __init__(self, config: VisionConfig, dtype: ir.DataType):
        super().__init__()
        self.norm1 = NarrowingNorm(config.embed_dim, EPS, dtype)
        self.attn = Attention(config, dtype)
        self.norm2 = NarrowingNorm(config.embed_dim, EPS, dtype)
        self.mlp = MLP(config, dtype)

    def forward(self, op: Any, x: ir.Value, rotary: Rotary) -> ir.Value:
        x = residual(op, x, self.attn(op, self.norm1(op, x), rotary))
        return residual(op, x, self.mlp(op, self.norm2(op, x)))


class PatchEmbed(nn.Module):
    """The official convolution, whose stride is its kernel, as a matrix on flat patches (channel, time, y, x)."""

    def __init__(self, config: VisionConfig, dtype: ir.DataType):
        super().__init__()
        self.proj = Linear(patch_size(config), config.embed_dim, bias=False, dtype=dtype)

    def forward(self, op: Any, patches: ir.Value) -> ir.Value:
        return self.proj(op, patches)


def patch_size(config: VisionConfig) -> int:
    """Values in one patch."""
    return config.in_channels * config.temporal_patch_size * config.patch_size**2


class Encoder(nn.Module):
    """Patches [n, patch_size] and their rows and columns [n, 2] -> features [n, embed_dim] in fp32."""

    def __init__(self, config: VisionConfig, dtype: ir.DataType):
        super().__init__()
        self.config, self.dtype = config, dtype
        self.patch_embed = PatchEmbed(config, dtype)
        self.blocks = nn.ModuleList([Block(config, dtype) for _ in range(config.depth)])

    def forward(self, op: Any, patches: ir.Value, positions: ir.Value) -> ir.Value:
        rotary = Rotary(op, self.config, positions, self.dtype)
        x = cast(op, self.patch_embed(op, cast(op, patches, self.dtype)), FLOAT)
        x = op.Unsqueeze(tap(x, f"{ENCODER}.patch_embed.out"), ints(op, 0))
        for index, block in enumerate(self.blocks):
            x = tap(block(op, x, rotary), f"{ENCODER}.blocks.{index}.out")
        return op.Squeeze(x, ints(op, 0))


class Projector(nn.Module):
    """Each block of neighbouring patches becomes one row: normalised one by one, side by side, through an MLP."""

    def __init__(self, config: VisionConfig, dtype: ir.DataType):
        super().__init__()
        self.width = config.embed_dim * config.spatial_merge_size**2
        self.ln_q = NarrowingNorm(config.embed_dim, EPS, dtype)
        self.mlp = nn.Sequential(
            Linear(self.width, self.width, dtype=dtype),
            Stage(gelu),
            Linear(self.width, config.hidden_size, dtype=dtype),
        )

    def forward(self, op: Any, features: ir.Value) -> ir.Value:
        return self.mlp(op, op.Reshape(self.ln_q(op, features), ints(op, -1, self.width)))


def vision_encoder(config: VisionConfig, profile: Profile) -> Subgraph:
    """Patches [n, values of one patch] and positions [n, 2] (row, column) of one picture -> features [n, embed_dim].

    Attention never crosses pictures, so each picture or video frame is a run of its own.
    """
    inputs = [Port("patches", "float32", ("n", patch_size(config))), Port("positions", "int64", ("n", 2))]
    outputs = [Port("features", "float32", ("n", config.embed_dim))]
    key = f"{ENCODER}.patch_embed.proj.weight"
    size = (config.patch_size, config.patch_size)
    shape = (config.embed_dim, config.in_channels, config.temporal_patch_size, *size)
    flat = Derived((key,), (shape,), lambda kernel: kernel.reshape(len(kernel), -1))
    root = Encoder(config, compute_dtype(profile))
    return author("vision_encoder", root, inputs, outputs, prefix=ENCODER, derived={key: flat})


def vision_projector(config: VisionConfig, profile: Profile) -> Subgraph:
    """Features [n, embed_dim], merge block by merge block -> rows [n / merge^2, hidden_size]."""
    dtype = compute_dtype(profile)
    inputs = [Port("features", "float32", ("n", config.embed_dim))]
    outputs = [Port("rows", port_dtype(dtype), ("rows", config.hidden_size))]
    return author("vision_projector", Projector(config, dtype), inputs, outputs, prefix=PROJECTOR)
