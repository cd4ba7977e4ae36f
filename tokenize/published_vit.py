"""The transformer and MLP halves of the published 4M tokenizers, under the names of their released weights.

A network here is what arXiv 2312.06647 and 2406.09406 describe; the attribute names are those of the state dicts,
so that the released safetensors load by name. `published_network.py` puts the halves together.

Legend of shapes: B images, C channels, D width, p patch, h x w the token grid.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

#: width, depth and heads by the name in a released config.json, without its ending "_enc" or "_dec"
VIT_SIZES: dict[str, tuple[int, int, int]] = {
    "vit_xs": (64, 2, 4),  # of tests alone
    "vit_s": (512, 8, 8),
    "vit_b": (768, 12, 12),
    "vit_l": (1024, 24, 16),
}
_EPS = 1e-6


class SelfAttention(nn.Module):
    def __init__(self, dim: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.qkv, self.proj = nn.Linear(dim, 3 * dim), nn.Linear(dim, dim)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.qkv(x).unflatten(-1, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)
        return self.proj(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))


class TwoLayers(nn.Module):
    """Linear, GELU or tanh, Linear."""

    def __init__(self, dim: int, tanh: bool = False) -> None:
        super().__init__()
        self.fc1, self.fc2 = nn.Linear(dim, 4 * dim), nn.Linear(4 * dim, dim)
        self.tanh = tanh

    def forward(self, x: Tensor) -> Tensor:
        hidden = self.fc1(x)
        return self.fc2(hidden.tanh() if self.tanh else F.gelu(hidden))


class PreNormBlock(nn.Module):
    def __init__(self, dim: int, heads: int) -> None:
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(dim, eps=_EPS), nn.LayerNorm(dim, eps=_EPS)
        self.attn, self.mlp = SelfAttention(dim, heads), TwoLayers(dim)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attn(self.norm1(x))
        return x + self.mlp(self.norm2(x))


class ViT(nn.Module):
    """What encoder and decoder share: a stored position table, blocks, and the MLP beside the quantizer.

    ``pos_emb`` (1, D, h, w) is part of the weights. At another grid it is resized bicubically, as in training at
    several resolutions.
    """

    pos_emb: Tensor

    def __init__(self, name: str, side: int, post_mlp: bool) -> None:
        super().__init__()
        self.dim, depth, heads = VIT_SIZES[name]
        self.register_buffer("pos_emb", torch.zeros(1, self.dim, side, side))
        self.blocks = nn.ModuleList(PreNormBlock(self.dim, heads) for _ in range(depth))
        self.norm_mlp = nn.LayerNorm(self.dim, eps=_EPS) if post_mlp else None
        self.post_mlp = TwoLayers(self.dim, tanh=True) if post_mlp else None

    def transform(self, x: Tensor) -> Tensor:
        """(B, D, h, w) to (B, D, h, w)."""
        grid = x.shape[2:]
        x = x + resized_positions(self.pos_emb, grid[0], grid[1])
        x = x.flatten(2).transpose(1, 2)
        for block in self.blocks:
            x = block(x)
        if self.norm_mlp is not None and self.post_mlp is not None:
            x = x + self.post_mlp(self.norm_mlp(x))
        return x.transpose(1, 2).unflatten(2, grid)


def resized_positions(table: Tensor, height: int, width: int) -> Tensor:
    """A position table (1, D, h, w) for another grid."""
    if table.shape[2:] == (height, width):
        return table
    return F.interpolate(table, (height, width), mode="bicubic", align_corners=False)


class ViTEncoder(ViT):
    """(B, C, H, W) to (B, D, H/p, W/p). Features arrive on their grid already: their ``patch`` is 1."""

    def __init__(self, name: str, channels: int, patch: int, side: int, post_mlp: bool) -> None:
        super().__init__(name, side, post_mlp)
        self.proj = nn.Conv2d(channels, self.dim, patch, stride=patch)

    def forward(self, x: Tensor) -> Tensor:
        return self.transform(self.proj(x))


class ViTDecoder(ViT):
    """(B, D, h, w) to (B, C, h*p, w*p); each token holds its patch as (channel, row, column)."""

    def __init__(self, name: str, channels: int, patch: int, side: int, post_mlp: bool, convs: bool) -> None:
        super().__init__(name, side, post_mlp)
        self.patch = patch
        self.out_proj = nn.Linear(self.dim, channels * patch**2)
        self.out_conv = (
            nn.Sequential(ConvNeXtBlock(channels), ConvNeXtBlock(channels)) if convs else nn.Identity()
        )

    def forward(self, x: Tensor) -> Tensor:
        tokens = self.transform(x).movedim(1, -1)
        return self.out_conv(F.pixel_shuffle(self.out_proj(tokens).movedim(-1, 1), self.patch))


class ConvNeXtBlock(nn.Module):
    """Depthwise 7x7, then an MLP per pixel, scaled per channel and added (arXiv 2201.03545).

    Over one channel the norm sees a single value: the block then only adds a constant.
    """

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.dwconv = nn.Conv2d(channels, channels, 7, padding=3, groups=channels)
        self.norm = nn.LayerNorm(channels, eps=_EPS)
        self.pwconv1, self.pwconv2 = nn.Linear(channels, 4 * channels), nn.Linear(4 * channels, channels)
        self.gamma = nn.Parameter(torch.full((channels,), 1e-6))

    def forward(self, x: Tensor) -> Tensor:
        pixels = self.norm(self.dwconv(x).movedim(1, -1))
        return x + (self.gamma * self.pwconv2(F.gelu(self.pwconv1(pixels)))).movedim(-1, 1)


class Bottleneck(nn.Module):
    """Residual MLPs at each place of a map, for global features and poses: (B, C, h, w) to (B, out, h, w)."""

    def __init__(self, channels: int, out_channels: int, width: int, depth: int) -> None:
        super().__init__()
        self.linear_in, self.linear_out = nn.Linear(channels, width), nn.Linear(width, out_channels)
        self.blocks = nn.ModuleList(WideBlock(width) for _ in range(depth))
        self.layernorms = nn.ModuleList(nn.LayerNorm(width) for _ in range(depth))

    def forward(self, x: Tensor) -> Tensor:
        x = self.linear_in(x.movedim(1, -1))
        for norm, wide in zip(self.layernorms, self.blocks, strict=True):
            x = x + wide(norm(x))
        return self.linear_out(x).movedim(-1, 1)


class WideBlock(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.block = nn.Sequential(nn.Linear(width, 4 * width), nn.GELU(), nn.Linear(4 * width, width))

    def forward(self, x: Tensor) -> Tensor:
        return self.block(x)
