"""The text decoder and what stands on both sides of it: token and code embeddings, and the language-model head."""

from typing import Any

import numpy as np
import onnx_ir as ir
from onnxscript import nn

from export.config import DecoderConfig
from export.graph import FLOAT, Subgraph, author, cast, compute_dtype, constant, contrib, ints, port_dtype
from export.layers import Embedding, Linear, RMSNorm, silu, split_last
from export.rotary import base_frequencies
from runtime.bundle import CacheLayout, Port, Profile
from runtime.errors import CheckpointError

HEAD_STEP = 16  # GroupQueryAttention with rotary positions


class Attention(nn.Module):
    """Grouped-query attention with rotary positions inside the operator and one shared past/present buffer."""

    def __init__(self, config: DecoderConfig, dtype: ir.DataType, window: int):
        super().__init__()
        self.config, self.dtype = config, dtype
        self.window = {"local_window_size": window} if window else {}
        width = config.num_attention_heads * config.head_dim
        self.W_pack = Linear(config.hidden_size, config.qkv_size, bias=config.attention_qkv_bias, dtype=dtype)
        if config.head_norms:
            self.q_norm = HeadNorm(config.num_attention_heads, config, dtype)
            self.k_norm = HeadNorm(config.num_key_value_heads, config, dtype)
        self.o_proj = Linear(width, config.hidden_size, bias=False, dtype=dtype)

    def forward(self, op: Any, x: ir.Value, past: tuple[ir.Value, ir.Value], at: "Positions") -> Any:
        y, key, value = contrib(
            op, "GroupQueryAttention", *self.projected(op, x), *past, at.seqlens_k, at.total, at.cos, at.sin,
            num_heads=self.config.num_attention_heads, kv_num_heads=self.config.num_key_value_heads,
            do_rotary=1, rotary_interleaved=int(self.config.rope_interleaved), _outputs=3, dtype=self.dtype,
            **self.window,
        )  # fmt: skip
        return self.o_proj(op, y), key, value

    def projected(self, op: Any, x: ir.Value) -> tuple[ir.Value | None, ...]:
        """Queries, keys and values [1, S, heads * head_dim]; where nothing is done to them, packed into the first."""
        packed = self.W_pack(op, x)
        if not self.config.head_norms:
            return packed, None, None
        keys = self.config.num_key_value_heads * self.config.head_dim
        q, k, v = split_last(op, packed, self.config.qkv_size - 2 * keys, keys, keys)
        return self.q_norm(op, q), self.k_norm(op, k), v


class HeadNorm(RMSNorm):
    """RMSNorm of each head by itself, all with the same weight: [1, S, heads * head_dim] -> the same."""

    def __init__(self, heads: int, config: DecoderConfig, dtype: ir.DataType):
        super().__init__(config.head_dim, config.rms_norm_eps, dtype)
        self.heads, self.width = heads, config.head_dim

    def forward(self, op: Any, x: ir.Value) -> ir.Value:
        y = super().forward(op, op.Reshape(x, ints(op, 1, -1, self.heads, self.width)))
        return op.Reshape(y, ints(op, 1, -1, self.heads * self.width))


class MLP(nn.Module):
    """SwiGLU: down(silu(gate(x)) * up(x))."""

    def __init__(self, config: DecoderConfig, dtype: ir.DataType):
        super().__init__()
        self.gate_proj = Linear(config.hidden_size, config.intermediate_size, bias=False, dtype=dtype)
        self.up_proj = Linear(config.hidden_size, config.intermediate_size, bias=False, dtype=dtype)
        self.down_proj = Linear(config.intermediate_size, config.hidden_size, bias=False, dtype=dtype)

    def forward(self, op: Any, x: ir.Value) -> ir.Value:
        return self.down_proj(op, op.Mul(silu(op, self.gate_proj(op, x)), self.up_proj(op, x)))


