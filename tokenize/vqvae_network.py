"""The network of the codec family "vqvae": a ViT encoder, a quantizer and a ViT decoder, at any size.

After 4M's tokenizers (spec of the paper's supplement: ViT-B/ViT-B, patch 16, 32-d cosine codebook): the demo's take
about 1 ms per 128-px crop on one core.

Legend of shapes: B images, C channels, S image side, p patch, h x w the token grid, T = h*w tokens.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import asdict, dataclass, replace
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fourmill.errors import ConfigError
from fourmill.tokenize.options import typed
from fourmill.tokenize.quantizers import Quantizer, make_quantizer
from fourmill.tokenize.spaces import Classes, Features, Space
from fourmill.tokenize.unet import UNetSize

QUANTIZERS = ("cosine", "fsq", "memory")
DECODERS = ("vit", "diffusion")
#: fields of `VQConfig` that "diffusion" alone has a use for, and those that it has none for
DIFFUSION_FIELDS = ("unet_width", "unet_multipliers", "unet_blocks", "unet_patch", "ddim_steps")
VIT_FIELDS = ("decoder_depth", "refine")
_AT_LEAST_ONE = (
    "dim", "heads", "patch_size", "latent_dim", "codebook_size", "memory_heads", "unet_width", "unet_blocks", "unet_patch",
)  # fmt: skip
MAX_CODES = 1 << 16  # ids are stored as uint16


@dataclass(frozen=True, kw_only=True, slots=True)
class VQConfig:
    """Sizes of a tokenizer network; the defaults are 4M's ViT-B."""

    dim: int = 768
    encoder_depth: int = 12
    decoder_depth: int = 12
    heads: int = 12
    mlp_ratio: float = 4.0
    patch_size: int = 16  # pixels; features are not patchified
    latent_dim: int = 32
    codebook_size: int = 8192
    quantizer: str = "cosine"  # "fsq", or "memory" (of vectors: MLPs of width dim around it)
    levels: tuple[int, ...] = ()  # of fsq, where they replace latent_dim and codebook_size
    refine: int = (
        0  # channels of the convolutions behind the decoder, at a quarter of the resolution; 0: none
    )
    memory_heads: int = 16  # codebooks, and tokens, of "memory"
    class_dim: int = 64  # of the learned embedding of a pixel's class
    normalisation: str = "log"  # of depth: "log" (metres) or "robust" (relative)
    depth_range: tuple[float, float] = (0.1, 200.0)  # metres, of "log"
    decoder: str = (
        "vit"  # or "diffusion": a U-Net that is told the codes; what follows is of that one, as in 4M
    )
    unet_width: int = 256
    unet_multipliers: tuple[int, ...] = (1, 2, 2, 2)  # of the width, at grids that are each half as fine
    unet_blocks: int = 3
    unet_patch: int = 4  # pixels of the finest grid's cells
    ddim_steps: int = 25  # of decoding

    def __post_init__(self) -> None:
        for name in _AT_LEAST_ONE:
            if getattr(self, name) < 1:
                raise ConfigError(f"{name} {getattr(self, name)} must be at least 1")
        if self.codes > MAX_CODES:
            raise ConfigError(
                f"codebook_size {self.codes} is more than {MAX_CODES}: token ids are stored as uint16"
            )
        if self.dim % (4 * self.heads):
            raise ConfigError(f"dim {self.dim} must be a multiple of 4 x heads ({self.heads})")
        if self.normalisation not in ("log", "robust"):
            raise ConfigError(f"normalisation {self.normalisation!r} is neither 'log' nor 'robust'")
        if self.quantizer not in QUANTIZERS or (self.quantizer == "fsq" and not self.levels):
            raise ConfigError(
                f"quantizer {self.quantizer!r}: known are 'cosine', 'memory' and 'fsq' (which needs `levels`)"
            )
        if self.quantizer == "memory" and self.latent_dim % self.memory_heads:
            raise ConfigError(
                f"latent_dim {self.latent_dim} must be a multiple of memory_heads ({self.memory_heads})"
            )
        if self.refine and self.patch_size % 4:
            raise ConfigError(f"patch_size {self.patch_size} must be a multiple of 4 where `refine` is set")
        self._check_decoder()

    def _check_decoder(self) -> None:
        if self.decoder not in DECODERS:
            raise ConfigError(f"decoder {self.decoder!r}: known are {', '.join(map(repr, DECODERS))}")
        if self.unet_width % 32:  # its norms have 32 groups
            raise ConfigError(f"unet_width {self.unet_width} must be a multiple of 32")
        if not self.unet_multipliers or min(self.unet_multipliers) < 1:
            raise ConfigError(f"unet_multipliers {self.unet_multipliers} must be numbers of at least 1")
        if not 1 <= self.ddim_steps <= 1000:
            raise ConfigError(f"ddim_steps {self.ddim_steps} must be 1 to 1000")

    @property
    def unet(self) -> UNetSize:
        return UNetSize(self.unet_width, self.unet_patch, self.unet_multipliers, self.unet_blocks)

    def to_mapping(self) -> dict[str, Any]:
        """What config.json says: nothing of a decoder that is not there."""
        left_out = ("decoder", *DIFFUSION_FIELDS) if self.decoder == "vit" else VIT_FIELDS
        return {name: value for name, value in asdict(self).items() if name not in left_out}

    @property
    def codes(self) -> int:
        return int(np.prod(self.levels)) if self.quantizer == "fsq" else self.codebook_size

    @classmethod
    def from_mapping(cls, values: dict[str, Any], where: str) -> VQConfig:
        """ConfigError with the key's full path where a key is unknown, of another type, or impossible."""
        return cls().with_changes(values, where)

    def with_changes(self, values: dict[str, Any], where: str) -> VQConfig:
        """A copy with some fields as a configuration has them, checked likewise."""
        checked = typed(VQConfig, values, where, "option of the vqvae codec")
        try:
            return replace(self, **checked)
        except ConfigError as error:
            raise ConfigError(f"{where}.{error}") from error


