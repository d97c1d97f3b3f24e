"""The text decoder and the depth transformer that chooses the codes of one audio frame.

Grouped-query attention (Ainslie et al. 2023, arXiv:2305.13245), rotary positions (Su et al. 2021, arXiv:2104.09864),
the head after RQ-Transformer (Lee et al. 2022, arXiv:2203.01941) with weights of its own for each depth. Attribute
names are the keys of the official state dict.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from export.config import DecoderConfig
from export.nano.audio_tokenizer import RMSNorm

_HEAD_DIM = 128  # of the depth transformer, hard-wired in the official code
Cache = list[tuple[Tensor, Tensor]]  # one (rotated keys, values) a layer, each [batch, kv heads, length, head_dim]


class DecoderAttention(nn.Module):
    """Grouped-query attention with one packed projection: rows [q; k; v]."""

    def __init__(self, config: DecoderConfig) -> None:
        super().__init__()
        self.heads, self.kv_heads = config.num_attention_heads, config.num_key_value_heads
        self.head_dim = config.head_dim
        self.W_pack = nn.Linear(config.hidden_size, config.qkv_size, bias=config.attention_qkv_bias)
        self.o_proj = nn.Linear(self.heads * self.head_dim, config.hidden_size, bias=False)

    def forward(
        self, x: Tensor, cos: Tensor, sin: Tensor, past: tuple[Tensor, Tensor] | None, bias: Tensor | None
    ) -> tuple[Tensor, tuple[Tensor, Tensor]]:
        batch, length, _ = x.shape
        qkv = self.W_pack(x).view(batch, length, -1, self.head_dim).transpose(1, 2)
        q, k, v = qkv.split([self.heads, self.kv_heads, self.kv_heads], 1)
        q, k = ((y * cos + _half_turned(y) * sin).to(v.dtype) for y in (q, k))
        if past is not None:
            k, v = torch.cat([past[0], k], 2), torch.cat([past[1], v], 2)
        group = self.heads // self.kv_heads
        keys, values = k.repeat_interleave(group, 1), v.repeat_interleave(group, 1)
        if bias is not None:  # plain products: in bfloat16 a CPU is faster with them than with the fused attention
            out = (q @ keys.transpose(-1, -2) * self.head_dim**-0.5 + bias).softmax(-1) @ values
        else:
            # With a past, queries stand at the end of the keys.
            seen = None
            if past is not None and length > 1:
                seen = torch.ones(length, k.shape[2], dtype=torch.bool).tril(k.shape[2] - length)
            alone = past is None and length > 1
            out = F.scaled_dot_product_attention(q, keys, values, attn_mask=seen, is_causal=alone)
        return self.o_proj(out.transpose(1, 2).reshape(batch, length, -1)), (k, v)


def _half_turned(x: Tensor) -> Tensor:
    left, right = x.chunk(2, -1)
    return torch.cat([-right, left], -1)


class DecoderMLP(nn.Module):
    """SwiGLU."""

    def __init__(self, config: DecoderConfig) -> None:
        super().__init__()
        self.gate_proj = nn.Linear(config.hidden_size, config.intermediate_size, bias=False)
        self.down_proj = nn.Linear(config.intermediate_size, config.hidden_size, bias=False)
        self.up_proj = nn.Linear(config.hidden_size, config.intermediate_size, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.down_proj(F.silu(self.gate_proj(x)) * self.up_proj(x))


class DecoderLayer(nn.Module):
    """Pre-norm attention and MLP."""

    def __init__(self, config: DecoderConfig) -> None:
        super().__init__()
        self.self_attn = DecoderAttention(config)
        self.mlp = DecoderMLP(config)
        self.input_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.post_attention_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)

    def forward(
        self,
        x: Tensor,
        cos: Tensor,
        sin: Tensor,
        past: tuple[Tensor, Tensor] | None,
        bias: Tensor | None,
    ) -> tuple[Tensor, tuple[Tensor, Tensor]]:
        out, kept = self.self_attn(self.input_layernorm(x), cos, sin, past, bias)
        x = x + out
        return x + self.mlp(self.post_attention_layernorm(x)), kept


class AttentionWeights(nn.Module):
    """Multi-head attention in torch's packed layout (in_proj_weight rows [q; k; v]), causal over depth."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.heads = dim // _HEAD_DIM
        self.in_proj_weight = nn.Parameter(torch.randn(3 * dim, dim) * 0.02)
        self.in_proj_bias = nn.Parameter(torch.zeros(3 * dim))
        self.out_proj = nn.Linear(dim, dim)

    def forward(self, x: Tensor) -> Tensor:
        batch, depth, dim = x.shape
        packed = F.linear(x, self.in_proj_weight, self.in_proj_bias).view(batch, depth, 3, self.heads, -1)
        q, k, v = (y.transpose(1, 2) for y in packed.unbind(2))
        out = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        return self.out_proj(out.transpose(1, 2).reshape(batch, depth, dim))


class DepthLayer(nn.Module):
    """One layer of the depth transformer; its feed-forward has weights of its own at each depth.

    The residual is the normalised sum, and the biases of linear1 and linear2 are stored but unused, as officially.
    """

    def __init__(self, dim: int, depths: int) -> None:
        super().__init__()
        self.dim = dim
        self.self_attention = AttentionWeights(dim)
        self.layernorm1 = RMSNorm(dim)
        self.layernorm2 = RMSNorm(dim)
        self.linear1 = nn.Linear(dim * depths, 2 * dim)
        self.linear2 = nn.Linear(2 * dim * depths, dim)

    def forward(self, x: Tensor) -> Tensor:
        """[n, depths so far, dim]."""
        depths = x.shape[1]
        y = self.layernorm2(self.self_attention(self.layernorm1(x)) + x)
        up = self.linear1.weight.view(2 * self.dim, -1, self.dim)[:, :depths]
        down = self.linear2.weight.view(self.dim, -1, 2 * self.dim)[:, :depths]
        inner = F.gelu(torch.einsum("nld,tld->nlt", y, up))
        return y + torch.einsum("nlt,dlt->nld", inner, down)


class AudioHead(nn.Module):
    """Hidden state of one position -> logits of the codes of one frame, level after level."""

    def __init__(self, dim: int, layers: int, codebook_sizes: tuple[int, ...]) -> None:
        super().__init__()
        self.transformer_layers = nn.ModuleList(DepthLayer(dim, len(codebook_sizes)) for _ in range(layers))
        self.headnorm = RMSNorm(dim)
        self.heads = nn.ModuleList(nn.Linear(dim, size + 1) for size in codebook_sizes)

    def forward(self, inputs: Tensor) -> Tensor:
        """Depth inputs [n, depths, dim] -> normalised outputs of the same shape."""
        for layer in self.transformer_layers:
            inputs = layer(inputs)
        return self.headnorm(inputs)

    def logits(self, outputs: Tensor) -> list[Tensor]:
        """One [n, size + 1] a depth; the last entry ends the audio on level 0 and means nothing on the others."""
        return [head(outputs[:, i]) for i, head in enumerate(self.heads) if i < outputs.shape[1]]


def rotary(positions: Tensor, head_dim: int, theta: float) -> tuple[Tensor, Tensor]:
    """cos and sin [..., 1, T, head_dim] in float32 of positions [..., T], halves duplicated."""
    inverse = theta ** (-torch.arange(0, head_dim, 2, device=positions.device) / head_dim)
    angles = positions[..., None, :, None].float() * inverse
    angles = torch.cat([angles, angles], -1)
    return angles.cos(), angles.sin()