class SkipNorm(RMSNorm):
    """RMSNorm of x + skip, and that sum, fp32 in fp16 graphs too: Qwen2.5 has residuals in the thousands."""

    def forward(self, op: Any, x: ir.Value, skip: ir.Value | None = None) -> Any:
        if self.dtype != FLOAT:
            total = cast(op, x, FLOAT) if skip is None else op.Add(skip, cast(op, x, FLOAT))
            total.type = ir.TensorType(FLOAT)
            y = op.SimplifiedLayerNormalization(
                total, cast(op, self.weight, FLOAT), axis=-1, epsilon=self.eps, stash_type=1
            )
            return op.Cast(y, to=self.dtype.value), total
        if skip is None:
            return super().forward(op, x), x
        y, _, _, total = contrib(
            op, "SkipSimplifiedLayerNormalization", x, skip, self.weight, epsilon=self.eps, _outputs=4, dtype=FLOAT
        )
        return y, total


class Layer(nn.Module):
    def __init__(self, config: DecoderConfig, dtype: ir.DataType, window: int):
        super().__init__()
        self.input_layernorm = SkipNorm(config.hidden_size, config.rms_norm_eps, dtype)
        self.self_attn = Attention(config, dtype, window)
        self.post_attention_layernorm = SkipNorm(config.hidden_size, config.rms_norm_eps, dtype)
        self.mlp = MLP(config, dtype)

    def forward(self, op: Any, x: ir.Value, skip: ir.Value | None, past: tuple[ir.Value, ir.Value], at: "Positions"):
        h, skip = self.input_layernorm(op, x, skip)
        h, key, value = self.self_attn(op, h, past, at)
        h, skip = self.post_attention_layernorm(op, h, skip)
        return self.mlp(op, h), skip, key, value


class Positions:
    """What every layer's attention asks: how long the cache is, and the rotary tables."""

    def __init__(self, op: Any, config: DecoderConfig, seqlens_k: ir.Value, total: ir.Value, dtype: ir.DataType):
        cos, sin = rotary_tables(config)
        self.seqlens_k, self.total = seqlens_k, total
        self.cos = constant(op, cos.astype(dtype.numpy()), "rotary.cos")
        self.sin = constant(op, sin.astype(dtype.numpy()), "rotary.sin")


def rotary_tables(config: DecoderConfig) -> tuple[np.ndarray, np.ndarray]:
    """cos, sin [max_position_embeddings, head_dim / 2]; row p is the angle of position `first_position` + p.

    GroupQueryAttention counts from 0; a model that counts from 1 gets a table that begins one position later.
    """
    stated = np.array(config.rope_frequencies, np.float32)
    frequencies = stated if stated.size else base_frequencies(config.rope_theta, config.head_dim)
    positions = np.arange(config.max_position_embeddings, dtype=np.float32) + config.first_position
    angle, length = np.outer(positions, frequencies), np.float32(config.rope_length)
    return np.cos(angle) * length, np.sin(angle) * length


class Model(nn.Module):
    def __init__(self, config: DecoderConfig, dtype: ir.DataType):
        super().__init__()
        self.config, self.dtype = config, dtype
        windows = config.windows or (0,) * config.num_hidden_layers
        self.layers = nn.ModuleList([Layer(config, dtype, window) for window in windows])
        self.norm = SkipNorm(config.hidden_size, config.rms_norm_eps, dtype)

    def forward(self, op: Any, x: ir.Value, seqlens_k: ir.Value, total: ir.Value, *pasts: ir.Value) -> list[ir.Value]:
        at = Positions(op, self.config, seqlens_k, total, self.dtype)
        skip, present = None, []
        for index, layer in enumerate(self.layers):
            x, skip, key, value = layer(op, x, skip, (pasts[2 * index], pasts[2 * index + 1]), at)
            present += [key, value]
        hidden, _ = self.norm(op, x, skip)
        return [hidden, *present]


