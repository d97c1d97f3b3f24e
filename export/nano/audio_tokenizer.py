"""Waveform features to codes and back to hidden states: encoder, bridge with its residual codebooks, audio decoder.

The maths is that of Baichuan-Omni-1.5's audio tokenizer (a Whisper encoder, a gated pooling bridge, residual vector
quantization after Zeghidour et al. 2021, arXiv:2107.03312); attribute names are the keys of the official state dict.
"""

import math
from typing import cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from export.config import AudioConfig
from export.nano.config import ModelConfig


class RMSNorm(nn.Module):
    """x / rms(x) * weight."""

    def __init__(self, dim: int, eps: float = 1e-6) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(dim))
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        return self.weight * (x * torch.rsqrt(x.float().pow(2).mean(-1, keepdim=True) + self.eps)).to(x.dtype)


def sinusoids(length: int, dim: int) -> Tensor:
    """Whisper's position table [length, dim]: sines in the first half of the columns, cosines in the second."""
    inverse = torch.exp(-math.log(10000) / (dim // 2 - 1) * torch.arange(dim // 2))
    angles = torch.arange(length)[:, None] * inverse[None]
    return torch.cat([angles.sin(), angles.cos()], 1)


def length_mask(lengths: Tensor, size: int) -> Tensor:
    """[batch, size], true in front of each item's length."""
    return torch.arange(size, device=lengths.device)[None] < lengths[:, None]


class Attention(nn.Module):
    """Multi-head self-attention; keys have no bias."""

    def __init__(self, dim: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.k_proj = nn.Linear(dim, dim, bias=False)
        self.v_proj = nn.Linear(dim, dim)
        self.q_proj = nn.Linear(dim, dim)
        self.out_proj = nn.Linear(dim, dim)

    def forward(self, x: Tensor, mask: Tensor | None, causal: bool) -> Tensor:
        batch, length, dim = x.shape
        q, k, v = (
            p(x).view(batch, length, self.heads, -1).transpose(1, 2) for p in (self.q_proj, self.k_proj, self.v_proj)
        )
        out = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, is_causal=causal)
        return self.out_proj(out.transpose(1, 2).reshape(batch, length, dim))


class TransformerLayer(nn.Module):
    """Pre-norm layer of the encoder and audio decoder (LayerNorm) and of the flow-matching prenet (RMSNorm)."""

    def __init__(self, dim: int, heads: int, ffn: int, causal: bool, norm: type[nn.Module] = nn.LayerNorm) -> None:
        super().__init__()
        self.causal = causal
        self.self_attn = Attention(dim, heads)
        self.self_attn_layer_norm = norm(dim)
        self.fc1 = nn.Linear(dim, ffn)
        self.fc2 = nn.Linear(ffn, dim)
        self.final_layer_norm = norm(dim)

    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        """[batch, T, dim]; `mask` [batch, 1, 1, T] of visible keys, unused by causal layers."""
        x = x + self.self_attn(self.self_attn_layer_norm(x), mask, self.causal)
        return x + self.fc2(F.gelu(self.fc1(self.final_layer_norm(x))))


class AudioEncoder(nn.Module):
    """Log-mel [batch, bins, T] at 100 Hz -> hidden [batch, ceil(T / 2), d_model] at 50 Hz."""

    positional_embedding: Tensor

    def __init__(self, config: AudioConfig) -> None:
        super().__init__()
        dim, pad = config.d_model, config.kernel_size // 2
        self.conv1 = nn.Conv1d(config.num_mel_bins, dim, config.kernel_size, padding=pad)
        self.conv2 = nn.Conv1d(dim, dim, config.kernel_size, stride=config.stride_size, padding=pad)
        self.register_buffer("positional_embedding", sinusoids(config.max_frames // config.stride_size, dim))
        self.layers = nn.ModuleList(
            TransformerLayer(dim, config.encoder_attention_heads, config.encoder_ffn_dim, causal=False)
            for _ in range(config.encoder_layers)
        )
        self.layer_norm = nn.LayerNorm(dim)

    def embed(self, mel: Tensor, mel_lengths: Tensor | None = None) -> Tensor:
        """The input of the first layer. With `mel_lengths` a padded item gives what it gives alone; the official code
        leaks one frame of padding here, which is what None reproduces."""
        x = F.gelu(self.conv1(mel))
        if mel_lengths is not None:
            x = x * length_mask(mel_lengths, x.shape[2])[:, None]
        x = F.gelu(self.conv2(x)).transpose(1, 2)
        return x + self.positional_embedding[: x.shape[1]]

    def forward(self, mel: Tensor, lengths: Tensor, mel_lengths: Tensor | None = None) -> Tensor:
        """`lengths` [batch] are the valid 50 Hz frames; the output is zero past them."""
        x = self.embed(mel, mel_lengths)
        valid = length_mask(lengths, x.shape[1])
        for layer in self.layers:
            x = layer(x, valid[:, None, None])
        return self.layer_norm(x) * valid[..., None]


class Codebook(nn.Module):
    """One level's code vectors [size, dim]; the other two tensors are the running statistics that train them."""

    embed: Tensor
    embed_avg: Tensor
    cluster_size: Tensor

    def __init__(self, size: int, dim: int) -> None:
        super().__init__()
        self.register_buffer("embed", torch.randn(size, dim) * 0.02)
        self.register_buffer("embed_avg", self.embed.clone())
        self.register_buffer("cluster_size", torch.ones(size))

    @torch.no_grad()
    def nearest(self, x: Tensor) -> Tensor:
        """Indices [n] of the code vectors next to x [n, dim], in float32."""
        with torch.autocast(x.device.type, enabled=False):
            return self._nearest(x.float())

    def _nearest(self, x: Tensor) -> Tensor:
        squares = (x * x).sum(1, keepdim=True) + (self.embed * self.embed).sum(1) - 2 * x @ self.embed.T
        return squares.clamp(min=0).sqrt().argmin(1)


class VectorQuantize(nn.Module):
    """The official nesting: vq_list.N.codebook.embed."""

    def __init__(self, size: int, dim: int) -> None:
        super().__init__()
        self.codebook = Codebook(size, dim)


class AudioBridge(nn.Module):
    """Pools avg_pooler frames into one, quantizes it in residual levels, maps code vectors to the decoder's width."""

    def __init__(self, config: AudioConfig) -> None:
        super().__init__()
        dim, pool, inner = config.d_model, config.avg_pooler, config.bridge_dim
        self.pool = pool
        self.gate_proj = nn.Conv1d(dim, inner, pool, stride=pool, bias=False)
        self.up_proj = nn.Conv1d(dim, inner, pool, stride=pool, bias=False)
        self.down_proj = nn.Linear(inner, inner, bias=False)
        self.layer_norm = nn.LayerNorm(inner)
        self.proj_decoder = nn.Linear(inner, dim)
        self.vq_list = nn.ModuleList(VectorQuantize(size, inner) for size in config.vq_config.codebook_sizes)

    @property
    def codebooks(self) -> list[Codebook]:
        """The levels, first to last."""
        return [cast(VectorQuantize, vq).codebook for vq in self.vq_list]

    def pooled(self, x: Tensor) -> Tensor:
        """[batch, T, d_model] -> [batch, ceil(T / pool), bridge_dim], the vectors that are quantized."""
        x = F.pad(x, (0, 0, 0, -x.shape[1] % self.pool))
        frames = x.transpose(1, 2)
        gated = F.silu(self.gate_proj(frames)) * self.up_proj(frames)
        stacked = x.reshape(x.shape[0], -1, x.shape[2] * self.pool)
        return self.layer_norm(self.down_proj(gated.transpose(1, 2)) + stacked)

    @torch.no_grad()
    def encode(self, vectors: Tensor) -> Tensor:
        """[n, bridge_dim] -> codes [n, levels]."""
        residual, codes = vectors, []
        for book in self.codebooks:
            codes.append(book.nearest(residual))
            residual = residual - book.embed[codes[-1]]
        return torch.stack(codes, -1)

    def decode(self, codes: Tensor) -> Tensor:
        """Codes [..., levels] -> sum of their vectors [..., bridge_dim], last level first as officially."""
        pairs = list(zip(self.codebooks, codes.unbind(-1), strict=True))
        total = pairs[-1][0].embed[pairs[-1][1]]
        for book, code in reversed(pairs[:-1]):
            total = total + book.embed[code]
        return total


class TransposedConv(nn.Module):
    """Transposed convolution, GroupNorm over channels and all time, and the cut of what overhangs on the right."""

    def __init__(self, inputs: int, outputs: int, kernel: int, stride: int) -> None:
        super().__init__()
        self.conv = nn.ConvTranspose1d(inputs, outputs, kernel, stride)
        self.norm = nn.GroupNorm(1, outputs)
        self.overhang = max(0, kernel - stride)

    def forward(self, x: Tensor) -> Tensor:
        """[batch, T, inputs] -> [batch, (T - 1) * stride + kernel - overhang, outputs]."""
        y = self.norm(self.conv(x.transpose(1, 2))).transpose(1, 2)
        return y[:, : y.shape[1] - self.overhang]


class PostNet(nn.Module):
    """Residual convolutions on the 16 kHz mel; unused with flow matching."""

    def __init__(self, bins: int, channels: tuple[int, ...]) -> None:
        super().__init__()
        layers: list[nn.Module] = []
        for inputs, outputs in zip((bins, *channels), channels[:-1], strict=False):
            layers += [nn.Conv1d(inputs, outputs, 5, padding=2), nn.GroupNorm(1, outputs), nn.Mish()]
        self.layers = nn.Sequential(*layers, nn.Conv1d(channels[-2], bins, 1))

    def forward(self, x: Tensor) -> Tensor:
        """[batch, T, bins] -> the same."""
        return x + self.layers(x.transpose(1, 2)).transpose(1, 2)


class AudioDecoder(nn.Module):
    """Code vectors [batch, L, d_model] at 12.5 Hz -> causal hidden states [batch, 4 L - 1, d_model] at 50 Hz."""

    positional_embedding: Tensor

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        audio, dim = config.audio, config.audio.d_model
        self.dconv1 = TransposedConv(dim, dim, audio.decoder_kernel_size, audio.avg_pooler)
        self.register_buffer("positional_embedding", sinusoids(audio.max_frames, dim))
        self.layers = nn.ModuleList(
            TransformerLayer(dim, audio.decoder_attention_heads, audio.decoder_ffn_dim, causal=True)
            for _ in range(audio.decoder_layers)
        )
        self.layer_norm = nn.LayerNorm(dim)
        self.dconv2 = TransposedConv(dim, config.post_net_bins, audio.decoder_kernel_size, config.decoder_stride_size)
        self.post_net = PostNet(config.post_net_bins, config.post_net_channels)

    def forward(self, x: Tensor) -> Tensor:
        """Items of one batch must have equal lengths: GroupNorm sees the padding."""
        x = self.dconv1(x)
        x = x + self.positional_embedding[: x.shape[1]]
        for layer in self.layers:
            x = layer(x)
        return self.layer_norm(x)
