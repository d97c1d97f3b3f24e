"""Hidden states to mel: the prenet and the conditional flow-matching U-Net, with its Euler sampler.

Conditional flow matching after Lipman et al. 2022 (arXiv:2210.02747), the network of Matcha-TTS / CosyVoice2 in the
causal one-level form of Baichuan-Omni-1.5; attribute names are the keys of the official state dict.
"""

import math
from typing import cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from export.config import FlowMatchingConfig
from export.nano.audio_tokenizer import RMSNorm, TransformerLayer, length_mask, sinusoids

CHUNK = 100  # mel frames; attention looks ahead to the end of its own chunk (hard-wired in the official code)


class Prenet(nn.Module):
    """Audio decoder's hidden states [batch, T, prenet_in_dim] -> mu [batch, T, mel bins], causal."""

    def __init__(self, config: FlowMatchingConfig, positions: int) -> None:
        super().__init__()
        dim, ffn = config.prenet_d_model, config.prenet_ffn_dim
        # Stored in checkpoints, never used.
        self.register_buffer("positional_embedding", sinusoids(positions, dim))
        inner = 4 * dim
        self.in_mlp = nn.Sequential(nn.Linear(config.prenet_in_dim, inner), nn.SiLU(), nn.Linear(inner, dim))
        self.transformer_layers = nn.ModuleList(
            TransformerLayer(dim, config.prenet_attention_heads, ffn, causal=True, norm=RMSNorm)
            for _ in range(config.prenet_nlayers)
        )
        self.final_norm = RMSNorm(dim)
        self.out_proj = nn.Linear(dim, config.prenet_out_dim, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        x = self.in_mlp(x)
        for layer in self.transformer_layers:
            x = layer(x)
        return self.out_proj(self.final_norm(x))


class CausalConv1d(nn.Conv1d):
    """Convolution that sees nothing later than its own frame."""

    def forward(self, input: Tensor) -> Tensor:
        return super().forward(F.pad(input, (self.kernel_size[0] - 1, 0)))


class _Transpose(nn.Module):
    """Swaps channels and time."""

    def forward(self, x: Tensor) -> Tensor:
        return x.transpose(1, 2)


class CausalBlock(nn.Module):
    """Causal convolution, LayerNorm over channels, Mish."""

    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__()
        self.block = nn.Sequential(
            CausalConv1d(inputs, outputs, 3), _Transpose(), nn.LayerNorm(outputs), _Transpose(), nn.Mish()
        )

    def forward(self, x: Tensor, mask: Tensor) -> Tensor:
        return self.block(x * mask) * mask


class ResnetBlock(nn.Module):
    """Two causal blocks with the time embedding between them, and a 1x1 skip."""

    def __init__(self, inputs: int, outputs: int, time: int) -> None:
        super().__init__()
        self.mlp = nn.Sequential(nn.Mish(), nn.Linear(time, outputs))
        self.block1 = CausalBlock(inputs, outputs)
        self.block2 = CausalBlock(outputs, outputs)
        self.res_conv = nn.Conv1d(inputs, outputs, 1)

    def forward(self, x: Tensor, mask: Tensor, time: Tensor) -> Tensor:
        h = self.block1(x, mask) + self.mlp(time)[..., None]
        return self.block2(h, mask) + self.res_conv(x * mask)


class _Gelu(nn.Module):
    """Linear and GELU under the official key `proj`."""

    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__()
        self.proj = nn.Linear(inputs, outputs)

    def forward(self, x: Tensor) -> Tensor:
        return F.gelu(self.proj(x))


class FeedForward(nn.Module):
    """dim -> 4 dim -> dim."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.net = nn.Sequential(_Gelu(dim, 4 * dim), nn.Identity(), nn.Linear(4 * dim, dim))

    def forward(self, x: Tensor) -> Tensor:
        return self.net(x)


class ChunkAttention(nn.Module):
    """Self-attention whose inner width is heads x head_dim, not dim."""

    def __init__(self, dim: int, heads: int, head_dim: int) -> None:
        super().__init__()
        self.heads = heads
        inner = heads * head_dim
        self.to_q = nn.Linear(dim, inner, bias=False)
        self.to_k = nn.Linear(dim, inner, bias=False)
        self.to_v = nn.Linear(dim, inner, bias=False)
        self.to_out = nn.ModuleList([nn.Linear(inner, dim), nn.Identity()])

    def forward(self, x: Tensor, visible: Tensor) -> Tensor:
        batch, length, _ = x.shape
        q, k, v = (p(x).view(batch, length, self.heads, -1).transpose(1, 2) for p in (self.to_q, self.to_k, self.to_v))
        out = F.scaled_dot_product_attention(q, k, v, attn_mask=visible)
        return self.to_out[0](out.transpose(1, 2).reshape(batch, length, -1))


class TransformerBlock(nn.Module):
    """Pre-norm attention and feed-forward on [batch, T, dim]."""

    def __init__(self, dim: int, heads: int, head_dim: int) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(dim)
        self.attn1 = ChunkAttention(dim, heads, head_dim)
        self.norm3 = nn.LayerNorm(dim)
        self.ff = FeedForward(dim)

    def forward(self, x: Tensor, visible: Tensor) -> Tensor:
        x = x + self.attn1(self.norm1(x), visible)
        return x + self.ff(self.norm3(x))


class TimeEmbedding(nn.Module):
    """Sinusoidal embedding of the flow's time and its MLP."""

    def __init__(self, dim: int, hidden: int) -> None:
        super().__init__()
        self.dim = dim
        self.linear_1 = nn.Linear(dim, hidden)
        self.linear_2 = nn.Linear(hidden, hidden)

    def forward(self, t: Tensor) -> Tensor:
        """[batch] -> [batch, hidden]."""
        half = self.dim // 2
        frequencies = torch.exp(-math.log(10000) / (half - 1) * torch.arange(half, device=t.device))
        angles = 1000 * t[:, None] * frequencies
        return self.linear_2(F.silu(self.linear_1(torch.cat([angles.sin(), angles.cos()], -1))))


class Stage(nn.ModuleList):
    """A resnet block, transformer blocks and, at both ends of the U, a convolution; indices are the official keys."""

    def __init__(self, inputs: int, config: FlowMatchingConfig, conv: bool) -> None:
        (channels,) = config.channels
        resnet = ResnetBlock(inputs, channels, 4 * channels)
        blocks = (
            TransformerBlock(channels, config.num_heads, config.attention_head_dim) for _ in range(config.n_blocks)
        )
        super().__init__([resnet, nn.ModuleList(blocks), *([CausalConv1d(channels, channels, 3)] if conv else [])])

    @property
    def resnet(self) -> ResnetBlock:
        return cast(ResnetBlock, self[0])

    @property
    def blocks(self) -> list[TransformerBlock]:
        return cast(list[TransformerBlock], self[1])

    @property
    def conv(self) -> CausalConv1d:
        return cast(CausalConv1d, self[2])

    def forward(self, x: Tensor, mask: Tensor, visible: Tensor, time: Tensor) -> Tensor:
        """Resnet and transformer blocks; the convolution is the caller's, for the skip leaves before it."""
        x = self.resnet(x, mask, time).transpose(1, 2)
        for block in self.blocks:
            x = block(x, visible)
        return x.transpose(1, 2)


class ConditionalDecoder(nn.Module):
    """The U-Net v(x, mu, t) of one level; x, mu and the result are [batch, mel bins, T]."""

    def __init__(self, config: FlowMatchingConfig) -> None:
        super().__init__()
        bins, (channels,) = config.in_channels, config.channels
        self.time_mlp = TimeEmbedding(2 * bins, 4 * channels)
        self.down_blocks = nn.ModuleList([Stage(2 * bins, config, conv=True)])
        self.mid_blocks = nn.ModuleList(Stage(channels, config, conv=False) for _ in range(config.num_mid_blocks))
        self.up_blocks = nn.ModuleList([Stage(2 * channels, config, conv=True)])
        self.final_block = CausalBlock(channels, channels)
        self.final_proj = nn.Conv1d(channels, bins, 1)

    @property
    def stages(self) -> list[Stage]:
        """All stages, the first and the last being the ends of the U."""
        return cast(list[Stage], [*self.down_blocks, *self.mid_blocks, *self.up_blocks])

    def forward(self, x: Tensor, mu: Tensor, t: Tensor, lengths: Tensor | None = None) -> Tensor:
        """`t` [batch] in 0..1; `lengths` [batch] in frames where items are padded."""
        frames = x.shape[2]
        lengths = lengths if lengths is not None else torch.full((x.shape[0],), frames)
        valid = length_mask(lengths, frames)
        mask, visible = valid[:, None].to(x.dtype), chunk_mask(valid)
        time = self.time_mlp(t)
        down, *middle, up = self.stages
        skip = down(torch.cat([x, mu], 1), mask, visible, time)
        x = down.conv(skip * mask)
        for stage in middle:
            x = stage(x, mask, visible, time)
        x = up.conv(up(torch.cat([x, skip], 1), mask, visible, time) * mask)
        return self.final_proj(self.final_block(x, mask) * mask) * mask


def chunk_mask(valid: Tensor) -> Tensor:
    """[batch, 1, T, T]: a frame sees everything before the end of its own chunk that is not padding."""
    index = torch.arange(valid.shape[1], device=valid.device)
    return (index[None] < (index[:, None] // CHUNK + 1) * CHUNK) & valid[:, None, None]


def time_steps(steps: int) -> Tensor:
    """The cosine schedule, steps + 1 values from 0 to 1."""
    return 1 - torch.cos(torch.linspace(0, 1, steps + 1) * 0.5 * math.pi)


class FlowMatchingDecoder(nn.Module):
    """Prenet and U-Net under their official names."""

    def __init__(self, config: FlowMatchingConfig, positions: int) -> None:
        super().__init__()
        self.steps = config.diffusion_steps
        self.guidance = config.cfm_params.inference_cfg_rate
        self.prenet = Prenet(config, positions)
        self.conditional_decoder = ConditionalDecoder(config)

    @torch.no_grad()
    def sample(self, mu: Tensor, noise: Tensor, lengths: Tensor | None = None) -> Tensor:
        """Euler steps with classifier-free guidance from `noise`; all are [batch, mel bins, T]."""
        x, times = noise, time_steps(self.steps).to(noise.device)
        t = times[0]
        for step in times[1:] - times[:-1]:
            at = t.expand(len(x))
            v = self.conditional_decoder(x, mu, at, lengths)
            if self.guidance > 0:
                unguided = self.conditional_decoder(x, torch.zeros_like(mu), at, lengths)
                v = (1 + self.guidance) * v - self.guidance * unguided
            x, t = x + step * v, t + step
        return x