def decoder(config: DecoderConfig, profile: Profile) -> Subgraph:
    """embeddings [1, S, hidden] + cache -> normalised hidden states [1, S, hidden] + cache.

    `total_sequence_length` is the number of positions after this run, `seqlens_k` the same less one. Rewinding is
    passing a smaller number. Past and present of a layer may be the same buffer. CheckpointError for a head_dim that
    the attention operator has no kernel for.
    """
    if config.head_dim % HEAD_STEP:
        raise CheckpointError(f"head_dim is {config.head_dim}, the attention operator takes multiples of {HEAD_STEP}")
    dtype = compute_dtype(profile)
    kind = port_dtype(dtype)
    cache = (1, config.num_key_value_heads, "cache", config.head_dim)
    names = [f"{i}.{side}" for i in range(config.num_hidden_layers) for side in ("key", "value")]
    inputs = [
        Port("inputs_embeds", kind, (1, "sequence", config.hidden_size)),
        Port("seqlens_k", "int32", (1,)),
        Port("total_sequence_length", "int32", ()),
        *(Port(f"past.{name}", kind, cache) for name in names),
    ]
    outputs = [
        Port("hidden", kind, (1, "sequence", config.hidden_size)),
        *(Port(f"present.{name}", kind, cache) for name in names),
    ]
    return author("decoder", Model(config, dtype), inputs, outputs, prefix="model")


def cache_layout(config: DecoderConfig, profile: Profile) -> CacheLayout:
    return CacheLayout(
        layers=config.num_hidden_layers,
        kv_heads=config.num_key_value_heads,
        head_dim=config.head_dim,
        dtype=port_dtype(compute_dtype(profile)),
        max_positions=config.max_position_embeddings,
    )


def embed_tokens(config: DecoderConfig, profile: Profile) -> Subgraph:
    """ids [n] -> rows [n, hidden]."""
    dtype = compute_dtype(profile)
    inputs = [Port("ids", "int64", ("n",))]
    outputs = [Port("rows", port_dtype(dtype), ("n", config.hidden_size))]
    table = Embedding(config.vocab_size, config.hidden_size, dtype)
    return author("embed_tokens", table, inputs, outputs, prefix="model.embed_tokens")


class EmbedAudio(nn.Module):
    """The row of one audio position: the sum of its codes' embeddings, one table a codebook."""

    def __init__(self, codebook_sizes: tuple[int, ...], width: int, dtype: ir.DataType):
        super().__init__()
        self.audio_embed_layers = nn.ModuleList([Embedding(size + 1, width, dtype) for size in codebook_sizes])

    def forward(self, op: Any, codes: ir.Value) -> ir.Value:
        rows = [
            table(op, op.Gather(codes, op.Constant(value_int=book), axis=1))
            for book, table in enumerate(self.audio_embed_layers)
        ]
        return op.Sum(*rows)


def embed_audio(config: DecoderConfig, codebook_sizes: tuple[int, ...], profile: Profile) -> Subgraph:
    """codes [n, codebooks] -> rows [n, hidden]."""
    dtype = compute_dtype(profile)
    inputs = [Port("codes", "int64", ("n", len(codebook_sizes)))]
    outputs = [Port("rows", port_dtype(dtype), ("n", config.hidden_size))]
    return author("embed_audio", EmbedAudio(codebook_sizes, config.hidden_size, dtype), inputs, outputs, prefix="model")


def lm_head(config: DecoderConfig, profile: Profile) -> Subgraph:
    """hidden states [n, hidden] -> logits [n, vocab] in fp32; the runtime asks for the last row alone."""
    dtype = compute_dtype(profile)
    inputs = [Port("hidden", port_dtype(dtype), ("n", config.hidden_size))]
    outputs = [Port("logits", "float32", ("n", config.vocab_size))]
    return author("lm_head", Head(config, dtype), inputs, outputs, prefix="lm_head")


class Head(Linear):
    def __init__(self, config: DecoderConfig, dtype: ir.DataType):
        super().__init__(config.hidden_size, config.vocab_size, bias=False, dtype=dtype)

    def forward(self, op: Any, x: ir.Value) -> ir.Value:
        return cast(op, super().forward(op, x), FLOAT)