def sincos_positions(height: int, width: int, dim: int) -> Tensor:
    """Fixed 2D positions (height*width, dim): sin and cos of the row, then of the column."""
    omega = 1.0 / 10000 ** (torch.arange(dim // 4, dtype=torch.float64) / (dim // 4))
    rows, columns = torch.meshgrid(torch.arange(height), torch.arange(width), indexing="ij")
    angles = [axis.reshape(-1, 1).double() * omega for axis in (rows, columns)]
    return torch.cat([part for a in angles for part in (a.sin(), a.cos())], dim=1).float()


class Block(nn.Module):
    """Pre-norm transformer block."""

    def __init__(self, dim: int, heads: int, mlp_ratio: float) -> None:
        super().__init__()
        self.heads = heads
        self.norm1, self.norm2 = nn.LayerNorm(dim, eps=1e-6), nn.LayerNorm(dim, eps=1e-6)
        self.qkv, self.proj = nn.Linear(dim, 3 * dim), nn.Linear(dim, dim)
        hidden = int(dim * mlp_ratio)
        self.fc1, self.fc2 = nn.Linear(dim, hidden), nn.Linear(hidden, dim)

    def forward(self, x: Tensor) -> Tensor:
        batch, tokens, dim = x.shape
        qkv = self.qkv(self.norm1(x)).view(batch, tokens, 3, self.heads, dim // self.heads)
        q, k, v = qkv.permute(2, 0, 3, 1, 4)
        mixed = F.scaled_dot_product_attention(q, k, v).transpose(1, 2).reshape(batch, tokens, dim)
        x = x + self.proj(mixed)
        return x + self.fc2(F.gelu(self.fc1(self.norm2(x))))


class Head(nn.Module):
    """Decoder tokens (B, T, dim) to a map (B, out, h*p, w*p).

    With ``refine`` the tokens are first spread over a grid of a quarter of the resolution, where two residual
    convolutions join neighbouring patches: outlines get sharper for little work.
    """

    def __init__(self, dim: int, patch: int, out_channels: int, refine: int) -> None:
        super().__init__()
        self.coarse = patch // 4 if refine else patch
        self.norm = nn.LayerNorm(dim, eps=1e-6)
        self.spread = nn.Linear(dim, (refine or out_channels) * self.coarse**2)
        self.convs = nn.ModuleList(nn.Conv2d(refine, refine, 3, padding=1) for _ in range(2 if refine else 0))
        self.out = nn.Conv2d(refine, out_channels * 16, 3, padding=1) if refine else None

    def forward(self, x: Tensor, grid: tuple[int, int]) -> Tensor:
        height, width = grid
        x = self.spread(self.norm(x)).transpose(1, 2).reshape(len(x), -1, height, width)
        x = F.pixel_shuffle(x, self.coarse)
        if self.out is None:
            return x
        for conv in self.convs:
            x = x + conv(F.gelu(x))
        return F.pixel_shuffle(self.out(F.gelu(x)), 4)


class TokenizerNetwork(nn.Module, ABC):
    """The trainable part. Input and output are what the space gives and takes.

    ``tokens`` is the shape of one image's ids; ``shift`` and ``scale`` (C, 1, 1) standardise features, and are empty
    elsewhere.
    """

    tokens: tuple[int, ...]
    quantizer: Quantizer
    shift: Tensor
    scale: Tensor

    @abstractmethod
    def encode(self, x: Tensor) -> Tensor:
        """Network input to latents (B, D, h, w)."""

    @abstractmethod
    def decode(self, latents: Tensor) -> Tensor:
        """Latents (B, D, h, w) to the network's output (B, out, H, W)."""

    @property
    def relaxes(self) -> bool:
        """Whether a fit begins with `forward_relaxed`."""
        return self.quantizer.relaxes

    def forward(self, x: Tensor, generator: torch.Generator | None = None) -> tuple[Tensor, Tensor, Tensor]:
        """(output, ids (B, *tokens), quantizer loss)."""
        quantized, ids, loss = self.quantized(x, generator)
        return self.reconstruct(x, quantized, generator), ids, loss

    def forward_relaxed(self, x: Tensor, generator: torch.Generator | None = None) -> Tensor:
        """The output without quantisation, for the first part of a fit."""
        return self.reconstruct(x, self.quantizer.relax(self.encode(x)), generator)

    def quantized(self, x: Tensor, generator: torch.Generator | None) -> tuple[Tensor, Tensor, Tensor]:
        """(code vectors (B, D, h, w), ids (B, *tokens), quantizer loss)."""
        latents = self.encode(x)
        with torch.autocast(x.device.type, enabled=False):  # the nearest of thousands of codes needs float32
            return self.quantizer.quantize(latents.float(), generator)

    def reconstruct(self, x: Tensor, quantized: Tensor, generator: torch.Generator | None) -> Tensor:
        """What a fit compares with ``x``."""
        return self.decode(quantized)

    def loss(self, space: Space, output: Tensor, target: Tensor) -> Tensor:
        """Of what `reconstruct` gave."""
        return space.loss(output, target)

    def set_trainable(self) -> None:
        """Gradients for what a fit is to change."""
        self.requires_grad_(True)


class VQNetwork(TokenizerNetwork):
    """Maps and features. ``base`` is the grid that position tables are made for; those of other grids are resized."""

    positions: Tensor

    def __init__(
        self, config: VQConfig, space: Space, grid: tuple[int, int], base: tuple[int, int] | None = None
    ) -> None:
        super().__init__()
        self.grid = self.tokens = grid
        self.base = base or grid
        self.patch = 1 if isinstance(space, Features) else config.patch_size
        self.classes = (
            nn.Embedding(space.out_channels, space.channels) if isinstance(space, Classes) else None
        )
        self.embed = nn.Linear(space.channels * self.patch**2, config.dim)
        self.register_buffer("positions", sincos_positions(*self.base, config.dim), persistent=False)
        standardised = space.channels if isinstance(space, Features) else 0
        self.register_buffer("shift", torch.zeros(standardised, 1, 1))
        self.register_buffer("scale", torch.ones(standardised, 1, 1))
        self.encoder = _blocks(config, config.encoder_depth)
        self.norm = nn.LayerNorm(config.dim, eps=1e-6)
        self.quantizer: Quantizer = make_quantizer(
            config.quantizer, config.codebook_size, config.latent_dim, config.levels
        )
        self.to_latent = nn.Linear(config.dim, self.quantizer.latent_dim)
        self._make_decoder(config, space)

    def _make_decoder(self, config: VQConfig, space: Space) -> None:
        self.from_latent = nn.Linear(self.quantizer.latent_dim, config.dim)
        self.decoder = _blocks(config, config.decoder_depth)
        refine = 0 if self.patch == 1 else config.refine
        self.head = Head(config.dim, self.patch, space.out_channels, refine)

    def encode(self, x: Tensor) -> Tensor:
        if self.classes is not None:
            x = self.classes(x).permute(0, 3, 1, 2)
        if len(self.shift):
            x = (x - self.shift) / self.scale
        grid = (x.shape[2] // self.patch, x.shape[3] // self.patch)
        tokens = self.encoder(self.embed(_patches(x, self.patch)) + self.table(grid))
        return self.to_latent(self.norm(tokens)).transpose(1, 2).unflatten(2, grid)

    def decode(self, latents: Tensor) -> Tensor:
        grid = (latents.shape[2], latents.shape[3])
        tokens = self.from_latent(latents.flatten(2).transpose(1, 2)) + self.table(grid)
        output = self.head(self.decoder(tokens), grid)
        return output * self.scale + self.shift if len(self.shift) else output

    def table(self, grid: tuple[int, int]) -> Tensor:
        """Positions (h*w, dim) of a grid."""
        if grid == self.base:
            return self.positions
        table = self.positions.T.unflatten(1, self.base)[None]
        return F.interpolate(table, grid, mode="bicubic", align_corners=False)[0].flatten(1).T


def _patches(x: Tensor, patch: int) -> Tensor:
    """(B, C, h*p, w*p) to (B, h*w, C*p*p): values of `pixel_unshuffle`, laid out as a product takes them, by one copy."""
    cells = x.unflatten(3, (-1, patch)).unflatten(2, (-1, patch))  # (B, C, h, p, w, p)
    return cells.permute(0, 2, 4, 1, 3, 5).flatten(3).flatten(1, 2)


def _blocks(config: VQConfig, depth: int) -> nn.Sequential:
    return nn.Sequential(*(Block(config.dim, config.heads, config.mlp_ratio) for _ in range(depth)))
