"""The U-Net of the published diffusion decoders, under the names of their released weights.

It works on patches: p x p pixels become channels, the condition is brought to the same grid and concatenated, and
the channels become pixels again at the end. Residual blocks take the time step as an added vector
(arXiv 2102.09672); a single head attends where the grid is 4 and 8 times coarser than the first.

Legend of shapes: B images, C channels, p patch, (h, w) the patch grid, D the condition's channels, E the embedding.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn


@dataclass(frozen=True, slots=True)
class UNetSize:
    width: int
    patch: int = 4
    multipliers: tuple[int, ...] = (1, 2, 2, 2)
    res_blocks: int = 3
    attention_at: tuple[int, ...] = (4, 8)


#: by the name in a released config.json
UNET_SIZES = {"unet_xs_patched": UNetSize(32), "unet_patched": UNetSize(256)}  # xs: of tests alone


def timestep_embedding(steps: Tensor, dim: int) -> Tensor:
    """Cosines, then sines, of ``steps`` (B,) at dim/2 frequencies from 1 down to about 1/10000: float32 (B, dim)."""
    half = dim // 2
    frequencies = torch.exp(torch.arange(half, device=steps.device) * (-math.log(10_000) / half))
    angles = steps.float()[:, None] * frequencies
    return torch.cat([angles.cos(), angles.sin()], dim=1)


class ResBlock(nn.Module):
    def __init__(self, channels: int, out_channels: int, embedding: int) -> None:
        super().__init__()
        self.in_layers = nn.Sequential(
            nn.GroupNorm(32, channels), nn.SiLU(), nn.Conv2d(channels, out_channels, 3, padding=1)
        )
        self.emb_layers = nn.Sequential(nn.SiLU(), nn.Linear(embedding, out_channels))
        # The third place was dropout in training; it keeps the number of the last layer's name.
        self.out_layers = nn.Sequential(
            nn.GroupNorm(32, out_channels),
            nn.SiLU(),
            nn.Identity(),
            nn.Conv2d(out_channels, out_channels, 3, padding=1),
        )
        self.skip_connection = (
            nn.Identity() if channels == out_channels else nn.Conv2d(channels, out_channels, 1)
        )

    def forward(self, x: Tensor, embedding: Tensor) -> Tensor:
        hidden = self.in_layers(x) + self.emb_layers(embedding)[:, :, None, None]
        return self.skip_connection(x) + self.out_layers(hidden)


class GridAttention(nn.Module):
    """One head over all places of the grid."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.norm = nn.GroupNorm(32, channels)
        self.qkv, self.proj_out = nn.Conv1d(channels, 3 * channels, 1), nn.Conv1d(channels, channels, 1)

    def forward(self, x: Tensor) -> Tensor:
        tokens = x.flatten(2)
        q, k, v = self.qkv(self.norm(tokens)).transpose(1, 2).unsqueeze(1).chunk(3, dim=-1)
        mixed = F.scaled_dot_product_attention(q, k, v).squeeze(1).transpose(1, 2)
        return (tokens + self.proj_out(mixed)).view_as(x)


class Down(nn.Module):
    def __init__(self, channels: int) -> None:
        super().__init__()
        self.op = nn.Conv2d(channels, channels, 3, stride=2, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        return self.op(x)


class Up(nn.Module):
    """Twice as large, or as large as ``size``: an odd grid comes back as it went."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(channels, channels, 3, padding=1)

    def forward(self, x: Tensor, size: torch.Size | None = None) -> Tensor:
        grid = size or torch.Size(2 * side for side in x.shape[2:])
        return self.conv(F.interpolate(x, grid, mode="nearest"))


class Stage(nn.ModuleList):
    """Layers after each other; each gets what it takes."""

    def forward(self, x: Tensor, embedding: Tensor, size: torch.Size | None = None) -> Tensor:
        for layer in self:
            if isinstance(layer, ResBlock):
                x = layer(x, embedding)
            else:
                x = layer(x, size) if isinstance(layer, Up) else layer(x)
        return x


class PatchedUNet(nn.Module):
    """(B, C, H, W) noisy pixels, steps (B,), condition (B, D, h', w') to the prediction (B, C, H, W)."""

    def __init__(self, size: UNetSize, channels: int, condition: int) -> None:
        super().__init__()
        self.size, self.channels = size, channels
        base, embedding = size.width, 4 * size.width
        self.time_embed = nn.Sequential(
            nn.Linear(base, embedding), nn.SiLU(), nn.Linear(embedding, embedding)
        )
        pixels = channels * size.patch**2
        self.input_blocks = nn.ModuleList([Stage([nn.Conv2d(pixels + condition, base, 3, padding=1)])])
        self.output_blocks = nn.ModuleList()
        width, skips, coarse = base, [base], 1
        for level, multiplier in enumerate(size.multipliers):
            for _ in range(size.res_blocks):
                self.input_blocks.append(self._stage(width, multiplier * base, coarse))
                width = multiplier * base
                skips.append(width)
            if level < len(size.multipliers) - 1:
                self.input_blocks.append(Stage([Down(width)]))
                skips.append(width)
                coarse *= 2
        middle = [
            ResBlock(width, width, embedding),
            GridAttention(width),
            ResBlock(width, width, embedding),
        ]
        self.middle_block = Stage(middle)
        for level, multiplier in reversed(list(enumerate(size.multipliers))):
            for index in range(size.res_blocks + 1):
                stage = self._stage(width + skips.pop(), multiplier * base, coarse)
                width = multiplier * base
                if level and index == size.res_blocks:
                    stage.append(Up(width))
                    coarse //= 2
                self.output_blocks.append(stage)
        self.out = nn.Sequential(nn.GroupNorm(32, width), nn.SiLU(), nn.Conv2d(width, pixels, 3, padding=1))

    def _stage(self, channels: int, out_channels: int, coarse: int) -> Stage:
        layers: list[nn.Module] = [ResBlock(channels, out_channels, 4 * self.size.width)]
        if coarse in self.size.attention_at:
            layers.append(GridAttention(out_channels))
        return Stage(layers)

    def forward(self, x: Tensor, steps: Tensor, condition: Tensor) -> Tensor:
        embedding = self.time_embed(timestep_embedding(steps, self.size.width))
        patches = F.pixel_unshuffle(x, self.size.patch)
        spread = F.interpolate(condition, patches.shape[2:], mode="nearest")
        hidden = torch.cat([patches, spread], dim=1)
        kept = []
        for stage in self.input_blocks:
            hidden = stage(hidden, embedding)
            kept.append(hidden)
        hidden = self.middle_block(hidden, embedding)
        for stage in self.output_blocks:
            skip = kept.pop()
            after = kept[-1].shape[2:] if kept else None
            hidden = stage(torch.cat([hidden, skip], dim=1), embedding, after)
        return F.pixel_shuffle(self.out(hidden), self.size.patch)
