"""Patches to token embeddings: the Qwen2-VL vision tower (no final norm) and the two-layer projector.

Attribute names are the keys of the official state dict; patches come in merge-block order, [n, channel * time * y * x].
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from export.config import VisionConfig

_EPS = 1e-6


class PatchEmbed(nn.Module):
    """One linear map a patch, stored as the convolution it officially is."""

    def __init__(self, config: VisionConfig) -> None:
        super().__init__()
        size = (config.temporal_patch_size, config.patch_size, config.patch_size)
        self.proj = nn.Conv3d(config.in_channels, config.embed_dim, size, stride=size, bias=False)

    def forward(self, patches: Tensor) -> Tensor:
        return patches @ self.proj.weight.flatten(1).T


def rotary_angles(grids: list[tuple[int, int]], merge: int, head_dim: int) -> Tensor:
    """2-D rotary angles [patches, head_dim / 2] of images with (rows, columns) patches: first rows, then columns."""
    quarter = head_dim // 4
    inverse = 10000.0 ** (-torch.arange(quarter) / quarter)
    angles = []
    for rows, columns in grids:
        index = torch.stack(torch.meshgrid(torch.arange(rows), torch.arange(columns), indexing="ij"), -1)
        blocks = index.view(rows // merge, merge, columns // merge, merge, 2).transpose(1, 2).reshape(-1, 2)
        angles.append((blocks[..., None] * inverse).flatten(1))
    return torch.cat(angles)


def _rotate(x: Tensor, angles: Tensor) -> Tensor:
    """Rotate-half on [batch, n, heads, head_dim] with angles [n, head_dim / 2]."""
    cos, sin = (torch.cat([f, f], -1)[:, None] for f in (angles.cos(), angles.sin()))
    left, right = x.chunk(2, -1)
    return x * cos + torch.cat([-right, left], -1) * sin


class VisionAttention(nn.Module):
    """Attention inside one image."""

    def __init__(self, dim: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.qkv = nn.Linear(dim, 3 * dim)
        self.proj = nn.Linear(dim, dim)

    def forward(self, x: Tensor, angles: Tensor, visible: Tensor | None) -> Tensor:
        batch, n, dim = x.shape
        q, k, v = self.qkv(x).view(batch, n, 3, self.heads, -1).unbind(2)
        q, k = _rotate(q, angles).to(v.dtype), _rotate(k, angles).to(v.dtype)
        out = F.scaled_dot_product_attention(*(y.transpose(1, 2) for y in (q, k, v)), attn_mask=visible)
        return self.proj(out.transpose(1, 2).reshape(batch, n, dim))


class VisionMLP(nn.Module):
    """Linear, quick GELU, linear."""

    def __init__(self, dim: int, inner: int) -> None:
        super().__init__()
        self.fc1 = nn.Linear(dim, inner)
        self.fc2 = nn.Linear(inner, dim)

    def forward(self, x: Tensor) -> Tensor:
        x = self.fc1(x)
        return self.fc2(x * torch.sigmoid(1.702 * x))


class VisionBlock(nn.Module):
    """Pre-norm transformer layer."""

    def __init__(self, config: VisionConfig) -> None:
        super().__init__()
        dim = config.embed_dim
        self.norm1 = nn.LayerNorm(dim, eps=_EPS)
        self.norm2 = nn.LayerNorm(dim, eps=_EPS)
        self.attn = VisionAttention(dim, config.num_heads)
        self.mlp = VisionMLP(dim, int(dim * config.mlp_ratio))

    def forward(self, x: Tensor, angles: Tensor, visible: Tensor | None) -> Tensor:
        x = x + self.attn(self.norm1(x), angles, visible)
        return x + self.mlp(self.norm2(x))


class VisionModel(nn.Module):
    """Patches [batch, n, patch values] or [n, patch values] -> features of width embed_dim."""

    def __init__(self, config: VisionConfig) -> None:
        super().__init__()
        self.merge, self.head_dim = config.spatial_merge_size, config.head_dim
        self.patch_embed = PatchEmbed(config)
        self.blocks = nn.ModuleList(VisionBlock(config) for _ in range(config.depth))

    def forward(self, patches: Tensor, grids: list[tuple[int, int]]) -> Tensor:
        """`grids`: (rows, columns) in patches of each image in a row of the batch; images do not see each other."""
        flat = patches.dim() == 2
        x = self.patch_embed(patches[None] if flat else patches)
        angles = rotary_angles(grids, self.merge, self.head_dim).to(x.device)
        visible = None if len(grids) == 1 else self._same_image(grids).to(x.device)
        for block in self.blocks:
            x = block(x, angles, visible)
        return x[0] if flat else x

    def _same_image(self, grids: list[tuple[int, int]]) -> Tensor:
        sizes = torch.tensor([rows * columns for rows, columns in grids])
        image = torch.repeat_interleave(torch.arange(len(grids)), sizes)
        return image[:, None] == image[None]


class VisualBridge(nn.Module):
    """Projector: LayerNorm, merge x merge patches side by side, two linear layers -> the decoder's width."""

    def __init__(self, config: VisionConfig) -> None:
        super().__init__()
        self.inner = config.embed_dim * config.spatial_merge_size**2
        self.ln_q = nn.LayerNorm(config.embed_dim, eps=_EPS)
        self.mlp = nn.Sequential(
            nn.Linear(self.inner, self.inner), nn.GELU(), nn.Linear(self.inner, config.hidden_size)
        )

    def forward(self, x: Tensor) -> Tensor:
        """[..., n, embed_dim] -> [..., n / merge^2, hidden_size]."""
        return self.mlp(self.ln_q(x).reshape(*x.shape[:-2], -1, self.inner))
